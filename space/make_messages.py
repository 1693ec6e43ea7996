"""Join two sets of labelled messages for the spam filter of the Space, and measure a filter on both.

    python space/make_messages.py --sms SMSSpamCollection --india india.tsv --output runs/space/messages

Writes a folder for examples/classify.py, whose rows for validation and test also say of which `corpus` they are, and
messages.txt, the training messages as text. Of the Indian messages half is for the test.
"""

import argparse
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from make_data import write
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_curve
from sklearn.pipeline import Pipeline, make_pipeline

from scratch_gpt2.cli import run_main
from scratch_gpt2.data.text_classification import (
    FRACTIONS,
    PreparedClassification,
    describe,
    prepare,
    read_labelled_text,
    save_prepared,
)

SEED = 42
INDIA_FRACTIONS = (0.4, 0.1, 0.5)
SPAM = "spam"
FALSE_ALARMS = 0.01
LINK = re.compile(r"(?:https?://|www\.)\S+|\b[\w-]+\.(?:com|co|in|net|org|uk|ly|me)\b\S*", re.IGNORECASE)
# How a message is changed to see what a filter holds on to.
VARIANTS: dict[str, Callable[[str], str]] = {
    "as_sent": str,
    "no_digits": lambda text: re.sub(r"\d", "", text),
    "no_links": lambda text: LINK.sub("", text),
    "upper_case": str.upper,
    "lower_case": str.lower,
}
# How often a training message is given, each time as it was sent, without digits, without links or without both. Upper
# and lower case are one to the filter's tokenizer.
DRAWS = 5
LEFT_OUT: tuple[tuple[str, ...], ...] = ((), ("no_digits",), ("no_links",), ("no_links", "no_digits"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sms", required=True, help="the SMS Spam Collection, label<TAB>text")
    parser.add_argument("--india", required=True, help="the Indian messages, label<TAB>text")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    arguments = parser.parse_args()
    data = join_corpora(arguments.sms, arguments.india)
    save_messages(data, arguments.output)
    for name, part in data.report["splits"].items():
        print(f"{name}: {part['rows']:,} messages, {part['labels']}")


def save_messages(data: PreparedClassification, folder: Path) -> None:
    save_prepared(with_variants(data), folder)
    write(folder / "messages.txt", [row["text"] for row in data.splits["train"]])


def join_corpora(
    sms: str, india: str, seed: int = SEED, train_on: tuple[str, ...] = ("sms", "india")
) -> PreparedClassification:
    """Both sets, each without duplicates and split by `seed`; for training and validation only those of `train_on`."""
    corpora = {
        "sms": prepare(read_labelled_text(sms), "sms", seed, FRACTIONS, unescape_entities=True),
        "india": prepare(read_labelled_text(india), "india", seed, INDIA_FRACTIONS, unescape_entities=True),
    }
    used = {"train": train_on, "validation": train_on, "test": tuple(corpora)}
    splits = {
        split: [row | {"corpus": name} for name in names for row in corpora[name].splits[split]]
        for split, names in used.items()
    }
    described = {split: describe(rows, () if split == "train" else splits["train"]) for split, rows in splits.items()}
    report = corpora["sms"].report | {"source": f"{sms}, {india}", "splits": described}
    return PreparedClassification(splits, corpora["sms"].label_names, report)


def with_variants(data: PreparedClassification) -> PreparedClassification:
    """Each training message DRAWS times, in one of the forms of LEFT_OUT, so that a filter does not rely on digits and
    links. One pass over these rows is DRAWS epochs."""
    rng = random.Random(SEED)
    train = []
    for row in DRAWS * data.splits["train"]:
        text = row["text"]
        for name in rng.choice(LEFT_OUT):
            text = VARIANTS[name](text)
        train.append(row | {"text": text.strip() or row["text"]})
    described = data.report["splits"] | {"train": describe(train, ())}
    return PreparedClassification(
        data.splits | {"train": train}, data.label_names, data.report | {"splits": described}
    )


def filter_metrics(
    spam_probabilities: Callable[[list[str]], np.ndarray],
    rows: list[dict],
    variants: tuple[str, ...] = tuple(VARIANTS),
) -> dict[str, float]:
    """Accuracy and F1 on the test rows of either corpus in each of VARIANTS, and, of messages as they were sent, the
    share of spam that is found where one in a hundred others is taken for spam."""
    metrics = {}
    for corpus in sorted({row["corpus"] for row in rows}):
        own = [row for row in rows if row["corpus"] == corpus]
        is_spam = np.array([row["label"] == SPAM for row in own])
        for variant in variants:
            # A message may be nothing but a link.
            probabilities = spam_probabilities([VARIANTS[variant](row["text"]).strip() or "." for row in own])
            metrics[f"{corpus}_{variant}_accuracy"] = float(accuracy_score(is_spam, probabilities > 0.5))
            metrics[f"{corpus}_{variant}_f1"] = float(f1_score(is_spam, probabilities > 0.5))
            if variant == "as_sent":
                false_alarms, found, _ = roc_curve(is_spam, probabilities, drop_intermediate=False)
                metrics[f"{corpus}_recall_at_1%"] = float(found[false_alarms <= FALSE_ALARMS].max())
    return metrics


def fit_tfidf(data: PreparedClassification) -> Pipeline:
    """The baseline that an honest reader asks for: words and pairs of words, and scikit-learn's defaults otherwise.
    The strength of the regularisation is chosen on the validation rows, as the GPT-2's epoch is."""
    texts, labels = (
        {name: [row[key] for row in rows] for name, rows in data.splits.items()} for key in ("text", "label")
    )
    candidates = []
    for strength in (1.0, 10.0, 100.0, 1000.0):
        model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=strength, max_iter=2000))
        model.fit(texts["train"], labels["train"])
        candidates.append((model.score(texts["validation"], labels["validation"]), -strength, model))
    return max(candidates, key=lambda candidate: candidate[:2])[2]


def spam_probabilities_of(model: Pipeline) -> Callable[[list[str]], np.ndarray]:
    """What `filter_metrics` asks for, of the baseline."""
    spam = list(model.classes_).index(SPAM)
    return lambda texts: model.predict_proba(texts)[:, spam]


if __name__ == "__main__":
    run_main(main)
