"""What a trained classifier leaves beside the model: test metrics, plots, and its most confident mistakes."""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import PredictionOutput

from ..files import write_json
from ..inspection import token_attributions
from ..prediction import classify_text
from ..tokenization import check_text, encode_texts
from .classification import ClassificationTrainer
from .plots import plot_confusion_matrix, plot_epochs


def report(
    trainer: ClassificationTrainer, prediction: PredictionOutput, validation_loss: float, output_dir: str
) -> dict[str, float]:
    """Write metrics.json and the plots, print the test metrics and the most confident mistakes, and return the metrics
    that are one number. `prediction` is that of `trainer.test_rows`."""
    from ..evaluation.metrics import classification_metrics  # takes seconds to import

    logits, references = prediction.predictions, prediction.label_ids
    names, positive = trainer.label_names_by_id, trainer.positive
    metrics: dict = classification_metrics(logits.argmax(-1), references, logits, label_names=names, positive=positive)
    matrix = metrics.pop("confusion_matrix")
    metrics.pop("positive_label", None)
    metrics["loss"] = prediction.metrics["test_loss"]  # type: ignore[index]
    known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    content = {"test": known | {"confusion_matrix": matrix}, "test_rows": len(references), "positive_label": positive}
    write_json(Path(output_dir, "metrics.json"), content | {"best_validation_loss": validation_loss})
    plot_epochs(trainer.state.log_history, Path(output_dir, "epochs.png"))
    plot_confusion_matrix(matrix, names, Path(output_dir, "confusion_matrix.png"))

    about = "means over the labels" if positive is None else f"of the label {one_line(repr(positive))}"
    print(f"\ntest    {len(references):,} texts; precision, recall and F1 are {about}")
    for name, value in metrics.items():
        print(f"  {name:<17} {value:.4f}")
    print(f"  {'confusion_matrix':<17} {matrix}")
    print_mistakes([trainer.test_rows[i] for i in range(len(references))], logits, names)
    return metrics


def print_mistakes(rows: list[dict], logits: np.ndarray, label_names: list[str]) -> None:
    mistakes = confident_mistakes(rows, logits)
    print("\nmost confident mistakes:" if mistakes else "\nno mistakes")
    for i, predicted, probability in mistakes:
        truth = label_names[rows[i]["labels"]]
        text = one_line(rows[i]["text"], 80)
        print(one_line(f"{truth} taken for {label_names[predicted]} ({probability:.3f}): {text}", 300))


def confident_mistakes(rows: list[dict], logits: np.ndarray, count: int = 10) -> list[tuple[int, int, float]]:
    """(row, predicted label id, its probability) of the wrong predictions, the most confident first."""
    probabilities = torch.from_numpy(logits).float().softmax(-1)
    confidence, predicted = probabilities.max(-1)
    wrong = [i for i, row in enumerate(rows) if row["labels"] != predicted[i]]
    wrong.sort(key=lambda i: -confidence[i])
    return [(i, predicted[i].item(), confidence[i].item()) for i in wrong[:count]]


def check_explainable(tokenizer: PreTrainedTokenizerBase, texts: list[str], n_positions: int) -> None:
    """Raise ValueError for a text that is empty, not valid Unicode, or longer than the model's context."""
    for text in texts:
        if not check_text(text).strip():
            raise ValueError("A text to explain is empty; give at least one word.")
        (ids,), _ = encode_texts(tokenizer, [text], max_length=sys.maxsize)
        if len(ids) > n_positions:
            raise ValueError(
                f"The text to explain {one_line(text, 40)!r} has {len(ids)} tokens, but the model has {n_positions} "
                "positions; shorten it."
            )


def explain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    """Print the label of each text and how much each of its tokens speaks for that label."""
    for text in texts:
        label, probability = next(iter(classify_text(model, tokenizer, text)[0].items()))
        print(f"\n{label} {probability:.3f}  {one_line(text)}")
        for token, score in token_attributions(model, tokenizer, text, label):
            print(f"  {score:+.3f}  {one_line(repr(token))}")


def one_line(text: str, width: int = 100) -> str:
    """A stranger's text made safe to print: one line without control characters, in the encoding of the terminal."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    text = text if len(text) <= width else text[: width - 1] + "…"
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
