"""What the cards of the Space's models say about them, measured: written texts, answers, and labels of messages."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from scratch_gpt2.data.collators import PaddingCollator
from scratch_gpt2.data.instructions import encode_prompt
from scratch_gpt2.evaluation.responses import reference_metrics
from scratch_gpt2.prediction import Response, respond

# Of each held-out text, in pieces that fit into a context of 512 tokens.
MEASURED_PIECES, PIECE_CHARACTERS = 120, 1200
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.95, "max_new_tokens": 300}
BATCH = 50
OPENING = "Once upon a time"
FIXED_ANSWERS = ("refusal", "small talk")


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> float:
    """Of the first MEASURED_PIECES, each of which is read after an end-of-text token.

    Per byte and of the same pieces, so that models with different vocabularies compare.
    """
    pieces = list(islice((piece for document in documents for piece in cut(document)), MEASURED_PIECES))
    limit = model.config.n_positions - 1
    encoded = [tokenizer(piece, verbose=False)["input_ids"][:limit] for piece in pieces]
    rows = [{"input_ids": [tokenizer.eos_token_id, *ids], "labels": [-100, *ids]} for ids in encoded]
    rows.sort(key=lambda row: len(row["input_ids"]))
    collate, nats = PaddingCollator(tokenizer.pad_token_id), 0.0
    for start in range(0, len(rows), 16):
        batch = collate(rows[start : start + 16])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        nats += model(**batch, skip_logits=True).loss.item() * int((batch["labels"] != -100).sum())
    return nats / math.log(2) / sum(len(tokenizer.decode(ids).encode()) for ids in encoded)


def cut(document: str) -> Iterable[str]:
    return (document[start : start + PIECE_CHARACTERS] for start in range(0, len(document), PIECE_CHARACTERS))


def answer(model, tokenizer, prompts: list[list[int]], seed: int = 0, **generation_options) -> list[Response]:
    """In batches of prompts of similar length; the answers come in the order of `prompts`."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers: dict[int, Response] = {}
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        set_seed(seed + start)
        found = respond(model, tokenizer, [prompts[row] for row in rows], **generation_options)
        answers |= dict(zip(rows, found, strict=True))
    return [answers[row] for row in range(len(prompts))]


def stories(model, tokenizer, count: int, seed: int = 0) -> list[Response]:
    """What a base writes after OPENING, which is not repeated."""
    ids = tokenizer(OPENING)["input_ids"]
    return answer(model, tokenizer, [ids] * count, seed, **SAMPLING)


@dataclass(frozen=True)
class Answered:
    """A row of the instruction data's test, and what the assistant said to it."""

    row: dict
    response: Response


def answer_rows(model, tokenizer, rows: list[dict]) -> list[Answered]:
    """Stories are sampled, with seed 0; everything else is the most likely answer."""
    answered = []
    for is_story in (True, False):
        some = [row for row in rows if (row["kind"] not in FIXED_ANSWERS) == is_story]
        prompts = [encode_prompt(tokenizer, [{"role": "user", "content": question(row)}]) for row in some]
        options = SAMPLING if is_story else {"do_sample": False, "max_new_tokens": 40}
        found = answer(model, tokenizer, prompts, **options)
        answered += [Answered(row, response) for row, response in zip(some, found, strict=True)]
    return answered


def most_likely_answers(model, tokenizer, questions: Iterable[str]) -> list[tuple[str, str]]:
    """Each question with the most likely answer, for a card."""
    questions = list(questions)
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in questions]
    found = answer(model, tokenizer, prompts, do_sample=False, max_new_tokens=300)
    return [(text, response.text) for text, response in zip(questions, found, strict=True)]


def question(row: dict) -> str:
    return f"{row['instruction']}\n\n### Input:\n{row['input']}" if row["input"] else row["instruction"]


def assistant_metrics(answered: list[Answered]) -> dict[str, float]:
    """Shares from 0 to 1, and ROUGE-L from 0 to 100."""
    of_kind = {kind: [a for a in answered if a.row["kind"] == kind] for kind in {a.row["kind"] for a in answered}}
    asked = [a for a in answered if a.row.get("must_use")]
    stories = [a for a in answered if a.row["kind"] not in FIXED_ANSWERS]
    metrics = {
        "uses_asked_name": mean(uses_all(a) for a in of_kind["name"]),
        "uses_new_name": mean(uses_all(a) for a in of_kind["new name"]),
        "uses_all_asked_words": mean(uses_all(a) for a in of_kind["words"]),
        "uses_an_asked_word": mean(uses(a, word) for a in of_kind["words"] for word in a.row["must_use"]),
        "uses_all_that_was_asked": mean(uses_all(a) for a in asked),
        "stories_that_end": mean(a.response.stopped for a in stories),
    }
    for kind in FIXED_ANSWERS:
        metrics[f"exact_{kind.replace(' ', '_')}"] = mean(a.response.text == a.row["output"] for a in of_kind[kind])
    texts = [[a.response.text for a in answered], [a.row["output"] for a in answered]]
    return metrics | {"rouge_l": reference_metrics(*texts)["rouge_l"]}


def uses_all(answered: Answered) -> bool:
    return all(uses(answered, word) for word in answered.row["must_use"])


def uses(answered: Answered, word: str) -> bool:
    return re.search(rf"\b{word}\b", answered.response.text, re.IGNORECASE) is not None


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
