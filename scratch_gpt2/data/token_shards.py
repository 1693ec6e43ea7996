"""Token shards: a corpus as .npy files of token ids, written once and read by memory map.

A folder holds `shard_00000.npy`, `shard_00001.npy`, ... and an `index.json` that describes them. The first shard is
for validation; where that is more than a tenth of the text, it is split, and the rest of it is for training. Every
document ends with the end-of-text token, and documents continue from one shard into the next. The index is replaced
in one step after each shard: a run that is killed loses the unfinished shard and nothing else, and continues at the
exact token.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..files import sha256, write_atomically
from .encoding import token_bytes, tokenize, tokenizer_fingerprint

SHARD_TOKENS = 100_000_000
# A tenth of a small text may be shorter than a block; half of it, up to this many tokens, is for validation then.
MIN_VALIDATION_TOKENS = 1024
INDEX = "index.json"
FORMAT = 3
READABLE_FORMATS = (2, FORMAT)  # in format 2, the source was a sentence
# The system limits how many files a process has open, often to 1024 and on a Mac to 256.
OPEN_SHARDS = 64


def write_token_shards(
    pieces: Iterable[tuple[str, bool]],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike,
    source: dict[str, Any] | str,
    shard_tokens: int = SHARD_TOKENS,
    part: tuple[int, int] = (0, 1),
) -> dict:
    """Tokenize `pieces` (from `text_sources`) on all cores into `folder`, and return the index.

    The memory needed is that of one shard and of two batches per core, for any amount of text. Called again with the
    same arguments after an interruption, it reads up to where the last finished shard ends, without tokenizing, and
    continues there; a finished folder is left as it is.

    Args:
        pieces: `(text, ends_document)`; the same ones whenever the call is repeated. Separators are not looked for
            here: `<|endoftext|>` inside a text is tokenized as ordinary characters.
        source: what the text is, for the index: `TextSource.describe()`, or any name.
        shard_tokens: tokens in each shard but the last.
        part: (I, N): `pieces` are the I-th of N parts of the text. The validation shard is the first of part 0.

    Raises ValueError for a folder that was begun with other arguments, and for fewer than two tokens.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index = {
        "format": FORMAT,
        "source": source,
        "part": list(part),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": "uint16" if len(tokenizer) <= 2**16 else "uint32",
        "shard_tokens": shard_tokens,
    }
    begun = read_index(folder) if (folder / INDEX).is_file() else {**index, "shards": [], "done": 0, "into_next": 0}
    check_source(begun, source, folder)
    for name, value in index.items():
        if name != "source" and begun[name] != value:
            raise ValueError(
                f"{folder} was begun with {name} {begun[name]!r}, not {value!r}; choose another folder or delete it."
            )
    if begun.get("complete"):
        return begun
    writer = ShardWriter(folder, begun, tokenizer)
    for ids, ends_document in tqdm_tokens(tokenize(pieces, tokenizer, skip=begun["done"])):
        writer.add(ids, ends_document)
    return writer.finish()


def check_source(index: dict, source: dict[str, Any] | str, folder: Path) -> None:
    """Raise ValueError if the shards of `index` were made from other text than `source`; how files are called does
    not matter."""
    if index["format"] != FORMAT:
        raise ValueError(
            f"{folder} has no record of its source text; train on it with --data, or delete it to make the shards "
            "again."
        )
    if without_names(index["source"]) != without_names(source):
        reason = difference(index["source"], source)
        raise ValueError(f"{folder} was made from other text: {reason}; choose another output folder or delete it.")


def without_names(source: Any) -> Any:
    if not isinstance(source, dict) or "files" not in source:
        return source
    return source | {"files": [{**file, "name": None} for file in source["files"]]}


def difference(old: Any, new: Any) -> str:
    """What is not the same in two sources, in words."""
    if isinstance(old, str) or isinstance(new, str) or old["kind"] != new["kind"]:
        return f"{old}, not {new}"
    for name in dict.fromkeys([*old, *new]):
        if name != "files" and old.get(name) != new.get(name):
            return f"{name} {old.get(name)!r}, not {new.get(name)!r}"
    before, now = ([file["name"] for file in source["files"]] for source in (old, new))
    if before != now:
        return f"the files {', '.join(before)}, not {', '.join(now)}"
    changed = [file["name"] for file, other in zip(old["files"], new["files"], strict=True) if file != other]
    return f"{', '.join(changed)} changed since then"


class ShardWriter:
    """Collects the tokens of one shard and writes it, then the index; `index` is what the folder holds so far.

    `done` counts the pieces whose tokens are all in finished shards, `into_next` the tokens of the piece after them
    that are there too.
    """

    def __init__(self, folder: Path, index: dict, tokenizer: PreTrainedTokenizerBase):
        self.folder, self.index = folder, index
        self.end_of_text = np.array([tokenizer.eos_token_id], dtype=index["dtype"])
        self.bytes_of = token_bytes(tokenizer)
        self.shard = np.empty(index["shard_tokens"], dtype=index["dtype"])
        self.filled = 0
        self.pieces = index["done"]
        self.skip = index["into_next"]

    def add(self, ids: np.ndarray, ends_document: bool) -> None:
        if ends_document and len(ids):  # an empty document leaves no trace
            ids = np.concatenate([ids, self.end_of_text])
        start, self.skip = self.skip, 0
        while start < len(ids):
            room = len(self.shard) - self.filled
            taken = ids[start : start + room]
            self.shard[self.filled : self.filled + len(taken)] = taken
            self.filled += len(taken)
            start += len(taken)
            if self.filled == len(self.shard):
                self.write_shard(done=self.pieces, into_next=start)
        self.pieces += 1

    def write_shard(self, done: int, into_next: int) -> None:
        number = len(self.index["shards"])
        split = "validation" if number == 0 and self.index["part"][0] == 0 else "train"
        shard = self.save(f"shard_{number:05d}.npy", split, self.shard[: self.filled])
        self.index |= {"shards": [*self.index["shards"], shard], "done": done, "into_next": into_next}
        write_index(self.folder, self.index)
        self.filled = 0

    def save(self, name: str, split: str, tokens: np.ndarray) -> dict:
        file = self.folder / name
        write_atomically(file, lambda opened: np.save(opened, tokens))
        return {
            "file": name,
            "split": split,
            "tokens": len(tokens),
            "bytes": self.count_bytes(tokens),
            "file_bytes": file.stat().st_size,
            "sha256": sha256(file),
        }

    def count_bytes(self, tokens: np.ndarray) -> int | None:
        if self.bytes_of is None:
            return None
        return sum(int(self.bytes_of[tokens[start : start + 2**20]].sum()) for start in range(0, len(tokens), 2**20))

    def finish(self) -> dict:
        part, parts = self.index["part"]
        total = sum(shard["tokens"] for shard in self.index["shards"]) + self.filled
        if part == 0 and total < 2:
            raise ValueError(f"The text has only {total} tokens, too few to train and to validate on; give more text.")
        if self.filled:
            self.write_shard(done=self.pieces, into_next=0)
        if part == 0:
            self.split_first(total * parts)
        self.index["complete"] = True
        write_index(self.folder, self.index)
        first = self.folder / "shard_00000.npy"
        if first.name not in (shard["file"] for shard in self.index["shards"]):
            first.unlink(missing_ok=True)
        return self.index

    def split_first(self, total: int) -> None:
        """Split the first shard where it is more than validation needs of `total` tokens."""
        shard = self.index["shards"][0]
        validation = max(total // 10, min(total // 2, MIN_VALIDATION_TOKENS))
        if validation < shard["tokens"]:
            tokens = open_shard(self.folder / shard["file"])
            self.index["shards"][:1] = [
                self.save("shard_00000_first.npy", "validation", tokens[:validation]),
                self.save("shard_00000_rest.npy", "train", tokens[validation:]),
            ]


def open_shard(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is not a file of tokens; it is damaged: make the shards again.") from error


def tqdm_tokens(encoded_pieces: Iterator[tuple[np.ndarray, bool]]) -> Iterator[tuple[np.ndarray, bool]]:
    first = list(itertools.islice(encoded_pieces, 1))  # an unreachable source ends without an empty progress bar
    # Warnings about the text appear while it is tokenized; they must not be appended to the bar.
    with logging_redirect_tqdm(), tqdm(unit=" tokens", unit_scale=True, desc="Tokenizing") as bar:
        for ids, ends_document in itertools.chain(first, encoded_pieces):
            bar.update(len(ids))
            yield ids, ends_document


def merge_parts(folder: str | os.PathLike) -> dict:
    """Write one index over the parts in `folder`'s sub-folders, so that `TokenShards` reads them as one set.

    Raises FileNotFoundError for a missing part, ValueError for an unfinished one, parts that do not fit together, and
    a folder with shards of its own.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file() and any("/" not in shard["file"] for shard in read_index(folder)["shards"]):
        raise ValueError(f"{folder} has shards of its own, which merging would replace; choose another folder.")
    parts = [(read_index(path.parent), path.parent.name) for path in folder.glob(f"*/{INDEX}")]
    parts.sort(key=lambda part: part[0]["part"])
    if not parts:
        raise FileNotFoundError(f"{folder} has no parts: no folder in it has an {INDEX}.")
    first = parts[0][0]
    count = first["part"][1]
    missing = set(range(count)) - {index["part"][0] for index, _ in parts}
    if missing:
        raise FileNotFoundError(f"{folder} has {len(parts)} of {count} parts; part {min(missing)} is missing.")
    for index, name in parts:
        if index["part"][1] != count:
            raise ValueError(f"{folder / name} is one of {index['part'][1]} parts, not of {count}; delete it.")
        if not index.get("complete"):
            raise ValueError(f"{folder / name} is not finished; run it again to continue it.")
        for key in ("format", "tokenizer", "source"):
            if without_names(index[key]) != without_names(first[key]):
                raise ValueError(f"{folder / name} has another {key} than {folder / parts[0][1]}; make it again.")
    shards = [{**s, "file": f"{name}/{s['file']}"} for index, name in parts for s in index["shards"]]
    merged = {**first, "part": [0, 1], "shards": shards, "done": sum(index["done"] for index, _ in parts)}
    write_index(folder, merged)
    return merged


def read_index(folder: Path) -> dict:
    """Raises FileNotFoundError for a folder without shards, ValueError for an index that cannot be read."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} has no token shards ({INDEX} is missing); make some with examples/prepare_text.py."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / INDEX} is damaged; delete the folder and make the shards again.") from error
    if not isinstance(index, dict) or "shards" not in index:
        raise ValueError(f"{folder / INDEX} is not an index of token shards; choose another folder.")
    if index.get("format") not in READABLE_FORMATS:
        formats = " and ".join(map(str, READABLE_FORMATS))
        raise ValueError(
            f"{folder / INDEX} is of format {index.get('format')}, but this version reads {formats}; make the shards "
            "again."
        )
    return index


def write_index(folder: Path, index: dict) -> None:
    write_atomically(folder / INDEX, lambda opened: opened.write(json.dumps(index, indent=1).encode()))


class TokenShards(torch.utils.data.Dataset):
    """Fixed-length blocks of one split's token stream, for Trainer: no samples to draw, nothing kept in memory.

    Item i is `{"input_ids", "labels"}`, both (block_length,), with the tokens from i * (block_length - 1) on. Blocks
    share one token, because the model shifts the labels: so every token but the first is predicted exactly once. The
    stream runs through all shards; the tail that does not fill a block, fewer than block_length tokens, is dropped.

    Raises FileNotFoundError for a folder without shards or with one missing, ValueError for one that is not finished
    or has a truncated shard, and for a split shorter than a block.
    """

    def __init__(self, folder: str | os.PathLike, block_length: int, split: str = "train"):
        if block_length < 2:
            raise ValueError(f"block_length is {block_length}, but predicting a token takes at least 2.")
        self.folder, self.block_length, self.split = Path(folder), block_length, split
        self.index = read_index(self.folder)
        if not self.index.get("complete"):
            raise ValueError(f"{folder} is not finished; run examples/prepare_text.py again to continue it.")
        shards = [shard for shard in self.index["shards"] if shard["split"] == split]
        for shard in shards:
            check_file_size(self.folder, shard)
        self.files = [self.folder / shard["file"] for shard in shards]
        self.starts = np.cumsum([0] + [shard["tokens"] for shard in shards])  # of each shard in the stream
        self.bytes = None if any(s["bytes"] is None for s in shards) else sum(s["bytes"] for s in shards)
        self.tokens = int(self.starts[-1])
        if len(self) == 0:
            raise ValueError(
                f"The {split} split of {folder} has {self.tokens} tokens, fewer than one block of {block_length}; "
                "give more text or a shorter block."
            )
        self.open: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return max(0, (self.tokens - 1) // (self.block_length - 1))

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(f"Block {i} does not exist; there are {len(self)}.")
        start = i * (self.block_length - 1)
        ids = torch.from_numpy(self._tokens(start, start + self.block_length).astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}

    def __getstate__(self) -> dict:
        # Worker processes open the files themselves instead of receiving a copy of them.
        return {**self.__dict__, "open": {}}

    def _tokens(self, start: int, end: int) -> np.ndarray:
        parts = []
        for number in range(int(np.searchsorted(self.starts, start, side="right")) - 1, len(self.files)):
            offset = self.starts[number]
            if offset >= end:
                break
            parts.append(self._shard(number)[max(0, start - offset) : end - offset])
        return np.concatenate(parts)

    def _shard(self, number: int) -> np.ndarray:
        if number not in self.open:
            if len(self.open) == OPEN_SHARDS:
                del self.open[next(iter(self.open))]  # the one that was opened first
            self.open[number] = open_shard(self.files[number])
        return self.open[number]

    def bytes_per_token(self) -> float | None:
        """Bytes of UTF-8 per token of this split, to turn a loss into bits per byte."""
        return None if self.bytes is None else self.bytes / self.tokens

    def check_fits(self, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
        """Raise ValueError if the tokenizer is another one, or the model too small in vocabulary or positions."""
        if tokenizer_fingerprint(tokenizer) != self.index["tokenizer"]:
            raise ValueError(
                f"The shards in {self.folder} were made with another tokenizer; use {self.folder / 'tokenizer'}."
            )
        check_model_fits(f"The shards in {self.folder} have", self.index["vocab_size"], self.block_length, config)


def check_model_fits(subject: str, vocab_size: int, block_length: int, config: PretrainedConfig) -> None:
    """Raise ValueError if a model is too small for token ids below `vocab_size` or for blocks of `block_length`."""
    if vocab_size > config.vocab_size:
        raise ValueError(
            f"{subject} {vocab_size} token ids, but the model's vocab_size is {config.vocab_size}; use a model with "
            "at least as many."
        )
    if block_length > config.n_positions:
        raise ValueError(
            f"A block has {block_length} tokens, but the model's n_positions is {config.n_positions}; shorten the "
            "blocks."
        )


def verify(folder: str | os.PathLike) -> int:
    """Compare every shard with its checksum and return their number. Raises ValueError for the first that differs."""
    folder = Path(folder)
    shards = read_index(folder)["shards"]
    for shard in tqdm(shards, desc="Checking", unit=" shards"):
        file = check_file_size(folder, shard)
        if sha256(file) != shard["sha256"]:
            raise ValueError(f"{file} does not have the checksum of the index; it is damaged: make the shards again.")
    return len(shards)


def check_file_size(folder: Path, shard: dict) -> Path:
    """The shard's file. Raises FileNotFoundError if it is missing, ValueError if it has another size."""
    file = folder / shard["file"]
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; make the shards again.")
    size = file.stat().st_size
    if size != shard["file_bytes"]:
        raise ValueError(f"{file} has {size} bytes, not {shard['file_bytes']}; it is damaged: make the shards again.")
    return file
