"""lm-evaluation-harness on our checkpoints, through the code that travels with them: the same results as ours."""

import functools
import math
import re
from pathlib import Path

import pytest
import transformers
from hellaswag_rows import ROWS
from lm_eval_tasks import run_harness
from model_fixtures import TINY, twins
from warm_python import run_python

from scratch_gpt2.evaluation.hellaswag import encode_example, hellaswag_accuracy, read_hellaswag, score_examples
from scratch_gpt2.evaluation.perplexity import perplexity

pytestmark = pytest.mark.xdist_group("lm_eval")  # one run of the harness
lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")

TEXTS = [
    "The cat sat on the mat. The rat sat under the hat of the cat.",
    "Where is the hat? The hat is on the mat.",
    "It is Zürich's cat, 8 of 10.",
]


@pytest.fixture(scope="module")
def model_folder(tiny_tokenizer, tmp_path_factory):
    """The second HellaSwag row is longer than 44 positions, so that the harness cuts it off."""
    folder = tmp_path_factory.mktemp("checkpoint")
    twins(sizes=TINY | {"vocab_size": 290, "n_positions": 44})[1].save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def harness(model_folder, tmp_path_factory):
    """What the harness writes: its results, and its samples by task."""
    options = ["--model", "hf", "--model_args", f"pretrained={model_folder},trust_remote_code=True"]
    options += ["--device", "cpu", "--batch_size", "2"]
    run = functools.partial(run_python, "import runpy\nrunpy.run_module('lm_eval', run_name='__main__')")
    return run_harness(run, tmp_path_factory.mktemp("harness"), ROWS, TEXTS, *options)


@pytest.fixture(scope="module")
def model(model_folder):
    return transformers.AutoModelForCausalLM.from_pretrained(model_folder)


def test_hellaswag_is_the_same_example_by_example(harness, model, tiny_tokenizer):
    results, samples, rows = harness
    examples = read_hellaswag(rows)
    encoded = [encode_example(tiny_tokenizer, example) for example in examples]
    assert max(len(example.context_ids) for example in encoded) > model.config.n_positions
    for sample, ours in zip(samples["local_hellaswag"], score_examples(model, encoded), strict=True):
        theirs = [float(response[0][0]) for response in sample["resps"]]
        assert ours.log_likelihoods == pytest.approx(theirs, rel=1e-5)
        assert sample["acc"] == (ours.prediction == ours.label)
        assert sample["acc_norm"] == (ours.prediction_norm == ours.label)
    ours = hellaswag_accuracy(model, tiny_tokenizer, examples)
    theirs = results["local_hellaswag"]
    assert (theirs["acc,none"], theirs["acc_norm,none"]) == pytest.approx((ours.accuracy, ours.accuracy_norm))
    errors = (ours.standard_error, ours.standard_error_norm)
    assert (theirs["acc_stderr,none"], theirs["acc_norm_stderr,none"]) == pytest.approx(errors)


def test_perplexity_is_the_same(harness, model, tiny_tokenizer):
    """The harness puts the end-of-text token before each text and weighs the texts by their bytes."""
    results, samples, _ = harness
    total = 0.0
    for text, sample in zip(TEXTS, samples["local_perplexity"], strict=True):
        ours = perplexity(model, tiny_tokenizer, f"<|endoftext|>{text}")
        assert ours.tokens <= model.config.n_positions
        total += ours.loss * ours.scored_tokens
        assert -ours.loss * ours.scored_tokens == pytest.approx(float(sample["resps"][0][0]), rel=1e-5)
    bits = total / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert results["local_perplexity"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)
    assert results["local_perplexity"]["byte_perplexity,none"] == pytest.approx(2**bits, rel=1e-6)


def test_the_protocol_is_of_the_installed_version():
    """What hellaswag.py says of the harness was read in this version; another one wants to be read again."""
    source = (Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml").read_text()
    assert re.search(r"version: 1\.0", source)
