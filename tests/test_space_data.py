"""What the Space's models are trained on: texts, instructions and messages, on small inputs."""

import hashlib
import lzma
import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "space"))

import make_data
import make_instructions
import make_messages
from make_instructions import REFUSAL, StoryWords
from measures import Answered, uses_all

from scratch_gpt2.data.text_classification import PreparedClassification
from scratch_gpt2.prediction import Response

# SHA-256 of the rows that the embedded assistant was trained and tested on.
INSTRUCTION_ROWS = "e30435940c62395e9713e81e5e72704a151473db8c98da32c91a134f90046f91"
STORY = (
    "Once upon a time, there was a little dog named Max. One day, Max saw a red kite. The kite was in a tree. "
    "Max wanted the kite, and so Max ran home. Max was very happy."
)


def test_documents_are_read_plain_or_compressed(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\n")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"Three.\n<|endoftext|>\n"))
    assert make_data.documents([tmp_path], "a.txt") == ["One.", "Two."]
    assert make_data.documents([tmp_path], "b.txt") == ["Three."]
    with pytest.raises(FileNotFoundError, match=r"c\.txt is in none of .*, nor is c\.txt\.xz\."):
        make_data.documents([tmp_path], "c.txt")


def test_documents_are_written_with_a_separator_line_each(tmp_path):
    make_data.write(tmp_path / "a.txt", ["One.", "Two."])
    assert (tmp_path / "a.txt").read_text() == "One.\n<|endoftext|>\nTwo.\n<|endoftext|>\n"


def test_unwanted_texts_are_dropped():
    texts = ["A cat.", "in @-@ between", "see www.example.org", "a_b", "In 1872.", "Two—three."]
    assert make_data.clean(texts) == ["A cat.", "Two--three."]


def test_a_whole_book_and_every_twentieth_tale_are_held_out():
    texts = [f"Tale {letter * 2}." for letter in "abcdefghijklmnopqrstuvw"] + ["Curdie went home."]
    train, held_out = make_data.split_children(texts)
    assert held_out == ["Tale aa.", "Tale uu.", "Curdie went home."]
    assert len(train) == 21


def test_simple_texts_have_common_words():
    common = {"the", "cat", "sat"}
    assert make_data.simple_texts(["The cat sat.", "The feline reposed."], common) == ["The cat sat."]


def test_a_story_tells_who_and_how_it_ends():
    assert make_instructions.main_name(STORY) == "Max"
    assert make_instructions.main_name("A dog ran. It was red.") is None
    assert make_instructions.ending_of(STORY) == "happy"
    assert make_instructions.ending_of("He lost it. He was sad.") == "sad"
    assert make_instructions.ending_of("He lost it. He was happy.") is None


@pytest.mark.parametrize(
    ("kind", "asked", "must_use"),
    [("name", "about Max", ["Max"]), ("ending", "with a happy ending", None), ("who", "about a little dog", None)],
)
def test_a_story_becomes_the_answer_to_a_request(kind, asked, must_use):
    row = make_instructions.story_row(STORY, StoryWords([STORY]), random.Random(0), kind)
    assert row["kind"] == kind
    assert asked in row["instruction"]
    assert row["output"] == STORY
    assert must_use is None or row["must_use"] == must_use


def test_asked_words_are_words_of_the_story():
    words = StoryWords([STORY] * 20)
    row = make_instructions.story_row(STORY, words, random.Random(1), "words")
    assert row["must_use"]
    assert all(word in STORY and word in row["instruction"] for word in row["must_use"])


def test_a_story_to_continue_is_cut_between_sentences():
    row = make_instructions.story_row(STORY, StoryWords([STORY]), random.Random(0), "continue")
    assert row["input"] == "Once upon a time, there was a little dog named Max. One day, Max saw a red kite."
    assert row["output"].startswith("The kite was in a tree.")


def test_small_talk_of_the_test_is_not_trained():
    train, test = make_instructions.small_talk_rows(random.Random(0))
    assert not {row["instruction"] for row in train} & {row["instruction"] for row in test}
    assert len(test) == 10


@pytest.mark.parametrize(
    ("instruction", "declined"),
    [("What is the capital of France?", True), ("Write a story about France.", False), ("Spell 'capital'.", True)],
)
def test_everything_but_stories_is_declined(instruction, declined):
    assert make_instructions.is_for_others({"instruction": instruction, "input": "", "output": ""}) is declined


def test_rows_are_the_same_whenever_they_are_made_and_the_test_is_held_out(shared_data):
    folders = [shared_data, shared_data / "more"]
    train, test = make_instructions.instruction_rows(folders)
    assert hashlib.sha256(repr((train, test)).encode()).hexdigest() == INSTRUCTION_ROWS
    asked = {(row["instruction"], row["input"]) for row in train if row.get("kind") == "refusal"}
    assert not asked & {(row["instruction"], row["input"]) for row in test}
    assert not {row["output"] for row in train if "must_use" in row} & {row["output"] for row in test}
    assert {row["output"] for row in test if row["kind"] == "refusal"} == {REFUSAL}


def test_a_story_uses_whole_words_only():
    row = {"kind": "words", "must_use": ["cat", "red"]}
    assert uses_all(Answered(row, Response("A Cat was red.", stopped=True)))
    assert not uses_all(Answered(row, Response("A cat was tired.", stopped=True)))


@pytest.mark.parametrize(
    ("variant", "text"),
    [
        ("no_digits", "Call  or www.win.com/a NOW"),
        ("no_links", "Call 0800 or  NOW"),
        ("upper_case", "CALL 0800 OR WWW.WIN.COM/A NOW"),
        ("lower_case", "call 0800 or www.win.com/a now"),
    ],
)
def test_variants_of_a_message(variant, text):
    assert make_messages.VARIANTS[variant]("Call 0800 or www.win.com/a NOW") == text


def test_filter_metrics_on_two_corpora():
    rows = [{"text": text, "label": label, "corpus": "a"} for text, label in (("win", "spam"), ("hi", "ham"))]
    rows += [{"text": text, "label": label, "corpus": "b"} for text, label in (("free", "spam"), ("win", "ham"))]
    metrics = make_messages.filter_metrics(
        lambda texts: np.array([0.9 if text == "win" else 0.2 for text in texts]), rows, ("as_sent",)
    )
    assert metrics == {
        "a_as_sent_accuracy": 1.0, "a_as_sent_f1": 1.0, "a_recall_at_1%": 1.0,
        "b_as_sent_accuracy": 0.0, "b_as_sent_f1": 0.0, "b_recall_at_1%": 0.0,
    }  # fmt: skip


def test_training_messages_come_without_digits_and_links():
    texts = ("Call 08 now", "hello", "see www.win.com 7", "12")
    rows = [{"text": text, "label": "spam"} for text in texts]
    data = PreparedClassification({"train": rows, "validation": rows, "test": rows}, ["spam"], {"splits": {}})
    varied = make_messages.with_variants(data)
    assert varied.splits["validation"] == rows
    assert varied.splits["test"] == rows
    forms = [{row["text"] for row in varied.splits["train"][number :: len(rows)]} for number in range(len(rows))]
    assert len(varied.splits["train"]) == 5 * len(rows)
    assert forms[0] == {"Call 08 now", "Call  now"}
    assert forms[1] == {"hello"}
    assert {"see www.win.com 7", "see"} <= forms[2] <= {"see www.win.com 7", "see www.win.com", "see  7", "see"}
    assert forms[3] == {"12"}  # nothing would be left of it
