"""Documents from files, standard input and the Hub, a bounded piece at a time.

Every reader yields pieces `(text, ends_document)`. A document is one row of a table, one text file, or what stands
between two separators in either. Text files may be larger than memory, so what is longer than a million characters
comes in pieces, cut where GPT-2's splitting rule cuts anyway: the pieces have the tokens of the whole. A row of a
table is never cut and has to fit into memory; a row whose text is null is left out.

The separator is `<|endoftext|>` unless another one is chosen. It never becomes text: whoever tokenizes the pieces puts
the end-of-text id after each document that has any. Line breaks next to a separator belong to neither document.
"""

import glob
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from ..tokenization import END_OF_TEXT, check_text
from .rows import ROW_KINDS, Located, hub_rows, json_lines, read_rows
from .text_files import STDIN, kind_of, open_text

PIECE_CHARACTERS = 2**20
# Without a good place to cut, a piece grows up to here and is then cut anyway, perhaps within a token.
MAX_PIECE_CHARACTERS = 16 * PIECE_CHARACTERS
# Up to the last good place to cut: before a space after something visible, or after a single line break between two
# visible characters. No token of GPT-2 reaches across, whatever stands around it.
UP_TO_LAST_CUT = re.compile(r".*(?:(?<=\S)(?= )|(?<=\S\n)(?=\S))", re.DOTALL)
LINE_BREAKS = "\r\n"
ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}
KINDS = (".txt", *ROW_KINDS)

Piece = tuple[str, bool]

logger = logging.getLogger(__name__)


def find_files(patterns: Iterable[str]) -> list[str]:
    """Files that the patterns match, each once, in the order of the patterns; `-` is standard input.

    Raises FileNotFoundError for a pattern without a match, ValueError for an empty file or an unknown kind.
    """
    files = []
    for pattern in patterns:
        matches = find_matches(pattern)
        if not matches:
            raise FileNotFoundError(
                f"No file matches {pattern!r}; give existing files, globs, or - for standard input."
            )
        files += matches
    files = list(dict.fromkeys(files))
    for file in files:
        if file != STDIN and Path(file).stat().st_size == 0:
            raise ValueError(f"{file} is empty; leave it out.")
        if file != STDIN and kind_of(file) not in KINDS:
            raise ValueError(f"{file} has an unsupported file type; use one of {', '.join(KINDS)}.")
    return files


def find_matches(pattern: str) -> list[str]:
    """The files that a pattern matches, in order; `-` is standard input."""
    if pattern == STDIN or Path(pattern).is_file():  # a file's own name may look like a pattern: notes[1].txt
        return [pattern]
    return [match for match in sorted(glob.glob(pattern, recursive=True)) if Path(match).is_file()]


def parse_separator(typed: str | None) -> str | None:
    r"""A separator as typed in a shell, where `\n`, `\r`, `\t` and `\\` stand for characters; `None` for an empty one,
    which switches separators off."""
    return re.sub(r"\\[nrt\\]", lambda escape: ESCAPES[escape[0]], typed or "") or None


def read_files(
    files: Iterable[str], text_column: str | None = None, separator: str | None = END_OF_TEXT
) -> Iterator[Piece]:
    """The documents of `files` (from `find_files`), without byte order marks.

    Args:
        text_column: the column of tables with the text, by default `text`. Standard input is read as JSON lines where
            a column is given, otherwise as text.
        separator: what stands between documents. One other than `<|endoftext|>` applies to text files only: the rows
            of a table are documents already.

    Raises ValueError for text that is not UTF-8, a row that cannot be read, and one whose `text_column` is missing or
    holds no text.
    """
    for file in files:
        if file == STDIN and text_column is not None:
            with open_text(STDIN, newline="\n") as opened:
                yield from documents_of_rows(json_lines(opened, "standard input"), text_column, separator)
        elif file == STDIN or kind_of(file) == ".txt":
            yield from read_text(file, separator)
        else:
            column = text_column or "text"
            yield from documents_of_rows(read_rows(file, [column]), column, separator)


def read_hub(
    name: str,
    config: str | None,
    split: str,
    text_column: str | None = None,
    separator: str | None = END_OF_TEXT,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Piece]:
    """The documents of a data set on the Hub, streamed; with `part` (I, N) only those of one of N machines.

    Raises ConnectionError if the Hub cannot be reached or stops answering, ValueError for a missing column.
    """
    rows = hub_rows(name, config, split, streaming=True, part=part)
    yield from documents_of_rows(rows, text_column or "text", separator)


def take_part(pieces: Iterable[Piece], part: tuple[int, int]) -> Iterator[Piece]:
    """With `part` (I, N): the documents I, I + N, I + 2N, ..."""
    which, parts = part
    document = 0
    for text, ends_document in pieces:
        if document % parts == which:
            yield text, ends_document
        document += ends_document


def documents_of_rows(rows: Iterable[Located], text_column: str, separator: str | None) -> Iterator[Piece]:
    nulls, seen_marker, origin = 0, False, ""
    for row, origin in rows:
        text = row.get(text_column, "")
        if text is None:
            nulls += 1
        elif text_column not in row or not isinstance(text, str):
            columns = ", ".join(map(str, row))
            raise ValueError(f"{origin} has no text in column {text_column!r}; its columns are {columns}.")
        else:
            has_marker = END_OF_TEXT in checked(text, origin)
            seen_marker = seen_marker or has_marker
            splits = has_marker and separator == END_OF_TEXT
            yield from ((document, True) for document in (split_documents(text) if splits else [text]))
    source = origin.rpartition(",")[0]
    if nulls:
        logger.warning("%s: rows left out because their %s is null: %d.", source, text_column, nulls)
    warn_of_separators(source, separator, found=True, marker=seen_marker)


def warn_of_separators(source: str, separator: str | None, found: bool, marker: bool) -> None:
    """Say where a chosen separator does not occur, and where `<|endoftext|>` is no separator although it occurs."""
    if separator == END_OF_TEXT:
        return
    if marker:
        reason = "no document separator is set" if separator is None else f"the document separator is {separator!r}"
        logger.warning("%s contains %s, which is read as ordinary text because %s.", source, END_OF_TEXT, reason)
    if separator is not None and not found:
        logger.warning("%s is one document, because the document separator %r does not occur.", source, separator)


def checked(text: str, origin: str) -> str:
    try:
        return check_text(text)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None


def read_whole_text(file: str) -> str:
    """A file's text with its own line ends, separators included.

    Raises ValueError if it is empty or not UTF-8, and for a table, whose syntax is no text.
    """
    if kind_of(file) in ROW_KINDS:
        raise ValueError(f"{file} is a table of rows; give its texts as a .txt file.")
    with open_text(file) as opened:
        text = opened.read()
    if not text:
        raise ValueError(f"{file} is empty.")
    return text


def read_text(file: str, separator: str | None = END_OF_TEXT) -> Iterator[Piece]:
    with open_text(file) as opened:
        yield from split_text(opened, separator, name="standard input" if file == STDIN else file)


def split_documents(text: str, separator: str | None = END_OF_TEXT) -> list[str]:
    """The documents of a whole text: one more than it has separators, and some may be empty."""
    first, *others = re.split(separator_pattern(separator), text) if separator else [text]
    warn_of_separators("The text", separator, found=bool(others), marker=END_OF_TEXT in text)
    if not others:
        return [first]
    return [first.rstrip(LINE_BREAKS), *(document.strip(LINE_BREAKS) for document in others)]


def separator_pattern(separator: str) -> str:
    r"""A line feed in a separator is a line break of either kind in the text, `\n` or `\r\n`."""
    return r"\r?\n".join(map(re.escape, re.split(r"(?<!\r)\n", separator)))


def split_text(opened: TextIO, separator: str | None = END_OF_TEXT, name: str = "The text") -> Iterator[Piece]:
    """Pieces of an open text file; together the documents of `split_documents`."""
    pattern = re.compile(separator_pattern(separator)) if separator else None
    longest = len(separator or "") + (separator or "").count("\n")
    rest, separated, seen_marker = "", False, False
    while text := opened.read(PIECE_CHARACTERS):
        rest += text
        seen_marker = seen_marker or END_OF_TEXT in rest
        if pattern is not None:
            *documents, rest = pattern.split(rest)
            for document in documents:
                yield document.strip(LINE_BREAKS) if separated else document.rstrip(LINE_BREAKS), True
                separated = True
        if cut := find_cut(rest, longest):
            yield rest[:cut].lstrip(LINE_BREAKS) if separated else rest[:cut], False
            rest = rest[cut:]
    yield rest.strip(LINE_BREAKS) if separated else rest, True
    warn_of_separators(name, separator, found=separated, marker=seen_marker)


def find_cut(text: str, longest_separator: int) -> int:
    """Where to cut a long text, or 0. What stays behind the cut is never empty, nor only line breaks."""
    if len(text) < PIECE_CHARACTERS:
        return 0
    # What follows the cut must be long enough to tell that it is no beginning of a separator.
    end = len(text) - longest_separator
    if match := UP_TO_LAST_CUT.match(text, 0, end):
        return match.end()
    return max(0, len(text[:end].rstrip()) - 1) if len(text) > MAX_PIECE_CHARACTERS else 0
