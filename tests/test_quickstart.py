"""The main job and the front door at smoke size: train, save, load in a fresh process, write; then generate.py."""

import importlib.util
import io
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm_python import run_python

from scratch_gpt2.cli import run_main
from scratch_gpt2.data.python_text import python_documents, read_docstrings
from scratch_gpt2.training.plots import plot_history

pytestmark = pytest.mark.xdist_group("quickstart")  # one run of the script
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


quickstart, generate = load_script("quickstart"), load_script("generate")


@pytest.fixture
def call(monkeypatch, capfd):
    """Run a script's main with a command line; returns exit code, stdout and stderr. The process that generates text
    has imported the libraries before it starts."""

    def generate_text(command):
        done = run_python(*command[2:])
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        return done

    monkeypatch.setattr(quickstart.subprocess, "run", generate_text)

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            run_main(script.main)
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    return run


def assert_one_line_error(result, *words):
    code, _, stderr = result
    assert code == 1
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and stderr.rstrip().endswith(errors[0])
    assert "Traceback" not in stderr
    for word in words:
        assert word in errors[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder and output of `examples/quickstart.py --smoke`, run as a user would."""
    folder = tmp_path_factory.mktemp("quickstart")
    done = run_python(EXAMPLES / "quickstart.py", "--smoke", "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


class TestQuickstart:
    def test_reports_what_it_trains_and_what_came_out(self, trained):
        folder, output = trained
        # 400 x 32 + 64 x 32 embeddings, 2 x (12 x 32^2 + 13 x 32) in the blocks, 2 x 32 in the last norm.
        assert "40,320 parameters, a vocabulary of 400 tokens and a context of 64" in output
        left = re.search(r"10 steps of 256 tokens, at most (\d+) of the 180 seconds in all", output)
        assert 60 <= int(left[1]) < 180  # the imports and the preparation count
        assert f"Loss curve: {folder / 'loss.png'}" in output
        assert f"AutoModelForCausalLM.from_pretrained({str(folder)!r})" in output
        for prompt in quickstart.PROMPTS:
            assert f"--------------------\n{prompt}" in output

    def test_validation_loss_falls_and_bits_per_byte_follow_from_it(self, trained):
        folder, output = trained
        history = json.loads((folder / "loss.json").read_text())
        losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        assert [entry["step"] for entry in history if "eval_loss" in entry] == [3, 6, 9, 10]
        assert losses == sorted(losses, reverse=True)
        assert f"Validation loss {losses[-1]:.3f} nats per token" in output
        bits_per_byte = float(output.split(" bits per byte")[0].split()[-1])
        assert 1.2 < losses[-1] / 0.6931 / bits_per_byte < 2.2  # bytes in a token, with so small a vocabulary

    def test_checkpoint_is_complete(self, trained):
        folder, _ = trained
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
        for name in ("model.safetensors", "tokenizer.json", "modeling_scratch_gpt2.py", "generation_config.json"):
            assert (folder / name).is_file()
        config = json.loads((folder / "config.json").read_text())
        assert config["use_cache"] is True and config["dtype"] == "float32"
        assert not list(folder.glob("*.tmp")) and not list(folder.glob("*.unfinished"))

    def test_the_run_is_recorded(self, trained):
        run = json.loads((trained[0] / "run.json").read_text())
        assert run["arguments"]["steps"] == 10 and run["arguments"]["smoke"] is True
        assert {"loss", "perplexity", "bits_per_byte"} <= run["metrics"].keys()

    def test_a_finished_model_is_replaced_only_when_told(self, trained, call, monkeypatch):
        folder, _ = trained
        before = (folder / "model.safetensors").read_bytes()
        assert_one_line_error(
            call(quickstart, "--smoke", "--output", folder), "finished run", "--overwrite_output_dir"
        )
        result = call(quickstart, "--smoke", "--text", folder / "loss.json", "--output", folder, "--overwrite")
        assert_one_line_error(result, "is an input of this run and would be overwritten")
        assert (folder / "model.safetensors").read_bytes() == before

    def test_options_follow_their_values(self, call, tmp_path, monkeypatch):
        monkeypatch.setattr(quickstart, "PROMPTS", [])
        code, output, _ = call(quickstart, "--smoke=True", "--steps", 3, "--output", tmp_path / "a")
        assert code == 0 and "\n3 steps of 256 tokens" in output
        code, _, errors = call(quickstart, "--smoke", "--setps", 3)
        assert code == 2 and errors.endswith("error: --setps is not an option; did you mean --steps?\n")

    def test_stops_at_the_deadline_and_still_saves(self, call, tmp_path, monkeypatch):
        monkeypatch.setattr(quickstart, "PROMPTS", [])
        code, output, _ = call(quickstart, "--smoke", "--seconds", "0.001", "--output", tmp_path)
        assert code == 0
        assert "0 seconds are over at step 1 of 10: stopping." in output
        assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "run.json").is_file()

    def test_writes_nothing_where_the_time_is_over(self, call, tmp_path, monkeypatch):
        monkeypatch.setattr(quickstart.subprocess, "run", lambda command: pytest.fail("another process was started"))
        code, output, _ = call(quickstart, "--smoke", "--seconds", "0.001", "--output", tmp_path / "a b")
        assert code == 0
        command = f"python examples/generate.py --model '{tmp_path / 'a b'}' --prompt 'The statement'"
        assert output.endswith(f"No time is left to generate text; run: {command}\n")

    @pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_in_the_training_saves_the_model(self, number, expected, call, tmp_path, monkeypatch):
        on_step_end = quickstart.Deadline.on_step_end

        def interrupt(self, args, state, control, **kwargs):
            on_step_end(self, args, state, control, **kwargs)
            if state.global_step == 4:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(quickstart.Deadline, "on_step_end", interrupt)
        code, output, errors = call(quickstart, "--smoke", "--output", tmp_path)
        assert code == expected
        assert errors.endswith(f"stopped at step 4 of 10; the model up to there is in {tmp_path}\n")
        assert "Validation loss" in output and "Another process" not in output
        run = json.loads((tmp_path / "run.json").read_text())
        history = json.loads((tmp_path / "loss.json").read_text())
        assert [entry["step"] for entry in history if "eval_loss" in entry] == [3, 4]
        assert run["metrics"]["loss"] == [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1]
        assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == 40_320

    def test_a_process_that_fails_is_reported_in_one_line(self, call, tmp_path, monkeypatch):
        monkeypatch.setattr(quickstart, "WRITE", "\nraise SystemExit(9)")
        result = call(quickstart, "--smoke", "--output", tmp_path, "--steps", 1)
        assert_one_line_error(result, "ended with code 9", f"the model is in {tmp_path}")

    def test_a_large_file_is_read_as_far_as_the_steps_do(self, call, tmp_path, monkeypatch):
        monkeypatch.setattr(quickstart, "PROMPTS", ["a"])
        monkeypatch.setattr(quickstart, "CHARACTERS_PER_TOKEN", 800)  # 10 steps x 8 rows x 64 tokens x 800
        (tmp_path / "large.txt").write_text("a cat. " * 600_000)
        code, output, _ = call(
            quickstart, "--smoke", "--text", tmp_path / "large.txt", "--output", tmp_path / "a", "--seconds", 0.001
        )
        assert code == 0
        assert f"Of {tmp_path / 'large.txt'}, the first 4,096,000 of 4,200,000 characters are used" in output

    def test_user_mistakes_end_in_one_line(self, call, tmp_path):
        assert_one_line_error(call(quickstart, "--smoke", "--text", tmp_path / "none.txt"), "none.txt")
        assert_one_line_error(call(quickstart, "--steps", 0), "--steps 0")
        short = tmp_path / "short.txt"
        short.write_text("Too little.")
        assert_one_line_error(call(quickstart, "--smoke", "--text", short), "too short", "64")
        latin = tmp_path / "latin.txt"
        latin.write_bytes(b"caf\xe9")
        assert_one_line_error(call(quickstart, "--smoke", "--text", latin), "latin.txt is not UTF-8")
        assert_one_line_error(call(quickstart, "--smoke", "--prompt", "x" * 200), "has 200 tokens; give 1 to 48")
        assert_one_line_error(call(quickstart, "--smoke", "--prompt", "\ud800"), "half of a surrogate pair")


class TestDeadline:
    def test_learning_rate_follows_the_steps_on_a_fast_machine(self, monkeypatch):
        monkeypatch.setattr(quickstart.time, "monotonic", lambda: 100.0)
        deadline = quickstart.Deadline(steps=100, seconds=50)
        rates = [round(deadline.learning_rate(step), 4) for step in (0, 5, 50, 75, 100)]
        assert rates == [0.0, 0.5, 0.5, 0.1464, 0.0]

    def test_learning_rate_is_down_in_time_on_a_slow_one(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(quickstart.time, "monotonic", lambda: now[0])
        deadline = quickstart.Deadline(steps=1000, seconds=50)
        rates = []
        for now[0] in (1.0, 25.0, 50.0, 60.0):
            rates.append(round(deadline.learning_rate(step=10), 4))
        assert rates == [0.1, 0.8536, 0.0, 0.0]  # after 1 second it is still step 10 of 1000 that counts


class TestTimeLimit:
    def test_the_end_takes_twice_the_startup_but_the_training_gets_a_third(self, monkeypatch):
        now = [1000.0]
        monkeypatch.setattr(quickstart.time, "monotonic", lambda: now[0])
        limit = quickstart.TimeLimit(seconds=180, used=10)
        assert (limit.startup, limit.left(), limit.for_training()) == (10, 170, 150)
        now[0] = 1080.0
        assert (limit.left(), limit.for_training()) == (90, 70)
        now[0] = 1155.0
        assert (limit.left(), limit.for_training()) == (15, 5)
        now[0] = 1200.0
        assert (limit.left(), limit.for_training()) == (-30, 0.001)

    def test_what_is_read_depends_on_the_time(self, tiny_tokenizer):
        assert len(python_documents(docstrings=True, seconds=0)) == len(python_documents(docstrings=False))
        pieces = [("the cat", False)] * 50
        length = len(tiny_tokenizer("the cat").input_ids)
        assert quickstart.make_rows(pieces, tiny_tokenizer, length, seconds=60).shape == (50, length)
        assert quickstart.make_rows(pieces, tiny_tokenizer, 2 * length, seconds=-1).shape == (1, 2 * length)


class TestText:
    def test_docstrings_of_a_module_that_is_not_run(self, tmp_path):
        file = tmp_path / "module.py"
        file.write_text(
            '"""About the module."""\n'
            "def add(a, b: int = 1, *rest):\n"
            '    """Add\n\n    them."""\n'
            "raise SystemExit\n"
            "class Box:\n"
            '    """Holds."""\n'
        )
        assert read_docstrings(file) == ("About the module.\n\nAdd\n\nthem.\n\nHolds.")

    def test_no_paragraph_comes_twice(self):
        paragraphs = [p for text in python_documents(docstrings=False) for p in text.split("\n\n")]
        assert len(paragraphs) > 2000
        assert len(paragraphs) == len(set(paragraphs))

    def test_pieces_are_the_file(self, tmp_path):
        file = tmp_path / "text.txt"
        file.write_text("Zürich\n" * 500, encoding="utf-8")
        pieces = quickstart.read_pieces(str(file), characters=10**6)
        assert len(pieces) == 98  # 3500 characters in pieces of 36
        assert "".join(text for text, _ in pieces) == "Zürich\n" * 500
        assert [ends_document for _, ends_document in pieces] == [False] * 97 + [True]

    def test_documents_end_at_separators(self, tmp_path, tiny_tokenizer):
        file = tmp_path / "text.txt"
        file.write_text("the cat\n<|endoftext|>\nrat<|endoftext|>\n", encoding="utf-8")
        pieces = quickstart.read_pieces(str(file), characters=10**6)
        assert "".join(f"{text}|" if ends else text for text, ends in pieces) == "the cat|rat|"
        rows = quickstart.make_rows([("the cat", True), ("rat", True)], tiny_tokenizer, length=1)
        the_cat, rat = tiny_tokenizer("the cat").input_ids, tiny_tokenizer("rat").input_ids
        assert rows.flatten().tolist() == [*the_cat, 289, *rat, 289] and tiny_tokenizer.eos_token_id == 289

    def test_rows_end_every_text(self, tiny_tokenizer):
        eos = tiny_tokenizer.eos_token_id
        a, b = tiny_tokenizer("the cat").input_ids, tiny_tokenizer("rat").input_ids
        rows = quickstart.make_rows([("the cat", True), ("rat", True)], tiny_tokenizer, length=2)
        everything = [*a, eos, *b, eos]
        assert rows.flatten().tolist() == everything[: len(everything) // 2 * 2]


class TestGenerate:
    def test_greedy_text_is_that_of_the_model(self, trained, call):
        folder, _ = trained
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer("The statement", return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        code, output, _ = call(
            generate, "--model", folder, "--prompt", "The statement", "--greedy", "--max_new_tokens", 8
        )
        assert code == 0
        assert output == tokenizer.decode(ids[0]) + "\n"

    def test_seed_decides_and_context_limits(self, trained, call):
        def sample(seed):
            return call(generate, "--model", trained[0], "--prompt", "Return", "--seed", seed, "--temperature", 2.0)[1]

        first = sample(1)
        assert first == sample(1) != sample(2)

    def test_prompt_from_standard_input(self, trained, call, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Return\n"))
        _, output, _ = call(generate, "--model", trained[0], "--prompt", "-", "--max_new_tokens", 4)
        assert output.startswith("Return") and not output.startswith("Return\n")

    def test_empty_prompt_begins_a_text(self, trained, call):
        code, output, _ = call(generate, "--model", trained[0], "--prompt", "", "--max_new_tokens", 4)
        assert code == 0 and output.strip()

    def test_user_mistakes_end_in_one_line(self, trained, call, tmp_path):
        folder = trained[0]
        hub = call(generate, "--model", "openai-community/gpt2", "--prompt", "Hello")
        assert_one_line_error(hub, "openai-community/gpt2", "Hugging Face Hub", "runs/quickstart")
        assert_one_line_error(call(generate, "--model", tmp_path, "--prompt", "a"), str(tmp_path))
        assert_one_line_error(call(generate, "--model", folder, "--prompt", "a\ud800"), "half of a surrogate pair")
        assert_one_line_error(call(generate, "--model", folder, "--prompt", "z\x00" * 40), "80 tokens", "64")
        assert_one_line_error(
            call(generate, "--model", folder, "--prompt", "a", "--temperature", -1), "temperature", "positive"
        )


class TestPlots:
    def test_draws_what_is_there_and_keeps_the_numbers(self, tmp_path):
        history = [{"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 2.5}, {"step": 2, "train_runtime": 1.0}]
        plot_history(history, tmp_path / "new" / "curve.png")
        assert json.loads((tmp_path / "new" / "curve.json").read_text()) == history
        assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["curve.json", "curve.png"]

    def test_nothing_to_draw(self, tmp_path):
        with pytest.raises(ValueError, match="neither loss nor eval_loss"):
            plot_history([{"step": 1}], tmp_path / "curve.png")
        assert not list(tmp_path.iterdir())


class TestCommandLine:
    def test_interruption_ends_in_one_line(self, capsys):
        def interrupted():
            raise KeyboardInterrupt

        with pytest.raises(SystemExit) as end:
            run_main(interrupted)
        assert end.value.code == 130
        assert capsys.readouterr().err == "\nstopped\n"

    def test_mistakes_of_ours_keep_their_traceback(self):
        with pytest.raises(ZeroDivisionError):
            run_main(lambda: 1 / 0)

    def test_long_messages_become_one_line(self, capsys):
        def fail():
            raise ValueError("first\n  second")

        with pytest.raises(SystemExit) as end:
            run_main(fail)
        assert end.value.code == 1
        assert capsys.readouterr().err == "error: first second\n"


def test_bfloat16_only_where_the_processor_has_it(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for capabilities, expected in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        arguments = quickstart.training_arguments(quickstart.Arguments(output=str(tmp_path)), batch_size=4)
        assert arguments.bf16 is expected
