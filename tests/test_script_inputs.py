"""Every script that reads files meets a zoo of them: the right count, or one sentence that names the file."""

import gzip
import json
import lzma
from pathlib import Path

import pytest
from example_scripts import run_in_process

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BASE = EXAMPLES.parent / "space" / "checkpoints" / "base"
MODEL = ("--model", BASE)
# What stands before the name of the file, and the option that names the output. All fail before a model is loaded.
TEXT_SCRIPTS = {
    "prepare_text.py": (["--train_tokenizer", 300, "--input"], "--output"),
    "pretrain.py": (["--preset", "tiny", "--vocab_size", 300, "--data"], "--output_dir"),
    "quickstart.py": (["--smoke", "--text"], "--output"),
    "perplexity.py": ([*MODEL, "--text"], "--json"),
    "compare_models.py": ([*MODEL, "--text"], "--output"),
}
ROW_SCRIPTS = {
    "prepare_text.py": (["--train_tokenizer", 300, "--input"], "--output"),
    "prepare_classification.py": (["--input"], "--output"),
    "sft.py": ([*MODEL, "--data"], "--output_dir"),
    "respond.py": ([*MODEL, "--data"], "--output"),
    "judge.py": (["--model", "judge", "--responses"], "--output"),
    "hellaswag.py": ([*MODEL, "--data"], "--results"),
}
WHOLE_TEXT_SCRIPTS = {name: TEXT_SCRIPTS[name] for name in ("quickstart.py", "perplexity.py", "compare_models.py")}
BAD_TEXTS = {
    "utf16.txt": "one two".encode("utf-16"),
    "latin.TXT": b"caf\xe9 au lait",
    "empty.txt": b"",
    "cut.txt.gz": gzip.compress(b"one two " * 100, mtime=0)[:-20],
}
BAD_ROWS = {
    "utf16.jsonl": '{"text": "one"}'.encode("utf-16"),
    "latin.JSONL": b'{"text": "caf\xe9"}',
    "nested.jsonl": b"[" * 100_000,
    "digits.jsonl": b'{"text": ' + b"9" * 5000 + b"}",
    "columns.jsonl": b'{"body": "one", "mark": 1}',
    "value.jsonl": b'{"text": {"a": 1}, "label": {"a": 1}, "instruction": {"a": 1}, "output": 1, "response": 1}',
    "cut.jsonl.xz": lzma.compress(b'{"text": "one"}\n' * 100)[:-20],
}


def cases(scripts, files):
    return [(script, name) for script in scripts for name in files]


def check_refusal(script, options, name, content, monkeypatch, capsys, tmp_path):
    before, output_option = options
    (tmp_path / name).write_bytes(content)
    output = tmp_path / ("scores.jsonl" if script == "judge.py" else "output.json")
    arguments = [*before, tmp_path / name, output_option, output]
    code, _, stderr = run_in_process(EXAMPLES / script, monkeypatch, capsys, *arguments)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 1 and "Traceback" not in stderr and len(errors) == 1, stderr
    assert str(tmp_path / name) in errors[0], errors[0]
    assert (tmp_path / name).read_bytes() == content
    assert not output.is_file()


@pytest.mark.parametrize(("script", "name"), cases(TEXT_SCRIPTS, BAD_TEXTS))
def test_a_bad_text_file_is_refused(script, name, monkeypatch, capsys, tmp_path):
    check_refusal(script, TEXT_SCRIPTS[script], name, BAD_TEXTS[name], monkeypatch, capsys, tmp_path)


@pytest.mark.parametrize("script", WHOLE_TEXT_SCRIPTS)
def test_a_table_is_not_measured_as_text(script, monkeypatch, capsys, tmp_path):
    check_refusal(
        script, TEXT_SCRIPTS[script], "a.JSONL.gz", gzip.compress(ROWS, mtime=0), monkeypatch, capsys, tmp_path
    )


@pytest.mark.parametrize(("script", "name"), cases(ROW_SCRIPTS, BAD_ROWS))
def test_a_bad_file_of_rows_is_refused(script, name, monkeypatch, capsys, tmp_path):
    check_refusal(script, ROW_SCRIPTS[script], name, BAD_ROWS[name], monkeypatch, capsys, tmp_path)


BOM = b"\xef\xbb\xbf"
TEXT = b"One fine day, a dog ran home.\n" * 40  # 1,200 bytes
ROWS = b"".join(json.dumps({"text": f"Message {n}", "label": "ab"[n % 2]}).encode() + b"\n" for n in range(20))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.txt", TEXT),
        ("bom.txt", BOM + TEXT),
        ("caps.TXT", TEXT),
        ("text.txt.gz", gzip.compress(BOM + TEXT, mtime=0)),
        ("text.TXT.XZ", lzma.compress(TEXT)),
    ],
)
def test_prepare_text_reads_every_byte_of_a_good_file(name, content, monkeypatch, capsys, tmp_path):
    (tmp_path / name).write_bytes(content)
    arguments = ["--input", tmp_path / name, "--output", tmp_path / "shards", "--train_tokenizer", 300]
    code, _, stderr = run_in_process(EXAMPLES / "prepare_text.py", monkeypatch, capsys, *arguments)
    assert code == 0, stderr
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert sum(shard["bytes"] for shard in index["shards"]) == 1200


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.jsonl", ROWS),
        ("bom.jsonl", BOM + ROWS),
        ("crlf.jsonl", ROWS.replace(b"\n", b"\r\n")),
        ("caps.JSONL", ROWS),
        ("rows.jsonl.gz", gzip.compress(ROWS, mtime=0)),
    ],
)
def test_prepare_classification_reads_every_row_of_a_good_file(name, content, monkeypatch, capsys, tmp_path):
    (tmp_path / name).write_bytes(content)
    arguments = ["--input", tmp_path / name, "--output", tmp_path / "data"]
    code, _, stderr = run_in_process(EXAMPLES / "prepare_classification.py", monkeypatch, capsys, *arguments)
    assert code == 0, stderr
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["rows_read"] == 20
    assert [report["splits"][split]["rows"] for split in ("train", "validation", "test")] == [14, 2, 4]
