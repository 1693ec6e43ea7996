"""HellaSwag: reading, wording, tokens, truncation, and scores equal to a plain loop over transformers' GPT-2."""

import dataclasses
import json
import math

import pytest
import torch
from model_fixtures import TINY, twins

from scratch_gpt2.evaluation.hellaswag import (
    Example,
    ExampleResult,
    check_fits,
    clean_text,
    encode_example,
    harness_texts,
    hellaswag_accuracy,
    read_hellaswag,
    score_examples,
    summarize,
)

ROW = {
    "ind": 24,
    "activity_label": "Cat care",
    "ctx_a": "The cat sat on the mat.",
    "ctx_b": "the cat",
    "ctx": "The cat sat on the mat. the cat",
    "split": "val",
    "label": 2,
    "endings": ["sat on the hat.", ", under the rat, is where it sat.", "is.", "[substeps] The rat  is a cat's."],
    "source_id": "activitynet~v_1",
}
WIKIHOW = ROW | {
    "ind": 25,
    "activity_label": "Pets and Animals",
    "ctx_a": "[header] How to sit on a mat [title] Find the mat. [step] A mat is under the cat. [substeps]",
    "ctx_b": "",
    "label": "0",
    "endings": ["The cat is on it.", "Sit. [title] Sit on the hat. [step] It is the cat's.", "a", "b c"],
}
ROWS = [ROW, WIKIHOW, ROW | {"ind": 26, "activity_label": "Rats", "ctx_a": "The rat.", "ctx_b": "it", "label": 1}]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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
    sample = examples[:30] + wikihow[:10]
    reference, model = make_twins(50257, positions)
    if positions == 48:
        short = [max(map(len, encode_example(gpt2_tokenizer, example).ending_ids)) <= 48 for example in sample]
        sample = [example for example, fits in zip(sample, short, strict=True) if fits]
        assert len(sample) > 30
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
    assert math.isnan(summarize([ExampleResult(1, 0, [], 0, 0)]).standard_error)
    with pytest.raises(ValueError, match="no examples"):
        summarize([])


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


def test_logits_only_where_endings_are_predicted(tiny_tokenizer, literal_examples):
    encoded = encode_example(tiny_tokenizer, literal_examples[1])
    shapes = []
    model = make_twins(290, 128)[1]
    model.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.logits.shape)))
    score_examples(model, [encoded])
    assert shapes == [(4, max(map(len, encoded.ending_ids)), 290)]


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
        (b"", r"holds no example up to its end, line 1; give"),
        (b"\n\n", r"holds no example"),
        (GOOD + GOOD[:50], r"line 2: this is not JSON in UTF-8"),
        (GOOD + b'{"ind": "\xff"}', r"line 2: this is not JSON in UTF-8"),
        (b"[" * 100_000, r"line 1: this is not JSON in UTF-8"),
        (b"[1, 2]", r"line 1: this is not a JSON object"),
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
