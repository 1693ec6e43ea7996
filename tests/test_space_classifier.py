"""The Space's spam filter: its verdicts, and the files that it sorts."""

# ruff: noqa: F811  (pytest passes imported fixtures by their names)

import csv
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("gradio", reason="the Space needs pip install '.[space]'")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "space"))

import markup
import table
from classifier import join_words, verdict, weigh_words
from test_space import CLASSIFIER, SENTENCE, checkpoints, desk, folder  # noqa: F401  (the last three are fixtures)

from scratch_gpt2 import inspection


def test_the_verdict_comes_without_the_words(checkpoints, monkeypatch):
    model, tokenizer = checkpoints.load("spam", CLASSIFIER)
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", None)
        probabilities, sentence = verdict(model, tokenizer, SENTENCE)
    assert set(probabilities) == {"not spam", "spam"} and sum(probabilities.values()) == pytest.approx(1)
    assert sentence.startswith("Unsure: ") == (max(probabilities.values()) < 0.8)
    first, *_, words = weigh_words(model, tokenizer, SENTENCE)
    assert first == []
    assert [word for word, _ in words] == ["The", " cat", " sat", " on", " the", " mat"]
    assert max(abs(value) for _, value in words) == 1


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.79, "Unsure: spam is more likely, with a probability of only 79%."),
        (0.81, "Spam, with a probability of 81.0%."),
        (0.1, "Not spam, with a probability of 90.0%."),
    ],
)
def test_an_unsure_verdict_says_so(checkpoints, monkeypatch, p, expected):
    ranked = dict(sorted({"ham": 1 - p, "spam": p}.items(), key=lambda item: -item[1]))
    monkeypatch.setattr("classifier.classify_text", lambda *_: [ranked])
    assert verdict(*checkpoints.load("spam", CLASSIFIER), "hello")[1] == expected


def test_a_calibrated_model_says_itself_when_it_is_unsure(checkpoints, monkeypatch):
    model, tokenizer = checkpoints.load("spam", CLASSIFIER)
    monkeypatch.setattr("classifier.classify_text", lambda *_: [{"spam": 0.7, "ham": 0.3}])
    monkeypatch.setattr(model.config, "unsure_below", 0.65, raising=False)
    assert verdict(model, tokenizer, "hello")[1] == "Spam, with a probability of 70.0%."


def test_the_page_says_what_the_filter_gets_wrong(desk):
    """An untrained model gets one of two wrong, whatever it answers."""
    (threshold, wrong), text = desk.known_limits("spam", [("hello", "spam"), ("hello", "not spam")]), "hello"
    assert threshold == 0.8 and wrong == text
    label = next(iter(desk.classify("spam", "hello")[0]))
    assert desk.known_limits("spam", [("hello", label)])[1] is None


def test_red_always_means_spam(checkpoints):
    """Whatever the label of the text is: the weights are those for spam."""
    model, tokenizer = checkpoints.load("spam", CLASSIFIER)
    *_, words = weigh_words(model, tokenizer, SENTENCE)
    raw = [value for _, value in inspection.token_attributions(model, tokenizer, SENTENCE, "spam")]
    assert (sum(value for _, value in words) > 0) == (sum(raw) > 0)
    shown = markup.weighed_words([("win", 1.0), (" mum", -0.5)], "spam", "not spam")
    assert '<span class="for" style="--weight:1.00" title="+1.00">win</span>' in shown
    assert '<span class="against" style="--weight:0.50" title="-0.50"> mum</span>' in shown


def test_words_begin_with_their_space():
    pieces = [("Wi", 1.0), ("n", 2.0), (" no", 0.5), ("w", 0.5), ("\n", 0.0), ("yes", 1.0)]
    assert join_words(pieces) == [("Win", 3.0), (" now", 1.0), ("\nyes", 1.0)]


def read(tmp_path, content: bytes, has_header: bool = True) -> table.Table:
    (tmp_path / "in.csv").write_bytes(content)
    return table.read_table(tmp_path / "in.csv", has_header)


@pytest.mark.parametrize(
    ("content", "columns", "texts"),
    [
        (b'id,Text\n1,hello\n2,"a, b"\n3\n', ["id", "Text"], ["hello", "a, b", ""]),
        (b"id;message\n1;hello, you\n2;b\n", ["id", "message"], ["hello, you", "b"]),
        (b"id\tbody\n1\thello; you\n", ["id", "body"], ["hello; you"]),
        (b"id|sms\n1|a,b\n", ["id", "sms"], ["a,b"]),
        ("\ufeffmessage\nhé\n".encode(), ["message"], ["hé"]),
        ("text;n\nhé;1\n".encode("cp1252"), ["text", "n"], ["hé"]),
        ("text,n\nhé,1\n".encode("utf-16"), ["text", "n"], ["hé"]),
        ("text\na\u2028b\u0085c\x0cd\n".encode(), ["text"], ["a\u2028b\u0085c\x0cd"]),
        (b"hello\nyou\n", ["column 1"], ["hello", "you"]),
        (b'text,n\r\n"",1\r\nx,2\r\n', ["text", "n"], ["", "x"]),
        (b"text\n" + b"x" * 220_000, ["text"], ["x" * 220_000]),
        (b"text\n" + b"x\n" * 1000, ["text"], ["x"] * 1000),
    ],
)
def test_csv_files_as_people_have_them(tmp_path, content, columns, texts):
    found = read(tmp_path, content)
    assert found.columns == columns and found.texts(None) == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "The file is empty; give one text per row."),
        (b"text\n", "The file has a header and no rows; give one text per row."),
        (b"text\n" + b"x\n" * 1001, "The file has more than 1,000 rows; split it."),
        (b"x" * 1_000_001, "The file has 1,000,001 bytes, and at most 1,000,000 are read here; split it."),
        (
            b"id,text\n1,hello, you\n",
            "Line 2 has 3 cells and the first row 2; put texts that contain ',' in quotation marks.",
        ),
        (b"\0\0\0", "The file is not text; save it as CSV."),
        (
            b"a" + b"," * 900_000 + b"\nx\nx\n",
            "The file has 900,001 columns, and at most 100 are read here; remove some.",
        ),
        (
            b'text\n"open\nyou\nand you\n',
            "A quotation mark is not closed or stands alone (unexpected end of data); double those in texts.",
        ),
    ],
)
def test_csv_files_that_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError) as error:
        read(tmp_path, content)
    assert str(error.value) == message


def test_a_column_is_chosen_where_none_is_called_text(tmp_path):
    found = read(tmp_path, b"a,b\n1,hello\n")
    assert found.text_column() is None and found.texts("b") == ["hello"]
    with pytest.raises(ValueError) as error:
        found.texts(None)
    assert str(error.value) == "No column is called text or message or sms; choose the column of the texts from a, b."
    found = read(tmp_path, b"1,hello\n2,you\n", has_header=False)
    assert found.columns == ["column 1", "column 2"] and found.texts("column 2") == ["hello", "you"]
    assert read(tmp_path, b"a,a,\n1,2,3\n").columns == ["a (1)", "a (2)", "column 3"]


def test_results_keep_every_row_and_column_and_say_what_was_skipped_or_cut(desk, tmp_path):
    (tmp_path / "in.csv").write_text("id;message\n=1+1;hello\n2;\n3;" + "the cat " * 600 + "\n")
    for results in desk.classify_file("spam", tmp_path / "in.csv", None, True):
        note, preview, file = results
        if file:  # it is there while the generator is open: the page makes its own copy
            rows = list(csv.reader(Path(file).read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["id", "message", "label", "probability", "note"]
    assert [row[0] for row in rows[1:]] == ["'=1+1", "2", "3"] and rows[3][1] == "the cat " * 600
    assert rows[1][2] in ("spam", "not spam") and 0.5 <= float(rows[1][3]) <= 1 and rows[1][4] == ""
    assert rows[2][2:] == ["", "", "no text"]
    assert rows[3][4] == "only the first 512 tokens were read"
    assert "3 rows: " in note and "1 without text. 1 text cut; the column note says where." in note
    assert preview["headers"] == ["text", "label", "probability", "note"] and len(preview["data"]) == 3


def test_results_hold_no_formulas(tmp_path):
    cells = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "  =1", "\r=1", "plain", "a=b"]
    assert [table.harmless(cell)[0] == "'" for cell in cells] == [True] * 7 + [False] * 2
    table.write_table(tmp_path / "out.csv", ["text", "=label"], [['=cmd|"/C calc"!A0', "spam"], ["a, b", "ham"]])
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["text", "'=label"], ['\'=cmd|"/C calc"!A0', "spam"], ["a, b", "ham"]]
