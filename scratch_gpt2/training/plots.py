"""Curves of a training run, drawn from what Trainer has logged."""

import os

from ..files import new_figure, save_figure


def plot_history(history: list[dict], path: str | os.PathLike, title: str = "Loss per token (nats)") -> None:
    """Draw the training and validation loss over the steps into the PNG file `path`.

    The numbers go into a JSON file of the same name beside it. `history` is `trainer.state.log_history`, entries with
    `step` and `loss` or `eval_loss`; others are kept in the JSON file and not drawn. No display is needed.

    Raises ImportError without matplotlib, ValueError where there is nothing to draw.
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


def plot_epochs(history: list[dict], path: str | os.PathLike) -> None:
    """Draw a classifier's loss and accuracy on training and validation rows over the epochs into the PNG file `path`.

    The numbers go into a JSON file of the same name beside it. `history` is the `trainer.state.log_history` of a
    `ClassificationTrainer`.

    Raises ImportError without matplotlib, ValueError where no epoch was evaluated.
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
    """Draw how many rows of each label (from top to bottom) were predicted as which (from left to right) into the PNG
    file `path`, and write the numbers into a JSON file of the same name beside it.

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
