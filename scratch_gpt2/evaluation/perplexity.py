"""Perplexity and bits per byte of a causal language model on a text longer than its context.

The text is one sequence of tokens, over which a window slides. Each window is encoded from scratch, and only the
tokens that no earlier window contained are scored, so that all but the first of them have a context. This is the
procedure of Hugging Face's "Perplexity of fixed-length models" (https://huggingface.co/docs/transformers/perplexity).

    window 1   t0 [t1 t2 t3 t4 t5 t6 t7]          context_length 8, stride 4; the tokens in brackets are scored
    window 2               t4 t5 t6 t7 [t8 t9 t10 t11]
    window 3                           t8 t9 t10 t11 [t12 t13]
"""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.encoding import between_ends, encode_documents
from ..data.text_sources import split_documents
from ..linear_cross_entropy import IGNORE_INDEX
from ..prediction import evaluation_mode
from ..tokenization import END_OF_TEXT, check_text
from .models import input_device


@dataclass(frozen=True)
class PerplexityResult:
    """The figures and the protocol they depend on.

    `loss` is the mean over the `scored_tokens`, in nats; `perplexity` is its exponential. `tokens` and `bytes` (UTF-8)
    are the size of the text. Its `document_ends`, one for several separators in a row, are tokens but no bytes.
    `start_token` says whether the tokenizer put its bos token before the text, as Llama's does and GPT-2's does not;
    otherwise the first token, which nothing precedes, is not scored.
    """

    perplexity: float
    bits_per_byte: float
    loss: float
    scored_tokens: int
    tokens: int
    bytes: int
    document_ends: int
    context_length: int
    stride: int
    start_token: bool


@dataclass(frozen=True)
class Window:
    """Tokens `begin` to `end` of the text, of which those from `first_scored` on are scored."""

    begin: int
    end: int
    first_scored: int


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    context_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    separator: str | None = END_OF_TEXT,
) -> PerplexityResult:
    """Perplexity and bits per byte of any causal language model of transformers, or ours, on one text.

    Every token has the same weight: `loss` is the sum over all scored tokens, in float64, divided by their number.
    Published figures differ here. Until 2024 the documentation named above took the mean of the windows' means, which
    gives a short last window the weight of a long one: 16.4541 instead of 16.4443 for gpt2-large on WikiText-2
    (https://github.com/huggingface/transformers/pull/34387). Its present code weighs a window that scores n tokens
    by n - 1 where windows overlap: 98.6357 instead of 98.6360 for one of our small models, 128 tokens, stride 64.

    Bits per byte are the mean per token, times the tokens in the text, over its bytes (Gao et al. 2020, "The Pile",
    section 3.1); unlike perplexity they can be compared between tokenizers.

    Memory: our model computes the logits of a chunk of the scored tokens at a time, others those of a batch of
    windows, `batch_size * context_length * vocab_size` numbers. Hooks on the head and adapters are respected.

    Args:
        context_length: tokens in a window; by default as many as the model has positions.
        stride: tokens by which the window advances; by default half a window. A smaller one gives every token more
            context, and takes longer. With `stride == context_length` windows do not overlap, and the first token of
            each window is not scored, as in the published procedure.
        batch_size: windows per batch; the result does not depend on it.
        separator: what separates the documents of the text. It becomes the tokenizer's end-of-text id, which is
            predicted like any other token but does not count as bytes. `None` reads it as ordinary text.

    Raises:
        ValueError: a text of fewer than two tokens or one that is not valid Unicode, a window longer than the model's
            positions or shorter than two tokens, a stride longer than the window, a tokenizer whose ids exceed the
            model's vocabulary.
    """
    context_length, stride = check_window(model, context_length, stride)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} but must be at least 1.")
    has_end = getattr(tokenizer, "eos_token_id", None) is not None
    documents = split_documents(check_text(text), separator if has_end else None)
    ids, start_token = encode(tokenizer, documents)
    if ids.max() >= model.config.vocab_size:
        raise ValueError(
            f"The tokenizer gives id {ids.max()} but the model's vocab_size is {model.config.vocab_size}: "
            "use the tokenizer that the model was trained with."
        )

    windows = list(sliding_windows(len(ids), context_length, stride))
    total, scored_tokens = total_loss(model, ids, windows, batch_size)
    loss = total / scored_tokens
    tokens = len(ids) - start_token
    size = sum(len(document.encode()) for document in documents)
    return PerplexityResult(
        perplexity=exponential(loss),
        bits_per_byte=loss / math.log(2) * tokens / size,
        loss=loss,
        scored_tokens=scored_tokens,
        tokens=tokens,
        bytes=size,
        document_ends=len(between_ends(documents)) - 1,
        context_length=context_length,
        stride=stride,
        start_token=start_token,
    )


def exponential(loss: float) -> float:
    """The perplexity of a loss in nats; infinity beyond the largest float, e^709.78."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def check_window(model, context_length: int | None, stride: int | None) -> tuple[int, int]:
    """Fill in the defaults. Raises ValueError for lengths that are out of range."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if context_length is None:
        if positions is None:
            raise ValueError(f"A {model.config.model_type} model has no maximum context length; give context_length.")
        context_length = int(positions)
    if context_length < 2:
        raise ValueError(f"context_length is {context_length} but must be at least 2: one token predicts the next.")
    if positions is not None and context_length > positions:
        raise ValueError(f"context_length is {context_length} but the model has only {positions} positions.")
    if stride is None:
        stride = context_length // 2
    if not 1 <= stride <= context_length:
        raise ValueError(
            f"stride is {stride} but must be from 1 to context_length ({context_length}), or tokens would be left out."
        )
    return context_length, stride


def encode(tokenizer, documents: list[str]) -> tuple[torch.LongTensor, bool]:
    """Token ids (N,) of the whole text, and whether they begin with a token that is not part of the text."""
    ids = encode_documents(documents, tokenizer)
    start = tokenizer("")["input_ids"][:1]  # an eos token, which T5's appends, is not one
    start_token = bool(start) and start[0] == tokenizer.bos_token_id
    if start_token:
        ids = start + ids
    if len(ids) < 2:
        raise ValueError(f"The text {''.join(documents)!r} is too short: perplexity needs at least two tokens.")
    return torch.tensor(ids), start_token


def sliding_windows(length: int, context_length: int, stride: int) -> Iterator[Window]:
    """Windows over `length` tokens; all but the last one have `context_length` tokens."""
    scored = 0
    for begin in range(0, length, stride):
        end = min(begin + context_length, length)
        first_scored = max(scored, begin + 1)  # nothing in the window precedes its first token
        if first_scored < end:
            yield Window(begin, end, first_scored)
        if end == length:
            return
        scored = end


@torch.no_grad()
def total_loss(model, ids: torch.LongTensor, windows: list[Window], batch_size: int) -> tuple[float, int]:
    """Sum of the losses of all scored tokens, in nats, and their number."""
    options, device = loss_options(model), input_device(model)
    total, scored_tokens = 0.0, 0
    with evaluation_mode(model):
        for batch in tqdm(make_batches(windows, batch_size), desc="perplexity", leave=False, disable=None):
            input_ids = torch.stack([ids[window.begin : window.end] for window in batch])  # (B, T)
            labels = input_ids.clone()
            for row, window in zip(labels, batch, strict=True):
                row[: window.first_scored - window.begin] = IGNORE_INDEX
            scored = int((labels != IGNORE_INDEX).sum())
            output = model(
                input_ids=input_ids.to(device),
                attention_mask=torch.ones_like(input_ids, device=device),
                labels=labels.to(device),
                use_cache=False,
                **options,
            )
            total += output.loss.item() * scored  # the loss is a mean; a Python float is float64
            scored_tokens += scored
    return total, scored_tokens


def loss_options(model) -> dict[str, bool]:
    """Arguments with which our model, also under an adapter, computes the loss from a chunk of the logits at a time,
    unless something is attached to its head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"skip_logits": True} if "skip_logits" in inspect.signature(base.forward).parameters else {}


def make_batches(windows: list[Window], batch_size: int) -> list[list[Window]]:
    """Batches of windows of equal length, so that nothing is padded: the last window, which may be shorter, is a batch
    of its own."""
    *full, last = windows
    return [full[start : start + batch_size] for start in range(0, len(full), batch_size)] + [[last]]
