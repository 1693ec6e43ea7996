"""Documents from files, standard input and the Hub, a bounded piece at a time.

Every reader yields pieces `(text, ends_document)`. A document is one row of a table (.jsonl, .parquet, a Hub data
set), one text file, or what stands between two separators in a text file. Text files may be larger than memory, so
they come in pieces of about a million characters, cut where GPT-2's splitting rule cuts anyway: the pieces have the
tokens of the whole.
"""

import glob
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ..tokenization import check_text

PIECE_CHARACTERS = 2**20
# Without a good place to cut, a piece grows up to here and is then cut anyway, perhaps within a token.
LONGEST_PIECE = 16 * PIECE_CHARACTERS
# A single line break between two visible characters is a token of its own, whatever stands around it.
GOOD_CUT = re.compile(r"(?<=\S\n)(?=\S)")

Piece = tuple[str, bool]


def find_files(patterns: list[str]) -> list[str]:
    """Files that the patterns match, in the order of the patterns; `-` is standard input.

    Raises FileNotFoundError for a pattern without a match, ValueError for an empty file or an unknown kind.
    """
    files = []
    for pattern in patterns:
        matches = ["-"] if pattern == "-" else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise FileNotFoundError(
                f"No file matches {pattern!r}; give existing files, globs, or - for standard input."
            )
        files += [match for match in matches if match == "-" or Path(match).is_file()]
    for file in files:
        if file != "-" and Path(file).stat().st_size == 0:
            raise ValueError(f"{file} is empty; leave it out.")
        if file != "-" and Path(file).suffix not in (".txt", ".jsonl", ".parquet"):
            raise ValueError(f"{file} is of an unknown kind; use .txt, .jsonl or .parquet.")
    return files


def read_files(files: list[str], text_column: str = "text", separator: str | None = None) -> Iterator[Piece]:
    """The documents of `files` (from `find_files`). `separator` splits text files into documents.

    Raises ValueError for text that is not UTF-8, for a broken line of JSON and for a row without `text_column`.
    """
    for file in files:
        if file.endswith(".jsonl"):
            yield from read_jsonl(file, text_column)
        elif file.endswith(".parquet"):
            yield from read_parquet(file, text_column)
        else:
            yield from read_text(file, separator)


def read_hub(name: str, config: str | None, split: str, text_column: str = "text") -> Iterator[Piece]:
    """The documents of a data set on the Hub, streamed.

    Raises ConnectionError where the Hub cannot be reached, ValueError for a missing column.
    """
    import datasets

    try:
        rows = iter(datasets.load_dataset(name, config, split=split, streaming=True))
        first = next(rows, None)
    except Exception as error:  # the library raises errors of its own, requests' and fsspec's
        raise ConnectionError(
            f"The data set {name!r} could not be had from the Hugging Face Hub "
            f"({str(error).strip().splitlines()[0]}); give local .txt, .jsonl or .parquet files with --input."
        ) from error
    if first is not None:
        yield text_of(first, text_column, name), True
        for row in rows:
            yield text_of(row, text_column, name), True


def text_of(row: dict, text_column: str, origin: str) -> str:
    text = row.get(text_column)
    if not isinstance(text, str):
        raise ValueError(
            f"{origin} has no text in column {text_column!r}; its columns are {', '.join(map(str, row))}."
        )
    return check_text(text)


def read_jsonl(file: str, text_column: str) -> Iterator[Piece]:
    with open(file, encoding="utf-8") as lines, reading_utf8(file):
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{file}, line {number} is not JSON: {error.msg}.") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{file}, line {number} is not a JSON object with a column {text_column!r}.")
                yield text_of(row, text_column, f"{file}, line {number}"), True


def read_parquet(file: str, text_column: str) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is not a parquet file or is damaged: {str(error).splitlines()[0]}") from error
    if text_column not in table.schema_arrow.names:
        raise ValueError(
            f"{file} has no column {text_column!r}; its columns are {', '.join(table.schema_arrow.names)}."
        )
    for batch in table.iter_batches(batch_size=256, columns=[text_column]):
        for row in batch.to_pylist():
            yield text_of(row, text_column, file), True


def read_text(file: str, separator: str | None) -> Iterator[Piece]:
    if file == "-":
        sys.stdin.reconfigure(encoding="utf-8", newline="")
        with reading_utf8("standard input"):
            yield from split_text(sys.stdin, separator)
    else:
        with open(file, encoding="utf-8", newline="") as opened, reading_utf8(file):
            yield from split_text(opened, separator)


def split_text(opened, separator: str | None) -> Iterator[Piece]:
    """Pieces of an open text file. Line breaks around a separator belong to neither document."""
    rest = ""
    while text := opened.read(PIECE_CHARACTERS):
        rest += text
        if separator is not None:
            *whole, rest = rest.split(separator)
            yield from ((document.strip("\r\n"), True) for document in whole)
            rest = rest.lstrip("\r\n") if whole else rest
        for cut in reversed(
            [match.start() for match in GOOD_CUT.finditer(rest, max(0, len(rest) - PIECE_CHARACTERS))]
        ):
            # What follows the cut must be long enough to tell that it is no beginning of a separator.
            if separator is None or len(rest) - cut > len(separator):
                yield rest[:cut], False
                rest = rest[cut:]
                break
        else:
            if len(rest) > LONGEST_PIECE and rest.strip():
                cut = len(rest.rstrip()) - 1  # something visible stays, so that the document's end is not empty
                yield rest[:cut], False
                rest = rest[cut:]
    yield rest.rstrip("\r\n") if separator is not None else rest, True


class reading_utf8:
    """Context manager that says in one sentence which file is not UTF-8, and where."""

    def __init__(self, file: str):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, UnicodeDecodeError):
            raise ValueError(
                f"{self.file} is not UTF-8 (byte {error.object[error.start]:#04x}); convert it, e.g. with iconv."
            ) from error
