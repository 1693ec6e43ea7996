"""HellaSwag: which of four endings does a language model find the most likely? (Zellers et al. 2019, arXiv:1905.07830)

The texts, their tokens, the truncation and the two accuracies are those of the task `hellaswag`, version 1.0, of
EleutherAI's lm-evaluation-harness 0.4.13 (lm_eval/tasks/hellaswag/utils.py, `_encode_pair` in lm_eval/api/model.py,
`_loglikelihood_tokens` in lm_eval/models/huggingface.py, `process_results` in lm_eval/api/task.py), without examples
in the prompt. Figures by other protocols, such as build-nanogpt's, cannot be compared with these.
"""

import inspect
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..tokenization import check_text

ENDINGS = 4


@dataclass(frozen=True)
class Example:
    """One row of the data set, its texts as they are there; `label` is the number of the right ending."""

    ind: int
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class EncodedExample:
    """Token ids, and the endings' lengths in characters, by which the harness normalises."""

    ind: int
    label: int
    context_ids: list[int]
    ending_ids: list[list[int]]
    ending_lengths: list[int]


@dataclass(frozen=True)
class ExampleResult:
    """`log_likelihoods` are the sums over the tokens of each ending, in nats. `prediction` is the most likely ending,
    `prediction_norm` the one with the highest log-likelihood per character; of equal ones the first."""

    ind: int
    label: int
    log_likelihoods: list[float]
    prediction: int
    prediction_norm: int


@dataclass(frozen=True)
class HellaSwagResult:
    """Shares of right answers (the harness' acc and acc_norm) in so many `examples`, and their standard errors."""

    accuracy: float
    accuracy_norm: float
    standard_error: float
    standard_error_norm: float
    examples: int


def read_hellaswag(file: str | os.PathLike) -> list[Example]:
    """Read the original jsonl form (hellaswag_val.jsonl of https://github.com/rowanz/hellaswag): a line is an object
    with `ind`, `activity_label`, `ctx_a`, `ctx_b`, four `endings` and `label`; other fields are ignored.

    Raises FileNotFoundError, and ValueError with the line's number for whatever is not of this form.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} is not a file; give HellaSwag's data as jsonl, such as hellaswag_val.jsonl.")
    examples = []
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    examples.append(parse_line(line))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
    if not examples:
        raise ValueError(f"{file} holds no example up to its end, line 1; give HellaSwag's data as jsonl.")
    return examples


def parse_line(line: bytes) -> Example:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        raise ValueError("this is not JSON in UTF-8; is the file complete, and jsonl?") from None
    if not isinstance(row, dict):
        raise ValueError("this is not a JSON object; give the original jsonl form.")
    for name in ("ind", "activity_label", "ctx_a", "ctx_b", "endings", "label"):
        if name not in row:
            raise ValueError(f"the field {name!r} is missing; give the original jsonl form.")
    endings = row["endings"]
    if not isinstance(endings, list) or len(endings) != ENDINGS:
        raise ValueError(f"the field 'endings' must be a list of {ENDINGS} texts.")
    texts = [row["activity_label"], row["ctx_a"], row["ctx_b"], *endings]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("'activity_label', 'ctx_a', 'ctx_b' and the endings must be strings.")
    if type(row["ind"]) is not int:
        raise ValueError(f"the field 'ind' is {row['ind']!r} but must be an integer.")
    if str(row["label"]) not in ("0", "1", "2", "3"):  # the Hub's copy has strings, empty ones in the test split
        raise ValueError(
            f"the field 'label' is {row['label']!r} but must be 0, 1, 2 or 3, as in the validation split."
        )
    example = Example(row["ind"], *texts[:3], tuple(endings), int(row["label"]))
    context, cleaned = harness_texts(example)
    if not all(check_text(text).strip() for text in (context, *cleaned)):
        raise ValueError("the context or an ending is empty once its bracketed marks are removed.")
    return example


def harness_texts(example: Example) -> tuple[str, list[str]]:
    """The context and the endings as lm-evaluation-harness words them (`process_docs` of its task)."""
    context = f"{example.activity_label}: {example.ctx_a} {example.ctx_b.capitalize()}"
    return clean_text(context), [clean_text(ending) for ending in example.endings]


def clean_text(text: str) -> str:
    """The harness' `preprocess`: WikiHow's marks, such as [header] and [step], go."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def encode_example(tokenizer: PreTrainedTokenizerBase, example: Example) -> EncodedExample:
    """The ids of the context, and of each ending as it follows the context with a blank between them.

    White space that ends the context counts as the ending's, since GPT-2's tokens begin with it.
    """
    context, endings = harness_texts(example)
    stripped = context.rstrip()
    context_ids = tokenizer(stripped, verbose=False).input_ids
    whole_ids = [tokenizer(f"{context} {ending}", verbose=False).input_ids for ending in endings]
    return EncodedExample(
        ind=example.ind,
        label=example.label,
        context_ids=context_ids,
        # Other tokenizers than GPT-2's would encode an ending by itself differently: Llama's adds a blank.
        ending_ids=[ids[len(context_ids) :] for ids in whole_ids],
        ending_lengths=[len(ending) for ending in endings],
    )


def check_fits(model: PreTrainedModel, examples: list[EncodedExample]) -> None:
    """Raise ValueError for an ending longer than the model's positions or an id that its vocabulary lacks."""
    positions = positions_of(model)
    for example in examples:
        longest = max(len(ids) for ids in example.ending_ids)
        if positions is not None and longest > positions:
            raise ValueError(
                f"An ending of HellaSwag's example {example.ind} has {longest} tokens but the model has only "
                f"{positions} positions; use a model with a longer context, or leave HellaSwag out."
            )
        highest = max(map(max, (example.context_ids, *example.ending_ids)))
        if highest >= model.config.vocab_size:
            raise ValueError(
                f"The tokenizer gives id {highest} but the model's vocab_size is {model.config.vocab_size}: "
                "use the tokenizer that the model was trained with."
            )


def positions_of(model: PreTrainedModel) -> int | None:
    return getattr(model.config, "max_position_embeddings", None)


def hellaswag_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example], batch_size: int = 4
) -> HellaSwagResult:
    """Accuracy and length-normalised accuracy of any causal language model, ours or of transformers.

    A text longer than the model's positions loses its beginning. Memory: see `score_batch`.

    Args:
        batch_size: examples computed together, four rows each; the result does not depend on it.

    Raises:
        ValueError: no examples, an ending longer than the model's positions, a tokenizer whose ids exceed the model's
            vocabulary.
    """
    encoded = [encode_example(tokenizer, example) for example in examples]
    check_fits(model, encoded)
    return summarize(score_examples(model, encoded, batch_size))


def summarize(results: list[ExampleResult]) -> HellaSwagResult:
    if not results:
        raise ValueError("There are no examples to take the accuracy of.")
    number = len(results)
    accuracy = sum(result.prediction == result.label for result in results) / number
    accuracy_norm = sum(result.prediction_norm == result.label for result in results) / number
    errors = (standard_error(share, number) for share in (accuracy, accuracy_norm))
    return HellaSwagResult(accuracy, accuracy_norm, *errors, number)


def standard_error(share: float, number: int) -> float:
    """Of the mean of `number` zeros and ones, from their sample variance; nan for one of them."""
    return math.sqrt(share * (1 - share) / (number - 1)) if number > 1 else math.nan


def score_examples(model: PreTrainedModel, examples: list[EncodedExample], batch_size: int = 4) -> list[ExampleResult]:
    """Results in the order of the examples. Those with contexts of similar length are computed together."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} but must be at least 1.")
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].context_ids))
    results = {}
    was_training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), desc="HellaSwag", leave=False, disable=None):
            numbers = order[start : start + batch_size]
            batch = [examples[i] for i in numbers]
            results |= dict(zip(numbers, map(make_result, batch, score_batch(model, batch)), strict=True))
    finally:
        model.train(was_training)
    return [results[i] for i in range(len(examples))]


def make_result(example: EncodedExample, log_likelihoods: list[float]) -> ExampleResult:
    per_character = [score / length for score, length in zip(log_likelihoods, example.ending_lengths, strict=True)]
    prediction, prediction_norm = (scores.index(max(scores)) for scores in (log_likelihoods, per_character))
    return ExampleResult(example.ind, example.label, log_likelihoods, prediction, prediction_norm)


@torch.no_grad()
def score_batch(model: PreTrainedModel, batch: list[EncodedExample]) -> list[list[float]]:
    """Log-likelihoods of the endings of each example, in nats.

    The rows are padded on the right, where a causal model does not look. The logits exist from the first position
    that predicts an ending to the last one: `4 * len(batch) * positions * vocab_size` numbers, with few positions
    more than the longest ending has tokens where the contexts are of similar length. Models that do not know
    `logits_to_keep` compute them for whole rows.
    """
    targets = [ids for example in batch for ids in example.ending_ids]
    rows = [torch.tensor(ids) for example in batch for ids in input_rows(model, example)]
    starts = [len(row) - len(target) for row, target in zip(rows, targets, strict=True)]
    input_ids = pad_sequence(rows, batch_first=True)  # (R, T)
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    first = min(starts)
    kept = input_ids.shape[1] - first
    keep = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(
        input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device), use_cache=False, **keep
    ).logits[:, -kept:]  # (R, P, V)
    scores = [
        -F.cross_entropy(
            row[start - first :][: len(target)].float(), torch.tensor(target, device=row.device), reduction="sum"
        )
        for row, start, target in zip(logits, starts, targets, strict=True)
    ]
    return torch.stack(scores).view(len(batch), ENDINGS).tolist()


def input_rows(model: PreTrainedModel, example: EncodedExample) -> list[list[int]]:
    """What the model reads for each ending: as much of the context's end as fits, and the ending without its last
    token, which is only predicted."""
    rows = [(example.context_ids + ids)[:-1] for ids in example.ending_ids]
    positions = positions_of(model)
    return rows if positions is None else [row[-positions:] for row in rows]
