"""Log-likelihoods of several continuations of one context, which is computed once.

A row holds the context, followed by its continuations side by side. The positions of each continuation follow those
of the context, and a mask hides the others from it, so the result is that of the continuation alone. The last token
of each continuation is only predicted and is not part of the row; the first tokens are all predicted by the last
token of the context.

    row            c0 c1 c2 c3   a0 a1 a2   b0 b1    continuations a0 to a3 and b0 to b2
    position        0  1  2  3    4  5  6    4  5
    logits at               c3   a0 a1 a2   b0 b1

Models that are not full attention throughout, and texts longer than the model's positions, are computed with one row
per continuation.
"""

import inspect
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..prediction import evaluation_mode
from .models import input_device

CONTEXT, PADDING = 0, -1  # segments of a row; the continuations are 1, 2, 3, ...

Choices = tuple[list[int], list[list[int]]]  # token ids of a context and of each of its continuations


def log_likelihoods(
    model: PreTrainedModel, choices: list[Choices], batch_size: int
) -> Iterator[list[tuple[int, list[float]]]]:
    """Yield batches of (index in `choices`, sum of the log-likelihoods of each continuation's tokens, in nats).

    Items of similar length form a batch, the longest come first. A context that does not fit is cut at its beginning.
    The model is in evaluation mode meanwhile.

    Raises ValueError for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} but must be at least 1.")
    positions = positions_of(model)
    room = (float("inf") if positions is None else positions) if can_share_context(model) else 0
    shared = [number for number, item in enumerate(choices) if shared_length(item) <= room]
    apart = [number for number, item in enumerate(choices) if shared_length(item) > room]

    with evaluation_mode(model):
        for numbers, score in ((shared, score_shared), (apart, score_apart)):
            numbers.sort(key=lambda number: -shared_length(choices[number]))
            for start in range(0, len(numbers), batch_size):
                batch = numbers[start : start + batch_size]
                scores = score(model, [choices[number] for number in batch])
                yield list(zip(batch, scores, strict=True))


def positions_of(model: PreTrainedModel) -> int | None:
    return getattr(model.config, "max_position_embeddings", None)


def shared_length(item: Choices) -> int:
    context, continuations = item
    return len(context) + sum(len(ids) - 1 for ids in continuations)


def can_share_context(model: PreTrainedModel) -> bool:
    """Whether mask and positions alone decide what a token sees, and the model uses both as given: no recurrent state
    (Mamba), no distances of its own (ALiBi), no sliding window, no mask in another format."""
    config = model.config
    return (
        {"position_ids", "logits_to_keep"} <= set(inspect.signature(model.forward).parameters)
        and getattr(model, "_supports_attention_backend", False)
        and not getattr(model, "_is_stateful", False)
        and getattr(config, "sliding_window", None) is None
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
        and config._attn_implementation in ("eager", "sdpa")
    )


@torch.no_grad()
def score_shared(model: PreTrainedModel, batch: list[Choices]) -> list[list[float]]:
    """Memory: the logits of the predicting positions only. These are one per item, and one per token that follows the
    first token of a continuation, times the size of the vocabulary."""
    device = input_device(model)
    input_ids, position_ids, segments, predicting = (
        pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding).to(device)
        for rows, padding in zip(zip(*map(lay_out, batch), strict=True), (0, 0, PADDING, False), strict=True)
    )  # (B, T) each
    logits = model(
        input_ids=input_ids,
        attention_mask=segment_mask(segments, model.dtype),
        position_ids=position_ids,
        use_cache=False,
        logits_to_keep=predicting,
    ).logits.float()  # (N, V)

    sources, targets = predictions(batch)
    rows = torch.tensor(sources, device=logits.device)
    scores = logits[rows, torch.tensor(targets, device=logits.device)] - logits.logsumexp(-1)[rows]
    lengths = [len(ids) for _, continuations in batch for ids in continuations]
    sums = iter(torch.stack([part.sum() for part in scores.split(lengths)]).tolist())
    return [[next(sums) for _ in continuations] for _, continuations in batch]


def lay_out(item: Choices) -> tuple[list[int], list[int], list[int], list[bool]]:
    """Token ids, positions, segments, and whether the position predicts a token: the columns of one row, (T,) each."""
    context, continuations = item
    ids, positions, segments = list(context), list(range(len(context))), [CONTEXT] * len(context)
    for segment, continuation in enumerate(continuations, start=1):
        inputs = continuation[:-1]
        ids += inputs
        positions += range(len(context), len(context) + len(inputs))
        segments += [segment] * len(inputs)
    predicting = [False] * (len(context) - 1) + [True] * (len(ids) - len(context) + 1)
    return ids, positions, segments, predicting


def segment_mask(segments: torch.LongTensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, T, T) to add to the attention scores: a token sees itself and what precedes it in its own segment and in
    the context. `segments` is (B, T)."""
    keys, queries = segments[:, None, :], segments[:, :, None]
    visible = ((keys == CONTEXT) | (keys == queries)).tril()
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def predictions(batch: list[Choices]) -> tuple[list[int], list[int]]:
    """For every token of every continuation: the index of the position that predicts it among all predicting positions
    of the batch, and its id."""
    sources, targets = [], []
    position = 0
    for _, continuations in batch:
        first, position = position, position + 1
        for ids in continuations:
            inputs = len(ids) - 1
            sources += [first, *range(position, position + inputs)]
            targets += ids
            position += inputs
    return sources, targets


@torch.no_grad()
def score_apart(model: PreTrainedModel, batch: list[Choices]) -> list[list[float]]:
    """One row per continuation, padded on the right, which a causal model does not see.

    Memory: the logits from the first position that predicts a continuation to the last one, rows times positions times
    the size of the vocabulary. With contexts of similar length that is little more than the longest continuation.
    Models without `logits_to_keep` compute the logits of whole rows.
    """
    targets = [ids for _, continuations in batch for ids in continuations]
    rows = [torch.tensor(ids) for item in batch for ids in input_rows(item, positions_of(model))]
    starts = [len(row) - len(target) for row, target in zip(rows, targets, strict=True)]
    input_ids = pad_sequence(rows, batch_first=True)  # (R, T)
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    first = min(starts)
    kept = input_ids.shape[1] - first
    keep = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    device = input_device(model)
    logits = model(
        input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False, **keep
    ).logits[:, -kept:]  # (R, P, V)
    scores = [
        -F.cross_entropy(
            row[start - first :][: len(target)].float(), torch.tensor(target, device=row.device), reduction="sum"
        )
        for row, start, target in zip(logits, starts, targets, strict=True)
    ]
    sums = iter(torch.stack(scores).tolist())
    return [[next(sums) for _ in continuations] for _, continuations in batch]


def input_rows(item: Choices, positions: int | None) -> list[list[int]]:
    """Token ids to read for each continuation: as much of the end of the context as fits, and the continuation without
    its last token."""
    context, continuations = item
    rows = [(context + ids)[:-1] for ids in continuations]
    return rows if positions is None else [row[-positions:] for row in rows]
