"""Curves of a training run, drawn from what Trainer has logged."""

import os
from pathlib import Path

from ..files import figure_file

LOSS = {"training": "loss", "validation": "eval_loss"}
SMALL_PANELS = {"learning rate": "learning_rate", "gradient norm": "grad_norm"}


def plot_history(history: list[dict], path: str | os.PathLike, title: str = "Loss per token (nats)") -> None:
    """Draw the training and validation loss over the steps into the PNG file `path`.

    The numbers are saved to a JSON file of the same name. `history` is `trainer.state.log_history`, entries with
    `step` and `loss` or `eval_loss`; others are kept in the JSON file and not drawn. No display is needed.

    Raises ImportError without matplotlib, ValueError if there is nothing to draw.
    """
    curves = {label: points for label, key in LOSS.items() if (points := _points(history, key))}
    if not curves:
        raise ValueError("The history has neither loss nor eval_loss: train for at least one logging step.")
    with figure_file(path, history, figsize=(7, 4)) as figure:
        axes = figure.add_subplot(xlabel="step", title=title)
        for label, points in curves.items():
            axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3)
        axes.grid()
        axes.legend()


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
    with figure_file(path, figsize=(8, 6 if len(rows) == 2 else 4)) as figure:
        panels: dict = figure.subplot_mosaic(rows, height_ratios=[2.5, 1][: len(rows)])
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
            axes.grid()


def plot_epochs(history: list[dict], path: str | os.PathLike) -> None:
    """Draw a classifier's loss and accuracy on training and validation rows over the epochs into the PNG file `path`.

    The numbers are saved to a JSON file of the same name. `history` is the `trainer.state.log_history` of a
    `ClassificationTrainer`.

    Raises ImportError without matplotlib, ValueError if no epoch was evaluated.
    """
    if not any("eval_loss" in entry for entry in history):
        raise ValueError("The history has no eval_loss: train for at least one epoch.")
    with figure_file(path, history, figsize=(9, 4)) as figure:
        for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            for label, key in (("training", f"train_sample_{quantity}"), ("validation", f"eval_{quantity}")):
                points = [(entry["epoch"], entry[key]) for entry in history if key in entry]
                axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3)
            axes.set(xlabel="epoch", title=quantity)
            axes.grid()
            axes.legend()


def plot_confusion_matrix(matrix: list[list[int]], label_names: list[str], path: str | os.PathLike) -> None:
    """Draw a confusion matrix, true labels from top to bottom and predicted ones from left to right, into the PNG file
    `path`, and save the numbers to a JSON file of the same name.

    Raises ImportError without matplotlib.
    """
    names = [label if len(label) <= 20 else label[:19] + "…" for label in label_names]
    darkest = max(max(row) for row in matrix)
    numbers = {"labels": label_names, "matrix": matrix}
    with figure_file(path, numbers, figsize=(2.5 + len(label_names), 2 + len(label_names))) as figure:
        axes = figure.add_subplot(xlabel="predicted", ylabel="true")
        axes.imshow(matrix, cmap="Blues")
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        for i, row in enumerate(matrix):
            for j, count in enumerate(row):
                axes.text(
                    j, i, str(count), ha="center", va="center", color="white" if 2 * count > darkest else "black"
                )
