"""What a trained model says: labels of texts and answers to prompts."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data.instructions import Conversation, encode_prompt
from .tokenization import check_text


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off inside, and return to training mode afterwards if the model was in it, also on an error."""
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

    Texts longer than `tokenizer.model_max_length` or the model's context are cut at the end, as in training.

    Raises ValueError for a text that is empty or not valid Unicode.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(texts):
        if not check_text(text).strip():
            raise ValueError(f"Text {number} is empty; give at least one word to classify.")
    max_length = min(tokenizer.model_max_length, model.config.n_positions)
    was_training = model.training
    model.eval()
    results = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            texts[start : start + batch_size],
            truncation=True,
            max_length=max_length,
            padding=True,
            split_special_tokens=True,
            return_tensors="pt",
        ).to(model.device)
        for probabilities in model(**batch, use_cache=False).logits.float().softmax(-1).tolist():
            named = ((model.config.id2label[i], probability) for i, probability in enumerate(probabilities))
            results.append(dict(sorted(named, key=lambda item: -item[1])))
    model.train(was_training)
    return results


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
    """One answer a prompt, computed together. `generation_options` go to `generate`: max_new_tokens, do_sample ...

    The prompts are padded on the left: `generate` gives other models the positions, ours counts them itself.
    """
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    ends = end_tokens(model, tokenizer)
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
