"""Traps of training with transformers' Trainer and of adapters (PEFT)."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments, default_data_collator

from scratch_gpt2 import (
    ScratchGPT2Config,
    ScratchGPT2ForCausalLM,
    ScratchGPT2ForQuestionAnswering,
    ScratchGPT2ForSequenceClassification,
    ScratchGPT2ForTokenClassification,
)

EOS = 60


def make_model(head=ScratchGPT2ForCausalLM, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    tokens = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "classifier_dropout": 0.0}
    return head(ScratchGPT2Config(**sizes | tokens | dropout | options))


def make_trainer(model, rows, folder, batch_size=2, accumulation=1, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=1e9,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options.pop("arguments", {}),
    )
    data = {"train_dataset": rows, "eval_dataset": rows, "data_collator": default_data_collator}
    return Trainer(model, arguments, **data, **options)


def random_ids(*shape):
    return torch.randint(0, EOS, shape, generator=torch.Generator().manual_seed(1))


def padded_rows():
    """Eight rows of 2 to 9 tokens, padded to 9."""
    mask = torch.arange(9) < torch.tensor([9, 3, 5, 2, 7, 4, 8, 6])[:, None]
    return [
        {"input_ids": ids, "attention_mask": shown.long()} for ids, shown in zip(random_ids(8, 9), mask, strict=True)
    ]


def unpadded_rows(count, length):
    return [{"input_ids": ids, "labels": ids} for ids in random_ids(count, length)]


def with_labels(task):
    """`padded_rows` with the labels of a head; row by row they count differently."""
    rows = padded_rows()
    numbers = torch.randn(8, 3, generator=torch.Generator().manual_seed(2))
    for index, row in enumerate(rows):
        if task == "causal_lm":
            row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
        elif task == "token_classification":
            row["labels"] = (row["input_ids"] % 3).masked_fill(row["attention_mask"] == 0, -100)
        elif task == "question_answering":
            row["start_positions"], row["end_positions"] = 0, int(row["attention_mask"].sum()) - 1
        elif task == "single_label":
            row["labels"] = index % 3
        elif task == "multi_label":
            row["labels"] = (numbers[index] > 0).float()
        elif task == "regression":
            row["labels"] = numbers[index, 0].item()
        elif task == "regression_of_three":
            row["labels"] = numbers[index]
    return rows


TASKS = {
    "causal_lm": (ScratchGPT2ForCausalLM, {}),
    "single_label": (ScratchGPT2ForSequenceClassification, {"num_labels": 3}),
    "multi_label": (ScratchGPT2ForSequenceClassification, {"num_labels": 3}),
    "regression": (ScratchGPT2ForSequenceClassification, {"num_labels": 1}),
    "regression_of_three": (ScratchGPT2ForSequenceClassification, {"num_labels": 3, "problem_type": "regression"}),
    "token_classification": (ScratchGPT2ForTokenClassification, {"num_labels": 3}),
    "question_answering": (ScratchGPT2ForQuestionAnswering, {}),
}


def one_step(task, batch_size, accumulation, folder):
    """Loss, gradient norm and weights after one optimizer step over all eight rows."""
    head, options = TASKS[task]
    model = make_model(head, **options)
    trainer = make_trainer(model, with_labels(task), folder, batch_size, accumulation)
    loss = trainer.train().training_loss
    return loss, trainer.state.log_history[0]["grad_norm"], model.state_dict()


@pytest.mark.parametrize("task", TASKS)
def test_accumulation_changes_nothing(task, tmp_path):
    """8 rows at once, 2 at a time and 1 at a time; rows have between 1 and 8 labels."""
    head, options = TASKS[task]
    before = make_model(head, **options).state_dict()
    loss, grad_norm, weights = one_step(task, 8, 1, tmp_path)
    change = {name: weights[name] - before[name] for name in weights}
    assert grad_norm > 0.1
    for batch_size, accumulation in ((2, 4), (1, 8)):
        split_loss, split_norm, split_weights = one_step(task, batch_size, accumulation, tmp_path)
        assert split_loss == pytest.approx(loss, rel=1e-5)
        assert split_norm == pytest.approx(grad_norm, rel=1e-5)
        split_change = {name: split_weights[name] - before[name] for name in weights}
        torch.testing.assert_close(split_change, change, rtol=1e-3, atol=1e-6)


def test_the_logged_loss_is_the_mean_over_the_tokens(tmp_path):
    """On rows of 5 tokens, where counting the first as a target too would show: 4/5 of the loss."""
    model = make_model()
    rows = unpadded_rows(4, 5)
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        log_probs = model(ids).logits.log_softmax(-1)  # (4, 5, V)
    terms = [-log_probs[row, t, ids[row, t + 1]].item() for row in range(4) for t in range(4)]
    expected = math.fsum(terms) / 16

    trainer = make_trainer(model, rows, tmp_path, batch_size=2, accumulation=2)
    assert trainer.train().training_loss == pytest.approx(expected, rel=1e-5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("head", "loss_type"),
    [
        (ScratchGPT2ForCausalLM, "ForCausalLM"),
        (ScratchGPT2ForSequenceClassification, "ForSequenceClassification"),
        (ScratchGPT2ForTokenClassification, "ForTokenClassification"),
        (ScratchGPT2ForQuestionAnswering, "ForQuestionAnswering"),
    ],
)
def test_trainer_knows_what_each_loss_counts(head, loss_type):
    """Trainer decides by the loss type, and that by the class name, whether labels are shifted."""
    assert make_model(head).loss_type == loss_type


def test_a_training_step_without_labels_to_learn_keeps_the_weights(tmp_path):
    model = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rows = [row | {"labels": torch.full_like(row["labels"], -100)} for row in unpadded_rows(4, 5)]
    make_trainer(model, rows, tmp_path, accumulation=2).train()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_norms_and_biases_do_not_decay(tmp_path):
    model = make_model(n_layer=1)
    arguments = {"weight_decay": 0.1}
    groups = make_trainer(model, unpadded_rows(1, 5), tmp_path, arguments=arguments).create_optimizer().param_groups
    names = {weight: name for name, weight in model.named_parameters()}
    decayed, spared = (
        {names[weight] for group in groups if group["weight_decay"] == decay for weight in group["params"]}
        for decay in (0.1, 0.0)
    )
    assert decayed == {
        "model.embed_tokens.weight",  # and with it the head
        "model.embed_positions.weight",
        "model.layers.0.attn.q_proj.weight",
        "model.layers.0.attn.k_proj.weight",
        "model.layers.0.attn.v_proj.weight",
        "model.layers.0.attn.out_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    }
    assert spared == set(names.values()) - decayed
    assert len(spared) == 12  # six biases, and weight and bias of three norms


@pytest.mark.parametrize("use_cache", [False, True])
def test_compute_metrics_receives_what_the_preprocessing_left(use_cache, tmp_path):
    """Logits alone reach `preprocess_logits_for_metrics`, never a cache; then (N, T) whole numbers are kept."""
    received = []

    def argmax(logits, labels):
        received.append(logits)
        return logits.argmax(-1)

    def compute_metrics(evaluation):
        received.append(evaluation.predictions)
        return {"metric": 1.0}

    trainer = make_trainer(
        make_model(),
        unpadded_rows(4, 5),
        tmp_path,
        preprocess_logits_for_metrics=argmax,
        compute_metrics=compute_metrics,
    )
    trainer.model.config.use_cache = use_cache
    metrics = trainer.evaluate()
    *logits, predictions = received
    assert [tuple(batch.shape) for batch in logits] == [(4, 5, 61)]
    assert (predictions.shape, predictions.dtype) == ((4, 5), np.int64)
    assert metrics["eval_metric"] == 1.0


def test_no_cache_reaches_compute_metrics_from_a_classifier(tmp_path):
    head, options = TASKS["single_label"]
    received = []
    trainer = make_trainer(
        make_model(head, **options),
        with_labels("single_label"),
        tmp_path,
        compute_metrics=lambda evaluation: received.append(evaluation.predictions) or {},
    )
    trainer.model.config.use_cache = True
    trainer.evaluate()
    assert [predictions.shape for predictions in received] == [(8, 3)]


# Adapters


def make_lora(head=ScratchGPT2ForCausalLM, target_modules="all-linear", task_type="CAUSAL_LM", **options):
    """A model with adapters of rank 2. B starts at zero, so it is filled for the adapters to have an effect."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=target_modules, task_type=task_type, **options)
    model = peft.get_peft_model(make_model(head), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return model


def test_lora_parameter_count():
    """Rank 2 on width 16: 2 * (16 + 16) for each of q, k, v and out, 2 * (16 + 64) for up and down, two layers."""
    trainable, _ = make_lora().get_nb_trainable_parameters()
    assert trainable == 2 * (4 * 64 + 2 * 160) == 1152
    trainable, _ = make_lora(target_modules=["q_proj", "v_proj"]).get_nb_trainable_parameters()
    assert trainable == 2 * 2 * 64


def test_lora_merges_and_reloads(tmp_path):
    peft = pytest.importorskip("peft")
    model = make_lora().eval()
    input_ids = random_ids(2, 6)
    logits = model(input_ids).logits
    assert (logits - make_model().eval()(input_ids).logits).abs().max() > 0.1

    model.save_pretrained(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(make_model(), tmp_path / "adapter").eval()
    torch.testing.assert_close(reloaded(input_ids).logits, logits, rtol=0, atol=0)

    merged = model.merge_and_unload()
    assert type(merged) is ScratchGPT2ForCausalLM
    torch.testing.assert_close(merged(input_ids).logits, logits, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    from_file = ScratchGPT2ForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(from_file(input_ids).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
def test_evaluation_reports_its_loss(lora, tmp_path):
    model = make_lora() if lora else make_model()
    rows = unpadded_rows(4, 5)
    metrics = make_trainer(model, rows, tmp_path, arguments={"label_names": ["labels"]}).evaluate()
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        logits = model.eval()(ids).logits[:, :-1]
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_every_adapter_learns_with_checkpointing(checkpointing, tmp_path):
    arguments = {"activation_checkpointing": True, "activation_checkpointing_kwargs": checkpointing}
    model = make_lora()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    make_trainer(model, unpadded_rows(2, 6), tmp_path, arguments=arguments).train()
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert len([name for name in changed if "lora_B" in name]) == 12


def test_an_adapter_on_the_head_takes_part_in_the_training_loss():
    """The loss without logits reads the head's weight; a head that is more than its weight has to be called."""
    model = make_lora(target_modules=["lm_head"]).train()
    input_ids = random_ids(2, 6)
    loss = model(input_ids, labels=input_ids).loss
    logits = model(input_ids).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, input_ids[:, 1:].flatten()))
    assert (loss - make_model().train()(input_ids, labels=input_ids).loss).abs() > 1e-2
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if "lora_" in name}
    assert len(gradients) == 2 and all(gradient.any() for gradient in gradients.values())


def test_a_head_that_is_trained_in_full_takes_part_in_the_training_loss():
    model = make_lora(target_modules=["q_proj"], modules_to_save=["lm_head"]).train()
    input_ids = random_ids(2, 6)
    model(input_ids, labels=input_ids).loss.backward()
    assert {name for name, weight in model.named_parameters() if "lm_head" in name and weight.grad is not None} == {
        "base_model.model.lm_head.modules_to_save.default.weight"
    }


def test_an_adapted_classifier_trains_its_head(tmp_path):
    model = make_lora(ScratchGPT2ForSequenceClassification, ["q_proj", "v_proj"], "SEQ_CLS")
    before = model.base_model.model.score.modules_to_save.default.weight.clone()
    rows = [row | {"labels": index % 2} for index, row in enumerate(padded_rows())]
    make_trainer(model, rows, tmp_path).train()
    assert not torch.equal(model.base_model.model.score.modules_to_save.default.weight, before)


# Warnings

QUIET = """
import sys, warnings
warnings.filterwarnings("error", module=r"scratch_gpt2($|\\.)")
import torch
from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM
model = ScratchGPT2ForCausalLM(ScratchGPT2Config.from_preset("tiny", n_layer=1))
ids = torch.arange(1, 9).unsqueeze(0)
model.train()(ids, labels=ids).loss.backward()
model.save_pretrained(sys.argv[1])
model = ScratchGPT2ForCausalLM.from_pretrained(sys.argv[1])
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
"""


def test_training_saving_loading_and_generating_print_no_warning(tmp_path):
    command = [sys.executable, "-W", "default", "-c", QUIET, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "scratch_gpt2" in line or "[transformers]" in line]
    assert lines == []
    assert result.stdout == ""
