"""The trainer that all scripts share: losses, divergence, interruption, and what resuming may change."""

import json
import logging
import math
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from model_fixtures import random_ids, tiny_model
from safetensors.torch import load_file
from test_pretrain import NEW, SMALL, TEXT, book, command, history, make_trainer, read_log, run_script  # noqa: F401
from transformers import TrainerCallback
from warm_python import run_python

from scratch_gpt2.cli import Stopped
from scratch_gpt2.data.token_shards import TokenShards
from scratch_gpt2.training.checkpoints import checkpoint_to_resume, newest_intact_checkpoint
from scratch_gpt2.training.identity import check_identity, fingerprint
from scratch_gpt2.training.pretraining import predicted_bytes_per_token
from scratch_gpt2.training.recipes import PretrainingArguments
from scratch_gpt2.training.trainer import LanguageModelTrainer


def language_model_trainer(folder, rows, evaluated=None, **options):
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "eval_strategy": "no"}
    steps = {"max_steps": 1, "logging_steps": 1, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 1e9}
    args = PretrainingArguments(folder, **quiet | steps | options)
    data = {"train_dataset": rows, "eval_dataset": rows if evaluated is None else evaluated}
    return LanguageModelTrainer(tiny_model(), args, **data)


def rows_of(ids):
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


class TestLosses:
    @pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 1), (1, 2)])
    def test_label_smoothing_compares_with_the_next_token(self, batch_size, accumulation, tmp_path):
        """Two rows of 5 tokens: 0.9 times the negative log-probability of the next token, plus 0.1 times the mean over
        the vocabulary (Szegedy et al. 2016)."""
        ids = random_ids(2, 5)
        log_probs = tiny_model()(ids).logits.log_softmax(-1)  # (2, 5, 61)
        terms = []
        for row in range(2):
            for t in range(4):
                terms.append(-0.9 * log_probs[row, t, ids[row, t + 1]].item() - 0.1 * log_probs[row, t].mean().item())
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        trainer = language_model_trainer(tmp_path, rows_of(ids), label_smoothing_factor=0.1, **sizes)
        trainer.train()
        assert history(trainer) == {1: pytest.approx(math.fsum(terms) / 8, rel=1e-4)}

    def test_the_evaluation_is_not_smoothed(self, tmp_path):
        ids = random_ids(4, 5)
        expected = tiny_model()(ids, labels=ids).loss.item()
        trainer = language_model_trainer(tmp_path, rows_of(ids), label_smoothing_factor=0.5)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("options", [{}, {"batch_eval_metrics": True}, {"eval_do_concat_batches": False}], ids=str)
    @pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
    def test_the_evaluation_is_the_mean_over_tokens_in_any_batches(self, batch_size, options, tmp_path):
        ids = random_ids(5, 6)
        labels = ids.clone()
        labels[0, 2:] = -100
        logits = tiny_model()(ids).logits[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten()).item()
        rows = [{"input_ids": i, "labels": row} for i, row in zip(ids, labels, strict=True)]
        trainer = language_model_trainer(tmp_path, rows, per_device_eval_batch_size=batch_size, **options)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)

    def test_bits_per_byte_are_those_of_the_evaluated_blocks(self, tiny_tokenizer, tmp_path):
        """The first block is of letters that are tokens of one byte each, the others of longer tokens."""
        vocabulary = tiny_tokenizer.get_vocab()
        short, long = vocabulary["q"], max(vocabulary.items(), key=lambda item: len(item[0]) * (item[0] < "<"))
        eos = tiny_tokenizer.eos_token_id
        blocks = [
            {"labels": torch.tensor([long[1], short, short, eos])},
            {"labels": torch.tensor([short] + [long[1]] * 3)},
        ]
        assert predicted_bytes_per_token(blocks[:1], tiny_tokenizer) == pytest.approx(2 / 3)
        assert predicted_bytes_per_token(blocks, tiny_tokenizer) == pytest.approx((2 + 3 * len(long[0])) / 6)

    @pytest.mark.parametrize("logged", [1, 4, 100])
    def test_train_loss_of_a_resumed_run_is_that_of_the_whole_run(self, logged, tmp_path):
        straight = make_trainer(tmp_path, max_steps=6, logging_steps=logged).train()
        expected = straight.metrics["train_loss"]
        shutil.rmtree(tmp_path / "checkpoint-6")
        resumed = make_trainer(tmp_path, max_steps=6, logging_steps=logged)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert resumed.state.log_history[-1]["train_loss"] == pytest.approx(expected, rel=1e-6)
        finished = make_trainer(tmp_path, max_steps=6, logging_steps=logged)
        finished.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert finished.state.log_history[-1]["train_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("step", [2, 4])
def test_a_full_disk_ends_in_a_sentence_and_the_run_can_be_resumed(step, tmp_path, monkeypatch):
    """PyTorch's own error when a file cannot be written to its end."""
    straight = make_trainer(tmp_path / "straight", max_steps=4)
    straight.train()
    run, save = tmp_path / "run", torch.save

    def save_half(value, file, *args, **kwargs):
        if f"checkpoint-{step}" not in str(file):
            return save(value, file, *args, **kwargs)
        Path(file).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 61370752 vs 61370644")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_half)
        with pytest.raises(OSError, match=rf"^There is no space left on the disk of .*checkpoint-{step}; free some"):
            make_trainer(run, max_steps=4).train()
    resumed = make_trainer(run, max_steps=4)
    resumed.train(resume_from_checkpoint=checkpoint_to_resume(str(run), resume=True))
    assert history(resumed) == history(straight)


class BreakWeights(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.model.norm.weight[0] = float("nan")


class TestDivergence:
    def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(self, tmp_path):
        trainer = make_trainer(tmp_path, learning_rate=1e30, warmup_steps=0, save_steps=100)
        message = (
            r"^The loss is (nan|inf) in step 2 with learning_rate 1e\+30: training has diverged\. Nothing was saved"
        )
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert not list(tmp_path.glob("**/*.safetensors"))

    def test_the_last_good_checkpoint_is_kept_and_named(self, tmp_path):
        trainer = make_trainer(tmp_path, callbacks=[BreakWeights(step=3)])
        with pytest.raises(ValueError, match=r"in step 4 .* The last good checkpoint is .*checkpoint-2: continue"):
            trainer.train()
        assert newest_intact_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")

    def test_broken_weights_are_not_saved(self, tmp_path):
        trainer = make_trainer(tmp_path, callbacks=[BreakWeights(step=4)])
        with pytest.raises(
            ValueError, match=r"^The weights are not finite after step 4 .*good checkpoint .*checkpoint-2"
        ):
            trainer.train()
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]

    def test_from_the_command_line(self, book, tmp_path):  # noqa: F811
        options = (
            NEW | TEXT | {"--data": book, "--output_dir": tmp_path, "--learning_rate": "1e30", "--save_steps": 100}
        )
        done = run_python(*command(options))
        assert done.returncode == 1
        assert "error: The loss is" in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "run.json").exists()


class SendSignal(TrainerCallback):
    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


SIGNAL_WHEN_LOGGED = """
import os, runpy, sys, threading, time
from pathlib import Path

log, number = Path(sys.argv[1]), int(sys.argv[2])
sys.argv = sys.argv[3:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))


def send():
    while not log.exists() or not log.read_text():
        time.sleep(0.2)
    os.kill(os.getpid(), number)


threading.Thread(target=send, daemon=True).start()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class TestInterruption:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_saves_a_checkpoint_from_which_the_run_becomes_the_same(self, number, tmp_path, capsys):
        straight = make_trainer(tmp_path / "straight")
        straight.train()
        before = signal.getsignal(number)
        stopped = make_trainer(tmp_path / "stopped", callbacks=[SendSignal(number, step=3)])
        with pytest.raises(Stopped, match=r"^stopped at step 3 of 6; add --resume to the same command") as caught:
            stopped.train()
        assert caught.value.signal_number == number and signal.getsignal(number) is before
        assert "press Ctrl-C again" in capsys.readouterr().err
        resumed = make_trainer(tmp_path / "stopped")
        resumed.train(resume_from_checkpoint=newest_intact_checkpoint(tmp_path / "stopped"))
        assert resumed.state.log_history[2]["step"] == 3 and history(resumed) == history(straight)

    def test_without_checkpoints_there_is_nothing_to_continue(self, tmp_path):
        trainer = make_trainer(tmp_path, callbacks=[SendSignal(signal.SIGINT, step=2)], save_strategy="no")
        with pytest.raises(Stopped, match=r"^stopped at step 2 of 6; nothing was saved, because save_strategy is no$"):
            trainer.train()
        assert not list(tmp_path.glob("checkpoint-*"))

    def test_a_signal_in_the_last_step_does_not_spoil_the_end(self, tmp_path):
        trainer = make_trainer(tmp_path, callbacks=[SendSignal(signal.SIGINT, step=6)])
        assert trainer.train().global_step == 6

    def test_training_in_another_thread_leaves_the_signals_alone(self, tmp_path):
        thread = threading.Thread(target=make_trainer(tmp_path, max_steps=1).train)
        thread.start()
        thread.join()
        assert (tmp_path / "checkpoint-1").is_dir() or list(tmp_path.iterdir())

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_from_the_command_line(self, number, code, book, tmp_path):  # noqa: F811
        options = (
            NEW | TEXT | {"--data": book, "--output_dir": tmp_path, "--max_steps": 100_000, "--eval_steps": 10**6}
        )
        options |= {"--save_steps": 10**6, "--sample_steps": 0}
        done = run_python(SIGNAL_WHEN_LOGGED, tmp_path / "log.jsonl", int(number), *command(options))
        assert done.returncode == code
        assert "add --resume to the same command" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
        assert newest_intact_checkpoint(tmp_path) is not None
        assert not (tmp_path / "model.safetensors").exists()


class TestResuming:
    def test_a_changed_learning_rate_and_weight_decay_take_effect(self, tmp_path):
        make_trainer(tmp_path).train()
        same = make_trainer(tmp_path)
        same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        changed = make_trainer(tmp_path, learning_rate=0.002, weight_decay=0.3, save_strategy="no")
        changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        before, after = (history(trainer, "learning_rate") for trainer in (same, changed))
        assert after[4] == before[4]
        for step in (5, 6):
            assert after[step] == pytest.approx(before[step] * 0.002 / 0.01)
        assert [group["weight_decay"] for group in changed.optimizer.param_groups] == [0.3, 0.0]
        schedule = {"max_steps": 10, "lr_scheduler_type": "linear", "warmup_steps": 0, "save_strategy": "no"}
        longer = make_trainer(tmp_path, **schedule)
        longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        rates = history(longer, "learning_rate")
        assert [rates[step] for step in range(5, 11)] == pytest.approx([0.006, 0.005, 0.004, 0.003, 0.002, 0.001])

    def test_changed_steps_take_effect(self, tmp_path, caplog):
        logging.getLogger("transformers").addHandler(caplog.handler)
        make_trainer(tmp_path, logging_steps=4).train()
        resumed = make_trainer(tmp_path, save_steps=1, max_steps=7)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        logging.getLogger("transformers").removeHandler(caplog.handler)
        assert {5, 7} <= {int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")}
        assert list(history(resumed)) == [2, 4, 5, 6, 7]
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    def test_checkpoints_of_which_none_is_complete(self, tmp_path):
        make_trainer(tmp_path, save_only_model=True, max_steps=4).train()
        files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        message = r"^No checkpoint in .* is complete, .*\(checkpoint-4: optimizer.pt is missing\)"
        with pytest.raises(ValueError, match=message):
            checkpoint_to_resume(str(tmp_path), resume=True)
        assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == files

    def test_what_there_is_to_resume(self, tmp_path):
        assert checkpoint_to_resume(str(tmp_path / "absent"), resume=True) is None
        tiny_model().save_pretrained(tmp_path / "finished")
        with pytest.raises(ValueError, match=r"finished contains a finished model but no checkpoint to continue from"):
            checkpoint_to_resume(str(tmp_path / "finished"), resume=True)
        make_trainer(tmp_path / "run", max_steps=4).train()
        checkpoints = [str(tmp_path / "run" / f"checkpoint-{step}") for step in (2, 4)]
        assert checkpoint_to_resume(str(tmp_path / "run"), resume=True) == checkpoints[1]
        assert checkpoint_to_resume(str(tmp_path / "run"), resume=False, path=checkpoints[0]) == checkpoints[0]
        with pytest.raises(ValueError, match=r"contains checkpoints of an earlier run; add --resume"):
            checkpoint_to_resume(str(tmp_path / "run"), resume=False)
        with pytest.raises(ValueError, match=r"--resume_from_checkpoint .*absent cannot be continued: there is no"):
            checkpoint_to_resume(str(tmp_path / "run"), resume=False, path=str(tmp_path / "absent"))

    def test_the_identity_of_a_run(self, tmp_path):
        def check(checkpoint=None, data="a", **options):
            args = PretrainingArguments(tmp_path, use_cpu=True, report_to="none", **options)
            return check_identity(args, checkpoint, data=data)

        assert check() == []
        checkpoint = str(tmp_path / "checkpoint-2")
        assert check(checkpoint) == []
        with pytest.raises(ValueError, match=r"^seed is 7, but the run in .* began with 42; resume with that value"):
            check(checkpoint, seed=7)
        with pytest.raises(ValueError, match=r"^The data differs from what the run in .* began with; resume"):
            check(checkpoint, data="b")
        with pytest.raises(ValueError, match=r"^rows_per_step is 16, but the run in .* began with 8;"):
            check(checkpoint, per_device_train_batch_size=16)
        changes = check(checkpoint, learning_rate=1e-3, max_steps=5)
        assert changes == [
            "max_steps: 5 from here on, 19073 before",
            "learning_rate: 0.001 from here on, 0.0006 before",
        ]
        assert json.loads((tmp_path / "identity.json").read_text())["changeable"]["learning_rate"] == 1e-3
        assert fingerprint(["x", 1]) == fingerprint(["x", 1]) != fingerprint(["x", 2])
        for content in ("", "[]", "{}", '{"fixed": 1}'):
            (tmp_path / "identity.json").write_text(content)
            with pytest.raises(ValueError, match=r"identity\.json is damaged \(.*\); copy it again, or delete it\.$"):
                check(checkpoint)

    def test_the_script_says_what_changes_and_refuses_what_cannot(self, book, tmp_path, monkeypatch, capsys):  # noqa: F811
        options = NEW | TEXT | {"--data": book, "--output_dir": tmp_path, "--max_steps": 4, "--sample_steps": 0}
        run_script(monkeypatch, options)
        weights = (tmp_path / "model.safetensors").read_bytes()
        with pytest.raises(ValueError, match=r"^seed is 1, but the run in .* began with 42"):
            run_script(monkeypatch, options | {"--seed": 1}, "--resume")
        with pytest.raises(ValueError, match=r"^dropout is 0.5, but the run in .* began with 0.1"):
            run_script(monkeypatch, options | {"--dropout": 0.5}, "--resume")
        assert (tmp_path / "model.safetensors").read_bytes() == weights
        capsys.readouterr()
        run_script(monkeypatch, options | {"--max_steps": 6, "--learning_rate": 0.02}, "--resume")
        output = capsys.readouterr().out
        assert "max_steps: 6 from here on, 4 before\nlearning_rate: 0.02 from here on, 0.01 before\n" in output
        assert json.loads((tmp_path / "run.json").read_text())["arguments"]["learning_rate"] == 0.02
        rates = {e["step"]: e["learning_rate"] for e in read_log(tmp_path) if "loss" in e}
        assert list(rates) == [1, 2, 3, 4, 5, 6] and rates[5] > 0.005


class TestOutput:
    def test_a_finished_model_is_replaced_only_when_told(self, book, tmp_path, monkeypatch):  # noqa: F811
        options = NEW | TEXT | {"--data": book, "--output_dir": tmp_path, "--max_steps": 2, "--sample_steps": 0}
        run_script(monkeypatch, options)
        before = (tmp_path / "model.safetensors").read_bytes()
        with pytest.raises(FileExistsError, match="add --overwrite_output_dir to replace it"):
            run_script(monkeypatch, options | {"--seed": 1})
        again = {"--data": tmp_path / "shards", "--model": tmp_path, "--output_dir": tmp_path}
        with pytest.raises(ValueError, match="is an input of this run and would be overwritten"):
            run_script(monkeypatch, SMALL | again, "--overwrite_output_dir")
        assert (tmp_path / "model.safetensors").read_bytes() == before
        run_script(monkeypatch, options | {"--seed": 1}, "--overwrite_output_dir")
        assert (tmp_path / "model.safetensors").read_bytes() != before

    def test_epochs_are_honored(self, book, tmp_path, monkeypatch, capsys):  # noqa: F811
        options = {name: value for name, value in (NEW | TEXT).items() if name != "--max_steps"}
        options |= {"--data": book, "--output_dir": tmp_path, "--num_train_epochs": 1, "--sample_steps": 0}
        run_script(monkeypatch, options | {"--save_strategy": "no"})
        train = TokenShards(tmp_path / "shards", 16, "train")
        steps = [entry["step"] for entry in read_log(tmp_path) if "loss" in entry]
        assert steps[-1] == len(train) // 4
        assert "seen 1.00 times" in capsys.readouterr().out

    def test_accumulation_decides_the_tokens_of_a_step(self, book, tmp_path, monkeypatch, capsys):  # noqa: F811
        options = {name: value for name, value in (NEW | TEXT).items() if name != "--tokens_per_step"}
        options |= {"--data": book, "--output_dir": tmp_path, "--gradient_accumulation_steps": 3, "--max_steps": 1}
        run_script(monkeypatch, options)
        assert "step       6 rows, 96 tokens = 1 process(es) x 2 rows x 3 passes\n" in capsys.readouterr().out


def test_a_finished_run_that_is_resumed_records_its_sample(book, tmp_path, monkeypatch):  # noqa: F811
    options = NEW | TEXT | {"--data": book, "--output_dir": tmp_path, "--max_steps": 4}
    run_script(monkeypatch, options)
    samples = json.loads((tmp_path / "run.json").read_text())["samples"]
    assert samples[0][1]
    for name in ("run.json", "model.safetensors"):
        Path(tmp_path, name).unlink()
    run_script(monkeypatch, options, "--resume")
    assert json.loads((tmp_path / "run.json").read_text())["samples"] == samples
    assert load_file(tmp_path / "model.safetensors")
