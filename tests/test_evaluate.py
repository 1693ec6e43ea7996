"""The report on several models: its figures are those of the functions that it calls."""

import json
import math
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from example_scripts import run_in_process
from hellaswag_rows import ROWS, write_rows
from model_fixtures import TINY, tiny_config, twins
from warm_python import processes, run_python

from scratch_gpt2 import ScratchGPT2ForCausalLM, ScratchGPT2ForSequenceClassification
from scratch_gpt2.data.text_classification import PreparedClassification
from scratch_gpt2.evaluation import report
from scratch_gpt2.evaluation.hellaswag import hellaswag_accuracy, read_hellaswag
from scratch_gpt2.evaluation.models import load_model, measure_generation, weights_digest
from scratch_gpt2.evaluation.perplexity import perplexity
from scratch_gpt2.evaluation.report import Figure, Plan, figures, measure_apart, measure_model, plot, table

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "compare_models.py"
run_example = partial(run_in_process, EXAMPLE)
TEXT = "The rat sat under the hat, and where the cat sat is where the mat is: on the hat of the rat.\n"
SPAM = PreparedClassification(
    splits={
        "train": [],
        "validation": [],
        "test": [{"text": f"The {name} sat.", "label": label} for name, label in zip("abcde", "xyxyx", strict=True)],
    },
    label_names=["x", "y"],
    report={},
)


@pytest.fixture(scope="module")
def folders(tiny_tokenizer, tmp_path_factory):
    """The same weights as our checkpoint and as transformers', and a classifier that says y to everything."""
    reference, ours = twins(sizes=TINY | {"vocab_size": 290, "n_positions": 128})
    classifier = ScratchGPT2ForSequenceClassification(
        tiny_config(vocab_size=290, id2label={0: "x", 1: "y"}, label2id={"x": 0, "y": 1})
    )
    with torch.no_grad():
        classifier.score.weight.zero_()
        classifier.model.norm.weight.zero_()
        classifier.model.norm.bias.fill_(1.0)
        classifier.score.weight[1] = 0.1
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("ours", ours), ("theirs", reference), ("classifier", classifier)):
        model.save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def warm_processes(monkeypatch):
    """Each model is measured in a process that has imported PyTorch, not in a new interpreter."""
    monkeypatch.setattr(report.multiprocessing, "get_context", lambda method: processes)


def measure(folder, plan):
    return measure_model(str(folder), str(folder), plan)


def test_a_language_model(folders, tiny_tokenizer, tmp_path):
    examples = read_hellaswag(write_rows(tmp_path / "rows.jsonl", ROWS))
    plan = Plan(texts={"a": TEXT}, context=32, stride=8, hellaswag=examples, protocol="build-nanogpt", new_tokens=5)
    result = measure(folders / "ours", plan)
    model = ScratchGPT2ForCausalLM.from_pretrained(folders / "ours")
    expected = perplexity(model, tiny_tokenizer, TEXT, 32, 8)
    assert result["texts"]["a"]["perplexity"] == expected.perplexity
    assert result["texts"]["a"]["stride"] == 8
    hellaswag = hellaswag_accuracy(model, tiny_tokenizer, examples, protocol="build-nanogpt")
    assert result["hellaswag"]["protocol"] == "build-nanogpt"
    assert result["hellaswag"]["accuracy_norm"] == hellaswag.accuracy_norm
    assert result["generation"]["tokens_per_second"] > 0
    assert (result["class"], result["dtype"]) == ("ScratchGPT2ForCausalLM", "float32")
    assert result["parameters"] == model.num_parameters()
    assert list(figures(result)) == [
        "million parameters",
        "perplexity, a",
        "bits per byte, a",
        "HellaSwag accuracy, build-nanogpt",
        "HellaSwag accuracy_norm, build-nanogpt",
        "generated tokens per second",
        "peak MB while generating",
    ]


def test_a_classifier(folders):
    """It says y to all five rows, of which two are y."""
    result = measure(folders / "classifier", Plan(classification=SPAM, batch_size=5))
    classification = result["classification"]
    assert classification["rows"] == 5
    assert classification["accuracy"] == pytest.approx(0.4)
    assert classification["precision"] == pytest.approx(0.4)
    assert classification["recall"] == 1.0
    assert classification["f1"] == pytest.approx(4 / 7)
    assert classification["roc_auc"] == 0.5  # all scores are equal
    assert classification["confusion_matrix"] == [[0, 3], [0, 2]]
    assert "generation" not in result


def test_what_does_not_apply(folders):
    with pytest.raises(ValueError, match="classifier is a ScratchGPT2ForSequenceClassification, and nothing that was"):
        measure(folders / "classifier", Plan(texts={"a": TEXT}))
    with pytest.raises(ValueError, match="ours is a ScratchGPT2ForCausalLM, and nothing that was requested"):
        measure(folders / "ours", Plan(classification=SPAM, new_tokens=0))
    other = PreparedClassification(SPAM.splits, ["x", "z"], {})
    with pytest.raises(ValueError, match="The model's labels are x, y but the data's are x, z"):
        measure(folders / "classifier", Plan(classification=other))


def test_gpt2_checkpoints_are_computed_with_our_model_or_the_reference(folders):
    assert type(load_model(str(folders / "theirs"))) is ScratchGPT2ForCausalLM
    assert type(load_model(str(folders / "theirs"), reference=True)) is transformers.GPT2LMHeadModel
    assert type(load_model(str(folders / "ours"), reference=True)) is ScratchGPT2ForCausalLM


def test_generation_is_timed_without_its_first_run(folders, monkeypatch):
    """Four runs of 2, 4, 1 and 3 seconds: the median of the last three is 3."""
    model = load_model(str(folders / "ours"))
    times = iter([0, 2, 10, 14, 20, 21, 30, 33])
    lengths = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: lengths.append(generate(*a, **k).shape[1]) or torch.ones(1))
    with monkeypatch.context() as patch:
        patch.setattr("scratch_gpt2.evaluation.models.time.perf_counter", lambda: next(times))
        result = measure_generation(model, new_tokens=6)
    assert result["tokens_per_second"] == 2.0
    assert lengths == [22] * 4  # 16 of the prompt, and an end-of-text token does not end it
    with pytest.raises(
        ValueError, match="113 new tokens after a prompt of 16 are more than the model's 128 positions"
    ):
        measure_generation(model, new_tokens=113)


@pytest.mark.skipif(sys.platform != "linux", reason="the process's peak memory is read from /proc")
def test_memory_is_what_generating_takes(folders):
    """What was taken and given back before does not count, what is taken meanwhile does. In a process of its own: the
    tests before may have told the allocator of this one to keep freed memory."""
    script = (
        "import sys, torch; from scratch_gpt2.evaluation.models import load_model, measure_generation\n"
        "model = load_model(sys.argv[1]); generate = model.generate\n"
        "torch.ones(200 * 2**18).sum()  # 200 MB\n"
        "before = measure_generation(model, new_tokens=2)['peak_mb']\n"
        "model.generate = lambda *a, **k: torch.ones(200 * 2**18).sum() and generate(*a, **k)\n"
        "print(measure_generation(model, new_tokens=2)['peak_mb'] - before)\n"
    )
    done = run_python(script, folders / "ours")
    assert done.returncode == 0, done.stderr
    assert 150 < float(done.stdout.split()[-1]) < 250


def test_the_digest_tells_weights_apart(folders):
    model = load_model(str(folders / "ours"))
    digest = weights_digest(model)
    assert weights_digest(load_model(str(folders / "ours"))) == digest
    assert weights_digest(model.to(torch.bfloat16)) != digest
    model = load_model(str(folders / "ours"))
    with torch.no_grad():
        model.model.norm.bias[3] += 1e-6
    assert weights_digest(model) != digest


def test_table_and_plot(tmp_path, monkeypatch):
    results = {
        "first": {
            "parameters": 1_500_000,
            "hellaswag": {
                "protocol": "lm-eval",
                "accuracy": 0.25,
                "accuracy_norm": 0.5,
                "interval": [0.2, 0.3],
                "interval_norm": [0.45, 0.55],
            },
        },
        "second": {"parameters": 2_000_000, "generation": {"tokens_per_second": 1234.56, "peak_mb": math.nan}},
    }
    assert table(results).splitlines() == [
        "                                                    first   second",
        "million parameters                                    1.5      2.0",
        "HellaSwag accuracy, lm-eval       0.2500 [0.2000, 0.3000]        -",
        "HellaSwag accuracy_norm, lm-eval  0.5000 [0.4500, 0.5500]        -",
        "generated tokens per second                             -  1,234.6",
        "peak MB while generating                                -      nan",
    ]
    assert str(Figure(0.5)) == "0.5000"
    panels = []
    monkeypatch.setattr(report, "draw_bars", lambda panel, title, bars: panels.append(title))
    plot(results, tmp_path / "new" / "report.png")
    assert panels == [
        "million parameters",
        "HellaSwag accuracy, lm-eval",
        "HellaSwag accuracy_norm, lm-eval",
        "generated tokens per second",  # and none without a number
    ]
    assert (tmp_path / "new" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "new").iterdir())) == 1


def die(name, tokenizer, plan):
    os._exit(9)


def test_a_killed_process_is_named(monkeypatch):
    monkeypatch.setattr(report, "measure_model", die)
    with pytest.raises(
        ChildProcessError, match="The process that evaluated some/model was killed, perhaps for lack of"
    ):
        measure_apart("some/model", "some/model", Plan())


def test_script_puts_models_side_by_side(folders, tmp_path, monkeypatch, capsys):
    text = tmp_path / "a.txt"
    text.write_text(TEXT)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    models = (folders / "ours", folders / "theirs")
    options = ("--text", text, "--hellaswag", rows, "--new_tokens", 4, "--output", tmp_path / "report")
    code, printed, errors = run_example(monkeypatch, capsys, "--model", *models, *options)
    assert code == 0, errors
    lines = printed.splitlines()
    assert lines[0].split() == [str(folder) for folder in models]
    perplexities = next(line for line in lines if line.startswith("perplexity")).split()[-2:]
    assert perplexities[0] == perplexities[1]
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert list(written["models"]) == [str(folder) for folder in models]
    first = written["models"][str(models[0])]
    assert f"{first['texts'][str(text)]['perplexity']:,.3f}" == perplexities[0]
    assert written["versions"]["transformers"] == transformers.__version__
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.json", "report.png"]


def test_script_keeps_the_results_of_good_models_beside_a_mistyped_one(folders, tmp_path, monkeypatch, capsys):
    options = ("--smoke", "--new_tokens", 2, "--output", tmp_path / "report")
    mistyped = folders / "our"
    code, printed, errors = run_example(monkeypatch, capsys, "--model", folders / "ours", mistyped, *options)
    assert code == 1
    assert printed.splitlines()[0].split() == [str(folders / "ours")]
    lines = [line for line in errors.splitlines() if str(mistyped) in line]
    assert lines[0].startswith(f"{mistyped} could not be evaluated: ")
    assert lines[-1] == f"error: Not evaluated, for the reasons above: {mistyped}."
    assert list(json.loads((tmp_path / "report" / "report.json").read_text())["models"]) == [str(folders / "ours")]
    assert (tmp_path / "report" / "report.png").is_file()


def test_script_replaces_nothing_without_being_told(folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "report.json").write_text("mine")
    options = ("--model", folders / "ours", "--smoke", "--new_tokens", 0)
    code, _, errors = run_example(monkeypatch, capsys, *options, "--output", tmp_path)
    assert code == 1 and "report.json exists; choose another name, or add --overwrite to replace it." in errors
    assert (tmp_path / "report.json").read_text() == "mine"
    code, _, errors = run_example(monkeypatch, capsys, *options, "--output", tmp_path / "report.json" / "new")
    assert code == 1 and "report.json cannot be written (Not a directory); choose another folder." in errors
    assert run_example(monkeypatch, capsys, *options, "--output", tmp_path, "--overwrite")[0] == 0


def test_script_ends_with_one_line_on_mistakes(folders, tmp_path, monkeypatch, capsys):
    for options, message in (
        (("--text", tmp_path / "absent.txt"), "absent.txt does not exist; check the path."),
        (("--new_tokens", -1), "new_tokens is -1 but must be at least 0"),
        (("--hellaswag_limit", 0), "hellaswag_limit is 0 but must be at least 1"),
        (("--classification", tmp_path), "has no report.json; make the folder with"),
    ):
        code, _, errors = run_example(monkeypatch, capsys, "--model", folders / "ours", *options)
        assert code == 1 and message in errors, errors
        assert errors.strip().splitlines()[-1].startswith("error: ")
