"""`--eval_only`: a checkpoint is measured, and nothing but evaluation.json is written."""

import json
import math

import pytest
import test_classify
import test_pretrain
import test_sft
import torch
from test_classify import inputs  # noqa: F401
from test_pretrain import book, straight_run  # noqa: F401
from test_sft import files, full_run  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from scratch_gpt2.cli import given_options
from scratch_gpt2.data.instructions import encode_conversation, read_instructions
from scratch_gpt2.files import sha256
from scratch_gpt2.training.evaluation_only import evaluates_only
from scratch_gpt2.training.recipes import InstructionArguments


def contents(folder):
    return {path.relative_to(folder): sha256(path) for path in folder.rglob("*") if path.is_file()}


def evaluation(folder):
    assert [path.name for path in folder.iterdir()] == ["evaluation.json"]
    return json.loads((folder / "evaluation.json").read_text())


def test_pretraining_measures_the_loss_that_the_run_ended_with(straight_run, tmp_path, monkeypatch):  # noqa: F811
    before = contents(straight_run)
    options = {"--data": straight_run / "shards", "--model": straight_run, "--output_dir": tmp_path / "out"}
    test_pretrain.run_script(monkeypatch, options | {"--use_cpu": "true"}, "--eval_only")
    written = evaluation(tmp_path / "out")
    run = json.loads((straight_run / "run.json").read_text())
    assert written["metrics"]["loss"] == pytest.approx(run["metrics"]["loss"], abs=1e-6)
    assert written["metrics"]["perplexity"] == pytest.approx(math.exp(run["metrics"]["loss"]), rel=1e-5)
    assert written["metrics"]["bits_per_byte"] == pytest.approx(run["metrics"]["bits_per_byte"], abs=1e-6)
    assert (written["model"]["name"], written["split"]) == (straight_run.name, "validation")
    assert contents(straight_run) == before
    with pytest.raises(FileExistsError, match=r"evaluation.json exists; .* --overwrite"):
        test_pretrain.run_script(monkeypatch, options, "--eval_only")
    with pytest.raises(ValueError, match=r"^--model is missing: name the checkpoint to evaluate\.$"):
        test_pretrain.run_script(monkeypatch, {"--data": straight_run / "shards"}, "--eval_only")


def test_instruction_tuning_measures_the_rows_held_out(full_run, files, tmp_path):  # noqa: F811
    before = contents(full_run)
    options = files | test_sft.OPTIONS | {"--model": full_run, "--output_dir": tmp_path / "out"}
    test_sft.run_script(options, "--do_eval")  # without --do_train, as in transformers' scripts
    model, tokenizer = AutoModelForCausalLM.from_pretrained(full_run), AutoTokenizer.from_pretrained(full_run)
    total = tokens = 0
    for row in read_instructions(str(full_run / "test.json")):
        example = encode_conversation(tokenizer, row.messages, max_length=192)
        ids, labels = (torch.tensor([example[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            scores = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        learned = labels[0, 1:] != -100
        total, tokens = total - scores[learned].sum().item(), tokens + learned.sum().item()
    written = evaluation(tmp_path / "out")
    assert written["metrics"]["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert written["split"] == "test" and contents(full_run) == before
    with pytest.raises(ValueError, match=r"^--test is 0, so no rows are held out"):
        test_sft.run_script(options | {"--test": 0}, "--eval_only")


def test_classification_measures_the_test_texts(inputs, tmp_path):  # noqa: F811
    test_classify.run(inputs, tmp_path / "run", "--num_train_epochs", 2)
    before = contents(tmp_path / "run")
    test_classify.run(inputs, tmp_path / "out", "--model", tmp_path / "run", "--eval_only")
    expected = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    metrics = evaluation(tmp_path / "out")["metrics"]
    assert metrics["accuracy"] == expected["accuracy"] and metrics["f1"] == expected["f1"]
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert contents(tmp_path / "run") == before
    with pytest.raises(ValueError, match=r"base is not a classifier; leave out --eval_only to train one\.$"):
        test_classify.run(inputs, tmp_path / "none", "--eval_only")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"eval_only"}, True),
        ({"do_eval"}, True),
        ({"do_predict"}, True),
        ({"do_eval", "do_train"}, False),
        ({}, False),
    ],
)
def test_what_asks_for_an_evaluation_only(given, expected, tmp_path):
    args = InstructionArguments(tmp_path, **dict.fromkeys(given, True))
    args._given = set(given)
    assert given_options(args) == set(given) and evaluates_only(args) is expected
