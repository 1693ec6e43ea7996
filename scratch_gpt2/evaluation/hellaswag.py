"""HellaSwag: which of four endings does a language model find the most likely? (Zellers et al. 2019, arXiv:1905.07830)

There are two protocols, whose figures are not comparable:

"lm-eval": the texts, their tokens, the truncation and the two accuracies are those of the task `hellaswag`, version
1.0, of EleutherAI's lm-evaluation-harness 0.4.13 (lm_eval/tasks/hellaswag/utils.py, `_encode_pair` in
lm_eval/api/model.py, `_loglikelihood_tokens` in lm_eval/models/huggingface.py, `process_results` in
lm_eval/api/task.py), without examples in the prompt. The activity precedes the context, WikiHow's marks are
removed, and the normalized accuracy uses the log-likelihood per character.

"build-nanogpt": Karpathy's variant (https://github.com/karpathy/build-nanogpt/blob/master/hellaswag.py), "completion
style": the texts are unchanged, without the activity, and the normalized accuracy uses the log-likelihood per token.
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.rows import hub_rows, json_lines
from ..data.text_files import open_text
from ..tokenization import check_text
from .continuations import log_likelihoods, positions_of
from .progress import ProgressFile

PROTOCOLS = ("lm-eval", "build-nanogpt")
DATA_SET = "Rowan/hellaswag"
ENDINGS = 4


@dataclass(frozen=True)
class Example:
    """One row of the data set with unchanged texts; `label` is the index of the correct ending."""

    ind: int
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class EncodedExample:
    """Token ids, and the lengths of the endings by which the protocol normalizes: in characters or in tokens."""

    ind: int
    label: int
    context_ids: list[int]
    ending_ids: list[list[int]]
    ending_lengths: list[int]


@dataclass(frozen=True)
class ExampleResult:
    """`log_likelihoods` are the sums over the tokens of each ending, in nats. `prediction` is the most likely ending,
    `prediction_norm` the one with the highest log-likelihood per unit of length; ties go to the first."""

    ind: int
    label: int
    log_likelihoods: list[float]
    prediction: int
    prediction_norm: int


@dataclass(frozen=True)
class HellaSwagResult:
    """Shares of correct answers (acc and acc_norm) among the `examples`, their standard errors as the harness computes
    them, and their 95% confidence intervals by Wilson."""

    accuracy: float
    accuracy_norm: float
    standard_error: float
    standard_error_norm: float
    interval: tuple[float, float]
    interval_norm: tuple[float, float]
    examples: int


def read_hellaswag(file: str | os.PathLike) -> list[Example]:
    """Read the original jsonl form (hellaswag_val.jsonl of https://github.com/rowanz/hellaswag): a line is an object
    with `ind`, `activity_label`, `ctx_a`, `ctx_b`, four `endings` and `label`; other fields are ignored.

    Raises FileNotFoundError, and ValueError with the line's number for whatever is not of this form.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} is not a file; give HellaSwag's data as jsonl, such as hellaswag_val.jsonl.")
    with open_text(str(file), newline="\n") as lines:
        examples = [parse_row(row, origin) for row, origin in json_lines(lines, str(file))]
    if not examples:
        raise ValueError(f"{file} contains no examples; give HellaSwag's data as JSON lines.")
    return examples


def load_hellaswag() -> list[Example]:
    """The validation split from the Hugging Face Hub.

    Raises ConnectionError if the Hub cannot be reached, ValueError for rows of another form.
    """
    return [parse_row(row, origin) for row, origin in hub_rows(DATA_SET, split="validation")]


def parse_row(row: dict, origin: str) -> Example:
    try:
        return as_example(row)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None


def as_example(row: dict) -> Example:
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
    example = Example(row["ind"], row["activity_label"], row["ctx_a"], row["ctx_b"], tuple(endings), int(row["label"]))
    context, cleaned = harness_texts(example)
    if not all(check_text(text).strip() for text in (context, *cleaned)):
        raise ValueError("the context or an ending is empty once its bracketed marks are removed.")
    return example


def harness_texts(example: Example) -> tuple[str, list[str]]:
    """The context and the endings as lm-evaluation-harness writes them (`process_docs` of its task)."""
    context = f"{example.activity_label}: {example.ctx_a} {example.ctx_b.capitalize()}"
    return clean_text(context), [clean_text(ending) for ending in example.endings]


def clean_text(text: str) -> str:
    """The harness' `preprocess`: removes WikiHow's marks, such as [header] and [step]."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def nanogpt_texts(example: Example) -> tuple[str, list[str]]:
    """The context and the endings, unchanged. The field `ctx` of the data is `ctx_a`, followed by `ctx_b` if any."""
    return f"{example.ctx_a} {example.ctx_b}" if example.ctx_b else example.ctx_a, list(example.endings)


def encode_example(tokenizer: PreTrainedTokenizerBase, example: Example, protocol: str = "lm-eval") -> EncodedExample:
    """The ids of the context, and of each ending, which follows the context after a space.

    In lm-eval, white space at the end of the context belongs to the ending, because GPT-2's tokens begin with it;
    build-nanogpt encodes context and ending separately.

    Raises ValueError for an unknown protocol and, with build-nanogpt, a context without tokens.
    """
    if protocol == "lm-eval":
        context, endings = harness_texts(example)
        context_ids = tokenizer(context.rstrip(), verbose=False).input_ids
        whole_ids = [tokenizer(f"{context} {ending}", verbose=False).input_ids for ending in endings]
        # Other tokenizers encode an ending alone differently: Llama's adds a space.
        ending_ids = [ids[len(context_ids) :] for ids in whole_ids]
        lengths = [len(ending) for ending in endings]
    elif protocol == "build-nanogpt":
        context, endings = nanogpt_texts(example)
        context_ids = tokenizer(context, verbose=False).input_ids
        ending_ids = [tokenizer(f" {ending}", add_special_tokens=False, verbose=False).input_ids for ending in endings]
        lengths = [len(ids) for ids in ending_ids]
    else:
        raise ValueError(f"The protocol is {protocol!r} but must be one of {', '.join(PROTOCOLS)}.")
    if not context_ids:
        raise ValueError(f"HellaSwag's example {example.ind} has no context, which {protocol} needs; leave it out.")
    return EncodedExample(example.ind, example.label, context_ids, ending_ids, lengths)


def check_fits(model: PreTrainedModel, examples: list[EncodedExample]) -> None:
    """Raise ValueError for an ending longer than the model's positions or an id outside its vocabulary."""
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


def hellaswag_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    batch_size: int = 4,
    protocol: str = "lm-eval",
) -> HellaSwagResult:
    """Accuracy and length-normalized accuracy of any causal language model, ours or of transformers.

    The context is computed once for the four endings; see `continuations.py`, also for the memory that this takes. A
    text longer than the model's positions is cut at its beginning.

    Args:
        batch_size: examples per batch; the result does not depend on it.

    Raises:
        ValueError: no examples, an ending longer than the model's positions, a tokenizer whose ids exceed the model's
            vocabulary, an unknown protocol.
    """
    encoded = [encode_example(tokenizer, example, protocol) for example in examples]
    check_fits(model, encoded)
    return summarize(score_examples(model, encoded, batch_size))


def summarize(results: list[ExampleResult]) -> HellaSwagResult:
    if not results:
        raise ValueError("There are no examples to compute the accuracy of.")
    number = len(results)
    right = sum(result.prediction == result.label for result in results)
    right_norm = sum(result.prediction_norm == result.label for result in results)
    return HellaSwagResult(
        accuracy=right / number,
        accuracy_norm=right_norm / number,
        standard_error=standard_error(right / number, number),
        standard_error_norm=standard_error(right_norm / number, number),
        interval=wilson_interval(right, number),
        interval_norm=wilson_interval(right_norm, number),
        examples=number,
    )


def standard_error(share: float, number: int) -> float:
    """Standard error of the mean of `number` zeros and ones, from their sample variance; nan for a single one."""
    return math.sqrt(share * (1 - share) / (number - 1)) if number > 1 else math.nan


def wilson_interval(right: int, number: int) -> tuple[float, float]:
    """95% confidence interval of a probability, estimated from `right` of `number` samples (Wilson 1927). Unlike
    share +- 1.96 standard errors, it stays within 0 and 1 and is accurate for few samples too."""
    z = 1.959964  # the 97.5th percentile of the normal distribution
    share = right / number
    middle = share + z * z / (2 * number)
    half = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    low, high = ((middle + sign * half) / (1 + z * z / number) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def score_examples(
    model: PreTrainedModel, examples: list[EncodedExample], batch_size: int = 4, progress: ProgressFile | None = None
) -> list[ExampleResult]:
    """Results in the order of the examples. With `progress`, each result is written there as soon as it is computed,
    and those of an earlier run are not computed again.

    Raises ValueError for a batch size below 1 and for a progress file with other records.
    """
    results = read_results(progress, len(examples)) if progress is not None else {}
    missing = [number for number in range(len(examples)) if number not in results]
    with tqdm(total=len(examples), initial=len(results), desc="HellaSwag", leave=False, disable=None) as bar:
        for batch in score_in_batches(model, [examples[number] for number in missing], batch_size):
            batch = {missing[number]: result for number, result in batch.items()}
            if progress is not None:
                progress.append([{"number": number} | asdict(result) for number, result in batch.items()])
            results |= batch
            bar.update(len(batch))
    return [results[number] for number in range(len(examples))]


def read_results(progress: ProgressFile, examples: int) -> dict[int, ExampleResult]:
    refusal = f"{progress.file} contains records that are not HellaSwag's; choose another file or delete it."
    try:
        results = {record.pop("number"): ExampleResult(**record) for record in map(dict, progress.records)}
    except (KeyError, TypeError):
        raise ValueError(refusal) from None
    if not results.keys() <= set(range(examples)):
        raise ValueError(refusal)
    return results


def score_in_batches(
    model: PreTrainedModel, examples: list[EncodedExample], batch_size: int
) -> Iterator[dict[int, ExampleResult]]:
    """Yield results by the index of the example, those of the longest examples first."""
    choices = [(example.context_ids, example.ending_ids) for example in examples]
    for batch in log_likelihoods(model, choices, batch_size):
        yield {number: make_result(examples[number], scores) for number, scores in batch}


def make_result(example: EncodedExample, scores: list[float]) -> ExampleResult:
    normalized = [score / length for score, length in zip(scores, example.ending_lengths, strict=True)]
    prediction, prediction_norm = (values.index(max(values)) for values in (scores, normalized))
    return ExampleResult(example.ind, example.label, scores, prediction, prediction_norm)
