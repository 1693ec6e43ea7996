"""Documents from files, standard input and the Hub, a bounded piece at a time.

Every reader yields pieces `(text, ends_document)`. A document is one row of a table (.jsonl, .parquet, a Hub data
set), one text file, or what stands between two separators in a text file. Text files may be larger than memory, so
what is longer than a million characters comes in pieces, cut where GPT-2's splitting rule cuts anyway: the pieces
have the tokens of the whole. A row of a table is never cut and has to fit into memory; where its text is null, it is
left out.
"""

import glob
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from ..tokenization import check_text

PIECE_CHARACTERS = 2**20
# Without a good place to cut, a piece grows up to here and is then cut anyway, perhaps within a token.
LONGEST_PIECE = 16 * PIECE_CHARACTERS
# Up to the last good place to cut: before a space after something visible, or after a single line break between two
# visible characters. No token of GPT-2 reaches across, whatever stands around it.
UP_TO_LAST_CUT = re.compile(r".*(?:(?<=\S)(?= )|(?<=\S\n)(?=\S))", re.DOTALL)

Piece = tuple[str, bool]

logger = logging.getLogger(__name__)


def find_files(patterns: list[str]) -> list[str]:
    """Files that the patterns match, each once, in the order of the patterns; `-` is standard input.

    Raises FileNotFoundError for a pattern without a match, ValueError for an empty file or an unknown kind.
    """
    files = []
    for pattern in patterns:
        if pattern == "-" or Path(pattern).is_file():  # a file's own name may look like a pattern: notes[1].txt
            matches = [pattern]
        else:
            matches = [match for match in sorted(glob.glob(pattern, recursive=True)) if Path(match).is_file()]
        if not matches:
            raise FileNotFoundError(
                f"No file matches {pattern!r}; give existing files, globs, or - for standard input."
            )
        files += matches
    files = list(dict.fromkeys(files))
    for file in files:
        if file != "-" and Path(file).stat().st_size == 0:
            raise ValueError(f"{file} is empty; leave it out.")
        if file != "-" and Path(file).suffix not in (".txt", ".jsonl", ".parquet"):
            raise ValueError(f"{file} is of an unknown kind; use .txt, .jsonl or .parquet.")
    return files


def read_files(files: list[str], text_column: str = "text", separator: str | None = None) -> Iterator[Piece]:
    """The documents of `files` (from `find_files`), without byte order marks. `separator` splits text files.

    Raises ValueError for text that is not UTF-8, for a broken line of JSON and for a row whose `text_column` is
    missing or holds no text.
    """
    for file in files:
        if file.endswith(".jsonl"):
            yield from read_jsonl(file, text_column)
        elif file.endswith(".parquet"):
            yield from read_parquet(file, text_column)
        else:
            yield from read_text(file, separator)


def read_hub(
    name: str, config: str | None, split: str, text_column: str = "text", part: tuple[int, int] = (0, 1)
) -> Iterator[Piece]:
    """The documents of a data set on the Hub, streamed; with `part` (I, N) only those of one of N machines.

    Where N divides the number of the data set's files, a part downloads its own files only.

    Raises ConnectionError where the Hub cannot be reached or stops answering, ValueError for a missing column.
    """
    yield from read_rows(hub_rows(name, config, split, part), text_column, f"{name}, row")


def hub_rows(name: str, config: str | None, split: str, part: tuple[int, int]) -> Iterator[dict]:
    import datasets
    from datasets.distributed import split_dataset_by_node

    try:
        data = datasets.load_dataset(name, config, split=split, streaming=True)
        yield from split_dataset_by_node(data, rank=part[0], world_size=part[1])
    except Exception as error:  # the library raises errors of its own, httpx's and fsspec's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConnectionError(
            f"The data set {name!r} could not be had from the Hugging Face Hub ({reason}); "
            "try again later, or give local .txt, .jsonl or .parquet files with --input."
        ) from error


def take_part(pieces: Iterable[Piece], part: tuple[int, int]) -> Iterator[Piece]:
    """With `part` (I, N): the documents I, I + N, I + 2N, ..."""
    which, parts = part
    document = 0
    for text, ends_document in pieces:
        if document % parts == which:
            yield text, ends_document
        document += ends_document


def read_rows(rows: Iterable[dict | None], text_column: str, origin: str) -> Iterator[Piece]:
    """The text of each row. `origin` is what an error calls a row, but for its number; an empty line is `None`."""
    nulls = 0
    for number, row in enumerate(rows, start=1):
        if row is None:
            continue
        text = row.get(text_column, "")
        if text is None:
            nulls += 1
        elif text_column not in row or not isinstance(text, str):
            columns = ", ".join(map(str, row))
            raise ValueError(f"{origin} {number} has no text in column {text_column!r}; its columns are {columns}.")
        else:
            yield checked(text, f"{origin} {number}"), True
    if nulls:
        logger.warning("%s: %d rows were left out, because their %s is null.", origin, nulls, text_column)


def checked(text: str, origin: str) -> str:
    try:
        return check_text(text)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None


def read_jsonl(file: str, text_column: str) -> Iterator[Piece]:
    with open(file, encoding="utf-8-sig") as lines, reading_utf8(file):
        rows = (json_row(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1))
        yield from read_rows(rows, text_column, f"{file}, line")


def json_row(line: str, origin: str) -> dict | None:
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin} is not JSON: {error.msg}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{origin} is not a JSON object with a column for the text.")
    return row


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
    batches = table.iter_batches(batch_size=256, columns=[text_column])
    rows = (row for batch in batches for row in batch.to_pylist())
    yield from read_rows(rows, text_column, f"{file}, row")


def read_whole_text(file: str) -> str:
    """A file's text with its own line ends. Raises ValueError where it is empty or not UTF-8."""
    with reading_utf8(file):
        text = Path(file).read_bytes().decode()  # Path.read_text() would change line ends, and with them the bytes
    if not text:
        raise ValueError(f"{file} is empty.")
    return text


def read_text(file: str, separator: str | None) -> Iterator[Piece]:
    if file == "-":
        sys.stdin.reconfigure(encoding="utf-8-sig", newline="")  # type: ignore[union-attr]
        with reading_utf8("standard input"):
            yield from split_text(sys.stdin, separator)
    else:
        with open(file, encoding="utf-8-sig", newline="") as opened, reading_utf8(file):
            yield from split_text(opened, separator)


def split_text(opened: TextIO, separator: str | None) -> Iterator[Piece]:
    """Pieces of an open text file. Line breaks around a separator belong to neither document."""
    trimmed = "" if separator is None else "\r\n"
    rest = ""
    while text := opened.read(PIECE_CHARACTERS):
        rest += text
        if separator is not None:
            *documents, rest = rest.split(separator)
            yield from ((document.strip(trimmed), True) for document in documents)
        if cut := find_cut(rest, separator):
            yield rest[:cut].lstrip(trimmed), False
            rest = rest[cut:]
    yield rest.strip(trimmed), True


def find_cut(text: str, separator: str | None) -> int:
    """Where to cut a long text, or 0. What stays behind the cut is never empty, nor only line breaks."""
    if len(text) < PIECE_CHARACTERS:
        return 0
    # What follows the cut must be long enough to tell that it is no beginning of a separator.
    end = len(text) - len(separator or "")
    if match := UP_TO_LAST_CUT.match(text, 0, end):
        return match.end()
    return max(0, len(text[:end].rstrip()) - 1) if len(text) > LONGEST_PIECE else 0


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
