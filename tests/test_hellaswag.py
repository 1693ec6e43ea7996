"""HellaSwag: reading, wording, tokens, truncation, and scores equal to a plain loop over transformers' GPT-2."""

import bz2
import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers
from example_scripts import run_in_process
from hellaswag_rows import ROW, ROWS, write_rows
from model_fixtures import TINY, twins
from warm_python import run_two

from scratch_gpt2.evaluation import hellaswag
from scratch_gpt2.evaluation.hellaswag import (
    Example,
    ExampleResult,
    check_fits,
    clean_text,
    encode_example,
    harness_texts,
    hellaswag_accuracy,
    load_hellaswag,
    nanogpt_texts,
    read_hellaswag,
    score_examples,
    summarize,
    wilson_interval,
)

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "hellaswag.py"
run_example = partial(run_in_process, EXAMPLE)


@pytest.fixture(scope="module")
def literal_examples(tmp_path_factory):
    return read_hellaswag(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS))


def make_twins(vocab_size, n_positions):
    return twins(sizes=TINY | {"vocab_size": vocab_size, "n_positions": n_positions})


@torch.no_grad()
def plain_scores(model, tokenizer, example):
    """One ending at a time: context and ending are tokenized by themselves, and every logit is computed."""
    context, endings = harness_texts(example)
    stripped = context.rstrip()
    context_ids = tokenizer(stripped).input_ids
    scores = []
    for ending in endings:
        ending_ids = tokenizer(context[len(stripped) :] + " " + ending).input_ids
        ids = torch.tensor([context_ids + ending_ids])[:, -(model.config.n_positions + 1) :]
        log_probabilities = model(ids[:, :-1]).logits[0].double().log_softmax(-1)
        picked = log_probabilities[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        scores.append(picked[-len(ending_ids) :].sum().item())
    return scores


def assert_equal_to_plain_loop(reference, model, tokenizer, examples, batch_size):
    results = score_examples(model, [encode_example(tokenizer, example) for example in examples], batch_size)
    right = right_norm = 0
    for example, result in zip(examples, results, strict=True):
        scores = plain_scores(reference, tokenizer, example)
        per_character = [score / len(text) for score, text in zip(scores, harness_texts(example)[1], strict=True)]
        assert (result.ind, result.label) == (example.ind, example.label)
        assert result.log_likelihoods == pytest.approx(scores, rel=1e-5)
        assert result.prediction == scores.index(max(scores))
        assert result.prediction_norm == per_character.index(max(per_character))
        right += scores.index(max(scores)) == example.label
        right_norm += per_character.index(max(per_character)) == example.label
    accuracies = hellaswag_accuracy(model, tokenizer, examples, batch_size)
    assert accuracies.accuracy == right / len(examples) and accuracies.accuracy_norm == right_norm / len(examples)


def test_reading_keeps_the_texts_as_they_are(literal_examples):
    assert literal_examples[0] == Example(
        24, "Cat care", "The cat sat on the mat.", "the cat", tuple(ROW["endings"]), 2
    )
    assert [example.label for example in literal_examples] == [2, 0, 1]


def test_blank_lines_are_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{json.dumps(ROW)}\r\n\n")
    assert [example.ind for example in read_hellaswag(path)] == [24]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  plain  ", "plain"),
        ("A mat [title] Find it. [step] Go.", "A mat. Find it. Go."),
        ("[header] How to sit [title] Sit", " How to sit. Sit"),  # as the harness leaves it
        ("ends [step]", "ends "),
        ("a   b    c", "a  b  c"),  # pairs of blanks, once
        ("[title] first", " first"),
    ],
)
def test_clean_text(text, cleaned):
    assert clean_text(text) == cleaned


def test_wording(literal_examples):
    assert harness_texts(literal_examples[0]) == (
        "Cat care: The cat sat on the mat. The cat",
        ["sat on the hat.", ", under the rat, is where it sat.", "is.", " The rat is a cat's."],
    )
    assert harness_texts(literal_examples[1])[0] == (
        "Pets and Animals: How to sit on a mat. Find the mat. A mat is under the cat. "
    )
    capitals = dataclasses.replace(literal_examples[0], ctx_b="the CAT of Rome")
    assert harness_texts(capitals)[0] == "Cat care: The cat sat on the mat. The cat of rome"


def test_ids_of_gpt2(gpt2_tokenizer):
    example = Example(1, "A", "The cat [step]", "", ("sat.", ", sat", "dog", "[x] is"), 0)
    encoded = encode_example(gpt2_tokenizer, example)
    assert encoded.context_ids == gpt2_tokenizer("A: The cat").input_ids == [32, 25, 383, 3797]
    # "The cat" is followed by a blank, where [step] was, and by the blank before the ending
    assert encoded.ending_ids == [[220, 3332, 13], [220, 837, 3332], [220, 3290], [220, 220, 318]]
    assert encoded.ending_lengths == [4, 5, 3, 3]


def test_literal_rows_equal_a_plain_loop(tiny_tokenizer, literal_examples):
    reference, model = make_twins(290, n_positions=128)
    assert_equal_to_plain_loop(reference, model, tiny_tokenizer, literal_examples, batch_size=2)
    assert_equal_to_plain_loop(reference, reference, tiny_tokenizer, literal_examples, batch_size=3)


@pytest.mark.parametrize("positions", [1024, 48])  # most contexts are cut off at 48
def test_real_rows_equal_a_plain_loop(gpt2_tokenizer, shared_data, positions):
    examples = read_hellaswag(shared_data / "hellaswag_val_subset.jsonl")
    wikihow = [example for example in examples if example.ctx_b == ""]
    sample = examples[:14] + wikihow[:6]
    reference, model = make_twins(50257, positions)
    if positions == 48:
        short = [max(map(len, encode_example(gpt2_tokenizer, example).ending_ids)) <= 48 for example in sample]
        sample = [example for example, fits in zip(sample, short, strict=True) if fits]
        assert len(sample) > 15
    assert_equal_to_plain_loop(reference, model, gpt2_tokenizer, sample, batch_size=4)


def test_truncation_keeps_the_end_of_the_context(tiny_tokenizer, literal_examples):
    """An ending as long as the model's positions is predicted from the context's last token on."""
    encoded = encode_example(tiny_tokenizer, literal_examples[1])
    longest = max(map(len, encoded.ending_ids))
    assert longest < len(encoded.context_ids)
    for positions in (longest, longest + 1, longest + 5):
        reference, model = make_twins(290, positions)
        assert_equal_to_plain_loop(reference, model, tiny_tokenizer, literal_examples[1:2], batch_size=1)
        cut = dataclasses.replace(encoded, context_ids=encoded.context_ids[-positions:])
        assert score_examples(model, [cut]) == score_examples(model, [encoded])
    with pytest.raises(ValueError, match=rf"example 25 has {longest} tokens but the model has only {longest - 1} pos"):
        hellaswag_accuracy(make_twins(290, longest - 1)[1], tiny_tokenizer, literal_examples[1:2])


def test_build_nanogpt_leaves_the_texts_and_counts_tokens(gpt2_tokenizer, literal_examples):
    cat, wikihow, _ = literal_examples
    assert nanogpt_texts(cat) == (ROW["ctx"], ROW["endings"])
    assert nanogpt_texts(wikihow)[0] == ROWS[1]["ctx"]
    encoded = encode_example(
        gpt2_tokenizer, Example(1, "A", "The cat", "sat ", ("is", " is", ", sat", "[x]"), 0), "build-nanogpt"
    )
    # the texts as they are: a blank at the context's end, and one more before each ending
    assert encoded.context_ids == gpt2_tokenizer("The cat sat ").input_ids == [464, 3797, 3332, 220]
    assert encoded.ending_ids == [[318], [220, 318], [837, 3332], [685, 87, 60]]
    assert encoded.ending_lengths == [1, 2, 2, 3]


@torch.no_grad()
def four_rows(model, tokenizer, row):
    """Sums and means of the endings' losses, as build-nanogpt's hellaswag.py computes them."""
    context = tokenizer(row["ctx"]).input_ids
    rows = [context + tokenizer(" " + ending).input_ids for ending in row["endings"]]
    tokens, mask = torch.zeros(2, 4, max(map(len, rows)), dtype=torch.long)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids)
        mask[i, len(context) : len(ids)] = 1
    losses = F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    sums = (losses.view(4, -1) * mask[:, 1:]).sum(1)
    return sums, sums / mask[:, 1:].sum(1)


def test_build_nanogpt_equals_its_script_on_real_rows(gpt2_tokenizer, shared_data):
    file = shared_data / "hellaswag_val_subset.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert all(
        nanogpt_texts(example)[0] == row["ctx"] for example, row in zip(read_hellaswag(file), rows, strict=True)
    )
    numbers = range(0, len(rows), 40)
    examples = [read_hellaswag(file)[number] for number in numbers]
    reference, model = make_twins(50257, 512)
    encoded = [encode_example(gpt2_tokenizer, example, "build-nanogpt") for example in examples]
    for number, result in zip(numbers, score_examples(model, encoded), strict=True):
        sums, means = four_rows(reference, gpt2_tokenizer, rows[number])
        assert result.log_likelihoods == pytest.approx((-sums).tolist(), rel=1e-5)
        assert (result.prediction, result.prediction_norm) == (sums.argmin(), means.argmin())


def read_klosax(file):
    """Contexts and endings of https://github.com/klosax/hellaswag_text_data: six lines a task, texts cleaned."""
    with bz2.open(file, "rt", encoding="utf-8", newline="\n") as opened:
        lines = opened.read().split("\n")
    return {(lines[i], *lines[i + 2 : i + 6]): int(lines[i + 1]) for i in range(0, len(lines) - 5, 6)}


def test_cleaned_texts_are_those_of_another_cleaner(shared_data):
    """But for capitals and blanks, our wording of all 1,000 rows is that of the cleaned text form."""

    def alike(text):
        return " ".join(text.lower().split())

    klosax = read_klosax(shared_data / "hellaswag_val_full_klosax.txt.bz2")
    labels = {tuple(map(alike, texts)): label for texts, label in klosax.items()}
    assert len(klosax) == 10_042
    for example in read_hellaswag(shared_data / "hellaswag_val_subset.jsonl"):
        context, endings = harness_texts(example)
        assert labels[tuple(map(alike, (context, *endings)))] == example.label


def test_endings_of_one_token(gpt2_tokenizer):
    example = Example(1, "Cat", "The cat", "is", ("on", "under", "in", "at"), 3)
    encoded = encode_example(gpt2_tokenizer, example)
    assert encoded.ending_ids == [[319], [739], [287], [379]]
    model = make_twins(50257, 32)[1]
    with torch.no_grad():
        expected = model(torch.tensor([encoded.context_ids])).logits[0, -1].log_softmax(-1)[[319, 739, 287, 379]]
    assert score_examples(model, [encoded])[0].log_likelihoods == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_uniform_model_takes_the_fewest_tokens(gpt2_tokenizer, literal_examples):
    """Each token costs log(50257) nats. The second context ends with a blank, one more token of each ending. Per
    character, 10 tokens to 33 characters and 14 to 37 are the fewest."""
    model = make_twins(50257, 64)[1]
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    results = score_examples(model, [encode_example(gpt2_tokenizer, example) for example in literal_examples])
    assert [[round(-score / math.log(50257), 3) for score in result.log_likelihoods] for result in results] == [
        [5, 10, 2, 8],
        [7, 14, 2, 3],
        [5, 10, 2, 8],
    ]
    assert [result.prediction for result in results] == [2, 2, 2]
    accuracies = hellaswag_accuracy(model, gpt2_tokenizer, literal_examples)
    assert accuracies.accuracy == 1 / 3
    assert [result.prediction_norm for result in results] == [1, 1, 1] and accuracies.accuracy_norm == 1 / 3


def test_of_equal_endings_the_first_is_taken(gpt2_tokenizer):
    example = Example(1, "Cat", "The cat", "is", ("on", "on", "on", "on"), 0)
    model = make_twins(50257, 32)[1]
    assert hellaswag_accuracy(model, gpt2_tokenizer, [example]).accuracy == 1.0


def test_accuracies_and_standard_errors():
    pairs = [(0, 0), (1, 0), (2, 0), (3, 0)]  # one of four right, all of four right
    result = summarize([ExampleResult(i, 0, [], *pair) for i, pair in enumerate(pairs)])
    assert (result.accuracy, result.accuracy_norm, result.examples) == (0.25, 1.0, 4)
    assert result.standard_error == 0.25  # sqrt((0.75**2 + 3 * 0.25**2) / 3) / sqrt(4)
    assert result.standard_error_norm == 0.0
    assert result.interval == pytest.approx((0.0456, 0.6994), abs=1e-4)  # by hand from Wilson's formula
    assert math.isnan(summarize([ExampleResult(1, 0, [], 0, 0)]).standard_error)
    with pytest.raises(ValueError, match="no examples"):
        summarize([])


@pytest.mark.parametrize(
    ("right", "number", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_of_wilson(right, number, low, high):
    """Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3."""
    assert wilson_interval(right, number) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(number - right, number) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_mode_and_random_state_are_kept(tiny_tokenizer, literal_examples):
    _, model = twins(sizes=TINY | {"vocab_size": 290, "n_positions": 128}, resid_pdrop=0.5, embd_pdrop=0.5)
    expected = hellaswag_accuracy(model, tiny_tokenizer, literal_examples)
    encoded = [encode_example(tiny_tokenizer, example) for example in literal_examples]
    scores = score_examples(model, encoded)
    model.train()
    state = torch.get_rng_state()
    assert hellaswag_accuracy(model, tiny_tokenizer, literal_examples) == expected
    assert score_examples(model, encoded) == scores
    assert model.training and torch.equal(torch.get_rng_state(), state)
    model.eval()
    hellaswag_accuracy(model, tiny_tokenizer, literal_examples)
    assert not model.training


def test_the_context_is_computed_once_and_logits_only_where_they_predict(tiny_tokenizer, literal_examples):
    encoded = encode_example(tiny_tokenizer, literal_examples[1])
    after_first = sum(len(ids) - 1 for ids in encoded.ending_ids)
    shapes = []
    model = make_twins(290, 128)[1]
    model.model.layers[0].register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape[:2])))
    model.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.logits.shape)))
    score_examples(model, [encoded])
    assert shapes == [(1, len(encoded.context_ids) + after_first), (1 + after_first, 290)]


def test_a_model_without_logits_to_keep(tiny_tokenizer, literal_examples):
    """Its forward shows no such argument, as behind PEFT's."""
    reference, model = make_twins(290, 128)
    expected = hellaswag_accuracy(reference, tiny_tokenizer, literal_examples)
    forward = model.forward
    model.forward = lambda **inputs: forward(**inputs)
    assert hellaswag_accuracy(model, tiny_tokenizer, literal_examples) == expected


def test_a_tokenizer_that_does_not_fit(tiny_tokenizer, literal_examples):
    with pytest.raises(ValueError, match=r"gives id \d+ but the model's vocab_size is 61: use the tokenizer"):
        hellaswag_accuracy(make_twins(61, 128)[1], tiny_tokenizer, literal_examples)
    check_fits(make_twins(290, 128)[1], [encode_example(tiny_tokenizer, literal_examples[0])])


def test_a_batch_size_of_nothing(tiny_tokenizer, literal_examples):
    with pytest.raises(ValueError, match="batch_size is 0 but must be at least 1"):
        hellaswag_accuracy(make_twins(290, 128)[1], tiny_tokenizer, literal_examples, batch_size=0)


GOOD = json.dumps(ROW).encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"contains no examples; give HellaSwag's data as JSON lines"),
        (b"\n\n", r"contains no examples"),
        (GOOD + GOOD[:50], r"line 2 is not JSON: Expecting value"),
        (GOOD + b'{"ind": "\xff"}', r"rows.jsonl is not UTF-8 \(byte 0xff\)"),
        (b"[" * 100_000, r"line 1 is JSON that is nested too deeply"),
        (b"[1, 2]", r"line 1 is not a JSON object"),
        ({"ctx_a": None}, r"line 1: 'activity_label', .* must be strings"),
        ({"endings": ["a", "b", "c"]}, r"line 1: the field 'endings' must be a list of 4 texts"),
        ({"endings": ["a", "b", "c", 4]}, r"line 1: .* endings must be strings"),
        ({"endings": ["a", "b", "c", "[title] "]}, r"line 1: the context or an ending is empty once"),
        ({"label": ""}, r"line 1: the field 'label' is '' but must be 0, 1, 2 or 3"),
        ({"label": 4}, r"line 1: the field 'label' is 4 but"),
        ({"label": True}, r"line 1: the field 'label' is True but"),
        ({"ind": "24"}, r"line 1: the field 'ind' is '24' but must be an integer"),
        ({"ctx_a": "\ud800"}, r"line 1: The text is not valid Unicode"),
    ],
)
def test_malformed_files(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(ROW | content).encode())
    with pytest.raises(ValueError, match=message) as error:
        read_hellaswag(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ind", "activity_label", "ctx_a", "ctx_b", "endings", "label"])
def test_a_missing_field(tmp_path, name):
    path = write_rows(tmp_path / "rows.jsonl", [ROW, {key: value for key, value in ROW.items() if key != name}])
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2: the field '{name}' is missing"):
        read_hellaswag(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.jsonl is not a file; give HellaSwag's data"):
        read_hellaswag(tmp_path / "absent.jsonl")


def test_rows_of_the_hub(monkeypatch):
    """There labels are strings, empty ones in the test split."""
    rows = [row | {"label": str(row["label"])} for row in ROWS]
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or rows)
    assert [example.label for example in load_hellaswag()] == [2, 0, 1]
    assert asked == [(("Rowan/hellaswag", None), {"split": "validation"})]


def test_a_hub_that_does_not_answer():
    with pytest.raises(ConnectionError, match=r"could not be downloaded .*, or give a local file instead\.$") as error:
        load_hellaswag()
    assert "\n" not in str(error.value)


def test_an_unknown_protocol_and_an_empty_context(tiny_tokenizer, literal_examples):
    with pytest.raises(ValueError, match="protocol is 'x' but must be one of lm-eval, build-nanogpt"):
        encode_example(tiny_tokenizer, literal_examples[0], "x")
    without = dataclasses.replace(literal_examples[0], ctx_a="", ctx_b="")
    with pytest.raises(ValueError, match="example 24 has no context, which build-nanogpt needs"):
        encode_example(tiny_tokenizer, without, "build-nanogpt")


@pytest.fixture(scope="module")
def model_folder(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_twins(290, 128)[1].save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_script_continues_a_stopped_run(model_folder, tiny_tokenizer, tmp_path, monkeypatch, capsys):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    options = ("--model", model_folder, "--data", data, "--batch_size", 1)
    code, printed, errors = run_example(monkeypatch, capsys, *options, "--json", tmp_path / "whole.json")
    assert code == 0, errors
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    expected = hellaswag_accuracy(model, tiny_tokenizer, read_hellaswag(data))
    header, first, second = printed.splitlines()
    assert header == "HellaSwag by lm-eval's protocol, 3 examples, 95% intervals by Wilson"
    low, high = expected.interval
    assert first.split()[1:] == [
        f"{expected.accuracy:.4f}",
        "from",
        f"{low:.4f}",
        "to",
        f"{high:.4f}",
        *first.split()[6:],
    ]
    assert second.split()[:2] == ["accuracy_norm", f"{expected.accuracy_norm:.4f}"]

    results = tmp_path / "results.jsonl"
    stopped = (*options, "--results", results)

    def stop_after_one(*args):
        yield next(iterate(*args))
        raise KeyboardInterrupt

    iterate = hellaswag.log_likelihoods
    monkeypatch.setattr(hellaswag, "log_likelihoods", stop_after_one)
    assert run_example(monkeypatch, capsys, *stopped)[0] == 130
    monkeypatch.setattr(hellaswag, "log_likelihoods", iterate)
    lines = results.read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["number"] == 1  # the longest
    results.write_text(results.read_text() + '{"number": 0, "ind')  # a line that was being written
    computed = []
    monkeypatch.setattr(
        hellaswag,
        "log_likelihoods",
        lambda model, items, size: computed.append(len(items)) or iterate(model, items, size),
    )
    code, _, errors = run_example(monkeypatch, capsys, *stopped, "--json", tmp_path / "resumed.json")
    assert code == 0, errors
    assert computed == [2]
    assert json.loads((tmp_path / "resumed.json").read_text()) == json.loads((tmp_path / "whole.json").read_text())
    records = [json.loads(line) for line in results.read_text().splitlines()[1:]]
    assert sorted(record["ind"] for record in records) == [24, 25, 26]

    for change, message in (
        (("--protocol", "build-nanogpt"), "was begun with protocol 'lm-eval', not 'build-nanogpt'; choose another"),
        (("--limit", 2), "was begun with examples 3, not 2"),
        (("--data", write_rows(tmp_path / "other.jsonl", [ROWS[2], *ROWS[:2]])), "was begun with tokens"),
    ):
        code, _, errors = run_example(monkeypatch, capsys, *stopped, *change)
        assert code == 1 and message in errors, errors
        assert errors.strip().splitlines()[-1].startswith("error: ")


def test_several_processes_score_each_example_once(model_folder, tmp_path):
    """The file has a line for the settings and one for each example."""
    data, results = write_rows(tmp_path / "rows.jsonl", ROWS * 4), tmp_path / "results.jsonl"
    both = run_two(EXAMPLE, "--model", model_folder, "--data", data, "--results", results)
    assert [done.returncode for done in both] == [0, 0], both
    assert [done.stdout.count("HellaSwag by lm-eval's protocol, 12 examples") for done in both] == [1, 0]
    assert len(results.read_text().splitlines()) == 13


def test_script_replaces_nothing_without_being_told(model_folder, tmp_path, monkeypatch, capsys):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    content = data.read_bytes()
    options = ("--model", model_folder, "--data", data)
    for name in ("--json", "--results"):
        code, _, errors = run_example(monkeypatch, capsys, *options, name, data, "--overwrite")
        assert code == 1 and "rows.jsonl is an input of this command and would be replaced" in errors
    same = tmp_path / "same.json"
    code, _, errors = run_example(monkeypatch, capsys, *options, "--results", same, "--json", same)
    assert code == 1 and "same.json is an input of this command and would be replaced" in errors
    same.write_text("mine")
    code, _, errors = run_example(monkeypatch, capsys, *options, "--json", same)
    assert code == 1 and "same.json exists; choose another name, or add --overwrite to replace it." in errors
    assert (data.read_bytes(), same.read_text()) == (content, "mine")


def test_a_single_example_has_no_standard_error_in_json(model_folder, tmp_path, monkeypatch, capsys):
    data, report = write_rows(tmp_path / "rows.jsonl", ROWS[:1]), tmp_path / "new" / "report.json"
    code, _, errors = run_example(monkeypatch, capsys, "--model", model_folder, "--data", data, "--json", report)
    assert code == 0, errors
    assert json.loads(report.read_text(), parse_constant=pytest.fail)["standard_error"] is None


def test_script_refuses_weights_that_have_changed_and_other_records(
    model_folder, tiny_tokenizer, tmp_path, monkeypatch, capsys
):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    data, results = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "results.jsonl"
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    options = ("--model", tmp_path / "model", "--data", data, "--results", results)
    assert run_example(monkeypatch, capsys, *options)[0] == 0
    header, *lines = results.read_text().splitlines()
    results.write_text("\n".join([header, lines[0].replace('"number"', '"row"')]) + "\n")
    code, _, errors = run_example(monkeypatch, capsys, *options)
    assert code == 1 and "contains records that are not HellaSwag's; choose another file" in errors
    with torch.no_grad():
        model.model.norm.bias[0] += 1e-3
    model.save_pretrained(tmp_path / "model")
    code, _, errors = run_example(monkeypatch, capsys, *options)
    assert code == 1 and "was begun with weights" in errors


def test_script_ends_with_one_line_on_mistakes(model_folder, tmp_path, monkeypatch, capsys):
    good = write_rows(tmp_path / "good.jsonl", ROWS)
    empty = write_rows(tmp_path / "empty.jsonl", [])
    for options, message in (
        (("--data", empty), "contains no examples;"),
        (("--data", good, "--limit", 0), "limit is 0 but must be at least 1"),
        (("--data", good, "--batch_size", 0), "batch_size is 0 but must be at least 1"),
        ((), "'Rowan/hellaswag' could not be downloaded from the Hugging Face Hub"),
    ):
        code, _, errors = run_example(monkeypatch, capsys, "--model", model_folder, *options)
        assert code == 1 and message in errors, errors
        assert len([line for line in errors.splitlines() if line.startswith("error: ")]) == 1
