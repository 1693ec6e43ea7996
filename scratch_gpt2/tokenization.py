"""GPT-2's byte-level BPE: loaded, rebuilt from tiktoken or trained, always with the one chat template inside.

`<|endoftext|>` ends documents and chat turns and is also the padding token: padding is recognized by length, never by
id. A tokenizer encodes these characters as that one token wherever they occur in a text. For untrusted text,
`tokenizer(text, split_special_tokens=True)` encodes them as plain characters; the chat template refuses them.
"""

import json
import math
import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import tokenizers
from tiktoken_ext import openai_public
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from .checkpoint_files import check_descriptions, pin_revision

END_OF_TEXT = "<|endoftext|>"
GPT2_CONTEXT = 1024
# A byte-level BPE spells each byte as one printable character.
BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}

# Alpaca's wording (https://github.com/tatsu-lab/stanford_alpaca). A system turn replaces the first sentence.
# Contents are trimmed: a reply that began with white space would merge with the line break before it, and the
# tokens of the prompt would no longer begin the tokens of the whole conversation.
CHAT_TEMPLATE = r"""
{%- if messages[0].role != 'system' -%}
    {{- 'Below is an instruction that describes a task. ' -}}
    {{- 'Write a response that appropriately completes the request.' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.content is not string -%}
        {{- raise_exception('The content of a chat message must be one string, without parts.') -}}
    {%- elif eos_token and eos_token in message.content -%}
        {{- raise_exception('A chat message must not contain ' + eos_token + ', which ends a turn.') -}}
    {%- endif -%}
    {%- set content = message.content | trim -%}
    {%- if message.role == 'system' and loop.first -%}
        {{- content -}}
    {%- elif message.role == 'user' -%}
        {{- '\n\n### Instruction:\n' + content -}}
    {%- elif message.role == 'assistant' -%}
        {{- '\n\n### Response:\n' -}}
        {%- generation -%}{{- content + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- raise_exception('Chat role ' + message.role + ' is not known here: use user and assistant, '
                            + 'and system for the first message only.') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '\n\n### Response:\n' -}}
{%- endif -%}
""".strip()


def load_tokenizer(name_or_folder: str | os.PathLike) -> PreTrainedTokenizerFast:
    """Load a tokenizer, and add a pad token and the chat template if it has none.

    `name_or_folder` is a Hub id, a folder (`tokenizer.json`, `vocab.json` + `merges.txt`, or OpenAI's
    `encoder.json` + `vocab.bpe`), or `tiktoken:gpt2`.

    Raises FileNotFoundError if no tokenizer is found, ValueError for one that is damaged, has no vocabulary
    or has no eos token.
    """
    name = os.fspath(name_or_folder)
    if name.startswith("tiktoken:"):
        tokenizer = _from_tiktoken(name)
    elif os.path.isdir(name):
        check_descriptions(name)
        tokenizer = _from_folder(Path(name))
    elif os.path.isfile(name):
        raise NotADirectoryError(f"{name} is a file; give the folder of a tokenizer or of a checkpoint.")
    else:
        tokenizer = _from_hub(name)
    return _complete(tokenizer, name)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with GPT-2's splitting rule; 256 bytes first, `<|endoftext|>` last, as in GPT-2.

    The vocabulary is smaller than `vocab_size` if the texts contain too few distinct words; see `len(tokenizer)`.
    The result depends on the texts alone.

    Raises ValueError for a vocab_size below 257 or a text that `check_text` refuses.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size is {vocab_size}, but 256 bytes and {END_OF_TEXT} need at least 257.")
    if isinstance(texts, str):
        raise ValueError("texts is one string; pass a list of strings, such as [text].")
    bpe = tokenizers.Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    # Without the split, the pieces of <|endoftext|> would be learned as words.
    bpe.train_from_iterator((check_text(text).split(END_OF_TEXT) for text in texts), trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = model["vocab"] | {END_OF_TEXT: len(model["vocab"])}
    merges = [tuple(pair) for pair in model["merges"]]
    return _complete(GPT2Tokenizer(vocab=vocab, merges=merges), "trained here")


def check_text(text: str) -> str:
    """Return the text, or raise ValueError if half a surrogate pair makes it impossible to encode.

    Such strings come from broken JSON and from bytes that were not UTF-8. A tokenizer reports only that its argument
    has the wrong type.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text is not valid Unicode: character {error.start} is {text[error.start]!r}, half of a "
            "surrogate pair; remove it, or read the source as UTF-8 with errors='replace'."
        ) from None
    return text


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> tuple[list[list[int]], int]:
    """Token ids of texts to classify, and how many texts were cut to their first `max_length` tokens.

    Training, classification and explanation all encode with this function. `<|endoftext|>` in a text is read as plain
    characters, and `truncation_side` has no effect.
    """
    ids = tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"] if texts else []
    return [row[:max_length] for row in ids], sum(len(row) > max_length for row in ids)


def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Recover BPE's list of merges from tiktoken's ranks, which keep only the merged tokens.

    The halves of a token are the last two parts left when its bytes are merged by rank.
    """
    return [_halves(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]


def _halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, math.inf) for a, b in pairwise(parts)]
        i = pair_ranks.index(min(pair_ranks))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _from_tiktoken(name: str) -> PreTrainedTokenizerFast:
    if name != "tiktoken:gpt2":
        raise ValueError(f"Tokenizer {name!r} is not GPT-2's; use 'tiktoken:gpt2'.")
    try:
        ranks = openai_public.gpt2()["mergeable_ranks"]
    except OSError as error:
        raise FileNotFoundError(
            "tiktoken could not download GPT-2's vocabulary; set TIKTOKEN_CACHE_DIR to a folder in which "
            "tiktoken has cached it, or give a folder with encoder.json and vocab.bpe."
        ) from error
    characters = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    vocab[END_OF_TEXT] = len(vocab)
    merges = [(spell(left), spell(right)) for left, right in merges_from_ranks(ranks)]
    return GPT2Tokenizer(vocab=vocab, merges=merges)


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    def holds(*names: str) -> bool:
        return all((folder / name).is_file() for name in names)

    try:
        if holds("tokenizer.json"):
            return AutoTokenizer.from_pretrained(folder)
        if holds("vocab.json", "merges.txt"):
            return GPT2Tokenizer.from_pretrained(folder)
        if holds("encoder.json", "vocab.bpe"):
            vocab, merges = BPE.read_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
            return GPT2Tokenizer(vocab=vocab, merges=merges)
    except Exception as error:  # tokenizers raises a bare Exception for a file that it cannot parse
        raise ValueError(
            f"The tokenizer files in {str(folder)!r} cannot be read ({error}); copy them again."
        ) from error
    raise FileNotFoundError(
        f"Folder {str(folder)!r} contains no tokenizer: neither tokenizer.json, nor vocab.json with merges.txt, "
        "nor encoder.json with vocab.bpe."
    )


def _from_hub(name: str) -> PreTrainedTokenizerFast:
    hub = pin_revision(name, {})
    try:
        return AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"Tokenizer {name!r} is not a local folder and could not be downloaded from the Hugging Face Hub; give a "
            "folder with tokenizer.json or with vocab.json and merges.txt, or 'tiktoken:gpt2' with "
            "TIKTOKEN_CACHE_DIR set to a folder in which tiktoken has cached GPT-2's vocabulary."
        ) from error


def _complete(tokenizer: PreTrainedTokenizerFast, name: str) -> PreTrainedTokenizerFast:
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # transformers builds an empty GPT2Tokenizer for a repository that has no tokenizer files.
        raise ValueError(f"Tokenizer {name!r} has no vocabulary; its repository lacks the tokenizer files.")
    if tokenizer.eos_token is None and END_OF_TEXT in tokenizer.get_vocab():
        tokenizer.eos_token = END_OF_TEXT  # a tokenizer.json alone does not say what its tokens are for
    if tokenizer.eos_token is None:
        raise ValueError(f"Tokenizer {name!r} has no eos token and no {END_OF_TEXT}, so texts cannot end.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.model_max_length >= VERY_LARGE_INTEGER:
        tokenizer.model_max_length = GPT2_CONTEXT
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
