"""Training classifiers: the script from prepared data to a model that `pipeline` loads, its loss, its parts."""

import importlib.util
import json
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY_TEXT
from safetensors.torch import load_file
from warm_python import run_two

from scratch_gpt2 import (
    ScratchGPT2Config,
    ScratchGPT2ForCausalLM,
    ScratchGPT2ForSequenceClassification,
    load_tokenizer,
    train_tokenizer,
)
from scratch_gpt2.data.text_classification import PreparedClassification, prepare, save_prepared
from scratch_gpt2.inspection import token_attributions
from scratch_gpt2.prediction import classify_text
from scratch_gpt2.training import classification
from scratch_gpt2.training.adapters import add_lora
from scratch_gpt2.training.classification import (
    check_labels,
    encode_rows,
    encode_splits,
    label_weights,
    load_classifier,
    make_trainer,
    positive_label,
    weighted_loss,
)
from scratch_gpt2.training.classification_report import confident_mistakes, one_line
from scratch_gpt2.training.freezing import train_only
from scratch_gpt2.training.recipes import ClassificationArguments

REPOSITORY = Path(__file__).resolve().parents[1]
LABELS = ["ham", "spam"]
# All 34 training rows make one step; accelerate would fill up a step that lacks rows for one of two processes. The 4
# validation rows are one batch of 3 and an incomplete one, which is filled up.
TWO_STEPS = ["--num_train_epochs", 2, "--per_device_train_batch_size", 17, "--per_device_eval_batch_size", 3]


def load_script():
    spec = importlib.util.spec_from_file_location("classify", REPOSITORY / "examples" / "classify.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["classify"] = module
    spec.loader.exec_module(module)
    return module


classify = load_script()


def sentences():
    """Spam is about the rat; both kinds have all lengths."""
    rows = []
    for number in range(48):
        animal, label = ("rat", "spam") if number % 2 else ("cat", "ham")
        rows.append({"text": f"The {animal}" + " sat on the mat" * (number % 5 + 1) + f" {number}.", "label": label})
    return rows


def make_inputs(folder):
    """The prepared data and a base model, as a user would have them."""
    save_prepared(prepare(sentences(), "made here"), folder / "data")
    tokenizer = train_tokenizer([TINY_TEXT], vocab_size=290)
    torch.manual_seed(0)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    sizes = {"vocab_size": 290, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    ScratchGPT2ForCausalLM(ScratchGPT2Config(**sizes, **ids)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify")
    make_inputs(folder)
    return folder


def run(folder, output_dir, *options):
    """examples/classify.py in this process."""
    command = ["classify.py", "--data", folder / "data", "--model", folder / "base", "--output_dir", output_dir]
    command += ["--use_cpu", "--disable_tqdm", "true", "--learning_rate", "1e-2", "--report_to", "none", *options]
    before = sys.argv
    sys.argv = [str(word) for word in command]
    try:
        classify.main()
    finally:
        sys.argv = before


def losses(output_dir):
    history = json.loads((output_dir / "epochs.json").read_text())
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry]


def test_from_prepared_data_to_a_pipeline(inputs, tmp_path, capsys, caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    run(inputs, tmp_path, "--num_train_epochs", 4, "--class_weights", "true", "--explain", "The rat\x1b[2J sat")
    printed = capsys.readouterr().out
    assert "0 of 48 texts were cut to their first 64 tokens" in printed
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "no mistakes" in printed and "\x1b" not in printed and "\nspam 0." in printed
    assert "labels     ham, spam (a new head)\n" in printed
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["positive_label"] == "spam" and metrics["test_rows"] == 10
    assert "precision, recall and F1 are of the label 'spam'" in printed
    assert metrics["test"]["accuracy"] == metrics["test"]["f1"] == metrics["test"]["roc_auc"] == 1.0
    assert json.loads((tmp_path / "confusion_matrix.json").read_text()) == {
        "labels": LABELS,
        "matrix": [[5, 0], [0, 5]],
    }
    history = json.loads((tmp_path / "epochs.json").read_text())
    assert metrics["best_validation_loss"] == min(losses(tmp_path))
    for key in ("eval_loss", "eval_accuracy", "train_sample_loss", "train_sample_accuracy"):
        assert [entry["epoch"] for entry in history if key in entry] == [1, 2, 3, 4]
    for name in ("epochs.png", "confusion_matrix.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "trunk_cache").exists()

    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "ham", "1": "spam"} and config["label2id"] == {"ham": 0, "spam": 1}
    assert config["pad_token_id"] == 289 and config["dtype"] == "float32"
    assert ScratchGPT2Config.from_pretrained(tmp_path).use_cache is True
    before, after = (load_file(folder / "model.safetensors") for folder in (inputs / "base", tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(("model.layers.1.", "model.norm.")) for name in changed)

    lines = [line.strip() for line in printed.splitlines()[-2:]]
    exec("\n".join(lines))
    assert "'label': '" in capsys.readouterr().out
    pipe = transformers.pipeline("text-classification", str(tmp_path))
    assert [answer["label"] for answer in pipe(["The cat sat.", "The rat sat."])] == LABELS
    model = ScratchGPT2ForSequenceClassification.from_pretrained(tmp_path)
    answers = classify_text(model, load_tokenizer(tmp_path), ["The cat sat.", "The rat sat on the mat"], batch_size=1)
    assert [next(iter(answer)) for answer in answers] == LABELS
    assert answers[0]["ham"] == pytest.approx(pipe("The cat sat.")[0]["score"], abs=1e-5)
    assert sum(answers[1].values()) == pytest.approx(1)


def test_adapters_are_saved_reloaded_and_merged(inputs, tmp_path, tiny_tokenizer):
    from peft import PeftModel

    run(inputs, tmp_path, "--train", "lora", "--num_train_epochs", 2, "--max_length", 16)
    assert all(loss > 0 for loss in losses(tmp_path)) and len(losses(tmp_path)) == 2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 5_000_000
    merged = ScratchGPT2ForSequenceClassification.from_pretrained(tmp_path)
    base = load_classifier(str(inputs / "base"), LABELS, tiny_tokenizer)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = base.eval()(ids).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert not torch.allclose(adapted(ids).logits, plain, atol=1e-3)
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_gpt2_takes_less_than_five_megabytes():
    with torch.device("meta"):
        model = ScratchGPT2ForSequenceClassification(ScratchGPT2Config(num_labels=2))
    model = add_lora(model, "SEQ_CLS", classify.Arguments("").lora_rank, classify.Arguments("").lora_alpha)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # Rank 4 in 12 blocks: q, k, v, out 4 * (768 + 768), up and down 2 * (768 + 3072); and the head.
    assert trained == 12 * 4 * (4 * 1536 + 2 * 3840) + 2 * 768
    assert 4 * trained < 5_000_000


def train(inputs, output_dir, part, cached, **options):
    """Three epochs of a trainer; its evaluations and test logits."""
    tokenizer = load_tokenizer(inputs / "base")
    transformers.set_seed(1)
    model = load_classifier(str(inputs / "base"), LABELS, tokenizer)
    data = prepare(sentences(), "made here").splits
    splits = {name: encode_rows(rows, tokenizer, model.config.label2id, 64)[0] for name, rows in data.items()}
    train_only(model, part)
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "num_train_epochs": 3}
    args = ClassificationArguments(output_dir, **quiet | {"learning_rate": 3e-3} | options)
    trainer = make_trainer(model, args, tokenizer, splits, part if cached else None, output_dir / "cache")
    trainer.train()
    return trainer, trainer.predict(trainer.test_rows), model


@pytest.mark.parametrize("part", ["head", "last_block"])
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_cached_training_is_uncached_training(inputs, tmp_path, part, strategy):
    results = []
    for cached in (True, False):
        trainer, prediction, model = train(
            inputs, tmp_path / str(cached), part, cached, train_sampling_strategy=strategy
        )
        history = trainer.state.log_history
        numbers = [
            (key, entry[key])
            for entry in history
            for key in entry
            if not key.endswith(("runtime", "second", "grad_norm", "flos"))
        ]
        results.append((numbers, prediction.predictions, {k: v.clone() for k, v in model.state_dict().items()}))
    cached, uncached = results
    assert [name for name, _ in cached[0]] == [name for name, _ in uncached[0]] and len(cached[0]) > 50
    np.testing.assert_allclose([n for _, n in cached[0]], [n for _, n in uncached[0]], atol=1e-6, rtol=0)
    np.testing.assert_allclose(cached[1], uncached[1], atol=1e-5)
    torch.testing.assert_close(cached[2]["score.weight"], uncached[2]["score.weight"], atol=1e-5, rtol=0)


def test_predictions_are_in_the_order_of_the_rows(inputs, tmp_path):
    trainer, prediction, _ = train(inputs, tmp_path, "head", True, train_sampling_strategy="group_by_length")
    assert prediction.label_ids.tolist() == [trainer.test_rows[i]["labels"] for i in range(10)]
    lengths = [len(trainer.test_rows[i]["input_ids"]) for i in range(10)]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 2


def test_early_stopping(inputs, tmp_path):
    run(inputs, tmp_path, "--train", "head", "--num_train_epochs", 9, "--early_stopping", 2, "--learning_rate", 0.0)
    assert len(losses(tmp_path)) == 3  # the second and the third epoch are no better than the first


@pytest.mark.parametrize("part", ["last_block", "lora"])
def test_a_stopped_run_goes_on_as_the_same_run(inputs, tmp_path, monkeypatch, part):
    options = ["--train", part, "--num_train_epochs", 3, "--dropout", 0.1, "--early_stopping", 2]
    run(inputs, tmp_path / "whole", *options)
    evaluate, calls = classification.ClassificationTrainer.evaluate, []

    def stop_in_second_epoch(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(classification.ClassificationTrainer, "evaluate", stop_in_second_epoch)
        run(inputs, tmp_path / "stopped", *options)
    with pytest.raises(ValueError, match="--resume"):
        run(inputs, tmp_path / "stopped", *options)
    run(inputs, tmp_path / "stopped", *options, "--resume")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    torch.testing.assert_close(stopped, whole, rtol=0, atol=0)


def test_weighted_loss_by_hand():
    logits = torch.tensor(
        [[0.0, math.log(3.0)], [math.log(4.0), 0.0], [0.0, 0.0]]
    )  # p = (1/4 3/4) (4/5 1/5) (1/2 1/2)
    outputs, labels = SimpleNamespace(logits=logits), torch.tensor([1, 1, 0])
    each = -math.log(3 / 4), -math.log(1 / 5), -math.log(1 / 2)
    assert weighted_loss()(outputs, labels).item() == pytest.approx(sum(each) / 3)
    weighted = 2.0 * each[0] + 2.0 * each[1] + 0.5 * each[2]
    assert weighted_loss([0.5, 2.0])(outputs, labels).item() == pytest.approx(weighted / 3)
    assert weighted_loss([0.5, 2.0])(outputs, labels, torch.tensor(6)).item() == pytest.approx(weighted / 6)


def test_class_weights_follow_the_order_of_the_labels():
    rows = [{"label": label} for label in ["ham"] * 3 + ["spam"]]
    assert label_weights(rows, ["spam", "ham"]) == [4 / (2 * 1), 4 / (2 * 3)]


def test_the_positive_label_is_the_rarer_one():
    rows = [{"label": label} for label in ["ham"] * 3 + ["spam"]]
    assert positive_label(rows, ["ham", "spam"]) == positive_label(rows, ["spam", "ham"]) == "spam"
    assert positive_label(rows, ["ham", "spam"], wanted="ham") == "ham"
    assert positive_label(rows[2:], ["ham", "spam"]) == "spam"  # equally frequent: the second
    assert positive_label(rows, ["eggs", "ham", "spam"]) is None
    with pytest.raises(ValueError, match=r"^The positive label 'eggs' is not one of 'ham', 'spam'\.$"):
        positive_label(rows, ["ham", "spam"], wanted="eggs")
    with pytest.raises(ValueError, match=r"^There are 3 labels, but only one of two can be the positive label\.$"):
        positive_label(rows, ["eggs", "ham", "spam"], wanted="ham")


def test_encoded_rows(tiny_tokenizer):
    rows = [{"text": "The cat sat", "label": "spam"}, {"text": "<|endoftext|>", "label": "ham"}]
    encoded, cut = encode_rows(rows, tiny_tokenizer, {"ham": 0, "spam": 1}, max_length=5)
    assert tiny_tokenizer.decode(encoded[0]["input_ids"]) == "The cat sat"[: len("The cat sat")]
    assert [row["labels"] for row in encoded] == [1, 0] and cut == 1
    assert len(encoded[1]["input_ids"]) == 5 and tiny_tokenizer.eos_token_id not in encoded[1]["input_ids"]


def test_confident_mistakes():
    rows = [{"labels": 0}, {"labels": 0}, {"labels": 1}, {"labels": 1}]
    logits = np.log(np.array([[0.4, 0.6], [0.7, 0.3], [0.9, 0.1], [0.2, 0.8]], dtype=np.float32))
    mistakes = confident_mistakes(rows, logits)
    assert [(i, label, round(p, 4)) for i, label, p in mistakes] == [(2, 0, 0.9), (0, 1, 0.6)]
    assert confident_mistakes(rows, logits, count=1) == mistakes[:1]


def test_printed_safely(monkeypatch):
    assert one_line("a\nb\t c\x1b[2J\u202e") == "a b c\ufffd[2J\ufffd"
    assert one_line("x" * 200, 10) == "xxxxxxxxx…"
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="ascii"))
    assert one_line("£5") == "?5"


def prepared(train, test):
    splits = {"train": [{"text": "a", "label": name} for name in train], "validation": []}
    splits["test"] = [{"text": "a", "label": name} for name in test]
    return PreparedClassification(splits, sorted({*train, *test}), {})


def test_labels_that_cannot_be_learned():
    with pytest.raises(
        ValueError, match=r"^Row 2 of the train rows has the label \['ham', 'spam'\]; each row needs one"
    ):
        check_labels(PreparedClassification({"train": [{"label": "ham"}, {"label": ["ham", "spam"]}]}, LABELS, {}))
    with pytest.raises(ValueError, match=r"^All rows have the label \['ham'\]; .* at least two\.$"):
        check_labels(prepared(["ham", "ham"], ["ham"]))
    with pytest.raises(ValueError, match=r"^The label 'eggs' is in the test rows but not in the training rows"):
        check_labels(prepared(["ham", "spam"], ["ham", "eggs"]))


def test_a_classifier_for_other_labels(inputs, tmp_path, tiny_tokenizer):
    model = load_classifier(str(inputs / "base"), ["spam", "ham"], tiny_tokenizer)
    model.save_pretrained(tmp_path)
    continued = load_classifier(str(tmp_path), ["ham", "spam"], tiny_tokenizer)
    assert continued.config.id2label == {0: "spam", 1: "ham"}
    assert torch.equal(continued.score.weight, model.score.weight)
    with pytest.raises(ValueError, match=r"is a classifier for 'spam', 'ham', not for 'bad', 'good'; start from"):
        load_classifier(str(tmp_path), ["bad", "good"], tiny_tokenizer)


def test_half_precision_checkpoints_are_trained_in_float32(inputs, tmp_path, tiny_tokenizer):
    ScratchGPT2ForCausalLM.from_pretrained(inputs / "base", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert load_classifier(str(tmp_path), LABELS, tiny_tokenizer).dtype == torch.float32


def test_bad_arguments(inputs, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"^max_length is 65, but the model reads 1 to 64 tokens"):
        run(inputs, tmp_path, "--max_length", 65)
    with pytest.raises(FileNotFoundError, match=r"report\.json"):
        run(inputs, tmp_path, "--data", tmp_path)
    with pytest.raises(SystemExit):
        run(inputs, tmp_path, "--train", "tail")
    assert "invalid choice: 'tail'" in capsys.readouterr().err
    base = ["classify.py", "--model", str(inputs / "base")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", base)
        with pytest.raises(ValueError, match=r"^--data is missing: "):
            classify.main()
        patch.setattr(sys, "argv", [*base, "--explain", "The cat"])
        with pytest.raises(ValueError, match=r"base is not a classifier; train one with --data first\.$"):
            classify.main()
        (tmp_path / "adapter_config.json").write_text("{}")
        patch.setattr(sys, "argv", ["classify.py", "--model", str(tmp_path), "--explain", "The cat"])
        with pytest.raises(ValueError, match=r" is an adapter; give the model that it was merged into"):
            classify.main()


def test_bad_texts_to_classify(inputs, tiny_tokenizer):
    model = load_classifier(str(inputs / "base"), LABELS, tiny_tokenizer)
    with pytest.raises(ValueError, match=r"^Text 1 is empty"):
        classify_text(model, tiny_tokenizer, ["a cat", " \n"])
    with pytest.raises(ValueError, match="not valid Unicode"):
        classify_text(model, tiny_tokenizer, "\ud800")
    (cut,) = classify_text(model, tiny_tokenizer, "cat " * 500)  # longer than the 64 positions
    assert sum(cut.values()) == pytest.approx(1)


def test_dropping_the_last_batch_drops_no_row_of_an_evaluation(inputs, tmp_path):
    """34, 4 and 10 rows in batches of 8: without the last batch there would be 8 test rows and no validation row."""
    options = {"dataloader_drop_last": True, "per_device_eval_batch_size": 8, "num_train_epochs": 1}
    trainer, prediction, _ = train(inputs, tmp_path / "dropped", "head", True, **options)
    assert trainer.state.global_step == 4  # 34 // 8
    assert prediction.predictions.shape == (10, 2)
    assert trainer.validation_loss() > 0 and trainer.args.dataloader_drop_last


def test_without_an_evaluation_in_training_the_result_is_evaluated(inputs, tmp_path):
    run(
        inputs,
        tmp_path,
        "--train",
        "head",
        "--max_steps",
        2,
        "--eval_strategy",
        "no",
        "--load_best_model_at_end",
        "no",
    )
    assert json.loads((tmp_path / "metrics.json").read_text())["best_validation_loss"] == losses(tmp_path)[0]
    assert len(losses(tmp_path)) == 1


def test_losses_are_those_of_the_training(inputs, tmp_path):
    """With class weights and label smoothing, and the same in the middle of a batch as at its end."""
    transformers.set_seed(1)
    tokenizer = load_tokenizer(inputs / "base")
    model = load_classifier(str(inputs / "base"), LABELS, tokenizer)
    ids, labels = [[5, 6, 7], [8], [9, 10]], [1, 1, 0]
    rows = [{"input_ids": i, "labels": label, "text": ""} for i, label in zip(ids, labels, strict=True)]
    args = ClassificationArguments(
        tmp_path, use_cpu=True, report_to="none", per_device_eval_batch_size=2, label_smoothing_factor=0.1
    )
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    trainer = make_trainer(model, args, tokenizer, splits, class_weights=[0.5, 2.0])
    loss = trainer.predict(trainer.test_rows).metrics["test_loss"]
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([row])).logits for row in ids])
    weights = torch.tensor([0.5, 2.0])
    expected = torch.nn.functional.cross_entropy(
        logits, torch.tensor(labels), weights, reduction="sum", label_smoothing=0.1
    )
    assert loss == pytest.approx(expected.item() / 3, rel=1e-5)


def test_classification_explanation_and_pipeline_read_the_same_ids(inputs, tmp_path, capsys):
    """Also where the training texts were cut, and where a text holds what looks like a special token."""
    run(inputs, tmp_path, "--train", "head", "--num_train_epochs", 1, "--max_length", 8)
    assert "34 of 34 texts were cut to their first 8 tokens, 0 of 14 texts were cut to their first 64" in (
        capsys.readouterr().out
    )
    model = ScratchGPT2ForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.truncation_side = "left"
    pipe = transformers.pipeline("text-classification", str(tmp_path))
    for text in ("The rat sat on the mat on the mat on the mat.", "The cat<|endoftext|>sat"):
        read = []
        hook = model.model.register_forward_pre_hook(
            lambda module, args, kwargs, read=read: read.append(args[0] if args else kwargs.get("input_ids")),
            with_kwargs=True,
        )
        answer = classify_text(model, tokenizer, text)[0]
        hook.remove()
        ids = read[0][0].tolist()
        assert len(ids) > 8 and pipe.tokenizer(text)["input_ids"] == ids
        (row,), cut = encode_rows([{"text": text, "label": "ham"}], tokenizer, model.config.label2id, 64)
        assert row["input_ids"] == ids and cut == 0
        (scored,) = pipe(text)
        assert scored["score"] == pytest.approx(answer[scored["label"]], abs=1e-6)
        explained = token_attributions(model, tokenizer, text, "ham")
        assert [token for token, _ in explained] == [tokenizer.decode([token]) for token in ids]


def test_a_cut_is_said(inputs, tiny_tokenizer, caplog):
    model = load_classifier(str(inputs / "base"), LABELS, tiny_tokenizer)
    classify_text(model, tiny_tokenizer, ["cat", "cat " * 500])
    assert "1 of 2 texts were cut to their first 64 tokens." in caplog.text


def test_max_length_is_for_the_training_rows(tiny_tokenizer):
    data = prepare(sentences(), "made here")
    config = ScratchGPT2Config(n_positions=40, num_labels=2, id2label=dict(enumerate(LABELS)))
    config.label2id = {"ham": 0, "spam": 1}
    splits, said = encode_splits(data, tiny_tokenizer, config, max_length=5)
    longest = {name: max(len(row["input_ids"]) for row in rows) for name, rows in splits.items()}
    assert longest["train"] == 5 and longest["test"] > 20
    assert said.startswith("34 of 34 texts were cut to their first 5 tokens, ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora_rank", 4], r"^--lora_rank is for adapters: add --train lora, or leave it out\.$"),
        (["--train", "lora", "--lora_rank", 0], r"^lora_rank is 0 but must be at least 1"),
        (["--train", "head", "--dropout", 0.1], r"^--dropout acts in trained blocks, but --train head trains none"),
        (["--dropout", 1], r"^dropout is 1 but must be from 0 to below 1"),
        (["--train", "all", "--trunk_cache", "states"], r"^--trunk_cache is for --train head or last_block"),
        (["--activation_checkpointing"], r"^--activation_checkpointing needs the blocks .*--no_cache_trunk\.$"),
        (["--neftune_noise_alpha", 5], r"^--neftune_noise_alpha needs the blocks .*--no_cache_trunk\.$"),
        (["--metric_for_best_model", "speed"], r"^metric_for_best_model is 'speed'; choose one of accuracy, f1, loss"),
    ],
)
def test_options_that_do_not_fit(inputs, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(inputs, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_texts_to_explain_are_checked_before_the_training(inputs, tmp_path):
    with pytest.raises(ValueError, match=r"^The text to explain 'cat cat .* has \d+ tokens, but the model has 64"):
        run(inputs, tmp_path / "out", "--explain", "The cat", "cat " * 100)
    with pytest.raises(ValueError, match=r"^A text to explain is empty"):
        run(inputs, tmp_path / "out", "--explain", " ")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(inputs, tmp_path):
    options = ["--train", "head", "--num_train_epochs", 1]
    run(inputs, tmp_path, *options)
    (tmp_path / "adapter").mkdir()
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r" contains a finished run .*--overwrite_output_dir"):
        run(inputs, tmp_path, *options, "--learning_rate", 0.5)
    for overwrite in ([], ["--overwrite_output_dir"]):
        with pytest.raises(ValueError, match=r"is an input of this run and would be overwritten"):
            run(inputs, tmp_path, *options, "--model", tmp_path, *overwrite)
        with pytest.raises(ValueError, match=r"is an input of this run and would be overwritten"):
            run(inputs, inputs / "data", *options, *overwrite)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    run(inputs, tmp_path, *options, "--learning_rate", 0.5, "--overwrite_output_dir")
    assert (tmp_path / "model.safetensors").read_bytes() != before and not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([], ["--no_cache_trunk"]),
        (["--no_cache_trunk"], []),
        (["--no_cache_trunk"], ["--train", "all"]),
        (["--train", "lora"], ["--train", "lora", "--lora_rank", 2]),
        (["--train", "lora"], ["--train", "all"]),
    ],
)
def test_a_run_is_resumed_with_what_it_trained(inputs, tmp_path, first, then):
    run(inputs, tmp_path, "--num_train_epochs", 1, *first)
    with pytest.raises(ValueError, match=r"was trained with other settings \(.*\); resume with the same --train"):
        run(inputs, tmp_path, "--num_train_epochs", 2, "--resume", *then)


@pytest.mark.xdist_group("distributed")
def test_two_processes_train_what_one_trains(inputs, tmp_path):
    both = run_two(__file__, inputs, tmp_path / "two")
    assert [done.returncode for done in both] == [0, 0], both
    assert [done.stdout.count("Use the model") for done in both] == [1, 0]
    run(inputs, tmp_path / "one", *TWO_STEPS, "--gradient_accumulation_steps", 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("two", "one")]
    assert metrics[0]["best_validation_loss"] == pytest.approx(metrics[1]["best_validation_loss"], abs=1e-6)
    test = [results["test"] for results in metrics]
    assert test[0].pop("confusion_matrix") == test[1].pop("confusion_matrix")
    assert test[0] == pytest.approx(test[1], abs=1e-6)


if __name__ == "__main__":  # what each of the two processes runs
    run(Path(sys.argv[1]), sys.argv[2], *TWO_STEPS)
