"""Pairs of answers to one prompt, of which people prefer one: read and checked.

A row of data has one of these forms, each with the two answers `chosen` and `rejected`:

    {"instruction": ..., "input": ..., "chosen": ..., "rejected": ...}     the input may be missing or empty
    {"prompt": ..., "chosen": ..., "rejected": ...}                        texts, or lists of messages
    {"chosen": [...], "rejected": [...]}                                   whole conversations, with the same prompt
"""

import logging
from dataclasses import dataclass
from typing import Any

from .instructions import Conversation, as_conversation
from .rows import read_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preference:
    """Two conversations that differ in the last answer only."""

    chosen: Conversation
    rejected: Conversation

    @property
    def prompt(self) -> list[dict[str, str]]:
        return self.chosen.prompt


def read_preferences(source: str | list[str], max_rows: int | None = None) -> list[Preference]:
    """The first `max_rows` pairs of files that `read_rows` reads, or of the train split of a data set on the Hub.

    Pairs of equal answers, and pairs with an empty one, teach no preference; they are left out, and a warning says how
    many.

    Raises FileNotFoundError for a missing file, ConnectionError if the Hub cannot be reached, and ValueError,
    with the number of the row, for a row in none of the forms at the top of this file.
    """
    pairs: list[Preference] = []
    equal = 0
    for name in [source] if isinstance(source, str) else source:
        for row, origin in read_rows(name):
            if max_rows is not None and len(pairs) == max_rows:
                break
            pair = as_preference(row, origin)
            answers = {pair.chosen.output.strip(), pair.rejected.output.strip()}
            if len(answers) == 2 and "" not in answers:
                pairs.append(pair)
            else:
                equal += 1
    if equal:
        logger.warning("Pairs left out because their answers are equal or empty: %d.", equal)
    if not pairs:
        raise ValueError(f"There is no pair of a chosen and a rejected answer in {source}.")
    return pairs


def as_preference(row: dict[str, Any], origin: str) -> Preference:
    """Raises ValueError for a row in none of the forms at the top of this file."""
    for name in ("chosen", "rejected"):
        if not isinstance(row.get(name), str | list):
            columns = ", ".join(map(str, row))
            raise ValueError(
                f"{origin} has no answer in {name!r}; its columns are {columns}. Use instruction, input, chosen and "
                "rejected, or prompt, chosen and rejected."
            )
    chosen, rejected = (answered(row, row[name], origin) for name in ("chosen", "rejected"))
    if chosen.prompt != rejected.prompt:
        raise ValueError(f"{origin}: the conversations of chosen and rejected differ before their last answer.")
    return Preference(chosen, rejected)


def answered(row: dict[str, Any], answer: str | list, origin: str) -> Conversation:
    """The conversation of a row that ends with `answer`."""
    if isinstance(row.get("prompt"), list) or isinstance(answer, list):
        prompt = row.get("prompt") or []
        earlier = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        last = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        return as_conversation({"messages": [*earlier, *last]}, origin)
    if "instruction" in row:
        names = ("instruction", "input", "context", "system", "history")
        return as_conversation({name: row[name] for name in names if name in row} | {"output": answer}, origin)
    return as_conversation({"prompt": row.get("prompt"), "completion": answer}, origin)
