"""The models that come with the Space: small, described, and as good as their cards say."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "space"))

import make_checkpoints
from models import EMBEDDED, EMBEDDED_FOLDER, Checkpoints

from scratch_gpt2 import ScratchGPT2ForCausalLM, ScratchGPT2ForSequenceClassification
from scratch_gpt2.data.instructions import encode_prompt
from scratch_gpt2.data.text_classification import prepare, read_labelled_text
from scratch_gpt2.prediction import respond


@pytest.fixture(scope="module")
def checkpoints():
    return Checkpoints()


def test_they_are_small_and_hold_nothing_but_models():
    files = [file for file in EMBEDDED_FOLDER.rglob("*") if file.is_file()]
    assert {file.parent.name for file in files} == set(EMBEDDED)
    assert sum(file.stat().st_size for file in files) < 40_000_000
    assert {file.suffix for file in files} == {".safetensors", ".json", ".png", ".md"}
    for file in EMBEDDED_FOLDER.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_card_tells_how_it_was_made(name):
    card = (EMBEDDED_FOLDER / name / "README.md").read_text(encoding="utf-8")
    for heading in ("## Data", "## Commands", "## Training", "## Results", "## Samples", "## Limits"):
        assert f"\n{heading}\n" in card
    run = json.loads((EMBEDDED_FOLDER / name / "run.json").read_text())
    assert all(f"| {metric} | {value:.4f} |" in card for metric, value in run["metrics"].items())
    assert not re.search(r"""[\s"'`(]/\w+/\w""", card), "a path of somebody's machine"


def test_spam_is_as_accurate_as_its_card_says(checkpoints, shared_data, tmp_path):
    """On the same messages, which have to be prepared anew: they are not in the repository."""
    rows = read_labelled_text(str(shared_data / "sms_spam_collection.tsv"))
    data = prepare(rows, "sms", 42, unescape_entities=True)
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, data.splits["test"])))
    model, tokenizer = checkpoints.load("spam", ScratchGPT2ForSequenceClassification)
    metrics, samples = make_checkpoints.spam_results(model, tokenizer, tmp_path / "test.jsonl")
    run = json.loads((EMBEDDED_FOLDER / "spam" / "run.json").read_text())
    assert metrics == pytest.approx(run["metrics"], abs=2e-3)  # one of 1,035 messages is 1e-3
    assert metrics["accuracy"] > 0.97
    assert [list(sample) for sample in samples] == run["samples"]


def test_the_assistant_answers_as_its_card_says(checkpoints):
    model, tokenizer = checkpoints.load("assistant", ScratchGPT2ForCausalLM)
    run = json.loads((EMBEDDED_FOLDER / "assistant" / "run.json").read_text())
    samples = [(question, answer) for question, answer in run["samples"] if "\n" not in question]
    differing = []
    for question, answer in samples:
        ids = encode_prompt(tokenizer, [{"role": "user", "content": question}])
        (response,) = respond(model, tokenizer, [ids], max_new_tokens=128, do_sample=False)
        differing += [] if response.text == answer else [question]
    assert len(differing) < 2 <= len(samples)  # two tokens may be so close that another processor takes the other


def test_the_base_knows_english_better_than_nothing(checkpoints):
    """nats per token; a uniform guess would be ln 8192 = 9.01."""
    model, tokenizer = checkpoints.load("base", ScratchGPT2ForCausalLM)
    text = "Once upon a time there was a little girl who lived in a house with her mother. One day she went to the"
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs, labels=inputs.input_ids).loss < 4
