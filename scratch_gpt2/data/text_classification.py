"""Labeled texts: read, cleaned, split, and kept in a folder that examples/classify.py trains on.

A row is `{"text": str, "label": str}`. A label is the name of one class; a number in a file becomes its digits.
"""

import ast
import hashlib
import html
import json
import math
import os
import random
import re
import shutil
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import Located, hub_rows, read_rows, tsv_rows
from .text_files import kind_of, open_text
from .text_sources import checked

TEXT_COLUMN, LABEL_COLUMN = "text", "label"
# A list in the spelling of NumPy, "[0 1 0]", or of JSON, "[true, false]", neither of which is Python's.
NUMBER = r"(?:[-+]?\d[\d.e+-]*|true|false|null|nan)"
VECTOR = re.compile(rf"\[\s*{NUMBER}(?:[\s,]+{NUMBER})*\s*\]", re.IGNORECASE)
SPLITS = ("train", "validation", "test")
FRACTIONS = (0.7, 0.1, 0.2)
REPORT = "report.json"

Row = dict[str, str]


@dataclass(frozen=True)
class PreparedClassification:
    """The contents of a prepared folder: the rows of train, validation and test, the labels in the order of their ids,
    and a report of how the rows were made."""

    splits: dict[str, list[Row]]
    label_names: list[str]
    report: dict


def read_labelled_text(
    file: str | os.PathLike, text_column: str = TEXT_COLUMN, label_column: str = LABEL_COLUMN
) -> list[Row]:
    """The rows of a file that `read_rows` reads, without the line breaks after a text.

    Quotation marks in a .tsv are characters like any other: read by a CSV reader's rules, two of the 5,574 messages of
    the SMS Spam Collection vanish in others. Unless its first line names both columns, a .tsv (or a file without
    suffix) has that collection's layout: `label<TAB>text`, no header.

    Raises FileNotFoundError, and ValueError for an unknown kind, text that is not UTF-8, a missing column, and a row
    without a text or without exactly one label.
    """
    file = str(file)
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} is not a file; give labeled text as .tsv, .csv, .json, .jsonl or .parquet.")
    rows = [labelled_row(row, text_column, label_column, at) for row, at in rows_of(file, text_column, label_column)]
    if not rows:
        raise ValueError(f"{file} has no rows; give a file with labeled text.")
    return rows


def rows_of(file: str, text_column: str, label_column: str) -> Iterator[Located]:
    if kind_of(file) in ("", ".tsv"):
        default = (text_column, label_column) == (TEXT_COLUMN, LABEL_COLUMN)
        with open_text(file, newline="\n") as opened:
            yield from tsv_rows(opened, file, headerless=(LABEL_COLUMN, TEXT_COLUMN) if default else ())
    else:
        yield from read_rows(file)


def read_labelled_hub(
    name: str,
    config: str | None = None,
    split: str = "train",
    text_column: str = TEXT_COLUMN,
    label_column: str = LABEL_COLUMN,
) -> list[Row]:
    """The rows of one split of a data set on the Hub; labels by their names where the data set has some.

    Raises ConnectionError if the Hub cannot be reached, and ValueError as `read_labelled_text`.
    """
    rows = hub_rows(name, config, split)
    return [labelled_row(row, text_column, label_column, origin) for row, origin in rows]


def labelled_row(row: dict, text_column: str, label_column: str, origin: str) -> Row:
    if missing := [column for column in (text_column, label_column) if column not in row]:
        columns = ", ".join(repr(str(name)[:40]) for name in row)
        raise ValueError(f"{origin} has no column {' and no '.join(map(repr, missing))}; its columns are {columns}.")
    text = row[text_column]
    if text is None or (isinstance(text, str) and not text.strip()):
        raise ValueError(f"{origin} has an empty text; remove the row.")
    if not isinstance(text, str):
        raise ValueError(f"{origin} has {text!r} in column {text_column!r}, which is not text.")
    label = class_name(row[label_column], label_column, origin)
    return {"text": checked(text.rstrip("\r\n"), origin), "label": checked(label, origin)}


def class_name(label: object, column: str, origin: str) -> str:
    """The name of the one class that a label is. Raises ValueError for no label and for several in one cell."""
    if label is None or str(label).strip().lower() in ("", "nan"):
        raise ValueError(f"{origin} has no label in column {column!r}; label or remove the row.")
    if is_collection(label):
        raise ValueError(
            f"{origin} has {str(label)[:60]!r} in column {column!r}; a label must be one class, not a list, a one-hot "
            "vector or an object."
        )
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # a column of integers becomes one of floats where a table has an empty cell
    return str(label).strip()


def is_collection(label: object) -> bool:
    """Whether a label is a list or an object, or the text of one, as which a table holds it."""
    if isinstance(label, str) and VECTOR.fullmatch(label.strip()):
        return True
    if isinstance(label, str) and label.strip()[:1] in ("[", "{", "("):
        try:
            label = ast.literal_eval(label.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return False
    return isinstance(label, list | tuple | dict | set)


def label_order(label: str) -> tuple:
    """A key that sorts labels as people do: 2 before 10, and "class 2" before "class 10"."""
    if re.fullmatch(r"[+-]?\d+(\.\d+)?", label):
        return 0, float(label), [], label
    parts = re.split(r"(\d{1,15})", label)
    return 1, math.inf, [int(part) if number % 2 else part for number, part in enumerate(parts)], label


def unescape(rows: list[Row]) -> tuple[list[Row], int]:
    """The rows with HTML entities (`&amp;`, `&lt;#&gt;`) turned into characters, and how many texts had some."""
    unescaped = [row | {"text": html.unescape(row["text"])} for row in rows]
    return unescaped, sum(old != new for old, new in zip(rows, unescaped, strict=True))


def remove_duplicates(rows: list[Row]) -> tuple[list[Row], int, int]:
    """Keep the first row of each text, and none of a text with several labels, of which the right one is unknown.

    Texts that differ only in Unicode normalization are the same text.

    Returns the rows, how many others were removed as duplicates, and how many as contradictions.
    """
    labels: dict[str, set[str]] = {}
    for row in rows:
        labels.setdefault(composed(row["text"]), set()).add(row["label"])
    contradictory = {text for text, several in labels.items() if len(several) > 1}
    agreed = [row for row in rows if composed(row["text"]) not in contradictory]
    first = {composed(row["text"]): row for row in reversed(agreed)}
    kept = [row for row in agreed if first[composed(row["text"])] is row]
    return kept, len(agreed) - len(kept), len(rows) - len(agreed)


def composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def balance(rows: list[Row], seed: int) -> list[Row]:
    """As many rows of each label as the rarest one has, drawn at random, in their original order."""
    by_label = group_by_label(rows)
    rarest = min(len(members) for members in by_label.values())
    rng = random.Random(seed)
    kept = {number for members in by_label.values() for number in rng.sample(members, rarest)}
    return [row for number, row in enumerate(rows) if number in kept]


def split(rows: list[Row], seed: int, fractions: tuple[float, float, float] = FRACTIONS) -> dict[str, list[Row]]:
    """Train, validation and test, each with the same share of every label as nearly as whole rows allow and at least
    one row of it; drawn at random, in their original order.

    Raises ValueError for fewer than two labels, a label with fewer than three rows, and fractions that do not sum to
    1.
    """
    if len(fractions) != len(SPLITS) or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"The fractions {fractions} must be three positive numbers that sum to 1, such as 0.7 0.1 0.2."
        )
    by_label = group_by_label(rows)
    if len(by_label) < 2:
        raise ValueError(f"All rows have the label {next(iter(by_label), None)!r}; a classifier needs at least two.")
    rng = random.Random(seed)
    numbers: dict[str, list[int]] = {name: [] for name in SPLITS}
    for label, members in by_label.items():
        if len(members) < len(SPLITS):
            raise ValueError(
                f"The label {label!r} has only {len(members)} of {len(rows)} rows, but train, validation and test "
                "need one each; add some, or remove the label (a header that the columns were not named after?)."
            )
        shuffled = rng.sample(members, len(members))
        test = min(max(1, round(len(members) * fractions[2])), len(members) - 2)
        validation = min(max(1, round(len(members) * fractions[1])), len(members) - 1 - test)
        numbers["test"] += shuffled[:test]
        numbers["validation"] += shuffled[test : test + validation]
        numbers["train"] += shuffled[test + validation :]
    return {name: [rows[number] for number in sorted(chosen)] for name, chosen in numbers.items()}


def group_by_label(rows: list[Row]) -> dict[str, list[int]]:
    """Row numbers of each label, labels in the order of `label_order`, so that a seed always means the same choice."""
    groups: dict[str, list[int]] = {label: [] for label in sorted({row["label"] for row in rows}, key=label_order)}
    for number, row in enumerate(rows):
        groups[row["label"]].append(number)
    return groups


def class_weights(labels: Iterable) -> list[float]:
    """Weights for the loss, in the sorted order of the labels: rows / (classes * rows of the class).

    Every class then has the same weight in the mean, and the weights of all rows sum to their number (King and Zeng
    2001; scikit-learn's "balanced").
    """
    counts = Counter(labels)
    return [counts.total() / (len(counts) * counts[label]) for label in sorted(counts)]


def prepare(
    rows: list[Row],
    source: dict[str, Any] | str,
    seed: int = 0,
    fractions: tuple[float, float, float] = FRACTIONS,
    unescape_entities: bool = False,
    keep_duplicates: bool = False,
    balance_labels: bool = False,
) -> PreparedClassification:
    """Clean and split `rows`: unescape, remove duplicates, balance, split, in this order.

    `source` describes where the rows come from, for the report. A step that was not asked for is `null` there. Near
    duplicates are texts that equal one of the training texts except for case, spaces and digits, such as the same
    advertisement with another telephone number.

    Raises ValueError as `split`.
    """
    labels_read, rows_read = count_labels(rows), len(rows)
    unescaped = duplicates = contradictory = balanced_away = None
    if unescape_entities:
        rows, unescaped = unescape(rows)
    if not keep_duplicates:
        rows, duplicates, contradictory = remove_duplicates(rows)
    if balance_labels:
        before = len(rows)
        rows = balance(rows, seed)
        balanced_away = before - len(rows)
    splits = split(rows, seed, fractions)
    label_names = list(group_by_label(rows))
    report = {
        "source": source,
        "rows_read": rows_read,
        "labels_read": labels_read,
        "texts_unescaped": unescaped,
        "duplicates_removed": duplicates,
        "contradictory_rows_removed": contradictory,
        "rows_removed_to_balance": balanced_away,
        "seed": seed,
        "fractions": list(fractions),
        "label_names": label_names,
        "splits": {name: describe(splits[name], () if name == "train" else splits["train"]) for name in SPLITS},
    }
    return PreparedClassification(splits, label_names, report)


def describe(rows: list[Row], train: Iterable[Row]) -> dict:
    return {
        "rows": len(rows),
        "labels": count_labels(rows),
        "duplicates_of_train": count_shared(rows, train, composed),
        "near_duplicates_of_train": count_shared(rows, train, likeness),
        "sha256": hashlib.sha256(jsonl_bytes(rows)).hexdigest(),
    }


def count_labels(rows: list[Row]) -> dict[str, int]:
    return {label: len(numbers) for label, numbers in group_by_label(rows).items()}


def count_shared(rows: list[Row], others: Iterable[Row], key: Callable[[str], str]) -> int:
    """How many texts of `rows` have a key that a text of `others` has too."""
    keys = {key(row["text"]) for row in others}
    return sum(key(row["text"]) in keys for row in rows)


def likeness(text: str) -> str:
    return " ".join(re.sub(r"\d+", "0", composed(text).casefold()).split())


def jsonl_bytes(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def check_new(folder: str | os.PathLike) -> None:
    if Path(folder).exists():
        raise FileExistsError(f"{folder} exists already; delete it or choose another folder.")


def save_prepared(prepared: PreparedClassification, folder: str | os.PathLike) -> None:
    """Write train.jsonl, validation.jsonl, test.jsonl and report.json, under another name first, so that the folder is
    never incomplete. Raises FileExistsError if `folder` exists."""
    check_new(folder)
    folder = Path(folder)
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
        for name, rows in prepared.splits.items():
            (unfinished / f"{name}.jsonl").write_bytes(jsonl_bytes(rows))
        (unfinished / REPORT).write_text(
            json.dumps(prepared.report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load_prepared(folder: str | os.PathLike) -> PreparedClassification:
    """Read what `save_prepared` wrote.

    Raises FileNotFoundError for a folder without a report, and ValueError if the splits are not those that the
    report describes.
    """
    folder = Path(folder)
    if not (folder / REPORT).is_file():
        raise FileNotFoundError(f"{folder} has no {REPORT}; make the folder with examples/prepare_classification.py.")
    try:
        report = json.loads((folder / REPORT).read_bytes())
        splits = {}
        for name in SPLITS:
            written = (folder / f"{name}.jsonl").read_bytes()
            if hashlib.sha256(written).hexdigest() != report["splits"][name]["sha256"]:
                raise ValueError(f"{name}.jsonl was changed")
            splits[name] = [json.loads(line) for line in written.split(b"\n")[:-1]]
        return PreparedClassification(splits, report["label_names"], report)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder} is damaged ({reason}); make it again with examples/prepare_classification.py."
        ) from error
