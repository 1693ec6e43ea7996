"""Metrics of classification for `evaluate`, computed by scikit-learn.

They are called as those that `evaluate.load` fetches from the Hub, and need no network. Only scripts import this
module: evaluate and scikit-learn take seconds to load.
"""

import math
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
    """Share of right predictions."""

    def _compute(self, predictions, references):
        return {"accuracy": float(sklearn.metrics.accuracy_score(references, predictions))}


class Precision(ClassificationMetric):
    """Share of the predictions of `pos_label` that are right, 0 where there are none; `average="macro"` is the mean
    over `labels`."""

    def _compute(self, predictions, references, labels=None, pos_label=1, average="binary"):
        options = {"labels": labels, "pos_label": pos_label, "average": average, "zero_division": 0}
        return {"precision": float(sklearn.metrics.precision_score(references, predictions, **options))}


class Recall(ClassificationMetric):
    """Share of the rows of `pos_label` that are found, 0 where there are none; `average="macro"` is the mean over
    `labels`."""

    def _compute(self, predictions, references, labels=None, pos_label=1, average="binary"):
        options = {"labels": labels, "pos_label": pos_label, "average": average, "zero_division": 0}
        return {"recall": float(sklearn.metrics.recall_score(references, predictions, **options))}


class F1(ClassificationMetric):
    """Harmonic mean of precision and recall; `average="macro"` is the mean over `labels`."""

    def _compute(self, predictions, references, labels=None, pos_label=1, average="binary"):
        options = {"labels": labels, "pos_label": pos_label, "average": average, "zero_division": 0}
        return {"f1": float(sklearn.metrics.f1_score(references, predictions, **options))}


class RocAuc(ClassificationMetric):
    """Probability that a random row of label 1 has a higher score than one of label 0, ties counted as half. Takes
    `prediction_scores` (N,) and `references` (N,); nan where all references are equal."""

    columns = {"prediction_scores": datasets.Value("float64"), "references": datasets.Value("int64")}

    def _compute(self, prediction_scores, references):
        if len(set(references)) < 2:
            return {"roc_auc": math.nan}
        return {"roc_auc": float(sklearn.metrics.roc_auc_score(references, prediction_scores))}


class ConfusionMatrix(ClassificationMetric):
    """Row i, column j: how many rows of label i were predicted as j."""

    def _compute(self, predictions, references, labels=None):
        return {"confusion_matrix": sklearn.metrics.confusion_matrix(references, predictions, labels=labels).tolist()}


def classification_metrics(
    predictions, references, scores=None, *, label_names: list[str], positive: str | None = None
) -> dict[str, float | list[list[int]]]:
    """accuracy, precision, recall, f1, confusion_matrix, and with `scores` roc_auc.

    Of two labels, precision, recall, F1 and ROC AUC are those of `positive`; of more, means over the labels ("macro"),
    ROC AUC of each label against the others. ROC AUC is nan where a label is missing from the references.

    Args:
        predictions, references: (N,) label ids.
        scores: (N, number of labels) logits.
        label_names: the labels in the order of their ids.
        positive: one of two labels; by default the second, such as spam of ham and spam.

    Raises ValueError for empty or unequal lengths, scores of another shape, ids without a name, and an unknown
    `positive`.
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    check_ids(predictions, references, label_names)
    ids = list(range(len(label_names)))
    pair = {"predictions": predictions, "references": references}
    if len(ids) == 2:
        options: dict[str, Any] = {"pos_label": positive_id(label_names, positive)}
    else:
        options = {"labels": ids, "average": "macro"}
    result = Accuracy(keep_in_memory=True).compute(**pair)
    for metric in (Precision, Recall, F1):
        result |= metric(keep_in_memory=True).compute(**pair, **options)
    if scores is not None:
        scores = np.asarray(scores, dtype=float)
        if scores.shape != (len(references), len(ids)):
            raise ValueError(f"The scores have shape {scores.shape}, not {(len(references), len(ids))}: give logits.")
        result["roc_auc"] = roc_auc(scores, references, options.get("pos_label"))
    return result | ConfusionMatrix(keep_in_memory=True).compute(**pair, labels=ids)


def check_ids(predictions: np.ndarray, references: np.ndarray, label_names: list[str]) -> None:
    if not len(references) or predictions.shape != references.shape:
        raise ValueError(
            f"There are {predictions.size} predictions for {references.size} references; give one for each, "
            "and at least one."
        )
    for number in (*predictions, *references):
        if not 0 <= number < len(label_names):
            raise ValueError(f"The label id {number} has no name: label_names holds {len(label_names)}.")


def positive_id(label_names: list[str], positive: str | None) -> int:
    if positive is None:
        return 1
    if positive not in label_names:
        raise ValueError(f"The positive label {positive!r} is not one of {', '.join(map(repr, label_names))}.")
    return label_names.index(positive)


def roc_auc(logits: np.ndarray, references: np.ndarray, positive: int | None) -> float:
    """Of the label `positive`, or the mean over all labels. A label's score is its log odds against the others."""
    labels = range(logits.shape[1]) if positive is None else [positive]
    areas = []
    for label in labels:
        odds = logits[:, label] - np.logaddexp.reduce(np.delete(logits, label, axis=1), axis=1)
        area = RocAuc(keep_in_memory=True).compute(prediction_scores=odds, references=references == label)
        areas.append(area["roc_auc"])
    return float(np.mean(areas))
