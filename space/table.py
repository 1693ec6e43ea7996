"""A visitor's CSV file: its encoding and delimiter found out, its rows kept whole, the column of texts chosen."""

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from limits import MAX_COLUMNS, MAX_FILE_BYTES, MAX_ROWS

TEXT_COLUMNS = ("text", "message", "sms", "body", "content", "comment", "review", "sentence", "tweet")
DELIMITERS = (",", ";", "\t", "|")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclass(frozen=True)
class Table:
    """`columns` are names from the first row, or `column 1`, `column 2` ... where it is no header."""

    columns: list[str]
    rows: list[list[str]]

    def texts(self, column: str | None) -> list[str]:
        """The cells of a column, by default the one whose name says that it holds texts, or the only one.

        Raises ValueError where there is no such column.
        """
        found = column or self.text_column()
        if found not in self.columns:
            raise ValueError(
                f"No column is called {' or '.join(TEXT_COLUMNS[:3])}; choose the column of the texts from "
                f"{', '.join(self.columns)[:200]}."
            )
        position = self.columns.index(found)
        return [row[position] for row in self.rows]

    def text_column(self) -> str | None:
        """The column to begin with: the only one, or the first whose name is one of TEXT_COLUMNS."""
        if len(self.columns) == 1:
            return self.columns[0]
        return next((name for wanted in TEXT_COLUMNS for name in self.columns if name.lower() == wanted), None)


def read_table(path: str | os.PathLike, has_header: bool = True) -> Table:
    """Read a CSV file in UTF-8, UTF-16 or Latin-1, with commas, semicolons, tabs or bars between the cells.

    Raises ValueError for a file that is too large, has no rows, too many rows or columns, a row with more cells than
    the header, or a quotation mark that is not closed.
    """
    size = Path(path).stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"The file has {size:,} bytes, and at most {MAX_FILE_BYTES:,} are read here; split it.")
    content = decode(Path(path).read_bytes())
    if "\0" in content:
        raise ValueError("The file is not text; save it as CSV.")
    csv.field_size_limit(MAX_FILE_BYTES)
    delimiter = find_delimiter(content)
    try:
        numbered = parse(content, delimiter, strict=True)
    except csv.Error as error:
        raise ValueError(
            f"A quotation mark is not closed or stands alone ({error}); double those in texts."
        ) from error
    if not numbered:
        raise ValueError("The file is empty; give one text per row.")
    names = [cell.strip() for cell in numbered[0][1]]
    width = len(names)
    if width > MAX_COLUMNS:
        raise ValueError(f"The file has {width:,} columns, and at most {MAX_COLUMNS} are read here; remove some.")
    is_header = has_header and (width > 1 or names[0].lower() in TEXT_COLUMNS)
    numbered = numbered[int(is_header) :]
    if not numbered:
        raise ValueError("The file has a header and no rows; give one text per row.")
    if len(numbered) > MAX_ROWS:
        raise ValueError(f"The file has more than {MAX_ROWS:,} rows; split it.")
    for line, row in numbered:
        if len(row) > width:
            raise ValueError(
                f"Line {line} has {len(row)} cells and the first row {width}; put texts that contain {delimiter!r} in "
                "quotation marks."
            )
    rows = [row + [""] * (width - len(row)) for _, row in numbered]
    columns = distinct(names) if is_header else [f"column {number}" for number in range(1, width + 1)]
    return Table(columns, rows)


def decode(content: bytes) -> str:
    """UTF-8 or UTF-16 with a byte order mark, UTF-8, or else Windows' Latin-1, which Excel writes."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def find_delimiter(content: str) -> str:
    """The one that divides the first row, and divides the most rows into as many cells."""
    agreeing = {}
    for delimiter in DELIMITERS:
        widths = [len(row) for _, row in parse(content, delimiter)]
        agreeing[delimiter] = widths.count(widths[0]) if widths and widths[0] > 1 else 0
    return max(DELIMITERS, key=lambda delimiter: agreeing[delimiter])


def parse(content: str, delimiter: str, strict: bool = False) -> list[tuple[int, list[str]]]:
    """(line, cells) of the rows that are not blank, up to one more than a header and MAX_ROWS. Unless `strict`, a
    quotation mark that is not closed takes all the rest for one cell."""
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=strict)
    return list(islice(((reader.line_num, row) for row in reader if row), MAX_ROWS + 2))


def distinct(names: list[str]) -> list[str]:
    """Names to choose from: none empty, none twice."""
    named = [name or f"column {number}" for number, name in enumerate(names, start=1)]
    return [name if named.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(named, start=1)]


def write_table(path: Path, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(map(harmless, header))
        writer.writerows(map(harmless, row) for row in rows)


def harmless(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula (OWASP, "CSV Injection")."""
    return f"'{cell}" if cell.lstrip(" ").startswith(FORMULA_STARTS) else cell
