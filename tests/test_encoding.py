import json
import os
import random

import numpy as np
import pytest
import tiktoken
from tokenizers import Tokenizer
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from scratch_gpt2.data.encoding import batch_encoder, plain_encoder, tiktoken_encoding, tokenizer_fingerprint
from scratch_gpt2.hardware import usable_cores
from scratch_gpt2.tokenization import END_OF_TEXT, train_tokenizer

FRAGMENTS = [
    "the",
    "The",
    " cat",
    "s",
    "'s",
    "don't",
    "'LL",
    "42",
    "!",
    "--",
    "é",
    "e\u0301",
    "日本",
    "🙂",
    "ß",
    "x" * 40,
]
FRAGMENTS += [" ", "   ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u2028", "\x1f", "\x00", END_OF_TEXT, "_", "½", "४"]


def fuzzed_texts(count=500):
    rng = random.Random(0)
    return ["".join(rng.choices(FRAGMENTS, k=rng.randint(0, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def trained_tokenizer():
    """600 tokens trained on the texts to encode, so that there are long merges."""
    return train_tokenizer(fuzzed_texts(), 600)


@pytest.mark.parametrize("name", ["gpt2_tokenizer", "trained_tokenizer", "tiny_tokenizer"])
def test_tiktoken_gives_the_tokenizers_own_ids(request, monkeypatch, name):
    def no_download(name):
        raise AssertionError("the vocabulary is available locally")

    tokenizer = request.getfixturevalue(name)
    monkeypatch.setattr(tiktoken, "get_encoding", no_download)
    assert tiktoken_encoding(tokenizer) is not None
    texts = fuzzed_texts()
    fast, plain = batch_encoder(tokenizer)(texts), plain_encoder(tokenizer, np.uint16)(texts)
    assert [ids.tolist() for ids in fast] == [ids.tolist() for ids in plain]
    assert {ids.dtype for ids in [*fast, *plain]} == {np.dtype(np.uint16)}


def test_a_million_spaces_that_tiktoken_gives_up_at(gpt2_tokenizer):
    (ids,) = batch_encoder(gpt2_tokenizer)(["a" + " " * 1_000_000])
    assert ids.tolist() == [64] + [220] * 1_000_000


def changed(tokenizer, **changes):
    """The tokenizer with other entries in its tokenizer.json."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for place, value in changes.items():
        *outer, last = place.split("__")
        inner = state
        for key in outer:
            inner = inner[key]
        inner[last] = value
    copy = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=copy, eos_token=tokenizer.eos_token)


# Byte-level BPEs with the vocabulary of the trained tokenizer that give a text other ids.
OTHER_CONSTRUCTIONS = {
    "a space before the text": {"pre_tokenizer__add_prefix_space": True},
    "no splitting": {"pre_tokenizer__use_regex": False},
    "single digits": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        }
    },
    "small letters": {"normalizer": {"type": "Lowercase"}},
    "composed letters": {"normalizer": {"type": "NFC"}},
    "whole words first": {"model__ignore_merges": True},
}


@pytest.mark.parametrize("name", OTHER_CONSTRUCTIONS)
def test_other_constructions_keep_their_ids_and_have_another_fingerprint(trained_tokenizer, name):
    tokenizer = changed(trained_tokenizer, **OTHER_CONSTRUCTIONS[name])
    assert tiktoken_encoding(tokenizer) is None
    texts = [text.replace(END_OF_TEXT, "") for text in fuzzed_texts(50)]
    assert [ids.tolist() for ids in batch_encoder(tokenizer)(texts)] == tokenizer(texts)["input_ids"]
    if name not in ("single digits", "whole words first"):  # this vocabulary gives the probe the same ids there
        assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(trained_tokenizer)


def test_gpt2_with_a_space_before_the_text(gpt2_tokenizer):
    state = json.loads(gpt2_tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    tokenizer = GPT2Tokenizer(vocab=state["vocab"], merges=merges, add_prefix_space=True)
    assert tokenizer.get_vocab() == gpt2_tokenizer.get_vocab()
    assert batch_encoder(tokenizer)(["Hello world"])[0].tolist() == [18435, 995]
    assert batch_encoder(gpt2_tokenizer)(["Hello world"])[0].tolist() == [15496, 995]
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(gpt2_tokenizer)


@pytest.mark.parametrize(
    ("merges", "tokens", "ids"),
    [
        (["a b", "b c"], ["bc", "ab"], [257, 66]),  # tiktoken would join b and c first, which have the lower id
        (["a b", "b c", "a bc"], ["ab", "bc", "abc"], [256, 66]),  # tiktoken would then join ab and c
    ],
)
def test_ids_that_do_not_tell_the_merges(tiny_tokenizer, merges, tokens, ids):
    letters = {token: number for token, number in tiny_tokenizer.get_vocab().items() if number < 256}
    vocab = letters | {token: number for number, token in enumerate([*tokens, END_OF_TEXT], start=256)}
    tokenizer = GPT2Tokenizer(vocab=vocab, merges=[tuple(merge.split()) for merge in merges])
    assert tiktoken_encoding(tokenizer) is None
    assert batch_encoder(tokenizer)(["abc"])[0].tolist() == tokenizer("abc")["input_ids"] == ids


def test_added_words_that_are_not_special(tiny_tokenizer):
    copy = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    copy.add_tokens(["catsat"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy, eos_token=END_OF_TEXT)
    assert tiktoken_encoding(tokenizer) is None
    assert batch_encoder(tokenizer)(["catsat"])[0].tolist() == [290]


def test_the_fingerprint_survives_saving(tmp_path, trained_tokenizer):
    trained_tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(GPT2Tokenizer.from_pretrained(tmp_path)) == tokenizer_fingerprint(trained_tokenizer)


def test_the_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 9}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 64
