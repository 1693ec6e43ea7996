"""Curves of a training run, drawn from what Trainer has logged."""

import json
import os
from pathlib import Path

from ..data.token_shards import write_atomically


def plot_history(history: list[dict], path: str | os.PathLike, title: str = "Loss per token (nats)") -> None:
    """Draw the training and validation loss over the steps into the PNG file `path`.

    The numbers go into a JSON file of the same name beside it. `history` is `trainer.state.log_history`, entries with
    `step` and `loss` or `eval_loss`; others are kept in the JSON file and not drawn. No display is needed.

    Raises ImportError without matplotlib, ValueError where there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which would look for a display
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install matplotlib.") from error

    curves = {"training": _points(history, "loss"), "validation": _points(history, "eval_loss")}
    if not any(curves.values()):
        raise ValueError("The history holds neither loss nor eval_loss: train for at least one logging step.")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", title=title)
    for label, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3)
    axes.grid(alpha=0.3)
    axes.legend()

    path = Path(path)
    numbers = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(numbers, lambda file: file.write(json.dumps(history, indent=1).encode() + b"\n"))
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _points(history: list[dict], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in history if key in entry]
