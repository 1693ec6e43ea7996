"""Build the texts that the base of the Space is trained and measured on, from public data sets.

    python space/make_data.py --data data data/more --output runs/space/data

The files are looked for in the folders of `--data`, as they are or compressed (.xz). The same files give the same
texts: all choices are drawn with fixed seeds.
"""

import argparse
import lzma
import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from scratch_gpt2.cli import run_main

SEPARATOR = "<|endoftext|>"
SEED = 16

# How often a TinyStories text is repeated in the mix: it is the closest to what the assistant has to write.
STORY_REPEATS = 3
DIALOGUE_BYTES = 8_000_000
SENTENCES_A_TEXT = 20
# A tale or short story is taken where at least this share of its words are among the commonest of TinyStories.
COMMON_WORDS, SIMPLE = 5000, 0.80
# Held out: one book, recognised by a name, and every 20th tale of the first 358, which are fairy tales.
HELD_OUT_NAME, HELD_OUT_STEP, TALES = "Curdie", 20, 358
# While training, loss is measured on the first stories of TinyStories' validation file.
VALIDATION_STORIES = 400

UNWANTED = re.compile(r"@-@|<unk>|https?:|www\.|[<>|*_\[\]{}#@\\]|\d{3,}")
WORD = re.compile(r"[a-z']+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="folders with the data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder for the texts")
    arguments = parser.parse_args()
    write_base_texts(arguments.data, arguments.output)


def write_base_texts(folders: list[Path], output: Path) -> None:
    """`train.txt`, `validation.txt` and three texts to measure on: `stories.txt`, `books.txt` and `dialogues.txt`."""
    stories = clean(documents(folders, "tinystories_train.txt"))
    tales, books = split_children(documents(folders, "childrens_public_domain.txt"))
    dialogues = shuffled(documents(folders, "sgd_dialogues_train.txt"))
    dialogues = dialogues[: DIALOGUE_BYTES * len(dialogues) // sum(map(len, dialogues))]
    tales += clean(documents(folders, "public_domain_short_stories.txt"))
    simple = simple_texts(tales, commonest_words(stories))
    sentences = sentence_texts(read(folders, "tatoeba_en_sentences.txt").splitlines())
    held_out_stories = documents(folders, "tinystories_valid.txt")
    output.mkdir(parents=True, exist_ok=True)
    write(output / "train.txt", shuffled([*stories * STORY_REPEATS, *simple, *dialogues, *sentences]))
    write(output / "validation.txt", held_out_stories[:VALIDATION_STORIES])
    write(output / "stories.txt", held_out_stories)
    write(output / "books.txt", books)
    write(output / "dialogues.txt", documents(folders, "sgd_dialogues_dev.txt"))


def read(folders: list[Path], name: str) -> str:
    file = find(folders, name)
    content = file.read_bytes()
    return (lzma.decompress(content) if file.suffix == ".xz" else content).decode("utf-8")


def find(folders: list[Path], name: str) -> Path:
    """Raises FileNotFoundError where no folder has the file, plain or compressed."""
    for file in (folder / (name + ending) for folder in folders for ending in ("", ".xz")):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{name} is in none of {', '.join(map(str, folders))}, nor is {name}.xz.")


def documents(folders: list[Path], name: str) -> list[str]:
    texts = (text.strip() for text in read(folders, name).split(SEPARATOR))
    return [text for text in texts if text]


def write(file: Path, texts: Iterable[str]) -> None:
    file.write_text("".join(f"{text}\n{SEPARATOR}\n" for text in texts), encoding="utf-8")


def shuffled(items: list) -> list:
    return random.Random(SEED).sample(items, len(items))


def clean(texts: list[str]) -> list[str]:
    """Without texts that hold markup, links, long numbers or WikiText's `@-@`; long dashes become `--`."""
    return [text.replace("―", "--").replace("—", "--") for text in texts if not UNWANTED.search(text)]


def split_children(texts: list[str]) -> tuple[list[str], list[str]]:
    """Clean texts to train on, and the held-out book and tales, which are kept as they are."""
    held_out = [
        HELD_OUT_NAME in text or (number < TALES and number % HELD_OUT_STEP == 0) for number, text in enumerate(texts)
    ]
    train = [text for text, out in zip(texts, held_out, strict=True) if not out]
    return clean(train), [text for text, out in zip(texts, held_out, strict=True) if out]


def commonest_words(texts: list[str]) -> set[str]:
    counts = Counter(word for text in texts for word in WORD.findall(text.lower()))
    return {word for word, _ in counts.most_common(COMMON_WORDS)}


def simple_texts(texts: list[str], common: set[str]) -> list[str]:
    def share(text: str) -> float:
        words = WORD.findall(text.lower())
        return sum(word in common for word in words) / max(1, len(words))

    return [text for text in texts if share(text) >= SIMPLE]


def sentence_texts(sentences: list[str]) -> list[str]:
    """Sentences in groups: alone, each would be a document of a few tokens."""
    mixed = shuffled(clean(sentences))
    return [" ".join(mixed[start : start + SENTENCES_A_TEXT]) for start in range(0, len(mixed), SENTENCES_A_TEXT)]


if __name__ == "__main__":
    run_main(main)
