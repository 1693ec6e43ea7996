"""Rows of every kind of file: read correctly, or refused in one sentence that names the file."""

import bz2
import gzip
import json
import lzma

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from scratch_gpt2.data.instructions import read_instructions
from scratch_gpt2.data.rows import describe_files, describe_hub, hub_id, hub_rows, read_rows
from scratch_gpt2.data.text_classification import read_labelled_text
from scratch_gpt2.data.text_files import kind_of
from scratch_gpt2.data.text_sources import find_files, read_files, read_whole_text
from scratch_gpt2.evaluation.hellaswag import read_hellaswag
from scratch_gpt2.evaluation.judge import read_responses

AWKWARD = "a\u2028b\x0cc\u0085d"  # str.splitlines would cut it into four
ROWS = [{"text": AWKWARD, "label": "1"}, {"text": "two, or more", "label": "2"}]
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = f'text,label\r\n"{AWKWARD}",1\r\n"two, or more",2\r\n'.encode()
BOM = b"\xef\xbb\xbf"
COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


def parquet(rows, path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.read_bytes()


def rows_in(path, columns=None):
    return [row for row, _ in read_rows(str(path), columns)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("suffix", ["", *COMPRESS])
def test_every_kind_of_file_plain_and_compressed(tmp_path, kind, suffix):
    content = {
        "jsonl": JSON_LINES,
        "json": json.dumps(ROWS).encode(),
        "csv": CSV,
        "tsv": "".join(
            f"{row['text']}\t{row['label']}\n" for row in [{"text": "text", "label": "label"}, *ROWS]
        ).encode(),
        "parquet": parquet(ROWS, tmp_path / "plain.parquet"),
    }[kind]
    names = [f"rows.{kind}{suffix}", f"ROWS.{kind.upper()}{suffix.upper()}"]
    for name in names:
        (tmp_path / name).write_bytes(COMPRESS[suffix](content) if suffix else content)
        assert rows_in(tmp_path / name) == ROWS
    if kind != "parquet":
        marked = BOM + content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")  # as Windows writes it
        (tmp_path / names[0]).write_bytes(COMPRESS[suffix](marked) if suffix else marked)
        assert rows_in(tmp_path / names[0]) == ROWS


def test_the_kind_is_the_suffix_before_that_of_the_compression():
    names = ("a.jsonl", "a.b/C.TXT.GZ", "a.tar.xz", "SMSSpamCollection", "spam.zst", "a.csv.zip")
    assert [kind_of(name) for name in names] == [".jsonl", ".txt", ".tar", "", "", ".zip"]


def test_rows_are_named_by_file_and_line(tmp_path):
    (tmp_path / "a.csv").write_text('text,n\n"one\ntwo",1\n\nthree,2\n')
    (tmp_path / "a.jsonl").write_text('\n{"n": 1}\n')
    (tmp_path / "a.json").write_text('[{"n": 1},\n{"n": 2}]')
    parquet([{"n": 1}], tmp_path / "a.parquet")
    origins = [
        origin for kind in ("csv", "jsonl", "json", "parquet") for _, origin in read_rows(f"{tmp_path}/a.{kind}")
    ]
    assert origins == [
        f"{tmp_path}/a.csv, line 3",
        f"{tmp_path}/a.csv, line 5",
        f"{tmp_path}/a.jsonl, line 2",
        f"{tmp_path}/a.json, row 1",
        f"{tmp_path}/a.json, row 2",
        f"{tmp_path}/a.parquet, row 1",
    ]


def test_a_text_may_be_longer_than_the_csv_module_allows(tmp_path):
    (tmp_path / "a.csv").write_text(f'text,label\n"{"long, " * 40_000}",1\n')
    assert [len(row["text"]) for row in rows_in(tmp_path / "a.csv")] == [240_000]


def test_rows_shorter_than_the_header_have_empty_cells(tmp_path):
    (tmp_path / "a.csv").write_text("text,label,n\none\n")
    assert rows_in(tmp_path / "a.csv") == [{"text": "one", "label": None, "n": None}]


DEEP = b"[" * 100_000
DIGITS = b"9" * 5000
BAD_FILES = {
    "more.csv": (
        b"text,label\none,1\ntwo, or more,2\n",
        "FILE, line 3 has 3 cells, but the header names 2 columns; put texts that contain commas in quotation marks.",
    ),
    "more.tsv": (
        b"text\tlabel\none\ttwo\t1\n",
        "FILE, line 2 has 3 cells, but the header names 2 columns; replace tabs inside texts.",
    ),
    "twice.csv": (b"text,text,label\n", "FILE, line 1 names the column 'text' 2 times; rename all but one."),
    "quote.csv": (b'text\n"one\n', "FILE, line 2 is not CSV: unexpected end of data."),
    "latin.csv": (b"text\ncaf\xe9\n", "FILE is not UTF-8 (byte 0xe9); convert it, e.g. with iconv."),
    "utf16.csv": (
        "text\none\n".encode("utf-16"),
        "FILE is not UTF-8 but UTF-16 or a binary file; convert text with: ",
    ),
    "utf16le.jsonl": ('{"text": 1}'.encode("utf-16-le"), "FILE is not UTF-8 but UTF-16 or a binary file; convert"),
    "deep.jsonl": (b'{"a": 1}\n' + DEEP, "FILE, line 2 is JSON that is nested too deeply."),
    "deep.json": (b'[{"a": 1},\n"[[", ' + DEEP + b"]" * 100_000 + b"\n]", "FILE, line 2 is JSON that is nested too d"),
    "digits.jsonl": (b'{"a": 1}\n{"a": ' + DIGITS + b"}", "FILE, line 2 has a number of too many digits."),
    "digits.json": (b'[{"a": 12},\n{"a": ' + DIGITS + b"}]", "FILE, line 2 has a number of too many digits."),
    "lines.json": (b'{"a": 1}\n{"a": 2}', "FILE, line 2 is not JSON: Extra data; JSON lines need the suffix .jsonl."),
    "object.json": (b'{"rows": []}', "FILE is not a JSON list of rows."),
    "list.jsonl": (b"[1]", "FILE, line 1 is not a JSON object with a value for each column."),
    "empty.json": (b"", "FILE, line 1 is not JSON: Expecting value."),
    "cut.csv.gz": (gzip.compress(CSV * 100, mtime=0)[:-20], "FILE is damaged, or not compressed as its suffix says: "),
    "plain.csv.gz": (CSV, "FILE is damaged, or not compressed as its suffix says: Not a gzipped file"),
    "plain.csv.bz2": (CSV, "FILE is damaged, or not compressed as its suffix says: Invalid data stream"),
    "plain.csv.xz": (CSV, "FILE is damaged, or not compressed as its suffix says: Input format not supported"),
    "plain.csv.zst": (CSV, "FILE is damaged, or not compressed as its suffix says: ZSTD decompress failed"),
    "damaged.parquet": (b"PAR1 not", "FILE is not a Parquet file or is damaged: "),
    "word.docx": (b"x", "FILE has an unsupported file type; use one of .json, .jsonl, .csv, .tsv, .parquet."),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path, name):
    content, message = BAD_FILES[name]
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        rows_in(file)
    assert str(error.value).startswith(message.replace("FILE", str(file)))
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_missing_column(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no\.csv\.gz does not exist; give an existing file, or a data set of"
    ):
        rows_in(tmp_path / "no.csv.gz")
    parquet([{"body": "x", "n": 1}], tmp_path / "a.parquet")
    assert rows_in(tmp_path / "a.parquet", ["n"]) == [{"n": 1}]
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text'; its columns are body, n\.$"):
        rows_in(tmp_path / "a.parquet", ["text"])


# The content of a file, then what is read from it or the error.
TEXTS = {
    "bom.txt": (BOM + b"one\n", ["one\n"]),
    "crlf.txt": (b"one\r\ntwo\r\n", ["one\r\ntwo\r\n"]),
    "nul.txt": (b"one\0two", ["one\0two"]),
    "line.txt": (b"word " * 600_000, ["word " * 600_000]),
    "caps.TXT": (b"one", ["one"]),
    "text.txt.gz": (gzip.compress(BOM + b"one"), ["one"]),
    "text.TXT.XZ": (lzma.compress(b"one<|endoftext|>two"), ["one", "two"]),
    "rows.csv": (CSV, [AWKWARD, "two, or more"]),
    "rows.jsonl.zst": (COMPRESS[".zst"](JSON_LINES), [AWKWARD, "two, or more"]),
    "utf16.txt": ("one".encode("utf-16"), "FILE is not UTF-8 but UTF-16 or a binary file"),
    "utf16be.txt": ("one".encode("utf-16-be"), "FILE is not UTF-8 but UTF-16 or a binary file"),
    "latin.txt": (b"caf\xe9", "FILE is not UTF-8 (byte 0xe9)"),
    "empty.txt": (b"", "FILE is empty; leave it out."),
    "columns.csv": (b"body\none\n", "FILE, line 2 has no text in column 'text'; its columns are body."),
    "nested.jsonl": (b'{"text": {"a": "one"}}', "FILE, line 1 has no text in column 'text'; its columns are text."),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_the_zoo(tmp_path, name):
    content, expected = TEXTS[name]
    file = tmp_path / name
    file.write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(ValueError) as error:
            list(read_files(find_files([str(file)])))
        assert str(error.value).startswith(expected.replace("FILE", str(file))) and "\n" not in str(error.value)
        return
    documents = [""]
    for text, ends_document in read_files(find_files([str(file)])):
        documents[-1] += text
        documents += [""] if ends_document else []
    assert documents == [*expected, ""]
    if ".txt" in name.lower() and len(expected) == 1:
        assert read_whole_text(str(file)) == expected[0]


LABELLED = {
    "bom.csv": (BOM + CSV, ["1", "2"]),
    "crlf.tsv": (b"1\tone\r\n2\ttwo\r\n", ["1", "2"]),
    "nul.csv": (b"text,label\none\0,1\n", ["1"]),
    "line.jsonl": (json.dumps({"text": "word " * 600_000, "label": 7}).encode(), ["7"]),
    "caps.CSV.GZ": (gzip.compress(CSV), ["1", "2"]),
    "SMSSpamCollection.xz": (lzma.compress(b"ham\tone\nspam\ttwo\n"), ["ham", "spam"]),
    "utf16.tsv": ("1\tone\n".encode("utf-16"), "FILE is not UTF-8 but UTF-16 or a binary file"),
    "latin.tsv": (b"1\tcaf\xe9\n", "FILE is not UTF-8 (byte 0xe9)"),
    "empty.csv": (b"", "FILE has no rows; give a file with labeled text."),
    "columns.csv": (
        b"body,class\none,1\n",
        "FILE, line 2 has no column 'text' and no 'label'; its columns are 'body'",
    ),
    "commas.csv": (b"text,label\none, two,1\n", "FILE, line 2 has 3 cells, but the header names 2 columns"),
    "nested.jsonl": (
        b'{"text": ["one"], "label": 1}',
        "FILE, line 1 has ['one'] in column 'text', which is not text.",
    ),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_texts_of_the_zoo(tmp_path, name):
    content, expected = LABELLED[name]
    file = tmp_path / name
    file.write_bytes(content)
    if isinstance(expected, list):
        assert [row["label"] for row in read_labelled_text(file)] == expected
        return
    with pytest.raises(ValueError) as error:
        read_labelled_text(file)
    assert str(error.value).startswith(expected.replace("FILE", str(file))) and "\n" not in str(error.value)


INSTRUCTION = {"instruction": "Say one.", "output": "one"}
INSTRUCTIONS = {
    "bom.json": (BOM + json.dumps([INSTRUCTION] * 2).encode(), 2),
    "crlf.jsonl": (json.dumps(INSTRUCTION).encode() + b"\r\n", 1),
    "rows.CSV": (b"instruction,output\nSay one.,one\n", 1),
    "rows.jsonl.gz": (gzip.compress(json.dumps(INSTRUCTION).encode()), 1),
    "nul.jsonl": (b'{"instruction": "a\\u0000b", "output": "c"}', 1),
    "line.json": (json.dumps([{"instruction": "word " * 600_000, "output": "one"}]).encode(), 1),
    "utf16.json": (json.dumps([INSTRUCTION]).encode("utf-16"), "FILE is not UTF-8 but UTF-16 or a binary file"),
    "latin.json": (b'[{"instruction": "caf\xe9"}]', "FILE is not UTF-8 (byte 0xe9)"),
    "empty.jsonl": (b"", "There is no instruction with an answer in FILE."),
    "columns.csv": (
        b"question,answer\nSay one.,one\n",
        "FILE, line 2 has no text in 'prompt'; its columns are question",
    ),
    "nested.jsonl": (b'{"instruction": {"a": 1}, "output": "c"}', "FILE, line 1 has no text in 'instruction'"),
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions_of_the_zoo(tmp_path, name):
    content, expected = INSTRUCTIONS[name]
    file = tmp_path / name
    file.write_bytes(content)
    if isinstance(expected, int):
        assert len(read_instructions(str(file))) == expected
        return
    with pytest.raises(ValueError) as error:
        read_instructions(str(file))
    assert str(error.value).startswith(expected.replace("FILE", str(file))) and "\n" not in str(error.value)


HELLASWAG = {
    "ind": 1,
    "activity_label": "Sitting",
    "ctx_a": "The cat sits.",
    "ctx_b": "it",
    "endings": ["sleeps.", "barks.", "flies.", "reads."],
    "label": 0,
}
RESPONSE = INSTRUCTION | {"input": "", "response": "one"}
READERS = {
    "hellaswag": (read_hellaswag, HELLASWAG, "contains no examples"),
    "judge": (lambda file: read_responses(str(file)), RESPONSE, "has no rows"),
    "sft and respond": (lambda file: read_instructions(str(file)), INSTRUCTION, "There is no instruction with an ans"),
}


@pytest.mark.parametrize("name", READERS)
def test_json_lines_of_every_script(tmp_path, name):
    read, row, nothing = READERS[name]
    line = json.dumps(row).encode()
    files = {
        "plain.jsonl": (line, 1),
        "bom.jsonl": (BOM + line + b"\n" + line, 2),
        "crlf.jsonl": (line + b"\r\n\r\n" + line + b"\r\n", 2),
        "ROWS.JSONL": (line + b"\n", 1),
        "rows.jsonl.gz": (gzip.compress(line), 1),
        "empty.jsonl": (b"", nothing),
        "utf16.jsonl": (line.decode().encode("utf-16"), "utf16.jsonl is not UTF-8 but UTF-16 or a binary file"),
        "latin.jsonl": (line.replace(b"one", b"\xe9").replace(b"cat", b"\xe9"), "is not UTF-8 (byte 0xe9)"),
        "nul.jsonl": (line + b"\n\0\n", "line 2 is not JSON: Expecting value"),
        "columns.jsonl": (b'{"a": 1}', "line 1"),
        "nested.jsonl": (line + b"\n" + DEEP, "line 2 is JSON that is nested too deeply"),
        "digits.jsonl": (b'{"a": ' + DIGITS + b"}", "line 1 has a number of too many digits"),
        "list.jsonl": (b"[1]", "line 1 is not a JSON object"),
    }
    for file, (content, expected) in files.items():
        (tmp_path / file).write_bytes(content)
        if isinstance(expected, int):
            assert len(read(tmp_path / file)) == expected, file
            continue
        with pytest.raises(ValueError) as error:
            read(tmp_path / file)
        assert expected in str(error.value) and file in str(error.value) and "\n" not in str(error.value), file


def test_classes_of_the_hub_have_their_names(monkeypatch):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "spam"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, -1, None]}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    rows = list(hub_rows("some/data"))
    assert [row["label"] for row, _ in rows] == ["spam", None, None]  # -1: not labelled
    assert [origin for _, origin in rows] == ["some/data, row 1", "some/data, row 2", "some/data, row 3"]


def test_a_hub_that_does_not_answer_is_noticed_at_once(monkeypatch):
    monkeypatch.setattr("scratch_gpt2.data.rows.is_offline_mode", lambda: False)
    monkeypatch.setattr("scratch_gpt2.data.rows.hub_answers", lambda: False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("it was asked"))
    with pytest.raises(ConnectionError) as error:
        next(hub_rows("no/such"))
    assert str(error.value) == (
        "The data set 'no/such' could not be downloaded from the Hugging Face Hub (no answer; HF_HUB_OFFLINE=1 reads "
        "the local cache); check its name and the network, or give a local file instead."
    )


def test_a_source_is_described_without_folders(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc")
    described = describe_files([str(tmp_path / "a.txt"), "-"])
    checksum = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of abc, FIPS 180-2
    assert described == {
        "kind": "files",
        "files": [{"name": "a.txt", "bytes": 3, "sha256": checksum}, {"name": "standard input"}],
    }
    assert hub_id(describe_hub("me/data", None, "train")) == "me/data"
    assert hub_id(described) is None and hub_id("me/data, configuration None, split train") is None
