"""A report on one or several models, side by side: perplexity, HellaSwag, classification, speed of generation.

Every model is evaluated in its own process, so that none uses another's memory, caches or random state.
"""

import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from ..cpu_inference import optimize_if_faster
from ..data.text_classification import PreparedClassification
from ..files import INK, figure_file
from ..prediction import classify_text
from ..tokenization import END_OF_TEXT, load_tokenizer
from .hellaswag import Example, hellaswag_accuracy
from .models import load_model, load_tokenizer_of, measure_generation
from .perplexity import perplexity

COLUMNS = 3  # of panels in the plot
MAX_NAME = 30  # characters of a model's name that are shown in a panel


@dataclass(frozen=True)
class Plan:
    """What to evaluate. Language models get `texts` (by name), `hellaswag` and `new_tokens` of generation (0: none),
    classifiers the test split of `classification`. With `reference`, transformers' GPT-2 replaces ours; with
    `optimize`, ours takes the fastest kernels for this CPU, and their names are printed."""

    texts: dict[str, str] = field(default_factory=dict)
    context: int | None = None
    stride: int | None = None
    separator: str | None = END_OF_TEXT
    hellaswag: list[Example] = field(default_factory=list)
    protocol: str = "lm-eval"
    classification: PreparedClassification | None = None
    new_tokens: int = 64
    batch_size: int = 4
    reference: bool = False
    optimize: bool = False


@dataclass(frozen=True)
class Figure:
    """A number of the report, printed with `digits` digits after the point. `interval` is at 95%."""

    value: float
    digits: int = 4
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        text = f"{self.value:,.{self.digits}f}"
        if self.interval is None:
            return text
        low, high = self.interval
        return f"{text} [{low:.{self.digits}f}, {high:.{self.digits}f}]"


def measure_all(names: list[str], tokenizer: str | None, plan: Plan) -> tuple[dict[str, dict], dict[str, Exception]]:
    """The results of each model, and the errors of those that could not be evaluated, which are also printed."""
    results: dict[str, dict] = {}
    failures: dict[str, Exception] = {}
    for name in dict.fromkeys(names):
        try:
            results[name] = measure_apart(name, tokenizer, plan)
        except (OSError, ValueError, ImportError, torch.OutOfMemoryError) as error:
            failures[name] = error
            if len(set(names)) > 1:
                print(f"{name} could not be evaluated: {' '.join(str(error).split())}", file=sys.stderr)
    return results, failures


def measure_apart(name: str, tokenizer: str | None, plan: Plan) -> dict:
    """`measure_model` in its own process. Raises what it raises, and ChildProcessError if it was killed."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure_model, name, tokenizer, plan).result()
        except BrokenProcessPool:
            raise ChildProcessError(
                f"The process that evaluated {name} was killed, perhaps for lack of memory; try a smaller batch_size."
            ) from None


def measure_model(name: str, tokenizer_name: str | None, plan: Plan) -> dict:
    """Everything in the plan that applies to this kind of model, as JSON values.

    Raises ValueError if nothing applies, and the errors of the evaluations.
    """
    model = load_model(name, reference=plan.reference).to(PartialState().device)
    tokenizer = load_tokenizer(tokenizer_name) if tokenizer_name else load_tokenizer_of(name)
    if plan.optimize:
        print(f"{name}: {optimize_if_faster(model)}", file=sys.stderr)
    description = {
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }
    if not type(model).__name__.endswith("ForSequenceClassification"):
        result = measure_language_model(model, tokenizer, plan)
    elif plan.classification is not None:
        result = {"classification": measure_classification(model, tokenizer, plan.classification, plan.batch_size)}
    else:
        result = {}
    if not result:
        raise ValueError(
            f"{name} is a {type(model).__name__}, and nothing that was requested applies to it: give texts or "
            "HellaSwag for a language model, a prepared folder for a classifier."
        )
    return description | result


def measure_language_model(model, tokenizer, plan: Plan) -> dict:
    result: dict = {}
    if plan.new_tokens:
        result["generation"] = measure_generation(model, plan.new_tokens)
    if plan.texts:
        measure = partial(
            perplexity,
            model,
            tokenizer,
            context_length=plan.context,
            stride=plan.stride,
            batch_size=plan.batch_size,
            separator=plan.separator,
        )
        result["texts"] = {name: asdict(measure(text)) for name, text in plan.texts.items()}
    if plan.hellaswag:
        scores = hellaswag_accuracy(
            model, tokenizer, plan.hellaswag, batch_size=plan.batch_size, protocol=plan.protocol
        )
        result["hellaswag"] = {"protocol": plan.protocol} | asdict(scores)
    return result


def measure_classification(model, tokenizer, data: PreparedClassification, batch_size: int) -> dict:
    from .metrics import classification_metrics

    names = data.label_names
    known = list(model.config.id2label.values())
    if sorted(known) != sorted(names):
        raise ValueError(f"The model's labels are {', '.join(known)} but the data's are {', '.join(names)}.")
    rows = data.splits["test"]
    probabilities = classify_text(model, tokenizer, [row["text"] for row in rows], batch_size)
    # float32 has probabilities of exactly 0, whose logarithm scikit-learn refuses
    scores = np.log([[max(row[name], np.finfo(np.float32).tiny) for name in names] for row in probabilities])
    references = [names.index(row["label"]) for row in rows]
    metrics = classification_metrics(scores.argmax(1), references, scores, label_names=names)
    return {"rows": len(rows), "labels": names} | metrics


def figures(result: dict) -> dict[str, Figure]:
    """The numbers of one model by their names in the table and in the plot."""
    found = {"million parameters": Figure(result["parameters"] / 1e6, 1)}
    for name, text in result.get("texts", {}).items():
        found[f"perplexity, {name}"] = Figure(text["perplexity"], 3)
        found[f"bits per byte, {name}"] = Figure(text["bits_per_byte"])
    if hellaswag := result.get("hellaswag"):
        for name, interval in (("accuracy", "interval"), ("accuracy_norm", "interval_norm")):
            title = f"HellaSwag {name}, {hellaswag['protocol']}"
            found[title] = Figure(hellaswag[name], 4, tuple(hellaswag[interval]))
    if classification := result.get("classification"):
        label = classification.get("positive_label")
        about = "" if label is None else f" of {label!r}"
        found["classification accuracy"] = Figure(classification["accuracy"])
        for name in ("precision", "recall", "f1", "roc_auc"):
            found[f"classification {name}{about}"] = Figure(classification[name])
    if generation := result.get("generation"):
        found["generated tokens per second"] = Figure(generation["tokens_per_second"], 1)
        found["peak MB while generating"] = Figure(generation["peak_mb"], 0)
    return found


def table(results: dict[str, dict]) -> str:
    """A row for every figure, a column for every model; a dash where a figure does not apply."""
    columns = {name: figures(result) for name, result in results.items()}
    titles = dict.fromkeys(title for column in columns.values() for title in column)
    lines = [["", *columns]]
    lines += [[title, *(str(column.get(title, "-")) for column in columns.values())] for title in titles]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def plot(results: dict[str, dict], path: Path) -> None:
    """Write a PNG file with a panel for every figure and a bar for every model.

    Raises ImportError without matplotlib.
    """
    panels: dict[str, dict[str, Figure]] = {}
    for name, result in results.items():
        for title, figure in figures(result).items():
            if math.isfinite(figure.value):
                panels.setdefault(title, {})[name] = figure
    titles = list(panels)
    rows = [titles[start : start + COLUMNS] for start in range(0, len(titles), COLUMNS)]
    with figure_file(path, figsize=(5.5 * COLUMNS, (0.9 + 0.4 * len(results)) * len(rows))) as drawing:
        for row, strip in zip(rows, drawing.subfigures(len(rows), squeeze=False)[:, 0], strict=True):
            for panel, title in zip(strip.subplots(1, len(row), squeeze=False)[0], row, strict=True):
                draw_bars(panel, title, panels[title])


def draw_bars(panel, title: str, bars: dict[str, Figure]) -> None:
    for number, figure in enumerate(bars.values()):
        panel.barh(number, figure.value, color=f"C{number}", height=0.6)
        end = figure.value if figure.interval is None else max(figure.value, *figure.interval)
        if figure.interval is not None:
            panel.plot(figure.interval, [number, number], color=INK)
        panel.text(end, number, f" {figure.value:,.{figure.digits}f}", va="center")
    panel.margins(x=0.3)  # for the number of the longest bar
    names = [name if len(name) <= MAX_NAME else f"…{name[1 - MAX_NAME :]}" for name in bars]
    panel.set_yticks(range(len(bars)), names)
    panel.invert_yaxis()
    panel.set_title(title, fontsize=10)


def versions() -> dict[str, str]:
    import transformers

    from .. import __version__

    return {"scratch_gpt2": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
