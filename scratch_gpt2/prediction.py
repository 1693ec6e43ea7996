"""Predictions of trained models: labels of texts and answers to prompts."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data.instructions import Conversation, encode_prompt
from .tokenization import check_text, encode_texts

logger = logging.getLogger(__name__)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode; on leaving, also by an exception, restore the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def classify_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: str | Iterable[str], batch_size: int = 16
) -> list[dict[str, float]]:
    """The probability of every label for each text, by label name, the most probable first.

    Like transformers' `pipeline`, this reads whole texts. Texts longer than the model's context are truncated at the
    end, with a warning.

    Raises ValueError for a text that is empty or not valid Unicode.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(texts):
        if not check_text(text).strip():
            raise ValueError(f"Text {number} is empty; give at least one word to classify.")
    positions = model.config.max_position_embeddings
    encoded, cut = encode_texts(tokenizer, texts, max_length=positions)
    if cut:
        logger.warning("%d of %d texts were cut to their first %d tokens.", cut, len(texts), positions)
    results = {}
    with evaluation_mode(model):
        for rows in batches_by_length([len(ids) for ids in encoded], batch_size):
            batch = tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt")
            logits = model(**batch.to(model.device), use_cache=False).logits  # (B, number of labels)
            for row, probabilities in zip(rows, logits.float().softmax(-1).tolist(), strict=True):
                named = ((model.config.id2label[i], probability) for i, probability in enumerate(probabilities))
                results[row] = dict(sorted(named, key=lambda item: -item[1]))
    return [results[row] for row in range(len(texts))]


@dataclass(frozen=True)
class Response:
    """`stopped`: the model ended the answer itself, and was not cut off."""

    text: str
    stopped: bool


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation], longest: int | None
) -> tuple[list[Conversation], list[list[int]]]:
    """The conversations whose prompt has at most `longest` tokens (None: any number), and the ids of their prompts.

    Raises ValueError with the row's number for one that the chat template refuses.
    """
    fitting, prompts = [], []
    for conversation in conversations:
        try:
            ids = encode_prompt(tokenizer, conversation.prompt)
        except ValueError as error:
            raise ValueError(f"{conversation.origin}: {error}") from error
        if longest is None or len(ids) <= longest:
            fitting.append(conversation)
            prompts.append(ids)
    return fitting, prompts


def batches_by_length(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches, from the longest rows, which need the most memory, to the shortest."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} but must be at least 1.")
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def respond(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], **generation_options
) -> list[Response]:
    """One answer per prompt, generated as one batch; `generation_options` go to `generate`.

    The prompts are padded on the left. The model may be in training mode: it answers without dropout.
    """
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    ends = end_tokens(model, tokenizer)
    with evaluation_mode(model):
        output = model.generate(
            **inputs, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, use_cache=True, **generation_options
        )  # (B, T)
    responses = []
    for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
        length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        text = tokenizer.decode(ids[:length], skip_special_tokens=True)
        responses.append(Response(text.strip(), stopped=length < len(ids)))
    return responses


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's eos, and others that end a turn of this model, as Llama 3 has them."""
    also = model.generation_config.eos_token_id
    also = also if isinstance(also, list) else [] if also is None else [also]
    return sorted({tokenizer.eos_token_id, *also})
