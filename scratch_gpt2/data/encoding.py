"""Text to token ids on all cores, and how a tokenizer is recognized."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tiktoken
from tiktoken_ext import openai_public
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..hardware import usable_cores
from ..tokenization import BYTE_OF_CHARACTER, END_OF_TEXT, merges_from_ranks

# Pieces of text are tokenized in batches of about this many characters, with two batches per core in flight.
BATCH_CHARACTERS = 2**20
# GPT-2's merges follow from its ids; checking that again would take most of a second.
GPT2_MERGES_SHA256 = "980ca8f2d4b0964c87a762e901db0656ce92d3f1ecd940b25ba97463da5c68fa"
# Two tokenizers of the same vocabulary that split, normalize or begin a text differently give it different ids.
PROBE = "Hello, WORLD!  It's 1234.5 at Zoë's cafe\u0301,\n\n\tisn't it? ﬁ 日本 🙂 "


def tokenize(
    pieces: Iterable[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase, skip: int = 0
) -> Iterator[tuple[np.ndarray, bool]]:
    """The ids of every piece but the first `skip`, in order, computed ahead on all cores.

    Threads suffice: tiktoken and tokenizers compute in Rust and release Python's lock.
    """
    encode = batch_encoder(tokenizer)
    cores = usable_cores()
    with ThreadPoolExecutor(cores) as pool:
        pending: deque = deque()
        try:
            for batch in batches(pieces, skip):
                texts = [text for text, _ in batch]
                pending.append((pool.submit(encode, texts), batch))
                if len(pending) > 2 * cores:
                    yield from encoded(*pending.popleft())
            while pending:
                yield from encoded(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def encoded(future, batch: list[tuple[str, bool]]) -> Iterator[tuple[np.ndarray, bool]]:
    for ids, (_, ends_document) in zip(future.result(), batch, strict=True):
        yield ids, ends_document


def batches(pieces: Iterable[tuple[str, bool]], skip: int) -> Iterator[list[tuple[str, bool]]]:
    batch, size = [], 0
    for number, piece in enumerate(pieces):
        if number < skip:
            continue
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def batch_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[np.ndarray]]:
    """A function from a list of texts to a list of id arrays.

    It uses tiktoken, which is several times faster, where that gives the tokenizer's own ids. Special tokens in a text
    are ordinary characters.
    """
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    encoding = tiktoken_encoding(tokenizer)
    if encoding is None:
        return plain_encoder(tokenizer, dtype)

    # One call for the whole batch, because each return from Rust waits for Python's lock, which other threads hold.
    separator, separator_id = tokenizer.eos_token, tokenizer.eos_token_id

    def encode(texts: list[str]) -> list[np.ndarray]:
        try:
            if any(separator in text for text in texts):
                return [encoding.encode_to_numpy(text, disallowed_special=()).astype(dtype) for text in texts]
            ids = encoding.encode_to_numpy(separator.join(texts), allowed_special="all").astype(dtype)
        except ValueError:  # tiktoken's regular expressions fail on a million spaces in a row
            return plain_encoder(tokenizer, dtype)(texts)
        ends = [*np.flatnonzero(ids == separator_id), len(ids)]
        return [ids[start:end] for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]

    return encode


def plain_encoder(tokenizer: PreTrainedTokenizerBase, dtype: type) -> Callable[[list[str]], list[np.ndarray]]:
    # A copy, because reading special tokens as ordinary text is a setting of the whole tokenizer.
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.encode_special_tokens = True
    copy.no_truncation()
    copy.no_padding()

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.array(e.ids, dtype) for e in copy.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


def between_ends(documents: list[str]) -> list[str]:
    """The documents without the empty ones between others: several separators in a row are one end of a document."""
    last = len(documents) - 1
    return [document for number, document in enumerate(documents) if document or number in (0, last)]


def encode_documents(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text from its `split_documents`, with the end-of-text id between any two, as `between_ends` leaves
    them. Special tokens in a document are ordinary characters."""
    ids: list[int] = []
    for number, document in enumerate(between_ends(documents)):
        # Custom tokenizers need not know the option.
        as_text = {"split_special_tokens": True} if END_OF_TEXT in document else {}
        ids += [tokenizer.eos_token_id] if number else []
        ids += tokenizer(document, add_special_tokens=False, verbose=False, **as_text)["input_ids"]
    return ids


def tiktoken_encoding(tokenizer: PreTrainedTokenizerBase) -> tiktoken.Encoding | None:
    """The tokenizer's own BPE in tiktoken, or `None` where it is not built like GPT-2's.

    tiktoken has no merges: of all neighbors it joins those whose bytes together have the lowest id. The result is the
    same where the order of the ids is that of the merges, as it is after training.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if not is_built_like_gpt2(state):
        return None
    byte_of = {character: chr(byte) for character, byte in BYTE_OF_CHARACTER.items()}
    table = str.maketrans(byte_of)

    def spelled(token: str) -> bytes:
        return token.translate(table).encode("latin-1")

    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    tokens = {*byte_of, *(left + right for left, right in merges)}
    if not (tokens <= vocab.keys() and {*"".join(tokens)} <= byte_of.keys()) or tokenizer.eos_token in tokens:
        return None
    ranks = {spelled(token): vocab[token] for token in tokens}
    known = is_gpt2s(merges) and [vocab[left + right] for left, right in merges] == list(range(256, 50256))
    if not known and merges_from_ranks(ranks) != [(spelled(left), spelled(right)) for left, right in merges]:
        return None
    special = {tokenizer.eos_token: tokenizer.eos_token_id}
    return tiktoken.Encoding("own", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def is_gpt2s(merges: list[list[str]]) -> bool:
    return len(merges) == 50_000 and hashlib.sha256(json.dumps(merges).encode()).hexdigest() == GPT2_MERGES_SHA256


def is_built_like_gpt2(state: dict) -> bool:
    """Whether a `tokenizer.json` is a byte-level BPE that splits like GPT-2's and does not normalize the text."""
    model, splitter = state["model"], state["pre_tokenizer"] or {}
    variants = ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    return (
        model["type"] == "BPE"
        and not any(model[variant] for variant in variants)
        and state["normalizer"] is None
        and splitter.get("type") == "ByteLevel"
        and splitter["use_regex"]
        and not splitter["add_prefix_space"]
        and all(token["special"] for token in state["added_tokens"])  # others are cut out of the text first
    )


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray | None:
    """(vocab_size,): bytes of text in each token; `None` for a tokenizer that is not byte-level."""
    if "ByteLevel" not in str(tokenizer.backend_tokenizer.decoder):
        return None
    lengths: np.ndarray = np.zeros(len(tokenizer), dtype=np.int64)
    special = set(tokenizer.all_special_ids)
    for token, number in tokenizer.get_vocab().items():
        lengths[number] = 0 if number in special else len(token)  # a byte-level vocabulary spells a byte as a letter
    return lengths


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the vocabulary and of a sentence's ids, whatever kind of file the tokenizer came from."""
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    return hashlib.sha256(json.dumps([sorted(tokenizer.get_vocab().items()), ids]).encode()).hexdigest()
