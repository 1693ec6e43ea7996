"""Metrics compared with values computed by hand and with the examples in evaluate's documentation."""

import math
import socket

import evaluate
import numpy as np
import pytest

from scratch_gpt2.evaluation.metrics import (
    F1,
    Accuracy,
    ConfusionMatrix,
    Precision,
    Recall,
    RocAuc,
    classification_metrics,
)

NAMES = ["ham", "spam"]


@pytest.mark.parametrize(
    ("metric", "inputs", "expected"),
    [  # the examples in the documentation of evaluate's accuracy, precision, recall, f1 and roc_auc
        (Accuracy, ([0, 1, 1, 2, 1, 0], [0, 1, 2, 0, 1, 2]), 0.5),
        (Precision, ([0, 0, 1, 1, 0], [0, 1, 0, 1, 0]), 0.5),
        (Recall, ([0, 1, 0, 1, 1], [0, 0, 1, 1, 1]), 2 / 3),
        (F1, ([0, 0, 1, 1, 0], [0, 1, 0, 1, 0]), 0.5),
        (RocAuc, ([0.5, 0.2, 0.99, 0.3, 0.1, 0.7], [1, 0, 1, 1, 0, 0]), 7 / 9),
    ],
)
def test_examples_of_the_documentation(metric, inputs, expected):
    first = "prediction_scores" if metric is RocAuc else "predictions"
    result = metric(keep_in_memory=True).compute(**{first: inputs[0], "references": inputs[1]})
    (value,) = result.values()
    assert value == pytest.approx(expected)


def test_other_options_of_the_documentation():
    predictions, references = [0, 2, 1, 0, 0, 1], [0, 1, 2, 0, 1, 2]
    pair = {"predictions": predictions, "references": references}
    assert Precision().compute(**pair, average="macro") == {"precision": pytest.approx(2 / 9)}
    assert Recall().compute(**pair, average="macro") == {"recall": pytest.approx(1 / 3)}
    assert F1().compute(**pair, average="macro") == {"f1": pytest.approx(4 / 15)}
    pair = {"predictions": [0, 1, 0, 1, 1], "references": [0, 0, 1, 1, 1]}
    assert Recall().compute(**pair, pos_label=0) == {"recall": 0.5}
    pair = {"predictions": [1, 0, 1, 1, 0], "references": [1, 0, 1, 0, 1]}
    assert ConfusionMatrix().compute(**pair) == {"confusion_matrix": [[1, 1], [1, 2]]}


def test_they_are_metrics_of_evaluate_and_collect_batches():
    metric = Accuracy(keep_in_memory=True)
    assert isinstance(metric, evaluate.Metric)
    metric.add_batch(predictions=[1, 0], references=[1, 1])
    metric.add(prediction=0, reference=0)
    metric.add_batch(predictions=np.array([1]), references=np.array([0]))
    assert metric.compute() == {"accuracy": 0.5}
    assert evaluate.combine([Accuracy(), F1()]).compute(predictions=[1, 0], references=[1, 1]) == {
        "accuracy": 0.5,
        "f1": pytest.approx(2 / 3),
    }


def test_two_labels():
    """3 spam of which 2 are found, 5 ham of which 1 is taken for spam. Of the 15 pairs of spam and ham, 12 have the
    higher score at the spam and one a tie: (12 + 0.5) / 15."""
    references = [1, 1, 1, 0, 0, 0, 0, 0]
    odds = np.array([3.0, 1.0, -1.0, 2.0, -1.0, -2.0, -3.0, -4.0])
    offsets = np.array([5.0, -7.0, 0.0, 2.0, 100.0, -3.0, 1.0, 0.0])  # logits are only known up to a constant
    scores = np.stack((offsets, offsets + odds), axis=1)
    result = classification_metrics((odds > 0).astype(int), references, scores, label_names=NAMES)
    assert result == {
        "positive_label": "spam",
        "accuracy": 0.75,
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "roc_auc": pytest.approx(12.5 / 15),
        "confusion_matrix": [[4, 1], [1, 2]],
    }


def test_the_positive_label_can_be_the_first():
    references = [1, 1, 1, 0, 0, 0, 0, 0]
    odds = np.array([3.0, 1.0, -1.0, 2.0, -1.0, -2.0, -3.0, -4.0])
    scores = np.stack((-odds, np.zeros(8)), axis=1)
    result = classification_metrics(odds > 0, references, scores, label_names=NAMES, positive="ham")
    assert (result["precision"], result["recall"], result["f1"]) == pytest.approx((0.8, 0.8, 0.8))
    assert result["roc_auc"] == pytest.approx(12.5 / 15)
    assert result["confusion_matrix"] == [[4, 1], [1, 2]]


def test_the_positive_label_is_the_rarer_one():
    """7 of 68 rows are fraud, of which 2 are found; 2 others are taken for fraud. The F1 of the frequent label is
    2 * 59 / (2 * 59 + 7) = 0.944."""
    references = [0] * 7 + [1] * 61
    predictions = [0] * 2 + [1] * 5 + [0] * 2 + [1] * 59
    result = classification_metrics(predictions, references, label_names=["fraud", "other"])
    assert result["positive_label"] == "fraud"
    assert (result["precision"], result["recall"], result["f1"]) == pytest.approx((2 / 4, 2 / 7, 4 / 11))
    chosen = classification_metrics(predictions, references, label_names=["fraud", "other"], positive="other")
    assert chosen["positive_label"] == "other" and chosen["f1"] == pytest.approx(0.944)
    equal = classification_metrics([0, 1], [0, 1], label_names=["x", "y"])
    assert equal["positive_label"] == "y"  # of equally frequent ones the last
    assert "positive_label" not in classification_metrics([0, 1], [0, 1], label_names=["a", "b", "c"])


def test_nothing_predicted_positive_is_zero_without_a_warning(recwarn):
    result = classification_metrics([0, 0, 0], [0, 1, 0], label_names=NAMES)
    assert result == {
        "positive_label": "spam",
        "accuracy": pytest.approx(2 / 3),
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "confusion_matrix": [[2, 0], [1, 0]],
    }
    assert [str(warning.message) for warning in recwarn if "sklearn" in str(warning.category)] == []


def test_more_labels_are_averaged():
    """a: precision 2/3, recall 1; b: 0 and 0; c: 1 and 1/2; F1 4/5, 0 and 2/3. d is never there and counts as 0."""
    predictions, references = [0, 0, 0, 2, 1], [0, 0, 1, 2, 2]
    result = classification_metrics(predictions, references, label_names=["a", "b", "c"])
    assert result["accuracy"] == 0.6
    assert result["precision"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert result["recall"] == pytest.approx((1 + 0 + 1 / 2) / 3)
    assert result["f1"] == pytest.approx((4 / 5 + 0 + 2 / 3) / 3)
    assert result["confusion_matrix"] == [[2, 0, 0], [1, 0, 0], [0, 1, 1]]
    four = classification_metrics(predictions, references, label_names=["a", "b", "c", "d"])
    assert four["f1"] == pytest.approx((4 / 5 + 0 + 2 / 3 + 0) / 4)
    assert four["confusion_matrix"] == [[2, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_roc_auc_of_more_labels_is_the_mean_of_each_against_the_others():
    probabilities = np.array([[0.5, 0.2, 0.3], [0.25, 0.25, 0.5], [0.1, 0.5, 0.4], [0.5, 0.1, 0.4]])
    references = [0, 1, 0, 2]
    # Pairs in the right order, ties half. a: 0.5 and 0.1 against 0.25 and 0.5. b: 0.25 against 0.2, 0.5 and 0.1.
    # c: 0.4 against 0.3, 0.5 and 0.4.
    result = classification_metrics([0, 2, 1, 0], references, np.log(probabilities) + 7, label_names=["a", "b", "c"])
    assert result["roc_auc"] == pytest.approx((1.5 / 4 + 2 / 3 + 1.5 / 3) / 3)


def test_roc_auc_is_nan_where_a_label_is_missing():
    assert math.isnan(classification_metrics([0], [0], [[1.0, 0.0]], label_names=NAMES)["roc_auc"])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0, 1], [0]), {}, "There are 2 predictions for 1 references; give one for each, and at least one."),
        (([], []), {}, "There are 0 predictions for 0 references"),
        (([0, 2], [0, 1]), {}, "The label id 2 has no name: label_names has 2 entries."),
        (([0, 1], [0, -1]), {}, "The label id -1 has no name: label_names has 2 entries."),
        (([0], [0]), {"positive": "eggs"}, "The positive label 'eggs' is not one of 'ham', 'spam'."),
        (([0], [0], [[1.0]]), {}, r"The scores have shape \(1, 1\), not \(1, 2\)"),
    ],
)
def test_mistakes_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(*arguments, label_names=NAMES, **options)


def test_no_network_is_asked(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert classification_metrics([0, 1], [0, 1], label_names=NAMES)["accuracy"] == 1.0
