"""Pretraining: what is derived from the arguments, resuming as the same run, broken checkpoints, the script."""

import ctypes
import importlib.util
import json
import os
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY_TEXT
from model_fixtures import TINY, random_ids, tiny_config, tiny_model
from safetensors.torch import load_file
from warm_python import run_python

from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM
from scratch_gpt2.evaluation.hellaswag import hellaswag_accuracy, read_hellaswag
from scratch_gpt2.training import callbacks
from scratch_gpt2.training.callbacks import HellaSwagCallback, flops_per_token
from scratch_gpt2.training.checkpoints import find_fault, newest_intact_checkpoint
from scratch_gpt2.training.pretraining import PretrainingTrainer
from scratch_gpt2.training.recipes import PRETRAINING_RECIPES, PretrainingArguments
from scratch_gpt2.training.start import accumulation_steps, check_launch, check_same_sizes, model_to_continue

ROWS, LENGTH = 14, 16


def make_trainer(output_dir, optimizer="adamw", seed=0, dropout=0.1, rows=ROWS, callbacks=None, **options):
    """Six steps of two passes of two rows; 14 rows are 3.5 steps, so the epochs end in the middle of a step."""
    torch.manual_seed(seed)
    model = ScratchGPT2ForCausalLM(tiny_config(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout))
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    steps = {"max_steps": 6, "logging_steps": 1, "save_steps": 2, "eval_strategy": "no", "learning_rate": 0.01}
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    args = PretrainingArguments(output_dir, **quiet | steps | batch | options)
    data = [{"input_ids": row, "labels": row} for row in random_ids(rows, LENGTH)]
    sizes = {"tokens_per_step": 4 * LENGTH, "block_length": LENGTH}
    return PretrainingTrainer(model, args, optimizer, **sizes, train_dataset=data, callbacks=callbacks)


def history(trainer, key="loss"):
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


@pytest.mark.parametrize(
    ("tokens_per_step", "block_length", "batch_size", "world_size", "expected"),
    [(524_288, 1024, 16, 8, 4), (524_288, 1024, 8, 1, 64), (512, 256, 2, 1, 1)],
)
def test_accumulation_steps(tokens_per_step, block_length, batch_size, world_size, expected):
    assert accumulation_steps(tokens_per_step, block_length, batch_size, world_size) == expected


@pytest.mark.parametrize("tokens_per_step", [500_000, 1024])
def test_tokens_that_cannot_be_divided(tokens_per_step):
    with pytest.raises(ValueError, match=rf"{tokens_per_step}, .* 4096 tokens .*2 process.* x 2 rows x 1024"):
        accumulation_steps(tokens_per_step, block_length=1024, batch_size=2, world_size=2)


def test_flops_of_gpt2():
    # 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 768 * 1024
    assert flops_per_token(ScratchGPT2Config(), length=1024) == 854_438_400


def test_the_recipe(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=19_073, learning_rate=6e-4)
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(19_073)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    rate = scheduler.lr_lambdas[0]
    assert [6e-4 * rate(step) for step in (0, 715, 19_073)] == pytest.approx([0, 6e-4, 6e-5])
    assert rate(357) == pytest.approx(357 / 715)


@pytest.mark.parametrize("recipe", ["gpt3", "muon"])
def test_resume_is_the_same_run(tmp_path, recipe):
    options = {"optimizer": "adamw"} | PRETRAINING_RECIPES[recipe]
    straight = make_trainer(tmp_path, **options)
    straight.train()
    expected = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    shutil.rmtree(tmp_path / "checkpoint-6")
    shutil.rmtree(tmp_path / "checkpoint-4")

    resumed = make_trainer(tmp_path, **options, seed=1)  # other initial weights, other random state
    torch.rand(100)
    resumed.train(resume_from_checkpoint=newest_intact_checkpoint(tmp_path))
    assert len(history(straight)) == 6
    assert history(resumed) == history(straight)
    assert history(resumed, "grad_norm") == history(straight, "grad_norm")
    for name, tensor in load_file(tmp_path / "checkpoint-6" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
    states = (trainer.optimizer.state_dict()["state"] for trainer in (straight, resumed))
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_resuming_a_finished_run_takes_no_step(tmp_path):
    make_trainer(tmp_path).train()
    resumed = make_trainer(tmp_path, seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.state.global_step == 6
    for name, tensor in load_file(tmp_path / "checkpoint-6" / "model.safetensors").items():
        assert torch.equal(resumed.model.get_parameter(name), tensor), name


def test_the_comparison_would_notice_another_run(tmp_path):
    first, second = (make_trainer(tmp_path / str(seed), seed=seed, max_steps=1, save_strategy="no") for seed in (0, 1))
    first.train()
    second.train()
    assert history(first) != history(second)


def test_logs_speed_utilisation_and_bits_per_byte(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="no")
    trainer.peak_flops, trainer.bytes_per_token = 1e12, 4.0
    trainer.eval_dataset = trainer.train_dataset
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_bits_per_byte"] == pytest.approx(metrics["eval_loss"] / 0.6931472 / 4)
    entry = trainer.state.log_history[0]
    assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * flops_per_token(tiny_config(), LENGTH) / 1e12)


def test_evaluation_builds_no_logits(tmp_path):
    trainer = make_trainer(tmp_path)
    inputs = trainer.data_collator(trainer.train_dataset[:2])
    trainer.model.eval()
    expected = trainer.model(**inputs).loss
    seen = []
    trainer.model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    loss, logits, labels = trainer.prediction_step(trainer.model, inputs, prediction_loss_only=True)
    assert seen == [None] and loss is None
    assert labels.tolist() == [2 * (LENGTH - 1), 0]
    torch.testing.assert_close(logits, torch.tensor([expected.item() * 2 * (LENGTH - 1), 0.0]))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, max_steps=4, optimizer="muon").train()
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    return folder


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def overwrite_step(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"global_step": 3}))


@pytest.mark.parametrize(
    ("name", "damage", "fault"),
    [
        ("model.safetensors", cut, "model.safetensors is cut off"),
        ("model.safetensors", lambda path: os.truncate(path, 5), "model.safetensors is cut off"),
        ("model.safetensors", os.remove, "model.safetensors is missing"),
        ("optimizer.pt", cut, "optimizer.pt is cut off"),
        ("optimizer.pt", os.remove, "optimizer.pt is missing"),
        ("scheduler.pt", os.remove, "scheduler.pt is missing"),
        ("rng_state.pth", os.remove, "rng_state.pth is missing"),
        ("trainer_state.json", cut, "trainer_state.json is cut off"),
        ("trainer_state.json", os.remove, "trainer_state.json, which is written last, is missing"),
        ("trainer_state.json", overwrite_step, "trainer_state.json is of step 3"),
        ("trainer_state.json", lambda path: path.write_text("[]"), "trainer_state.json is cut off"),
        ("config.json", lambda path: path.write_text("[]"), "config.json is damaged"),
    ],
)
def test_broken_checkpoints_are_passed_over(checkpoints, tmp_path, caplog, name, damage, fault):
    folder = tmp_path / "run"
    shutil.copytree(checkpoints, folder)
    assert newest_intact_checkpoint(folder) == str(folder / "checkpoint-4")
    damage(folder / "checkpoint-4" / name)
    assert newest_intact_checkpoint(folder) == str(folder / "checkpoint-2")
    assert caplog.messages == [f"Skipping the broken checkpoint {folder / 'checkpoint-4'}: {fault}."]


def test_sharded_weights_with_a_missing_part(checkpoints, tmp_path):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(checkpoints / "checkpoint-4", folder)
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="40KB")
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 1 and find_fault(folder) is None
    parts[-1].unlink()
    assert find_fault(folder) == f"{parts[-1].name} is missing"


def test_no_checkpoint_at_all(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_intact_checkpoint(tmp_path) is None
    assert newest_intact_checkpoint(tmp_path / "absent") is None


def test_numbers_not_names_order_checkpoints(checkpoints, tmp_path):
    for step in (9, 10):
        shutil.copytree(checkpoints / "checkpoint-4", tmp_path / f"checkpoint-{step}")
        state = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text(json.dumps(json.loads(state.read_text()) | {"global_step": step}))
    assert newest_intact_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_resuming_a_model_of_another_size(checkpoints):
    checkpoint = str(checkpoints / "checkpoint-4")
    check_same_sizes(tiny_model(), checkpoint)
    with pytest.raises(ValueError, match=r"^n_layer is 2 here but 3 in .*checkpoint-4"):
        check_same_sizes(tiny_model(n_layer=2), checkpoint)


def test_processes_that_would_each_train_alone(tmp_path, monkeypatch):
    args = PretrainingArguments(tmp_path, use_cpu=True)
    check_launch(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP on GPUs only"):
        check_launch(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^2 processes were launched but no GPU .*--use_cpu"):
        check_launch(args)


def test_a_bfloat16_checkpoint_is_trained_in_float32(tmp_path):
    tiny_model(resid_pdrop=0.1).to(torch.bfloat16).save_pretrained(tmp_path)
    assert ScratchGPT2ForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    model = model_to_continue(str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.model.layers[0].mlp.resid_dropout.p == 0.0 and model.config.resid_pdrop == 0.0


def test_transformers_checkpoints_can_be_continued(tmp_path):
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY)).save_pretrained(tmp_path)
    model = model_to_continue(str(tmp_path), dropout=0.25)
    assert model.model.embd_dropout.p == 0.25 and model.config.attn_pdrop == 0.25


SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "pretrain.py"
NEW = {"--n_layer": 2, "--n_embd": 16, "--n_head": 2, "--n_positions": 16}
SMALL = {"--dropout": 0.1, "--max_steps": 8, "--logging_steps": 1, "--eval_steps": 4, "--save_steps": 2}
SMALL |= {"--tokens_per_step": 64, "--per_device_train_batch_size": 2, "--save_total_limit": 9, "--sample_steps": 4}
SMALL |= {"--learning_rate": 0.01, "--use_cpu": "true", "--disable_tqdm": "true"}
TEXT = SMALL | {"--vocab_size": 300}


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(f"{number}. {TINY_TEXT}" for number in range(40)))
    return path


def command(options, *flags):
    return [str(SCRIPT), *(str(part) for pair in options.items() for part in pair), *flags]


def run_script(monkeypatch, options, *flags):
    specification = importlib.util.spec_from_file_location("pretrain", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    # Dataclasses look their module up by its name.
    monkeypatch.setitem(sys.modules, "pretrain", script)
    specification.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", command(options, *flags))
    script.main()


@pytest.fixture(scope="module")
def straight_run(book, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_script(monkeypatch, NEW | TEXT | {"--data": book, "--output_dir": folder, "--optimizer": "muon"})
    return folder


def test_the_script_leaves_a_model_that_can_be_used(straight_run):
    names = {path.name for path in straight_run.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "log.jsonl", "curves.png", "samples", "shards"} <= names
    assert {f"checkpoint-{step}" for step in (2, 4, 6, 8)} <= names
    model = ScratchGPT2ForCausalLM.from_pretrained(straight_run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(straight_run)
    assert model.config.use_cache and model.config.n_layer == 2
    assert len(tokenizer) == model.config.vocab_size and tokenizer.model_max_length == 16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("the cat").input_ids) == "the cat"
    assert (straight_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted((straight_run / "samples").iterdir())] == ["step-4.txt", "step-8.txt"]


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_log_has_every_step_and_evaluation(straight_run):
    entries = read_log(straight_run)
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {"grad_norm", "learning_rate", "tokens_per_second"} <= steps[0].keys()
    assert steps[-1]["loss"] < steps[0]["loss"]
    evaluations = [entry["step"] for entry in entries if "eval_loss" in entry and "eval_bits_per_byte" in entry]
    assert evaluations == [4, 8, 8]


def test_resume_after_kill_9_during_a_save(book, straight_run, tmp_path, monkeypatch, capsys, caplog):
    """The process dies when half of checkpoint-6's optimizer is written; its log is two steps ahead by then."""
    options = NEW | TEXT | {"--data": book, "--output_dir": tmp_path, "--optimizer": "muon"}
    dying = f"""
import os, runpy, signal, sys, torch
sys.path.insert(0, {str(SCRIPT.parent)!r})
save = torch.save
def save_and_die(state, path, *args, **kwargs):
    save(state, path, *args, **kwargs)
    if str(path).endswith("checkpoint-6/optimizer.pt"):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_and_die
sys.argv = {command(options)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = run_python(dying)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert not (tmp_path / "checkpoint-6" / "trainer_state.json").exists()

    run_script(monkeypatch, options, "--resume")
    warning = f"Skipping the broken checkpoint {tmp_path / 'checkpoint-6'}: trainer_state.json, which is written last"
    assert any(message.startswith(warning) for message in caplog.messages)
    assert f"continues {tmp_path / 'checkpoint-4'}" in capsys.readouterr().out
    expected = load_file(straight_run / "model.safetensors")
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
    logs = [
        [entry["loss"] for entry in map(json.loads, (folder / "log.jsonl").open()) if "loss" in entry]
        for folder in (straight_run, tmp_path)
    ]
    assert len(logs[0]) == 8 and logs[0] == logs[1]


@pytest.fixture(scope="module")
def hellaswag_file(tmp_path_factory):
    """Three rows that differ in their right ending."""
    endings = ["is on the mat.", "sat.", "is the rat of the hat.", "a cat"]
    texts = {"activity_label": "Cats", "ctx_a": "The cat sat on the mat.", "ctx_b": "the cat", "endings": endings}
    path = tmp_path_factory.mktemp("hellaswag") / "rows.jsonl"
    path.write_text("".join(json.dumps(texts | {"ind": label, "label": label}) + "\n" for label in (1, 0, 1)))
    return path


def test_hellaswag_is_logged_and_changes_nothing(straight_run, book, hellaswag_file, tmp_path, monkeypatch):
    options = {"--data": book, "--output_dir": tmp_path, "--optimizer": "muon", "--save_strategy": "no"}
    options |= {"--hellaswag": hellaswag_file, "--hellaswag_steps": 3, "--hellaswag_rows": 2}
    run_script(monkeypatch, NEW | TEXT | options)
    entries = read_log(tmp_path)
    logged = {entry["step"]: entry for entry in entries if "hellaswag_accuracy" in entry}
    assert list(logged) == [3, 6, 8]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (entries, read_log(straight_run))]
    assert len(losses[0]) == 8 and losses[0] == losses[1]

    model = ScratchGPT2ForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = hellaswag_accuracy(model, tokenizer, read_hellaswag(hellaswag_file)[:2])
    assert logged[8]["hellaswag_accuracy"] == expected.accuracy
    assert logged[8]["hellaswag_accuracy_norm"] == expected.accuracy_norm
    weights = load_file(straight_run / "model.safetensors")
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


def test_trackers_get_hellaswag_and_its_time_is_not_trainings(tiny_tokenizer, hellaswag_file, tmp_path, monkeypatch):
    seen = []

    class Tracker(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = make_trainer(tmp_path, max_steps=4, save_strategy="no", logging_steps=4, callbacks=[Tracker()])
    trainer.model = ScratchGPT2ForCausalLM(tiny_config(vocab_size=290))
    callback = HellaSwagCallback(trainer, tiny_tokenizer, read_hellaswag(hellaswag_file), every=1)
    trainer.add_callback(callback)
    score = callbacks.score_examples
    monkeypatch.setattr(callbacks, "score_examples", lambda *arguments: time.sleep(0.5) or score(*arguments))
    trainer.train()
    shares = [logs for logs in seen if "hellaswag_accuracy" in logs]
    assert len(shares) == 4 and {"hellaswag_accuracy", "hellaswag_accuracy_norm"} <= shares[0].keys()
    (speed,) = (logs["tokens_per_second"] for logs in seen if "tokens_per_second" in logs)
    assert speed > 4 * LENGTH / 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"^--data is missing"),
        ({"--data": "absent"}, r"No file matches 'absent'"),
        ({"--data": "EMPTY"}, r"empty.txt is empty"),
        ({"--data": "DAMAGED"}, r"damaged.txt is not UTF-8"),
        ({"--data": "FOLDER"}, r"folder has no token shards"),
        (
            {"--data": "BOOK", "--tokenizer": "MODEL"},
            r"--vocab_size trains a tokenizer, and --tokenizer names another",
        ),
        ({"--data": "BOOK", "--optimizer": "muon", "--optim": "adafactor"}, r"--optim chooses another optimizer than"),
        ({"--data": "BOOK", "--muon_momentum": 0.9}, r"--muon_momentum is for --optimizer muon; leave it out"),
        ({"--data": "BOOK", "--muon_momentum": 1}, r"muon_momentum is 1.0 but must be in \[0, 1\)"),
        ({"--data": "BOOK", "--hellaswag_rows": 3}, r"--hellaswag_rows needs --hellaswag"),
        ({"--data": "BOOK", "--sample_steps": -1}, r"sample_steps is -1 but must be at least 0"),
        ({"--data": "BOOK", "--do_eval": "true"}, r"^--model is missing: name the checkpoint to evaluate"),
        (
            {"--data": "BOOK", "--metric_for_best_model": "unknown"},
            r"metric_for_best_model is 'unknown'; choose one of",
        ),
        ({"--data": "BOOK", "--report_to": "wandb"}, r"--report_to wandb needs a package that is not installed"),
        ({"--data": "BOOK", "--gradient_accumulation_steps": 3}, r"steps is 3, but tokens_per_step 64 takes 2"),
        ({"--data": "BOOK", "--num_train_epochs": 1}, r"max_steps is 8 and num_train_epochs is 1; give one of them"),
        ({"--data": "BOOK", "--prompt": "the cat sat on the mat " * 3}, r"The prompt has \d+ tokens, but the model's"),
        ({"--data": "BOOK", "--resume_from_checkpoint": "FOLDER"}, r"folder cannot be continued: trainer_state.json"),
        ({"--data": "BOOK", "--lr_scheduler_type": "cosine_with_min_lr", "--lr_scheduler_kwargs": "{}"}, r"min_lr"),
        ({"--data": "BOOK", "--tokens_per_step": 100}, r"is 100, which is not a multiple of the 32 tokens"),
        ({"--data": "BOOK", "--n_head": 3}, r"n_embd \(16\) is not divisible by n_head \(3\)"),
        ({"--data": "BOOK", "--n_positions": 4096, "--tokens_per_step": 8192}, r"fewer than one block of 4096"),
        ({"--data": "BOOK", "--block_length": 32}, r"32 tokens, but the model's n_positions is 16"),
        ({"--data": "BOOK", "--tokens_per_step": 65536}, r"\d+ blocks, but a step takes 4096"),
        ({"--data": "BOOK", "--model": "MODEL"}, r"--n_layer is for a new model; .*model has its own size"),
        ({"--data": "BOOK", "--hellaswag": "EMPTY"}, r"empty.txt contains no examples"),
        ({"--data": "BOOK", "--hellaswag": "ROWS", "--hellaswag_rows": 0}, r"hellaswag_rows is 0 but must be"),
        ({"--data": "BOOK", "--hellaswag": "ROWS", "--n_positions": 4}, r"but the model has only 4 positions"),
    ],
)
def test_bad_input(options, message, book, hellaswag_file, tmp_path, monkeypatch):
    paths = {"BOOK": book, "ROWS": hellaswag_file} | {name: tmp_path / name.lower() for name in ("FOLDER", "MODEL")}
    paths |= {name: tmp_path / f"{name.lower()}.txt" for name in ("EMPTY", "DAMAGED")}
    paths["EMPTY"].touch()
    paths["DAMAGED"].write_bytes(b"abc \xff def" * 100)
    paths["FOLDER"].mkdir()
    tiny_model().save_pretrained(paths["MODEL"])
    options = {name: paths.get(value, value) for name, value in options.items()}
    with pytest.raises((ValueError, OSError), match=message) as error:
        run_script(monkeypatch, NEW | TEXT | options | {"--output_dir": tmp_path / "out"})
    assert "\n" not in str(error.value)


def test_adamw_does_not_take_the_learning_rate_of_muon(book, tmp_path, monkeypatch):
    options = NEW | TEXT | {"--data": book, "--output_dir": tmp_path / "out"}
    options |= {"--recipe": "muon", "--optimizer": "adamw"}
    del options["--learning_rate"]
    with pytest.raises(ValueError, match=r"--recipe muon is for Muon; give --optimizer adamw its --learning_rate too"):
        run_script(monkeypatch, options)
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {"shards"}
    assert (tmp_path / "out" / "shards").exists() == (tmp_path / "out" / "shards" / "tokenizer").exists()


def test_shards_with_more_tokens_than_the_model(straight_run, tmp_path, monkeypatch):
    tiny_model(n_positions=16).save_pretrained(tmp_path / "model")
    options = {"--data": straight_run / "shards", "--model": tmp_path / "model", "--output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match=r"have 300 token ids, but the model's vocab_size is 61"):
        run_script(monkeypatch, SMALL | options)
    assert not (tmp_path / "out").exists()


def test_a_second_run_into_the_same_folder(straight_run, book, monkeypatch):
    with pytest.raises(FileExistsError, match=r"contains a finished run \(model.safetensors\).*--overwrite_output"):
        run_script(monkeypatch, NEW | TEXT | {"--data": book, "--output_dir": straight_run})


def test_shards_of_another_text(straight_run, book, tmp_path, monkeypatch):
    shutil.copytree(straight_run / "shards", tmp_path / "shards")
    options = {"--data": book, "--vocab_size": 400, "--output_dir": tmp_path}
    with pytest.raises(
        ValueError, match=r"shards was made from other text: vocab_size 300, not 400; choose another output folder"
    ):
        run_script(monkeypatch, NEW | TEXT | options)


def test_a_separator_in_a_text_file_is_the_eos_id(tmp_path, gpt2_tokenizer):
    gpt2_tokenizer.save_pretrained(tmp_path / "gpt2")
    (tmp_path / "a.txt").write_text("a\n<|endoftext|>\nb|c")
    script = runpy.run_path(str(SCRIPT))
    ids = {"<|endoftext|>": [64, 50256, 65, 91, 66, 50256]}
    ids["|"] = [64, 198, 27, 50256, 437, 1659, 5239, 50256, 29, 198, 65, 50256, 66, 50256]
    for number, (separator, expected) in enumerate(ids.items()):
        output_dir = tmp_path / str(number)
        data_args = script["DataArguments"](
            data=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "gpt2"), document_separator=separator
        )
        options = {"model_args": script["ModelArguments"](), "run_args": script["RunArguments"]()}
        folder, _ = script["open_data"](data_args, args=SimpleNamespace(output_dir=output_dir), **options)
        files = sorted(Path(folder).glob("*.npy"))
        assert [token for file in files for token in np.load(file).tolist()] == expected


def test_a_model_continues_on_shards(straight_run, tmp_path, monkeypatch):
    options = {"--data": straight_run / "shards", "--model": straight_run, "--output_dir": tmp_path}
    run_script(monkeypatch, SMALL | options | {"--max_steps": 2, "--learning_rate": 1e-5})  # the first rate is 0
    before, after = (load_file(folder / "model.safetensors") for folder in (straight_run, tmp_path))
    name = "model.embed_tokens.weight"
    assert 0 < (after[name] - before[name]).abs().max() < 2e-5


def test_smoke(tmp_path, monkeypatch, capsys):
    run_script(monkeypatch, {"--output_dir": tmp_path}, "--smoke", "--use_cpu")
    output = capsys.readouterr().out
    assert "step       16 rows, 1,024 tokens = 1 process(es) x 8 rows x 2 passes\n" in output
    assert "bits per byte" in output


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_used_again():
    """64 MB are 16,384 pages, each of which would fault whenever the memory is written again."""
    code = """
import resource, torch
from scratch_gpt2.hardware import keep_freed_memory
keep_freed_memory()
for _ in range(12):  # the heap settles
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    assert int(run_python(code).stdout) < 100
