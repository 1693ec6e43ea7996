"""Batches of encoded conversations: padded, or packed so that nothing is computed on padding.

Rows are dicts of `input_ids` and `labels` from `instructions.encode_conversation`. GPT-2 pads with its end-of-text
token, so padding is recognized by length and never by id: a real end of text keeps its label.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from ..linear_cross_entropy import IGNORE_INDEX

Row = dict[str, list[int]]


@dataclass
class PaddingCollator:
    """Pads rows on the right to the longest of the batch: labels with -100, the attention mask with 0."""

    pad_token_id: int

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        """Tensors of shape (B, T)."""
        shown = [[1] * len(row["input_ids"]) for row in rows]
        return {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": padded([row["labels"] for row in rows], IGNORE_INDEX),
            "attention_mask": padded(shown, 0),
        }


@dataclass
class PackingCollator:
    """Batches rows from `pack`. There is no attention mask: positions that restart at 0 tell the model where a
    document begins. The padding of shorter rows is a separate document, which no other document attends to."""

    pad_token_id: int

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        """Tensors of shape (B, T)."""
        longest = max(len(row["input_ids"]) for row in rows)
        positions = [row["position_ids"] + list(range(longest - len(row["position_ids"]))) for row in rows]
        return {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": padded([row["labels"] for row in rows], IGNORE_INDEX),
            "position_ids": torch.tensor(positions),
        }


def padded(sequences: list[list[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True, padding_value=value)


def pack(examples: list[Row], length: int) -> list[Row]:
    """Join examples into few rows of at most `length` tokens, without cutting any.

    Best fit decreasing (Johnson 1973; used for packing by Ding et al. 2024, arXiv:2404.10830): from the longest
    example to the shortest, each goes into the row where it leaves the least room. Rows get `position_ids`, which
    restart at 0 with each example. The first label of each is -100: the token before it belongs to another example.

    Raises ValueError for an example that is longer than `length`.
    """
    rows: list[list[Row]] = []
    free: list[tuple[int, int]] = []  # room and number of the rows that are not full, in order
    for example in sorted(examples, key=lambda example: len(example["input_ids"]), reverse=True):
        size = len(example["input_ids"])
        if size > length:
            raise ValueError(f"An example of {size} tokens does not fit into rows of {length}; truncate it first.")
        best = bisect_left(free, (size, 0))
        if best == len(free):
            room, number = length, len(rows)
            rows.append([])
        else:
            room, number = free.pop(best)
        rows[number].append(example)
        if room > size:
            insort(free, (room - size, number))
    return [joined(documents) for documents in rows]


def joined(documents: list[Row]) -> Row:
    return {
        "input_ids": [token for document in documents for token in document["input_ids"]],
        "labels": [label for document in documents for label in [IGNORE_INDEX, *document["labels"][1:]]],
        "position_ids": [position for document in documents for position in range(len(document["input_ids"]))],
    }
