"""Rows of JSON, JSON lines, CSV, TSV and Parquet files, compressed or not, and of data sets on the Hugging Face Hub.

Every reader yields `(row, origin)`: a dict by column, and what an error calls it, such as `rows.csv, line 3`. A reader
drops nothing: what does not fit is an error that names the file and the line.
"""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from transformers.utils.hub import is_offline_mode

from ..checkpoint_files import hub_answers
from ..files import sha256
from .text_files import STDIN, is_compressed, kind_of, open_binary, open_text

Located = tuple[dict[str, Any], str]


def read_rows(source: str, columns: list[str] | None = None) -> Iterator[Located]:
    """The rows of one file, or of the train split of a data set on the Hub.

    Args:
        columns: the only columns of a Parquet file to read; all by default.

    Raises FileNotFoundError for a missing file, ConnectionError if the Hub cannot be reached, and ValueError for a
    file of an unknown kind, text that is not UTF-8, and a row that cannot be read.
    """
    kind = kind_of(source)
    if kind == ".parquet" and Path(source).is_file():
        yield from parquet_rows(source, columns)
    elif kind in TEXT_READERS and Path(source).is_file():
        with open_text(source, NEWLINES[kind]) as opened:
            yield from TEXT_READERS[kind](opened, source)
    elif kind in ROW_KINDS:
        raise FileNotFoundError(f"{source} does not exist; give an existing file, or a data set of the Hub.")
    elif Path(source).exists():
        raise ValueError(f"{source} has an unsupported file type; use one of {', '.join(ROW_KINDS)}.")
    else:
        yield from hub_rows(source)


def json_lines(opened: TextIO, file: str) -> Iterator[Located]:
    """`opened` must split lines at line feeds only: JSON may hold U+2028 and its like."""
    for number, line in enumerate(opened, start=1):
        origin = f"{file}, line {number}"
        if line.strip():
            yield checked_row(parse_json(line, file, first_line=number), origin), origin


def json_array(opened: TextIO, file: str) -> Iterator[Located]:
    rows = parse_json(opened.read(), file)
    if not isinstance(rows, list):
        raise ValueError(f"{file} is not a JSON list of rows.")
    for number, row in enumerate(rows, start=1):
        origin = f"{file}, row {number}"
        yield checked_row(row, origin), origin


def checked_row(row: object, origin: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{origin} is not a JSON object with a value for each column.")
    return row


def parse_json(text: str, file: str, first_line: int = 1) -> Any:
    """The value of a JSON text that begins at line `first_line` of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        position, problem = error.pos, f"is not JSON: {error.msg}"
        if error.msg == "Extra data" and first_line == 1:
            problem += "; JSON lines need the suffix .jsonl"
    except RecursionError:
        position, problem = deepest(text), "is JSON that is nested too deeply"
    except ValueError:  # Python converts at most 4,300 digits
        position = max(re.finditer(r"\d+", text), key=lambda digits: len(digits[0])).start()
        problem = "has a number of too many digits"
    line = first_line + text.count("\n", 0, position)
    raise ValueError(f"{file}, line {line} {problem}.")


def deepest(text: str) -> int:
    """Where the brackets of a JSON text are nested the most."""
    depth = greatest = position = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', text, re.DOTALL):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > greatest:
            greatest, position = depth, token.start()
    return position


def csv_cells(opened: TextIO, file: str) -> Iterator[tuple[list[str], int]]:
    """The cells of every row that has some, the header among them, and the number of the row's last line."""
    csv.field_size_limit(2**31 - 1)  # by default 131,072 characters
    reader, line = csv.reader(opened, strict=True), 0
    try:
        for cells in reader:
            line = reader.line_num
            if cells:
                yield cells, line
    except csv.Error as error:  # in the row that begins after the last one that could be read
        raise ValueError(f"{file}, line {line + 1} is not CSV: {error}.") from error


def csv_rows(opened: TextIO, file: str) -> Iterator[Located]:
    columns: list[str] | None = None
    for cells, line in csv_cells(opened, file):
        if columns is None:
            columns = checked_columns(cells, f"{file}, line {line}")
            continue
        origin = f"{file}, line {line}"
        check_cells(cells, columns, origin, "put texts that contain commas in quotation marks")
        missing = [None] * (len(columns) - len(cells))
        yield dict(zip(columns, [*cells, *missing], strict=True)), origin


def tsv_rows(opened: TextIO, file: str, headerless: tuple[str, ...] = ()) -> Iterator[Located]:
    """Quotation marks are characters like any other. `headerless` names the columns of a file whose first line does
    not; the last of them then takes the rest of the line, tabs included."""
    columns: list[str] | None = None
    for number, line in enumerate(opened, start=1):
        line, origin = line.rstrip("\r\n"), f"{file}, line {number}"
        cells = line.split("\t")
        if columns is None:
            headerless = () if set(headerless) <= set(cells) else headerless
            columns = list(headerless) or checked_columns(cells, origin)
            if not headerless:
                continue
        if headerless:
            cells = line.split("\t", len(columns) - 1)
        check_cells(cells, columns, origin, "replace tabs inside texts")
        if line:
            yield dict(zip(columns, cells, strict=False)), origin


def checked_columns(columns: list[str], origin: str) -> list[str]:
    name, times = Counter(filter(None, columns)).most_common(1)[0] if any(columns) else ("", 0)
    if times > 1:
        raise ValueError(f"{origin} names the column {name!r} {times} times; rename all but one.")
    return columns


def check_cells(cells: list[str], columns: list[str], origin: str, remedy: str) -> None:
    if len(cells) > len(columns):
        raise ValueError(f"{origin} has {len(cells)} cells, but the header names {len(columns)} columns; {remedy}.")


def parquet_rows(file: str, columns: list[str] | None = None) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    with open_binary(file) as opened:
        try:
            table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(opened.read()) if is_compressed(file) else file)
            names = table.schema_arrow.names
            missing = [column for column in columns or [] if column not in names]
            if not missing:
                batches = table.iter_batches(batch_size=256, columns=columns)
                rows = (row for batch in batches for row in batch.to_pylist())
                for number, row in enumerate(rows, start=1):
                    yield row, f"{file}, row {number}"
        except pyarrow.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file} is not a Parquet file or is damaged: {reason}") from error
    if missing:
        raise ValueError(f"{file} has no column {missing[0]!r}; its columns are {', '.join(names)}.")


def hub_rows(
    name: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Located]:
    """The rows of one split of a data set on the Hub, classes by their names; with `part` (I, N) those of the I-th of
    N machines. Where N divides the number of the data set's files, a machine downloads its own files only. In offline
    mode (HF_HUB_OFFLINE=1), the data set is read from the local cache.

    Raises ConnectionError if the Hub cannot be reached or stops answering.
    """
    import datasets
    from datasets.distributed import split_dataset_by_node

    with downloading(name):
        options = {"streaming": True} if streaming else {}
        data = datasets.load_dataset(name, config, split=split, **options)
        features = getattr(data, "features", None) or {}
        classes = {column: kind.names for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
        if part[1] > 1:
            data = split_dataset_by_node(data, rank=part[0], world_size=part[1])
        for number, row in enumerate(data, start=1):
            for column, names in classes.items():
                value = row[column]
                row[column] = None if value is None or value < 0 else names[value]  # -1: not labelled
            yield row, f"{name}, row {number}"


@contextmanager
def downloading(name: str) -> Iterator[None]:
    try:
        if not (os.path.exists(name) or is_offline_mode() or hub_answers()):  # datasets would retry for 24 seconds
            raise ConnectionError("no answer; HF_HUB_OFFLINE=1 reads the local cache")
        yield
    except Exception as error:  # the library raises errors of its own, httpx's and fsspec's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConnectionError(
            f"The data set {name!r} could not be downloaded from the Hugging Face Hub ({reason}); check its name and "
            "the network, or give a local file instead."
        ) from error


Reader = Callable[[TextIO, str], Iterator[Located]]
TEXT_READERS: dict[str, Reader] = {".json": json_array, ".jsonl": json_lines, ".csv": csv_rows, ".tsv": tsv_rows}
NEWLINES = {".json": "", ".jsonl": "\n", ".csv": "", ".tsv": "\n"}
ROW_KINDS = (*TEXT_READERS, ".parquet")


def describe_files(files: Iterable[str]) -> dict[str, Any]:
    """What the report or index of prepared data says of the files that were read: names without folders, contents by
    their checksums."""
    described = [
        {"name": "standard input"}
        if file == STDIN
        else {"name": Path(file).name, "bytes": Path(file).stat().st_size, "sha256": sha256(Path(file))}
        for file in files
    ]
    return {"kind": "files", "files": described}


def describe_hub(name: str, config: str | None, split: str) -> dict[str, Any]:
    return {"kind": "hub", "name": name, "config": config, "split": split}


def hub_id(source: object) -> str | None:
    """The id of the data set on the Hub that a described source is; `None` for anything else."""
    return source["name"] if isinstance(source, dict) and source.get("kind") == "hub" else None
