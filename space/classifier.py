"""Classification: the verdict on one text, the words that decided, and whole columns of texts."""

from collections.abc import Iterator
from dataclasses import dataclass

from limits import MAX_EXPLAINED_CHARACTERS, check_input

from scratch_gpt2.inspection import attribution_steps
from scratch_gpt2.prediction import classify_text
from scratch_gpt2.tokenization import encode_texts

ROWS_AT_ONCE = 32
MAX_POINTS = 64  # of the integrated gradients: more changes no word's weight by more than 0.02
UNSURE_BELOW = 0.8  # unless the model's configuration says otherwise
SPAM = "spam"
SHOWN_LABELS = {"ham": "not spam"}  # few people know the word that the datasets use


def verdict(model, tokenizer, text: str) -> tuple[dict[str, float], str]:
    """Probabilities by label, and one sentence. Raises ValueError for a text that is empty or too long."""
    check_text(model, tokenizer, text)
    probabilities = {shown(label): p for label, p in classify_text(model, tokenizer, text)[0].items()}
    label, probability = next(iter(probabilities.items()))
    if probability < unsure_below(model):
        return probabilities, f"Unsure: {label} is more likely, with a probability of only {probability:.0%}."
    return probabilities, f"{label.capitalize()}, with a probability of {probability:.1%}."


def unsure_below(model) -> float:
    """The probability below which a label is no verdict: what calibration found, where the model was calibrated."""
    return getattr(model.config, "unsure_below", UNSURE_BELOW)


def check_text(model, tokenizer, text: str) -> None:
    """Raise ValueError for a text that is too long to be read as a whole."""
    check_input(text, MAX_EXPLAINED_CHARACTERS)
    if encode_texts(tokenizer, [text], max_length=model.config.n_positions)[1]:
        raise ValueError(f"The model reads at most {model.config.n_positions} tokens; shorten the text.")


def shown(label: str) -> str:
    return SHOWN_LABELS.get(label, label)


def explained_labels(model) -> tuple[str, str]:
    """The label that red words support (spam if there is such a label), and the label that blue words support."""
    labels = list(model.config.id2label.values())
    red = SPAM if SPAM in labels else labels[-1]
    others = [label for label in labels if label != red]
    return red, shown(others[0]) if len(others) == 1 else "another label"


def weigh_words(model, tokenizer, text: str) -> Iterator[list[tuple[str, float]]]:
    """The words of the text, each with its weight for the red label relative to the strongest word, from -1 (against
    the label) to 1. Yields better and better estimates, and an empty list before the first."""
    check_text(model, tokenizer, text)
    red, _ = explained_labels(model)
    for pieces in attribution_steps(model, tokenizer, text, red, MAX_POINTS):
        words = join_words(pieces)
        strongest = max((abs(value) for _, value in words), default=0) or 1.0
        yield [(word, value / strongest) for word, value in words]


def join_words(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Tokens that belong to one word, joined, and their attributions added. A word begins with its white space."""
    words: list[tuple[str, float]] = []
    for piece, value in pieces:
        if words and not piece[:1].isspace():
            before, so_far = words.pop()
            piece, value = before + piece, so_far + value
        words.append((piece, value))
    return words


@dataclass(frozen=True)
class RowResult:
    """`label` and `probability` are empty where the row has no text; `note` says so, and where a text was cut."""

    label: str = ""
    probability: str = ""
    note: str = ""


def classify_rows(model, tokenizer, texts: list[str]) -> Iterator[list[RowResult]]:
    """Yields the results of all rows so far after each batch."""
    done: list[RowResult] = []
    limit = model.config.n_positions
    for start in range(0, len(texts), ROWS_AT_ONCE):
        some = texts[start : start + ROWS_AT_ONCE]
        given = [text for text in some if text.strip()]
        answers = iter(classify_text(model, tokenizer, given, ROWS_AT_ONCE) if given else [])
        for text in some:
            if not text.strip():
                done.append(RowResult(note="no text"))
                continue
            label, probability = next(iter(next(answers).items()))
            _, is_cut = encode_texts(tokenizer, [text], max_length=limit)
            note = f"only the first {limit} tokens were read" if is_cut else ""
            done.append(RowResult(shown(label), f"{probability:.4f}", note))
        yield done
