"""One report on one or several models: what each predicts, knows, sorts, and how fast it writes.

Every model is measured in a process of its own, so that none uses the memory, the caches or the random state of
another.
"""

import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from ..cli import offline_unless_hub_answers
from ..data.text_classification import PreparedClassification
from ..files import write_atomically
from ..prediction import classify_text
from ..tokenization import load_tokenizer
from .hellaswag import Example, hellaswag_accuracy
from .models import load_model, measure_generation
from .perplexity import perplexity


@dataclass(frozen=True)
class Plan:
    """What to measure. Language models get `texts` (by name), `hellaswag` and `new_tokens` of generation (0: none),
    classifiers the test split of `classification`."""

    texts: dict[str, str] = field(default_factory=dict)
    context: int | None = None
    stride: int | None = None
    hellaswag: list[Example] = field(default_factory=list)
    protocol: str = "lm-eval"
    classification: PreparedClassification | None = None
    new_tokens: int = 64
    batch_size: int = 4
    reference: bool = False  # transformers' GPT-2 in place of ours


@dataclass(frozen=True)
class Figure:
    """A number of the report, printed with so many `digits` after the point. `interval` is at 95%."""

    value: float
    digits: int = 4
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        text = f"{self.value:,.{self.digits}f}"
        if self.interval is None:
            return text
        low, high = self.interval
        return f"{text} [{low:.{self.digits}f}, {high:.{self.digits}f}]"


def measure_apart(name: str, tokenizer: str, plan: Plan) -> dict:
    """`measure_model` in a process of its own. Raises what it raises, and ChildProcessError where it was killed."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure_model, name, tokenizer, plan).result()
        except BrokenProcessPool:
            raise ChildProcessError(
                f"The process that measured {name} was killed, perhaps for lack of memory; try a smaller batch_size."
            ) from None


def measure_model(name: str, tokenizer_name: str, plan: Plan) -> dict:
    """Everything of the plan that applies to this kind of model, as JSON has it.

    Raises ValueError where nothing applies, and what the measurements themselves raise.
    """
    offline_unless_hub_answers(name)
    model = load_model(name, plan.reference).to(PartialState().device).eval()
    tokenizer = load_tokenizer(tokenizer_name)
    result = {
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }
    described = len(result)
    if type(model).__name__.endswith("ForSequenceClassification"):
        if plan.classification is not None:
            result["classification"] = measure_classification(model, tokenizer, plan.classification, plan.batch_size)
    else:
        if plan.new_tokens:
            result["generation"] = measure_generation(model, plan.new_tokens)
        if plan.texts:
            options = (plan.context, plan.stride, plan.batch_size)
            result["texts"] = {
                text_name: asdict(perplexity(model, tokenizer, text, *options))
                for text_name, text in plan.texts.items()
            }
        if plan.hellaswag:
            scores = hellaswag_accuracy(model, tokenizer, plan.hellaswag, plan.batch_size, plan.protocol)
            result["hellaswag"] = {"protocol": plan.protocol} | asdict(scores)
    if len(result) == described:
        raise ValueError(
            f"{name} is a {type(model).__name__}, and nothing of what is asked for applies to it: give texts or "
            "HellaSwag for a language model, a prepared folder for a classifier."
        )
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
    """The numbers of one model by what they are called in the table and in the plot."""
    found = {"million parameters": Figure(result["parameters"] / 1e6, 1)}
    for name, text in result.get("texts", {}).items():
        found[f"perplexity, {name}"] = Figure(text["perplexity"], 3)
        found[f"bits per byte, {name}"] = Figure(text["bits_per_byte"])
    if hellaswag := result.get("hellaswag"):
        for name, interval in (("accuracy", "interval"), ("accuracy_norm", "interval_norm")):
            title = f"HellaSwag {name}, {hellaswag['protocol']}"
            found[title] = Figure(hellaswag[name], 4, tuple(hellaswag[interval]))
    if classification := result.get("classification"):
        for name in ("accuracy", "precision", "recall", "f1", "roc_auc"):
            found[f"classification {name}"] = Figure(classification[name])
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
    """A panel for every figure with a bar for every model, into the PNG file `path`.

    Raises ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure as Drawing  # not pyplot, which would look for a display
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install matplotlib.") from error

    columns = {name: figures(result) for name, result in results.items()}
    titles = list(dict.fromkeys(title for column in columns.values() for title in column))
    across = min(3, len(titles))
    down = math.ceil(len(titles) / across)
    drawing = Drawing(figsize=(4.5 * across, (0.9 + 0.4 * len(columns)) * down), layout="constrained")
    panels = drawing.subplots(down, across, squeeze=False).flatten()
    for panel, title in zip(panels, titles, strict=False):
        draw_bars(panel, title, columns)
    for panel in panels[len(titles) :]:
        panel.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: drawing.savefig(file, format="png", dpi=150))


def draw_bars(panel, title: str, columns: dict[str, dict[str, Figure]]) -> None:
    shown = {name: column[title] for name, column in columns.items() if title in column}
    for number, (name, figure) in enumerate(shown.items()):
        panel.barh(name, figure.value, color=f"C{number}", height=0.6)
        if figure.interval is not None:
            panel.plot(figure.interval, [name, name], color="black")
        panel.text(0, number, f" {figure.value:,.{figure.digits}f}", va="center")
    panel.invert_yaxis()
    panel.set_title(title, fontsize=10)


def write_json(path: Path, report: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(json.dumps(report, indent=2).encode() + b"\n"))


def versions() -> dict[str, str]:
    import transformers

    from .. import __version__

    return {"scratch_gpt2": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
