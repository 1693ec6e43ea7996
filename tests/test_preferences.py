"""Preference tuning: pairs are read and encoded as TRL encodes them, measured by hand, and learned by the script."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from test_sft import files, make_files  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from scratch_gpt2.data.instructions import split
from scratch_gpt2.data.preferences import as_preference, read_preferences

pytest.importorskip("trl", reason="needs pip install trl")
from scratch_gpt2.training.preferences import (
    answer_log_probabilities,
    as_dataset,
    encode_pair,
    fitting_pairs,
    preference_metrics,
    win_rate,
)

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "dpo.py"
QUESTION = {"role": "user", "content": "Name a color."}


def answer(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Name a color.", "input": "", "output": "?", "chosen": "Red.", "rejected": "No."},
        {"prompt": "Name a color.", "chosen": "Red.", "rejected": "No."},
        {"prompt": [QUESTION], "chosen": "Red.", "rejected": "No."},
        {"prompt": [QUESTION], "chosen": [answer("Red.")], "rejected": [answer("No.")]},
        {"prompt": "Name a color.", "chosen": [answer("Red.")], "rejected": [answer("No.")]},
        {"chosen": [QUESTION, answer("Red.")], "rejected": [QUESTION, answer("No.")]},
    ],
)
def test_every_form_is_the_same_pair(row):
    pair = as_preference(row, "row 1")
    assert pair.chosen.messages == [QUESTION, answer("Red.")] and pair.rejected.messages == [QUESTION, answer("No.")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"^row 1 has no answer in 'rejected'; its columns are prompt, chosen\."),
        ({"chosen": [QUESTION, answer("a")], "rejected": [answer("b")]}, r"^row 1: the conversation has no message"),
        ({"text": "a", "chosen": "b", "rejected": "c"}, r"^row 1 has no text in 'prompt'"),
    ],
)
def test_rows_that_are_no_pair(row, message):
    with pytest.raises(ValueError, match=message):
        as_preference(row, "row 1")


def test_equal_answers_are_left_out(tmp_path, caplog):
    rows = [{"prompt": "a", "chosen": "b", "rejected": r} for r in ("c", "b ", "")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert len(read_preferences(str(tmp_path / "rows.json"))) == 1
    assert "Pairs left out because their answers are equal or empty: 2." in caplog.text


def test_metrics_by_hand():
    """Margins 1 and -2, both 1 more than before; beta 0.5: rewards of 0.5."""
    scores, reference = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]]), torch.tensor([[-2.0, -2.0], [-5.0, -2.0]])
    expected = {"loss": math.log(1 + math.exp(-0.5)), "accuracy": 0.5, "margin": -0.5}
    expected |= {"reward_accuracy": 1.0, "reward_margin": 0.5}
    assert preference_metrics(scores, reference, beta=0.5) == pytest.approx(expected)


def test_the_win_rate_counts_ties_half_and_leaves_out_missing_scores():
    assert win_rate([50, 50, 50, None, 50], [60, 50, 40, 70, None]) == (0.5, 3)
    assert win_rate([50, 50], [60, 60]) == (1.0, 2)
    assert math.isnan(win_rate([None], [1])[0])


@pytest.fixture(scope="module")
def pairs_file(files):  # noqa: F811
    rows = json.loads(files["--data"].read_text())
    path = files["--data"].with_name("pairs.json")
    path.write_text(json.dumps([row | {"chosen": row["output"], "rejected": "red red"} for row in rows]))
    return path


def test_trl_gets_the_ids_that_are_measured(files, pairs_file, tmp_path):  # noqa: F811
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(files["--model"])
    model = AutoModelForCausalLM.from_pretrained(files["--model"])
    pairs, encoded = fitting_pairs(tokenizer, read_preferences(str(pairs_file), max_rows=5), max_length=192)
    args = DPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=192, disable_tqdm=True)
    trainer = DPOTrainer(model, args=args, train_dataset=as_dataset(pairs), processing_class=tokenizer)
    for row, (prompt, (chosen, rejected)) in zip(trainer.train_dataset, encoded, strict=True):
        assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == (prompt, chosen, rejected)
        assert chosen[-1] == rejected[-1] == tokenizer.eos_token_id
    prompt, (chosen, _) = encode_pair(tokenizer, pairs[0])
    with torch.no_grad():
        log_probs = model.eval()(torch.tensor([prompt + chosen])).logits.log_softmax(-1)[0]
    expected = sum(log_probs[len(prompt) + i - 1, token].item() for i, token in enumerate(chosen))
    assert answer_log_probabilities(model, encoded)[0, 0].item() == pytest.approx(expected, rel=1e-5)


def run(options, *flags):
    specification = importlib.util.spec_from_file_location("dpo", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "dpo", script)  # dataclasses look their module up by its name
        specification.loader.exec_module(script)
        words = [str(word) for pair in options.items() for word in pair]
        patch.setattr(sys, "argv", [str(SCRIPT), *words, *flags])
        script.main()


@pytest.mark.parametrize("flags", [[], ["--use_peft", "--merge"]], ids=["full", "lora"])
def test_the_script_learns_the_preference(files, pairs_file, tmp_path, flags, capsys):  # noqa: F811
    options = {
        "--model": files["--model"],
        "--data": pairs_file,
        "--output_dir": tmp_path / "run",
        "--validation": 0.2,
    }
    options |= {"--test": 0.2, "--max_steps": 6, "--learning_rate": 5e-3, "--eval_steps": 3, "--save_steps": 3}
    run(options | {"--report_to": "none", "--disable_tqdm": "true"}, "--use_cpu", *flags)
    output = capsys.readouterr().out
    assert "step       8 rows = 1 process(es) x 8 rows x 1 passes\n" in output and "pairs held out" in output
    measured = json.loads((tmp_path / "run" / "preferences.json").read_text())
    assert measured["before"]["loss"] == pytest.approx(math.log(2)) and measured["before"]["reward_margin"] == 0
    assert measured["after"]["reward_accuracy"] == 1.0 and measured["after"]["loss"] < 0.6
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    *_, test = split(read_preferences(str(pairs_file)), seed=42, fractions=(0.6, 0.2, 0.2))
    _, encoded = fitting_pairs(tokenizer, test, max_length=192)
    scores = answer_log_probabilities(saved, encoded)
    assert (scores[:, 0] - scores[:, 1]).mean().item() == pytest.approx(measured["after"]["margin"], rel=1e-3)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["command"].startswith("dpo.py --model base --data pairs.json --output_dir run")
    assert record["finished"].endswith("+00:00") and record["seconds"] > 0 and "trl" in record["versions"]
