"""Curves of a training run, drawn from what Trainer has logged."""

import os
from pathlib import Path

from ..files import new_figure, save_figure, write_atomically

LOSS = {"training": "loss", "validation": "eval_loss"}
SMALL_PANELS = {"learning rate": "learning_rate", "gradient norm": "grad_norm"}


def plot_history(history: list[dict], path: str | os.PathLike, title: str = "Loss per token (nats)") -> None:
    """Draw the training and validation loss over the steps into the PNG file `path`.

    The numbers go into a JSON file of the same name beside it. `history` is `trainer.state.log_history`, entries with
    `step` and `loss` or `eval_loss`; others are kept in the JSON file and not drawn. No display is needed.

    Raises ImportError without matplotlib, ValueError if there is nothing to draw.
    """
    figure = new_figure(figsize=(7, 4))
    curves = {"training": _points(history, "loss"), "validation": _points(history, "eval_loss")}
    if not any(curves.values()):
        raise ValueError("The history holds neither loss nor eval_loss: train for at least one logging step.")
    axes = figure.add_subplot(xlabel="step", title=title)
    for label, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3)
    axes.grid(alpha=0.3)
    axes.legend()

    save_figure(figure, path, history)


def _points(history: list[dict], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in history if key in entry]


def plot_log(history: list[dict], path: Path) -> None:
    """Draw the loss over the steps, and small below it the learning rate and the gradient norm, into the PNG file
    `path`.

    What was not logged has no panel; a history without any of them draws nothing. `history` is
    `trainer.state.log_history`.
    """
    losses = {label: points for label, key in LOSS.items() if (points := _points(history, key))}
    small = {title: points for title, key in SMALL_PANELS.items() if (points := _points(history, key))}
    if not losses and not small:
        return
    rows = ([["loss"] * max(1, len(small))] if losses else []) + ([list(small)] if small else [])
    figure = new_figure(figsize=(8, 6 if len(rows) == 2 else 4))
    panels = figure.subplot_mosaic(rows, height_ratios=[2.5, 1][: len(rows)])
    for label, points in losses.items():
        panels["loss"].plot(*zip(*points, strict=True), label=label)
    if losses:
        panels["loss"].set_ylabel("loss per token (nats)")
        panels["loss"].legend()
    for title, points in small.items():
        panels[title].plot(*zip(*points, strict=True))
        panels[title].set_title(title, fontsize="medium")
    for axes in panels.values():
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def plot_epochs(history: list[dict], path: str | os.PathLike) -> None:
    """Draw a classifier's loss and accuracy on training and validation rows over the epochs into the PNG file `path`.

    The numbers go into a JSON file of the same name beside it. `history` is the `trainer.state.log_history` of a
    `ClassificationTrainer`.

    Raises ImportError without matplotlib, ValueError if no epoch was evaluated.
    """
    figure = new_figure(figsize=(9, 4))
    evaluated = [entry for entry in history if "eval_loss" in entry]
    if not evaluated:
        raise ValueError("The history holds no eval_loss: train for at least one epoch.")
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for label, key in (("training", f"train_sample_{quantity}"), ("validation", f"eval_{quantity}")):
            points = [(entry["epoch"], entry[key]) for entry in history if key in entry]
            axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3)
        axes.set(xlabel="epoch", title=quantity)
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path, history)


def plot_confusion_matrix(matrix: list[list[int]], label_names: list[str], path: str | os.PathLike) -> None:
    """Draw a confusion matrix, true labels from top to bottom and predicted ones from left to right, into the PNG file
    `path`, and write the numbers into a JSON file of the same name beside it.

    Raises ImportError without matplotlib.
    """
    figure = new_figure(figsize=(2.5 + len(label_names), 2 + len(label_names)))
    names = [label if len(label) <= 20 else label[:19] + "…" for label in label_names]
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    axes.imshow(matrix, cmap="Blues")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    darkest = max(max(row) for row in matrix)
    for i, row in enumerate(matrix):
        for j, count in enumerate(row):
            axes.text(j, i, count, ha="center", va="center", color="white" if 2 * count > darkest else "black")
    save_figure(figure, path, {"labels": label_names, "matrix": matrix})
