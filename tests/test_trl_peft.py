"""Neighbours on our model and data: TRL's SFTTrainer, and the ways of PEFT to adapt a model besides LoRA."""

import pytest
import torch
from model_fixtures import random_ids, tiny_model, twins
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from scratch_gpt2 import ScratchGPT2Config
from scratch_gpt2.data.collators import PackingCollator, PaddingCollator, pack
from scratch_gpt2.data.instructions import Conversation, encode_conversations
from scratch_gpt2.tokenization import CHAT_TEMPLATE, train_tokenizer
from scratch_gpt2.training.start import new_model
from scratch_gpt2.training.trainer import LanguageModelTrainer

peft = pytest.importorskip("peft")
OPTIONS = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01, "lr_scheduler_type": "constant"}
OPTIONS |= {"logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
OPTIONS |= {"max_grad_norm": 1e9, "bf16": False}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([CHAT_TEMPLATE, "Name a colour, please. It is red, green or blue."], vocab_size=340)


@pytest.fixture(scope="module")
def conversations():
    words = ["It", "is", "red,", "green", "or", "blue."]
    rows = []
    for n in range(8):
        question, answer = f"Name {n + 1} words.", " ".join(words[: 1 + n % 6])
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(Conversation(messages, question, "", answer, f"row {n}"))
    return rows


def make_model(tokenizer, n_positions=128):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": n_positions, "initializer_range": 0.1}
    return new_model(ScratchGPT2Config.from_preset("tiny", **sizes), tokenizer)


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_trl_trains_as_we_do(packing, tokenizer, conversations, tmp_path):
    """On the same conversations, rendered by the same template: the same losses, gradient norms and weights."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"messages": row.messages} for row in conversations])
    options = OPTIONS | {"per_device_train_batch_size": 8, "gradient_checkpointing": False}
    sft = {"assistant_only_loss": True, "max_length": 128, "packing": packing}
    theirs = trl.SFTTrainer(
        make_model(tokenizer),
        trl.SFTConfig(str(tmp_path), **options, **sft),
        train_dataset=data,
        processing_class=tokenizer,
    )
    theirs.train()

    rows, _ = encode_conversations(tokenizer, conversations, max_length=128)
    collator = PackingCollator if packing else PaddingCollator
    ours = LanguageModelTrainer(
        make_model(tokenizer),
        TrainingArguments(str(tmp_path), **OPTIONS | {"per_device_train_batch_size": 8}),
        train_dataset=pack(rows, 128) if packing else rows,
        data_collator=collator(tokenizer.pad_token_id),
    )
    ours.train()
    assert len(logged(ours, "loss")) == 2
    assert logged(theirs, "loss") == pytest.approx(logged(ours, "loss"), rel=1e-4)
    assert logged(theirs, "grad_norm") == pytest.approx(logged(ours, "grad_norm"), rel=1e-3)


METHODS = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


# Prompt tuning is known to need large steps (Lester et al. 2021, arXiv:2104.08691, section 3.2).
LEARNING_RATES = {"prompt": 0.3, "prefix": 0.1}


@pytest.mark.parametrize("method", METHODS)
def test_peft_trains_saves_and_generates(method, tokenizer, conversations, tmp_path):
    """Only the adapter changes, it learns, and the reloaded one gives the same greedy text."""
    rows, _ = encode_conversations(tokenizer, conversations, max_length=120)
    model = peft.get_peft_model(make_model(tokenizer), METHODS[method]())
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    options = {"max_steps": 30, "per_device_train_batch_size": 8}
    options |= {"learning_rate": LEARNING_RATES.get(method, OPTIONS["learning_rate"])}
    trainer = LanguageModelTrainer(
        model,
        TrainingArguments(str(tmp_path / "run"), **OPTIONS | options),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=PaddingCollator(tokenizer.pad_token_id),
    )
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start - 0.05
    for name, weight in model.named_parameters():
        assert weight.requires_grad or torch.equal(weight, before[name]), name

    model.save_pretrained(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(make_model(tokenizer), tmp_path / "adapter")
    inputs = tokenizer("Name two words.", return_tensors="pt")
    texts = [
        adapted.eval().generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
        for adapted in (model, reloaded)
    ]
    assert texts[0] == texts[1] and len(texts[0]) > inputs.input_ids.shape[1]


def test_context_aware_prompt_tuning_computes_its_own_loss(tmp_path):
    """CPT reads the logits of a training step (Blau et al. 2024, arXiv:2410.17222): Trainer logs what it logs for
    transformers' GPT-2."""
    rows = [{"input_ids": row, "labels": row} for row in random_ids(8, 9).tolist()]
    losses = []
    for model in twins(GPT2LMHeadModel):
        config = peft.CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=[5, 17, 23, 8],
            cpt_mask=[1, 1, 1, 1],
            cpt_tokens_type_mask=[1, 2, 2, 4],
            opt_weighted_loss_type="decay",
            opt_loss_decay_factor=0.9,
        )
        args = TrainingArguments(str(tmp_path), **OPTIONS | {"label_names": ["labels"]})
        trainer = Trainer(peft.get_peft_model(model, config), args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses.append([*logged(trainer, "loss"), trainer.evaluate()["eval_loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("read", ["attribute", "index"])
def test_a_loss_from_the_logits_trains_as_in_transformers(read, tmp_path):
    """Distillation, for one: a trainer that calls the model with labels and reads its logits."""

    class LogitsTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            logits = outputs.logits if read == "attribute" else outputs[1]
            return outputs.loss + logits.square().mean()

    rows = [{"input_ids": row, "labels": row} for row in random_ids(8, 9).tolist()]
    losses = []
    for model in twins(GPT2LMHeadModel):
        trainer = LogitsTrainer(model, TrainingArguments(str(tmp_path), **OPTIONS), train_dataset=rows)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_an_adapter_trains_on_packed_rows(tmp_path):
    """Trainer hands `position_ids` through PEFT's wrapper: the loss of packed rows is that of separate ones."""
    rows = [
        {"input_ids": [5, 6, 7, 8, 2], "labels": [-100, 6, 7, 8, 2]},
        {"input_ids": [9, 4, 2], "labels": [-100, 4, 2]},
    ]
    losses = []
    for collator, data in ((PaddingCollator, rows), (PackingCollator, pack(rows, 8))):
        model = peft.get_peft_model(tiny_model(), METHODS["lora"]())
        args = TrainingArguments(str(tmp_path), **OPTIONS)
        trainer = LanguageModelTrainer(model, args, eval_dataset=data, data_collator=collator(2))
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
