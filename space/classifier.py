"""Texts to labels: one with the words that decided, or a CSV file of them."""

import csv
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from limits import MAX_EXPLAINED_CHARACTERS, MAX_FILE_BYTES, MAX_ROWS, check_input

from scratch_gpt2.inspection import token_attributions
from scratch_gpt2.prediction import classify_text

TEXT_COLUMNS = ("text", "message", "sms")
ROWS_AT_ONCE = 32
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def explain(model, tokenizer, text: str) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Probabilities by label, and the text in words, each with how much it speaks for the likeliest label, as a part
    of the strongest word: from -1 (against it) to 1.

    Raises ValueError for a text that is empty or too long.
    """
    check_input(text, MAX_EXPLAINED_CHARACTERS)
    probabilities = classify_text(model, tokenizer, text)[0]
    pieces = token_attributions(model, tokenizer, text, next(iter(probabilities)))
    words = join_words(pieces)
    strongest = max(abs(value) for _, value in words) or 1.0
    return probabilities, [(word, round(value / strongest, 3)) for word, value in words]


def join_words(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Tokens that belong to one word, joined, and their attributions added. A word begins with its white space."""
    words: list[tuple[str, float]] = []
    for piece, value in pieces:
        if words and not piece[:1].isspace():
            before, so_far = words.pop()
            piece, value = before + piece, so_far + value
        words.append((piece, value))
    return words


def read_texts(path: str | os.PathLike) -> list[str]:
    """The texts of a CSV file: its column `text`, `message` or `sms`, or without such a header its first column.

    Raises ValueError for a file that is too large, not UTF-8, not CSV, without texts, or with too many rows.
    """
    size = Path(path).stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"The file has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read here.")
    try:
        content = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"The file is not UTF-8 at byte {error.start}; save it as UTF-8.") from None
    try:
        # One row more than allowed tells that there are too many; a header may be another.
        rows = list(islice((row for row in csv.reader(content.splitlines(keepends=True)) if row), MAX_ROWS + 2))
    except csv.Error as error:
        raise ValueError(f"The file cannot be read as CSV ({error}).") from None
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    column = next((header.index(name) for name in TEXT_COLUMNS if name in header), None)
    texts = [row[column or 0] for row in rows[column is not None :] if len(row) > (column or 0)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("The file holds no texts; give one per row, in the first column or in one called text.")
    if len(texts) > MAX_ROWS:
        raise ValueError(f"The file has more than {MAX_ROWS:,} rows; split it.")
    return texts


def classify_rows(model, tokenizer, texts: list[str]) -> Iterator[list[tuple[str, str, float]]]:
    """(text, label, probability) of all rows so far, after every few of them. Texts are cut to the model's context."""
    done: list[tuple[str, str, float]] = []
    for start in range(0, len(texts), ROWS_AT_ONCE):
        some = [text[:MAX_EXPLAINED_CHARACTERS] for text in texts[start : start + ROWS_AT_ONCE]]
        for text, probabilities in zip(some, classify_text(model, tokenizer, some, ROWS_AT_ONCE), strict=True):
            label, probability = next(iter(probabilities.items()))
            done.append((text, label, probability))
        yield done


def write_results(path: Path, rows: list[tuple[str, str, float]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "probability"])
        writer.writerows([harmless(text), harmless(label), f"{probability:.4f}"] for text, label, probability in rows)


def harmless(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula (OWASP, "CSV Injection")."""
    return f"'{cell}" if cell.lstrip(" ").startswith(FORMULA_STARTS) else cell
