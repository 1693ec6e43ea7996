import io
import json
import random
import re
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from scratch_gpt2.data import text_sources
from scratch_gpt2.data.encoding import batch_encoder
from scratch_gpt2.data.text_files import read_stdin
from scratch_gpt2.data.text_sources import (
    find_files,
    parse_separator,
    read_files,
    read_hub,
    split_documents,
    split_text,
    take_part,
)

AWKWARD = ["a", "The", "don't", "'s", "42", "!", "--", "é", "日本", "🙂", " ", "  ", "\t", "\n", "\n\n", "\r\n", "\r"]
AWKWARD += ["\u00a0", "\u2028", "\x1f", "<|endoftext|>", "e\u0301"]


def awkward_text(seed, extra=()):
    rng = random.Random(seed)
    return "".join(rng.choices([*AWKWARD, *extra], k=rng.randint(0, 400)))


def joined(pieces):
    """The documents of the pieces, those without text left out."""
    documents, text = [], ""
    for piece, ends_document in pieces:
        text += piece
        if ends_document:
            documents.append(text)
            text = ""
    assert text == "", "the last piece does not end its document"
    return [document for document in documents if document]


def small_pieces(monkeypatch, text, characters, separator=None):
    monkeypatch.setattr(text_sources, "PIECE_CHARACTERS", characters)
    return list(split_text(io.StringIO(text, newline=""), separator))


@pytest.mark.parametrize("name", ["gpt2_tokenizer", "tiny_tokenizer"])
def test_pieces_of_a_long_text_have_the_tokens_of_the_whole(monkeypatch, request, name):
    encode = batch_encoder(request.getfixturevalue(name))
    cuts = 0
    for seed in range(300):
        text = awkward_text(seed)
        pieces = [piece for piece, _ in small_pieces(monkeypatch, text, 1 + seed % 50)]
        assert "".join(pieces) == text
        assert [i for ids in encode(pieces) for i in ids] == list(encode([text])[0]), (seed, pieces)
        cuts += len(pieces) - 1
    assert cuts > 1000


def test_pieces_of_books_have_the_tokens_of_the_whole(monkeypatch, shared_data, gpt2_tokenizer):
    encode = batch_encoder(gpt2_tokenizer)
    for name in ("austen-persuasion.txt", "blake-poems.txt", "wikitext2_test.raw.txt"):
        text = (shared_data / "text" / name).read_text(encoding="utf-8")[:400_000]
        for document in (text, text.replace("\n", "\r\n")):
            pieces = [piece for piece, _ in small_pieces(monkeypatch, document, 997)]
            assert len(pieces) > len(document) // 1100
            assert [i for ids in encode(pieces) for i in ids] == list(encode([document])[0])


SEPARATORS = {  # with the regular expression that finds them: a line feed is a line break of either kind
    "<|endoftext|>": r"<\|endoftext\|>",
    "\n\n": r"\r?\n\r?\n",
    "\r\n": r"\r\n",
    " - ": r" - ",
    "\n---\n": r"\r?\n---\r?\n",
    "aa": r"aa",
}


@pytest.mark.parametrize("separator", SEPARATORS)
def test_separators_are_found_across_the_borders_of_pieces(monkeypatch, gpt2_tokenizer, separator):
    encode = batch_encoder(gpt2_tokenizer)
    several = 0
    for seed in range(300):
        text = awkward_text(seed, extra=[separator] * 2 + [separator[:-1], separator[1:]])
        pieces = small_pieces(monkeypatch, text, 1 + seed % 20, separator)
        expected = re.split(SEPARATORS[separator], text)
        if len(expected) > 1:  # line breaks next to a separator go, and those at the end of a text that has some
            expected = [expected[0].rstrip("\r\n"), *(document.strip("\r\n") for document in expected[1:])]
        assert split_documents(text, separator) == expected
        expected = [document for document in expected if document]
        several += len(expected) > 1
        assert joined(pieces) == expected, seed
        # The end-of-text token follows the last piece, so that piece must not be empty where its document is not.
        ends = [piece for piece, ends_document in pieces if ends_document and piece]
        assert len(ends) == len(expected), seed
        tokens = [i for ids in encode([piece for piece, _ in pieces]) for i in ids]
        assert tokens == [i for ids in encode(expected) for i in ids], seed
    assert several > 200


def test_literal_pieces(monkeypatch):
    assert small_pieces(monkeypatch, "one two three", 9) == [("one two", False), (" three", True)]
    assert small_pieces(monkeypatch, "ab\ncd\nef", 7) == [("ab\ncd\n", False), ("ef", True)]
    assert small_pieces(monkeypatch, "one two three", 100) == [("one two three", True)]
    assert small_pieces(monkeypatch, "\none|\ntwo\n|\n|x y\n", 100, "|") == [
        ("\none", True),
        ("two", True),
        ("", True),
        ("x y", True),
    ]
    assert small_pieces(monkeypatch, "\none\n", 100, "|") == [("\none\n", True)]


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_the_default_separator(tmp_path, line_break):
    text = "one\n<|endoftext|>\ntwo\n\nparts\n<|endoftext|><|endoftext|>\nthree\n".replace("\n", line_break)
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    documents = ["one", f"two{line_break}{line_break}parts", "", "three"]
    for name in ("a.txt", "a.jsonl"):
        assert list(read_files([str(tmp_path / name)])) == [(document, True) for document in documents]
    assert split_documents(text) == documents
    assert split_documents(text, None) == [text]


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_a_separator_as_it_is_typed_in_a_shell(tmp_path, caplog, line_break):
    typed = r"\n\n"
    assert parse_separator(typed) == "\n\n"
    assert parse_separator(r"\t|\\n\r\x") == "\t|\\n\r\\x"
    assert parse_separator("") is None and parse_separator("<|endoftext|>") == "<|endoftext|>"
    (tmp_path / "a.txt").write_bytes("one\nline\n\ntwo\n\n\nthree\n".replace("\n", line_break).encode())
    documents = [f"one{line_break}line", "two", "three"]
    assert list(read_files([str(tmp_path / "a.txt")], separator=parse_separator(typed))) == [
        (d, True) for d in documents
    ]
    assert caplog.messages == []


def test_a_separator_that_does_not_occur_is_said(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert list(read_files([str(tmp_path / "a.txt")], separator="---")) == [("one\ntwo\n", True)]
    assert caplog.messages == [
        f"{tmp_path}/a.txt is one document, because the document separator '---' does not occur."
    ]
    caplog.clear()
    assert list(read_files([str(tmp_path / "a.txt")])) == [("one\ntwo\n", True)]
    assert caplog.messages == []


@pytest.mark.parametrize(("separator", "reason"), [(None, "no document separator is set"), ("#", "the document sep")])
def test_markers_that_are_read_as_text_are_said(tmp_path, caplog, separator, reason):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two#\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one<|endoftext|>two#"}')
    expected = {".txt": "one<|endoftext|>two#\n" if separator is None else "one<|endoftext|>two"}
    for kind in (".txt", ".jsonl"):
        caplog.clear()
        text = expected.get(kind, "one<|endoftext|>two#")  # a row is a document already
        first, *_ = read_files([f"{tmp_path}/a{kind}"], separator=separator)
        assert first == (text, True)
        assert len(caplog.messages) == 1
        message = f"{tmp_path}/a{kind} contains <|endoftext|>, which is read as ordinary text because {reason}"
        assert caplog.messages[0].startswith(message)


def test_a_text_without_a_place_to_cut_is_cut_anyway(monkeypatch):
    monkeypatch.setattr(text_sources, "MAX_PIECE_CHARACTERS", 50)
    pieces = small_pieces(monkeypatch, "x" * 1000, 10)
    assert "".join(piece for piece, _ in pieces) == "x" * 1000
    assert max(len(piece) for piece, _ in pieces) <= 60
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]


def test_files_of_all_kinds(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\n".encode())
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"text": "", "n": 1}\n{"text": "f\\u00fcnf"}\n')
    table = pyarrow.table({"n": [1, 2], "text": ["six", "seven"]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    files = find_files([str(tmp_path / "*"), str(tmp_path / "a.txt")])
    assert [file.rsplit("/", 1)[1] for file in files] == ["a.txt", "b.jsonl", "c.parquet"]
    assert list(read_files(files)) == [
        ("one\r\ntwo\n", True),
        ("three", True),
        ("", True),
        ("fünf", True),
        ("six", True),
        ("seven", True),
    ]


def test_globs_reach_into_folders_and_a_name_may_look_like_one(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("deep/er/x.txt", "a.txt", "notes[1].txt"):
        (tmp_path / name).write_text("text")
    assert find_files([f"{tmp_path}/**/*.txt"]) == [
        f"{tmp_path}/a.txt",
        f"{tmp_path}/deep/er/x.txt",
        f"{tmp_path}/notes[1].txt",
    ]
    assert find_files([f"{tmp_path}/notes[1].txt", "-"]) == [f"{tmp_path}/notes[1].txt", "-"]


def test_rows_on_standard_input(monkeypatch):
    """With a column, standard input holds JSON lines; without one it is text."""
    for column, expected in (("body", ["one\u2028", "two"]), (None, ['{"body": "one\u2028"}\n{"body": "two"}\n'])):
        lines = '\ufeff{"body": "one\u2028"}\n{"body": "two"}\n'
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="latin-1"))
        assert list(read_files(["-"], text_column=column)) == [(text, True) for text in expected]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "one"}\n')))
    with pytest.raises(
        ValueError, match=r"^standard input, line 1 has no text in column 'body'; its columns are text"
    ):
        list(read_files(["-"], text_column="body"))


def test_a_prompt_on_standard_input_has_no_byte_order_mark(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffgrößer\r\n".encode()), encoding="latin-1"))
    assert read_stdin() == "größer\n"


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("größer\r\n|b".encode()), encoding="latin-1"))
    assert list(read_files(["-"], separator="|")) == [("größer", True), ("b", True)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"^standard input is not UTF-8 \(byte 0xff\); convert it"):
        list(read_files(["-"]))


BAD_FILES = {
    "empty.txt": (b"", "FILE is empty; leave it out."),
    "word.docx": (b"x", "FILE has an unsupported file type; use one of .txt, .json, .jsonl, .csv, .tsv, .parquet."),
    "latin.txt": (b"caf\xe9", "FILE is not UTF-8 (byte 0xe9); convert it, e.g. with iconv."),
    "latin.jsonl": (b'{"text": "caf\xe9"}', "FILE is not UTF-8 (byte 0xe9); convert it, e.g. with iconv."),
    "broken.jsonl": (b'{"text": "a"}\n{"text": ', "FILE, line 2 is not JSON: Expecting value."),
    "list.jsonl": (b"[1]", "FILE, line 1 is not a JSON object with a value for each column."),
    "other.jsonl": (b'{"body": "x", "n": 1}', "FILE, line 1 has no text in column 'text'; its columns are body, n."),
    "number.jsonl": (b'\n{"text": 7}', "FILE, line 2 has no text in column 'text'; its columns are text."),
    "damaged.parquet": (b"PAR1 not", "FILE is not a Parquet file or is damaged: "),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_in_one_sentence(tmp_path, name):
    content, message = BAD_FILES[name]
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(read_files(find_files([str(file)])))
    assert str(error.value).startswith(message.replace("FILE", str(file)))
    assert "\n" not in str(error.value)


def test_half_a_surrogate_pair_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d"}')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: The text is not valid .* half of a surrogate pair"):
        list(read_files([str(tmp_path / "a.jsonl")]))


def test_rows_without_text_are_left_out_and_counted(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n\n{"text": "one"}\n{"text": null}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["two", None]}), tmp_path / "b.parquet")
    assert list(read_files([f"{tmp_path}/a.jsonl", f"{tmp_path}/b.parquet"])) == [("one", True), ("two", True)]
    assert caplog.messages == [
        f"{tmp_path}/a.jsonl: rows left out because their text is null: 2.",
        f"{tmp_path}/b.parquet: rows left out because their text is null: 1.",
    ]


def test_a_parquet_file_without_the_column(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text'; its columns are body, n\.$"):
        list(read_files([str(tmp_path / "a.parquet")]))
    with pytest.raises(ValueError, match=r"a\.parquet, row 1 has no text in column 'n'; its columns are n"):
        list(read_files([str(tmp_path / "a.parquet")], text_column="n"))


@pytest.mark.parametrize("pattern", ["missing.txt", "*.md", "."])
def test_no_match(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^No file matches"):
        find_files([pattern])


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_share_the_documents(parts):
    pieces = [("a", True), ("b1", False), ("b2", True), ("", True), ("d", True), ("e", True)]
    taken = [list(take_part(pieces, (number, parts))) for number in range(parts)]
    assert sorted(piece for part in taken for piece in part) == sorted(pieces)
    if parts == 2:
        assert taken[1] == [("b1", False), ("b2", True), ("d", True)]


@pytest.mark.parametrize("files", [4, 3])
def test_parts_of_a_streamed_data_set_share_its_rows(tmp_path, files):
    """Four files can be split between two machines, of three each machine takes every second row."""
    names = [f"{file} {row}" for file in range(files) for row in range(5)]
    for file in range(files):
        rows = (json.dumps({"text": name}) + "\n" for name in names[5 * file : 5 * file + 5])
        (tmp_path / f"train-{file}.jsonl").write_text("".join(rows))
    assert [text for text, _ in read_hub(str(tmp_path), None, "train")] == names
    shares = [[text for text, _ in read_hub(str(tmp_path), None, "train", part=(part, 2))] for part in (0, 1)]
    assert sorted(shares[0] + shares[1]) == names
    assert abs(len(shares[0]) - len(shares[1])) <= 1


def test_a_data_set_that_cannot_be_downloaded(tmp_path, monkeypatch):
    message = (
        r"'no/such' could not be downloaded from the Hugging Face Hub \(.*\); check its name and the network, or give"
    )
    with pytest.raises(ConnectionError, match=message):
        next(read_hub("no/such", None, "train"))
    (tmp_path / "train.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"has no text in column 'text'; its columns are body\.$"):
        next(read_hub(str(tmp_path), None, "train"))

    def breaking():
        yield {"text": "x"}
        raise RuntimeError

    stream = datasets.IterableDataset.from_generator(breaking)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    rows = read_hub("some/data", None, "train")
    assert next(rows) == ("x", True)
    with pytest.raises(ConnectionError, match=r"'some/data' could not be downloaded .* \(RuntimeError\); check its"):
        next(rows)
