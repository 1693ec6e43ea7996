"""From text to a folder of token shards and their tokenizer, for examples/prepare_text.py and examples/pretrain.py."""

import contextlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..tokenization import END_OF_TEXT, load_tokenizer, train_tokenizer
from .encoding import tokenizer_fingerprint
from .rows import describe_files, describe_hub
from .text_files import STDIN, is_compressed
from .text_sources import Piece, read_files, read_hub, take_part
from .token_shards import INDEX, SHARD_TOKENS, check_source, read_index, write_token_shards

TOKENIZER = "tokenizer"
TRAINING_CHARACTERS = 100_000_000
MIN_SHARD_TOKENS = 256
BYTES_PER_TOKEN = 4  # of English
COMPRESSION = 3  # of English by gzip, xz or zstd, roughly


@dataclass(frozen=True)
class TextSource:
    """Files (from `find_files`) or one split of a data set on the Hub, and how documents are read from them."""

    files: tuple[str, ...] = ()
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    text_column: str | None = None
    separator: str | None = END_OF_TEXT

    def pieces(self, part: tuple[int, int] = (0, 1)) -> Iterator[Piece]:
        if self.hub is not None:
            return read_hub(self.hub, self.config, self.split, self.text_column, self.separator, part)
        return take_part(read_files(self.files, self.text_column, self.separator), part)

    def describe(self) -> dict[str, Any]:
        """All that decides which text is read: shards of other text must not be taken for these. Files are told apart
        by their contents."""
        if self.hub is not None and os.path.isdir(self.hub):
            files = [str(file) for file in sorted(Path(self.hub).rglob("*")) if file.is_file()]
            origin = describe_files(files) | describe_hub(self.hub, self.config, self.split)
        elif self.hub is not None:
            origin = describe_hub(self.hub, self.config, self.split)
        else:
            origin = describe_files(self.files)
        return origin | {"column": self.text_column or "text", "separator": self.separator}

    def shard_tokens(self) -> int:
        """About a twentieth of local files, as a small text needs no large validation shard; else `SHARD_TOKENS`."""
        if self.hub is not None or STDIN in self.files:
            return SHARD_TOKENS
        size = sum(os.path.getsize(file) * (COMPRESSION if is_compressed(file) else 1) for file in self.files)
        return min(SHARD_TOKENS, max(MIN_SHARD_TOKENS, size // BYTES_PER_TOKEN // 20))


def text_to_shards(
    source: TextSource,
    output: str | os.PathLike,
    tokenizer: str,
    vocab_size: int | None = None,
    shard_tokens: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> tuple[PreTrainedTokenizerBase, dict]:
    """Tokenize text into token shards in `output`, save the tokenizer beside them, and return it and the index.

    An interrupted call continues when it is repeated; shards that are complete are used again.

    Args:
        tokenizer: a name for `load_tokenizer`.
        vocab_size: train a BPE of this size on the first 100 million characters of the text instead.
        shard_tokens: tokens in each shard but the last; by default `source.shard_tokens()`.
        part: (I, N): tokenize the I-th of N parts of the text, into a sub-folder of `output`.

    Raises ValueError for shards of other text or of another tokenizer, and whatever reading the text raises; where
    nothing was written before that, `output` is left as it was.
    """
    if shard_tokens is not None and shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens} but must be at least 1.")
    output = Path(output)
    if output.is_file():
        raise NotADirectoryError(f"{output} is a file; choose another output folder.")
    folder = output if part[1] == 1 else output / f"part_{part[0]:05d}"
    begun = (folder / INDEX).is_file()
    if begun and STDIN in source.files:
        raise ValueError(f"{folder} has shards, and standard input cannot be read again to continue them; delete it.")
    described = source.describe()
    if vocab_size is not None:
        described["vocab_size"] = vocab_size
    if begun:
        check_source(read_index(folder), described, folder)
    new_tokenizer = not (output / TOKENIZER).is_dir()
    try:
        made = make_tokenizer(source, output / TOKENIZER, tokenizer, vocab_size, begun)
        save_once(made, output / TOKENIZER)
        tokens = source.shard_tokens() if shard_tokens is None else shard_tokens
        index = write_token_shards(source.pieces(part), made, folder, described, tokens, part)
    except (ValueError, OSError):
        remove_if_nothing_was_written(output, folder, with_tokenizer=new_tokenizer and part[1] == 1)
        raise
    return made, index


def make_tokenizer(
    source: TextSource, saved: Path, name: str, vocab_size: int | None, begun: bool
) -> PreTrainedTokenizerBase:
    if vocab_size is None:
        return load_tokenizer(name)
    if begun and saved.is_dir():
        return load_tokenizer(saved)
    if STDIN in source.files:
        raise ValueError("Standard input can be read only once: train the tokenizer on files, or choose one.")
    print(f"Training a tokenizer of {vocab_size:,} tokens ...", file=sys.stderr)
    return train_tokenizer(first_texts(source.pieces(), TRAINING_CHARACTERS), vocab_size)


def first_texts(pieces: Iterable[Piece], characters: int) -> Iterator[str]:
    """The texts of the first pieces, at least `characters` of them where there are as many."""
    for text, _ in pieces:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def save_once(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save under another name and rename, because another part may be doing the same; the first one wins."""
    if not folder.is_dir():
        unfinished = folder.with_name(f".{TOKENIZER}-{uuid.uuid4().hex}")
        tokenizer.save_pretrained(unfinished)
        try:
            os.rename(unfinished, folder)
        except OSError:  # another part was faster
            shutil.rmtree(unfinished)
    if tokenizer_fingerprint(load_tokenizer(folder)) != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"{folder} contains another tokenizer; use it, delete it or choose another output folder.")


def remove_if_nothing_was_written(output: Path, folder: Path, with_tokenizer: bool) -> None:
    if not (folder / INDEX).is_file():
        if with_tokenizer:
            shutil.rmtree(output / TOKENIZER, ignore_errors=True)
        for empty in (folder, output):
            with contextlib.suppress(OSError):
                empty.rmdir()
