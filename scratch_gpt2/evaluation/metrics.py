"""Classification metrics for `evaluate`, computed by scikit-learn.

They are called like those that `evaluate.load` downloads from the Hub, but need no network. Only scripts import this
module, because evaluate and scikit-learn take seconds to load.
"""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import numpy as np
import sklearn.metrics

LABELS = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}


class ClassificationMetric(evaluate.Metric):
    """Takes label ids, `predictions` and `references`, both (N,)."""

    columns = LABELS

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=ClassificationMetric.__doc__,
            features=datasets.Features(self.columns),
            reference_urls=["https://scikit-learn.org/stable/modules/model_evaluation.html"],
        )


class Accuracy(ClassificationMetric):
    """Share of correct predictions."""

    def _compute(self, predictions, references):
        return {"accuracy": float(sklearn.metrics.accuracy_score(references, predictions))}


class LabelMetric(ClassificationMetric):
    """A metric of the label `pos_label`, or with `average="macro"` the mean over `labels`. 0 where it is undefined."""

    key: str

    def _compute(self, predictions, references, labels=None, pos_label=1, average="binary"):
        score = getattr(sklearn.metrics, f"{self.key}_score")
        options = {"labels": labels, "pos_label": pos_label, "average": average, "zero_division": 0}
        return {self.key: float(score(references, predictions, **options))}


class Precision(LabelMetric):
    """Share of the predictions of `pos_label` that are correct; `average="macro"`: the mean over `labels`."""

    key = "precision"


class Recall(LabelMetric):
    """Share of the rows of `pos_label` that are found; `average="macro"`: the mean over `labels`."""

    key = "recall"


class F1(LabelMetric):
    """Harmonic mean of precision and recall of `pos_label`; `average="macro"`: the mean over `labels`."""

    key = "f1"


class RocAuc(ClassificationMetric):
    """Probability that a random row of label 1 has a higher score than one of label 0, ties counted as half. Takes
    `prediction_scores` (N,) and `references` (N,); nan where all references are equal."""

    columns = {"prediction_scores": datasets.Value("float64"), "references": datasets.Value("int64")}

    def _compute(self, prediction_scores, references):
        if len(set(references)) < 2:
            return {"roc_auc": math.nan}
        return {"roc_auc": float(sklearn.metrics.roc_auc_score(references, prediction_scores))}


class ConfusionMatrix(ClassificationMetric):
    """Row i, column j: the number of rows of label i that were predicted as j."""

    def _compute(self, predictions, references, labels=None):
        return {"confusion_matrix": sklearn.metrics.confusion_matrix(references, predictions, labels=labels).tolist()}


def classification_metrics(
    predictions, references, scores=None, *, label_names: list[str], positive: str | None = None
) -> dict[str, Any]:
    """accuracy, precision, recall, f1, confusion_matrix, and with `scores` roc_auc.

    With two labels, precision, recall, F1 and ROC AUC are those of the label in `positive_label` of the result. With
    more, they are means over the labels ("macro"), ROC AUC of each label against the others, and there is no
    `positive_label`. ROC AUC is nan where a label is missing from the references.

    Args:
        predictions, references: (N,) label ids.
        scores: (N, number of labels) logits.
        label_names: the labels in the order of their ids.
        positive: one of two labels; by default the rarer one among the references, such as spam among ham: a model
            that only ever predicts the frequent label has an F1 near 1 for that label.

    Raises:
        ValueError: empty or unequal lengths, scores of another shape, an id without a name, an unknown `positive`.
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    check_ids(predictions, references, label_names)
    ids = list(range(len(label_names)))
    pair = {"predictions": predictions, "references": references}
    result: dict[str, Any] = {}
    options: dict[str, Any] = {"labels": ids, "average": "macro"}
    if len(ids) == 2:
        positive = positive or rarer_label((label_names[i] for i in references), label_names)
        if positive not in label_names:
            raise ValueError(f"The positive label {positive!r} is not one of {', '.join(map(repr, label_names))}.")
        result["positive_label"] = positive
        options = {"pos_label": label_names.index(positive)}
    result |= Accuracy(keep_in_memory=True).compute(**pair)
    for metric in (Precision, Recall, F1):
        result |= metric(keep_in_memory=True).compute(**pair, **options)
    if scores is not None:
        scores = np.asarray(scores, dtype=float)
        if scores.shape != (len(references), len(ids)):
            raise ValueError(f"The scores have shape {scores.shape}, not {(len(references), len(ids))}: give logits.")
        result["roc_auc"] = roc_auc(scores, references, options.get("pos_label"))
    return result | ConfusionMatrix(keep_in_memory=True).compute(**pair, labels=ids)


def rarer_label(labels: Iterable[str], label_names: list[str]) -> str:
    """The least frequent of `label_names` among the labels of some rows; the last one of equally frequent ones."""
    counts = Counter(labels)
    return min(reversed(label_names), key=lambda name: counts[name])


def check_ids(predictions: np.ndarray, references: np.ndarray, label_names: list[str]) -> None:
    if not len(references) or predictions.shape != references.shape:
        raise ValueError(
            f"There are {predictions.size} predictions for {references.size} references; give one for each, "
            "and at least one."
        )
    for number in (*predictions, *references):
        if not 0 <= number < len(label_names):
            raise ValueError(f"The label id {number} has no name: label_names has {len(label_names)} entries.")


def roc_auc(logits: np.ndarray, references: np.ndarray, positive: int | None) -> float:
    """ROC AUC of the label `positive`, or the mean over all labels. A label's score is its log odds against the
    others."""
    labels = range(logits.shape[1]) if positive is None else [positive]
    areas = []
    for label in labels:
        odds = logits[:, label] - np.logaddexp.reduce(np.delete(logits, label, axis=1), axis=1)
        area = RocAuc(keep_in_memory=True).compute(prediction_scores=odds, references=references == label)
        areas.append(area["roc_auc"])
    return float(np.mean(areas))
