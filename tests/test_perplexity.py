import copy
import functools
import json
import math
from functools import partial
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from example_scripts import run_in_process
from model_fixtures import TINY, twins

from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM
from scratch_gpt2.evaluation.perplexity import make_batches, perplexity, sliding_windows

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "perplexity.py"
run_example = partial(run_in_process, EXAMPLE)
TEXT = "The rat sat under the hat, and where the cat sat is where the mat is: on the hat of the rat.\n" * 3


def uniform_model(vocab_size, **options):
    """All weights zero: every token has probability 1 / vocab_size, whatever comes before it."""
    sizes = {"n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 1}
    model = ScratchGPT2ForCausalLM(ScratchGPT2Config(vocab_size=vocab_size, **sizes | options))
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


class FixedTokenizer:
    """Token ids by a rule, with the interface of transformers' tokenizers."""

    def __init__(self, rule, before=(), after=(), bos_token_id=None):
        self.rule, self.before, self.after, self.bos_token_id = rule, before, after, bos_token_id

    def __call__(self, text, add_special_tokens=True, split_special_tokens=False, verbose=True):
        ids = self.rule(text.encode())
        return {"input_ids": [*self.before, *ids, *self.after] if add_special_tokens else ids}


BYTES = FixedTokenizer(list)
PAIRS = FixedTokenizer(
    lambda data: [256 * first + second for first, second in zip(data[::2], data[1::2], strict=True)]
)


@pytest.fixture(scope="module")
def pair():
    """transformers' GPT-2 and ours with the same weights, 32 positions and the tiny tokenizer's vocabulary."""
    return twins(attention="sdpa", sizes=TINY | {"vocab_size": 290})


def one_window_at_a_time(model, ids, context_length, stride):
    """Losses of all scored tokens, from the logits, as the documentation's loop has it."""
    losses, previous_end = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context_length, len(ids))
        window = torch.tensor(ids[begin:end])
        with torch.no_grad():
            log_probs = model(window[None]).logits[0].double().log_softmax(-1)
        for position in range(max(previous_end - begin, 1), end - begin):
            losses.append(-log_probs[position - 1, window[position]].item())
        previous_end = end
        if end == len(ids):
            break
    return losses


def published_perplexity(model, ids, context_length, stride, weigh):
    """The documentation's loop over transformers' own loss; `weigh(scored, target_length)` is a window's weight."""
    total, weights, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context_length, len(ids))
        labels = torch.tensor([ids[begin:end]])
        target_length = end - previous_end
        inputs, labels = labels, labels.clone()
        labels[:, :-target_length] = -100
        with torch.no_grad():
            loss = model(inputs, labels=labels).loss.item()
        weight = weigh((labels[:, 1:] != -100).sum().item(), target_length)
        total, weights, previous_end = total + loss * weight, weights + weight, end
        if end == len(ids):
            break
    return math.exp(total / weights)


def test_uniform_model_has_the_perplexity_of_its_vocabulary():
    result = perplexity(uniform_model(256), BYTES, "eleven char")
    assert result.perplexity == pytest.approx(256, rel=1e-6)
    assert result.loss == pytest.approx(5.545177444479562, rel=1e-7)  # ln 256
    assert result.bits_per_byte == pytest.approx(8, rel=1e-7)
    assert (result.scored_tokens, result.tokens, result.bytes) == (10, 11, 11)
    assert (result.context_length, result.stride, result.start_token) == (8, 4, False)


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    text = "Zürich, 8° and 10 €."  # 24 bytes in 20 characters
    by_bytes = perplexity(uniform_model(256), BYTES, text, stride=8)
    by_pairs = perplexity(uniform_model(65536), PAIRS, text, stride=5)
    assert (by_bytes.tokens, by_pairs.tokens) == (24, 12)
    assert by_pairs.perplexity == pytest.approx(65536, rel=1e-6)
    assert by_bytes.bits_per_byte == pytest.approx(8, rel=1e-7)
    assert by_pairs.bits_per_byte == pytest.approx(8, rel=1e-7)


def test_a_start_token_is_context_and_the_first_token_is_scored():
    tokenizer = FixedTokenizer(list, before=[256], bos_token_id=256)
    result = perplexity(uniform_model(257), tokenizer, "eleven char")
    assert (result.scored_tokens, result.tokens, result.bytes, result.start_token) == (11, 11, 11, True)
    assert result.bits_per_byte == pytest.approx(8.005624549193879, rel=1e-7)  # log2 257


def test_a_token_that_ends_the_text_is_not_a_start_token():
    ends_with_eos = FixedTokenizer(list, after=[256], bos_token_id=1)
    result = perplexity(uniform_model(257), ends_with_eos, "eleven char")
    assert (result.scored_tokens, result.tokens, result.start_token) == (10, 11, False)


@pytest.mark.parametrize(
    ("length", "context_length", "stride", "expected"),
    [
        (14, 8, 4, [(0, 8, 1), (4, 12, 8), (8, 14, 12)]),
        (12, 8, 4, [(0, 8, 1), (4, 12, 8)]),
        (13, 8, 4, [(0, 8, 1), (4, 12, 8), (8, 13, 12)]),
        (8, 8, 4, [(0, 8, 1)]),
        (3, 8, 4, [(0, 3, 1)]),
        (2, 8, 1, [(0, 2, 1)]),
        (4, 2, 1, [(0, 2, 1), (1, 3, 2), (2, 4, 3)]),
        (20, 8, 8, [(0, 8, 1), (8, 16, 9), (16, 20, 17)]),
        (17, 8, 8, [(0, 8, 1), (8, 16, 9)]),  # the last token would be alone in its window
    ],
)
def test_windows(length, context_length, stride, expected):
    windows = list(sliding_windows(length, context_length, stride))
    assert [(window.begin, window.end, window.first_scored) for window in windows] == expected


@pytest.mark.parametrize("context_length", [2, 3, 7, 16])
def test_every_token_but_the_first_is_scored_once(context_length):
    for length in range(2, 50):
        for stride in range(1, context_length):
            windows = sliding_windows(length, context_length, stride)
            scored = [token for window in windows for token in range(window.first_scored, window.end)]
            assert scored == list(range(1, length)), (length, stride)


def test_windows_without_overlap_leave_out_their_first_tokens():
    scored = [token for window in sliding_windows(25, 8, 8) for token in range(window.first_scored, window.end)]
    assert scored == [token for token in range(25) if token not in (0, 8, 16, 24)]


def test_batches_hold_windows_of_one_length():
    batches = make_batches(list(sliding_windows(30, 8, 4)), batch_size=3)
    assert [[window.end - window.begin for window in batch] for batch in batches] == [[8, 8, 8], [8, 8, 8], [6]]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("context_length", "stride"), [(32, 16), (32, 32), (32, 1), (20, 7), (2, 1), (None, None)])
def test_equals_one_window_at_a_time_over_transformers(pair, tiny_tokenizer, context_length, stride, batch_size):
    ids = tiny_tokenizer(TEXT)["input_ids"]
    losses = one_window_at_a_time(pair[0], ids, context_length or 32, stride or 16)
    for model in pair:
        result = perplexity(model, tiny_tokenizer, TEXT, context_length, stride, batch_size)
        assert result.scored_tokens == len(losses)
        assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_equals_the_published_procedure_but_for_its_weights(pair, tiny_tokenizer):
    reference, ours = pair
    ids = tiny_tokenizer(TEXT)["input_ids"]
    actual = perplexity(ours, tiny_tokenizer, TEXT, 32, 16).perplexity
    assert actual == pytest.approx(published_perplexity(reference, ids, 32, 16, lambda scored, _: scored), rel=1e-5)
    present = published_perplexity(reference, ids, 32, 16, lambda _, target_length: target_length - 1)
    assert actual != pytest.approx(present, rel=1e-5)
    # Without overlap its weights are the numbers of scored tokens.
    present = published_perplexity(reference, ids, 32, 32, lambda _, target_length: target_length - 1)
    assert perplexity(ours, tiny_tokenizer, TEXT, 32, 32).perplexity == pytest.approx(present, rel=1e-5)


def test_text_shorter_than_a_window(pair, tiny_tokenizer):
    ids = tiny_tokenizer("The cat sat")["input_ids"]
    reference, ours = pair
    losses = one_window_at_a_time(reference, ids, 32, 16)
    result = perplexity(ours, tiny_tokenizer, "The cat sat")
    assert result.scored_tokens == len(ids) - 1 < 31
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_a_model_in_training_is_measured_without_dropout_and_stays_in_training(tiny_tokenizer):
    _, ours = twins(sizes=TINY | {"vocab_size": 290}, resid_pdrop=0.5)
    expected = perplexity(ours, tiny_tokenizer, TEXT)
    ours.train()
    assert perplexity(ours, tiny_tokenizer, TEXT) == expected
    assert ours.training and all(parameter.grad is None for parameter in ours.parameters())


def test_our_model_never_builds_the_logits(pair, tiny_tokenizer):
    _, ours = pair
    outputs = []
    handle = ours.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    perplexity(ours, tiny_tokenizer, TEXT)
    handle.remove()
    assert len(outputs) > 1
    assert all(output.logits is None and output.past_key_values is None for output in outputs)


def test_a_pad_token_at_the_edge_of_a_window_is_not_taken_for_padding(caplog):
    """GPT-2's eos, which also pads, may stand in a text: no warning that an attention mask is missing."""
    logger = transformers.utils.logging.get_logger("transformers")
    transformers.utils.logging.warning_once.cache_clear()
    logger.addHandler(caplog.handler)
    try:
        model = uniform_model(257, bos_token_id=256, eos_token_id=256, pad_token_id=256)
        perplexity(model, FixedTokenizer(lambda data: [256, *data, 256]), "The cat")
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text == ""


def test_the_mark_of_a_document_end_is_one_token_and_no_bytes(tiny_tokenizer):
    """28 documents of 8 bytes: their ends are predicted, but are not part of the text."""
    text = "<|endoftext|>".join(["The cat."] * 28)
    model = uniform_model(290, n_positions=64)
    result = perplexity(model, tiny_tokenizer, text)
    of_a_document = len(tiny_tokenizer("The cat.")["input_ids"])
    assert result.tokens == 28 * of_a_document + 27
    assert (result.bytes, result.document_ends) == (28 * 8, 27)
    assert result.bits_per_byte == pytest.approx(math.log2(290) * result.tokens / 224)


def test_several_marks_in_a_row_are_one_end():
    tokenizer = FixedTokenizer(list)
    tokenizer.eos_token_id = 256
    result = perplexity(uniform_model(257), tokenizer, "ab<|endoftext|><|endoftext|>\n<|endoftext|>cd")
    assert (result.tokens, result.bytes, result.document_ends) == (5, 4, 1)


def test_the_mark_of_a_document_end_is_the_eos_token_of_other_tokenizers():
    tokenizer = FixedTokenizer(list)
    tokenizer.eos_token_id = 256
    result = perplexity(uniform_model(257), tokenizer, "ab<|endoftext|>cd")
    assert (result.tokens, result.bytes, result.document_ends) == (5, 4, 1)
    result = perplexity(uniform_model(257), tokenizer, "ab<|endoftext|>cd", separator=None)
    assert (result.tokens, result.bytes, result.document_ends) == (17, 17, 0)


def test_a_perplexity_beyond_the_largest_float_is_infinite():
    """Token 0 has a logit of 4,000 and the others 0: their loss is 4,000 nats."""
    model = uniform_model(256, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.norm.bias.fill_(1.0)
        model.lm_head.weight[0] = 1000.0
    result = perplexity(model, BYTES, "eleven char")
    assert result.loss == pytest.approx(4000) and result.perplexity == math.inf
    assert result.bits_per_byte == pytest.approx(4000 / math.log(2))


def test_a_hook_on_the_head_counts(pair, tiny_tokenizer):
    """Halved logits, in our model as in transformers'."""
    results = []
    for model in pair:
        handle = model.lm_head.register_forward_hook(lambda module, arguments, output: output / 2)
        results.append(perplexity(model, tiny_tokenizer, TEXT))
        handle.remove()
        assert results[-1].loss != pytest.approx(perplexity(model, tiny_tokenizer, TEXT).loss, rel=1e-3)
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-6)


def test_a_head_that_accelerate_offloads(pair, tiny_tokenizer):
    _, ours = pair
    expected = perplexity(ours, tiny_tokenizer, TEXT)
    offloaded = accelerate.cpu_offload(copy.deepcopy(ours), execution_device="cpu")
    assert offloaded.lm_head.weight.device.type == "meta"
    assert perplexity(offloaded, tiny_tokenizer, TEXT).loss == pytest.approx(expected.loss, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "The text '' is too short: perplexity needs at least two tokens."),
        ("a", {}, "The text 'a' is too short"),
        ("broken \ud800", {}, "not valid Unicode"),
        (TEXT, {"context_length": 9}, "context_length is 9 but the model has only 8 positions"),
        (TEXT, {"context_length": 1}, "context_length is 1 but must be at least 2"),
        (TEXT, {"stride": 9}, r"stride is 9 but must be from 1 to context_length \(8\)"),
        (TEXT, {"context_length": 4, "stride": 5}, r"stride is 5 but must be from 1 to context_length \(4\)"),
        (TEXT, {"stride": 0}, "stride is 0 but"),
        (TEXT, {"batch_size": 0}, "batch_size is 0 but"),
        ("naïve", {}, "gives id 195 but the model's vocab_size is 128"),
    ],
)
def test_mistakes_are_named(text, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(uniform_model(128), BYTES, text, **options)


SEPARATED = {  # text: (separator, its ids in GPT-2's vocabulary, bytes of text)
    "a\n<|endoftext|>\nb": ("<|endoftext|>", [64, 50256, 65], 2),
    "a<|endoftext|><|endoftext|>b<|endoftext|>\n": ("<|endoftext|>", [64, 50256, 65, 50256], 2),
    "<|endoftext|>a": ("<|endoftext|>", [50256, 64], 1),
    "a<|endoftext|>": (None, [64, 27, 91, 437, 1659, 5239, 91, 29], 14),
    "a\r\n\r\nb<|endoftext|>": ("\n\n", [64, 50256, 65, 27, 91, 437, 1659, 5239, 91, 29], 15),
    "a\n": ("<|endoftext|>", [64, 198], 2),
}


@pytest.mark.parametrize("text", SEPARATED)
def test_separators_are_the_eos_id_and_count_no_bytes(gpt2_tokenizer, monkeypatch, text):
    separator, ids, size = SEPARATED[text]
    seen = []
    model = uniform_model(50257, n_positions=16)
    monkeypatch.setattr(model, "forward", recording(model.forward, seen))
    result = perplexity(model, gpt2_tokenizer, text, separator=separator)
    assert seen == [ids]
    assert (result.tokens, result.bytes, result.scored_tokens) == (len(ids), size, len(ids) - 1)
    assert result.bits_per_byte == pytest.approx(math.log2(50257) * len(ids) / size)


def test_a_separator_that_does_not_occur_is_said(gpt2_tokenizer, caplog):
    perplexity(uniform_model(50257), gpt2_tokenizer, "a b c", separator="|")
    assert caplog.messages == ["The text is one document, because the document separator '|' does not occur."]


def recording(forward, seen):
    @functools.wraps(forward)
    def recorded(*arguments, **options):
        seen.extend(options["input_ids"].tolist())
        return forward(*arguments, **options)

    return recorded


def test_a_model_without_a_maximum_context_length_needs_one():
    model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=256, hidden_size=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match="A bloom model has no maximum context length; give context_length"):
        perplexity(model, BYTES, TEXT)
    assert perplexity(model, BYTES, TEXT, context_length=16).scored_tokens == len(TEXT) - 1


def wikitext_as_on_the_hub(raw: str) -> str:
    """The rows of the Hub's wikitext-2-raw-v1, lines with their line end and nothing for blank ones, joined."""
    lines = raw.split("\n")[:-1]
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)


def test_wikitext_has_the_published_number_of_tokens(shared_data, gpt2_tokenizer):
    raw = (shared_data / "text" / "wikitext2_test.raw.txt").read_bytes().decode()
    assert len(gpt2_tokenizer(wikitext_as_on_the_hub(raw), verbose=False)["input_ids"]) == 287_644
    assert len(gpt2_tokenizer(raw, verbose=False)["input_ids"]) == 286_221


@pytest.mark.hub
@pytest.mark.timeout(0)
def test_published_perplexity_of_gpt2_large(shared_data, gpt2_tokenizer):
    """774M parameters, 562 windows: for a GPU. The figure is of https://github.com/huggingface/transformers/pull/34387,
    gpt2-large at context 1024 and stride 512, and rounded to 16.44 in the documentation."""
    raw = (shared_data / "text" / "wikitext2_test.raw.txt").read_bytes().decode()
    model = ScratchGPT2ForCausalLM.from_pretrained("openai-community/gpt2-large")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    result = perplexity(model, gpt2_tokenizer, wikitext_as_on_the_hub(raw), context_length=1024, stride=512)
    assert result.scored_tokens == 287_643
    assert result.perplexity == pytest.approx(16.4443, abs=0.002)


@pytest.fixture(scope="module")
def model_folder(pair, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pair[1].save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_example_prints_a_table_and_writes_json(pair, model_folder, tiny_tokenizer, tmp_path, monkeypatch, capsys):
    first, second, report = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "report.json"
    first.write_bytes(TEXT.encode())
    second.write_bytes(b"The cat sat\r\non the mat\r\n")
    options = ("--model", model_folder, "--context", 20, "--stride", 7, "--json", report)
    code, printed, errors = run_example(monkeypatch, capsys, *options, "--text", first, second)
    assert code == 0, errors
    expected = perplexity(pair[1], tiny_tokenizer, TEXT, 20, 7)
    header, _, first_row, second_row = printed.strip().split("\n")
    assert header == "windows of 20 tokens, stride 7, no start token, mean over tokens"
    assert first_row.split()[0] == f"{expected.perplexity:.4f}" and first_row.endswith(str(first))
    assert second_row.split()[5] == "25" and second_row.endswith(str(second))
    written = json.loads(report.read_text())
    assert (written["model"], written["dtype"]) == (str(model_folder), "float32")
    assert written["results"][0]["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert written["results"][0]["stride"] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "report.json"]


def test_example_replaces_nothing_without_being_told(model_folder, tmp_path, monkeypatch, capsys):
    text, report = tmp_path / "a.txt", tmp_path / "report.json"
    text.write_bytes(TEXT.encode())
    report.write_text("mine")
    options = ("--model", model_folder, "--text", text, "--json")
    for more in ((), ("--overwrite",)):
        code, _, errors = run_example(monkeypatch, capsys, *options, text, *more)
        assert code == 1 and errors.endswith(
            "a.txt is an input of this command and would be replaced; choose another output.\n"
        )
    code, _, errors = run_example(monkeypatch, capsys, *options, report)
    assert code == 1 and "report.json exists; choose another name, or add --overwrite to replace it." in errors
    assert (text.read_bytes(), report.read_text()) == (TEXT.encode(), "mine")
    assert run_example(monkeypatch, capsys, *options, report, "--overwrite")[0] == 0
    assert json.loads(report.read_text())["model"] == str(model_folder)


def test_example_reads_its_options_from_a_file(model_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    options = tmp_path / "options.yaml"
    options.write_text(f"model: {model_folder}\ntext: [{tmp_path / 'a.txt'}]\ncontext: 20\nstride: 7\n")
    code, printed, errors = run_example(monkeypatch, capsys, options)
    assert code == 0, errors
    assert printed.startswith("windows of 20 tokens, stride 7,")
    code, printed, errors = run_example(monkeypatch, capsys, "--config", options, "--stride", 9)
    assert code == 0 and printed.startswith("windows of 20 tokens, stride 9,")


def test_example_writes_an_infinite_perplexity(tiny_tokenizer, tmp_path, monkeypatch, capsys):
    model = uniform_model(290, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.norm.bias.fill_(1.0)
        model.lm_head.weight[0] = 1000.0
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    options = ("--model", tmp_path / "model", "--text", tmp_path / "a.txt", "--json", tmp_path / "a.json")
    code, printed, errors = run_example(monkeypatch, capsys, *options)
    assert code == 0, errors
    assert printed.split("\n")[2].split()[0] == "inf"
    assert json.loads((tmp_path / "a.json").read_text())["results"][0]["perplexity"] is None  # JSON has no infinity


def test_example_computes_a_gpt2_checkpoint_with_our_model(pair, tiny_tokenizer, tmp_path, monkeypatch, capsys):
    pair[0].save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    text = tmp_path / "a.txt"
    text.write_bytes(TEXT.encode())
    loaded = []
    monkeypatch.setattr(ScratchGPT2ForCausalLM, "eval", lambda model: loaded.append(model) or model.train(False))
    code, printed, errors = run_example(monkeypatch, capsys, "--model", tmp_path / "gpt2", "--text", text)
    assert code == 0, errors
    assert loaded
    assert printed.split("\n")[2].split()[0] == f"{perplexity(pair[0], tiny_tokenizer, TEXT).perplexity:.4f}"


def test_example_ends_with_one_line_on_mistakes(model_folder, tmp_path, monkeypatch, capsys):
    latin1, empty, good = tmp_path / "latin1.txt", tmp_path / "empty.txt", tmp_path / "good.txt"
    latin1.write_bytes("naïve".encode("latin-1"))
    empty.write_bytes(b"")
    good.write_bytes(TEXT.encode())
    for options, message in (
        (("--text", latin1), f"{latin1} is not UTF-8 (byte 0xef); convert it, e.g. with iconv."),
        (("--text", tmp_path / "absent.txt"), "absent.txt does not exist; check the path."),
        (("--text", good, empty), f"{empty} is empty."),
        (("--text", good, "--json", tmp_path / "absent" / "report.json"), "create it first."),
        (("--text", good, "--tokenizer", tmp_path / "absent"), "absent does not exist; give an existing folder"),
    ):
        code, printed, errors = run_example(monkeypatch, capsys, "--model", model_folder, *options)
        assert (code, printed) == (1, "")
        assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors
    code, _, errors = run_example(monkeypatch, capsys, "--model", model_folder, "--text", good, "--context", 33)
    assert code == 1
    assert errors.endswith("error: context_length is 33 but the model has only 32 positions.\n")
