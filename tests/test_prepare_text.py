"""Text to token shards: the function that two scripts call, and examples/prepare_text.py."""

import io
import itertools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_token_shards import EOS, contents
from warm_python import run_python, run_two

from scratch_gpt2 import ScratchGPT2Config
from scratch_gpt2.data.text_to_shards import TextSource, text_to_shards
from scratch_gpt2.data.token_shards import TokenShards
from scratch_gpt2.tokenization import load_tokenizer, train_tokenizer

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "prepare_text.py"


def test_separators_become_the_eos_id(tmp_path, gpt2_tokenizer):
    """By the function that prepare_text.py and pretrain.py call, from a text file and from a table."""
    gpt2_tokenizer.save_pretrained(tmp_path / "gpt2")
    text = "a\n<|endoftext|>\nb<|endoftext|>"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    marker = [27, 91, 437, 1659, 5239, 91, 29]  # <|endoftext|> as ordinary text
    ids = {
        "<|endoftext|>": [64, 50256, 65, 50256],
        None: [64, 198, *marker, 198, 65, *marker, 50256],  # 198 is a line feed
        "b": [64, 198, *marker, 50256, *marker, 50256],
    }
    for number, (separator, expected) in enumerate(ids.items()):
        for kind in (".txt", ".jsonl"):
            folder = tmp_path / f"{number}{kind}"
            source = TextSource(files=(f"{tmp_path}/a{kind}",), separator=separator)
            tokenizer, index = text_to_shards(source, folder, tokenizer=str(tmp_path / "gpt2"))
            tokens = [token for shard in index["shards"] for token in np.load(folder / shard["file"]).tolist()]
            if separator == "b" and kind == ".jsonl":  # a row is a document already
                expected = ids[None]
            assert tokens == expected
            assert tokenizer.eos_token_id == 50256
        if separator == "<|endoftext|>":
            assert sum(shard["bytes"] for shard in index["shards"]) == 2


# The script


def prepare(*arguments, stdin=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
        if stdin is not None:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        runpy.run_path(str(EXAMPLE))["main"]()


@pytest.fixture
def documents(tmp_path, byte_tokenizer):
    """Twenty documents in a .jsonl file, and the tokenizer's folder."""
    byte_tokenizer.save_pretrained(tmp_path / "bytes")
    texts = [f"document {i:02d}" for i in range(20)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return ["--input", tmp_path / "text.jsonl", "--tokenizer", tmp_path / "bytes", "--shard_tokens", "50"]


def read_back(folder, tokenizer):
    """The documents of complete shards, in the order of the index."""
    index = json.loads((folder / "index.json").read_text())
    tokens = itertools.chain(*(np.load(folder / shard["file"]).tolist() for shard in index["shards"]))
    return tokenizer.decode(list(tokens)).split("<|endoftext|>")[:-1]


def test_two_parts_at_the_same_time_and_merged(tmp_path, documents, byte_tokenizer, capsys):
    folder = tmp_path / "shards"
    code = "import os, runpy, sys\nsys.argv = [*sys.argv[1:], '--part', os.environ['RANK'] + '/2']\n"
    code += "sys.path.insert(0, os.path.dirname(sys.argv[0]))\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    parts = run_two(code, EXAMPLE, *documents, "--output", folder)
    assert [part.returncode for part in parts] == [0, 0], parts
    assert (
        "Part 1/2 is done. When all parts are done, run: "
        f"python examples/prepare_text.py --output {folder} --merge\n" in parts[1].stdout
    )
    shares = [read_back(folder / f"part_{i:05d}", byte_tokenizer) for i in (0, 1)]
    assert shares[0] == [f"document {i:02d}" for i in range(0, 20, 2)]
    assert shares[1] == [f"document {i:02d}" for i in range(1, 20, 2)]
    prepare("--output", folder, "--merge", "--check")
    assert capsys.readouterr().out == (
        f"{folder}: 190 train tokens in 5 shard(s)\n"
        f"{folder}: 50 validation tokens in 1 shard(s)\n"
        "Shards that match their checksums: 6.\n"
    )
    assert read_back(folder, byte_tokenizer) == shares[0] + shares[1]
    assert sorted(file.name for file in folder.iterdir()) == ["index.json", "part_00000", "part_00001", "tokenizer"]
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = ScratchGPT2Config(vocab_size=257, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=EOS)
    TokenShards(folder, 64).check_fits(tokenizer, model)


def test_other_text_is_not_mixed_in(tmp_path, documents):
    folder = tmp_path / "shards"
    prepare(*documents, "--output", folder)
    before = contents(folder)
    prepare(*documents, "--output", folder)
    with pytest.raises(
        ValueError, match=r"shards was made from other text: column 'text', not 'body'; choose another"
    ):
        prepare(*documents, "--output", folder, "--text_column", "body")
    with pytest.raises(
        ValueError, match=r"made from other text: separator '<\|endoftext\|>', not None; choose another"
    ):
        prepare(*documents, "--output", folder, "--document_separator", "")
    with pytest.raises(ValueError, match=r"shard_tokens 50, not 51; choose another"):
        prepare(*documents, "--output", folder, "--shard_tokens", "51")
    with pytest.raises(
        ValueError, match="tokenizer contains another tokenizer; use it, delete it or choose another output folder"
    ):
        prepare(*documents[:2], "--output", folder, "--shard_tokens", "50", "--tokenizer", other_tokenizer(tmp_path))
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "b.txt").write_text("more text"), "the files a.txt, not a.txt, b.txt"),
        (lambda folder: (folder / "a.txt").write_text("the cat and the rat\n" * 50), "a.txt changed since then"),
        (lambda folder: (folder / "a.txt").open("a").write("more"), "a.txt changed since then"),
    ],
    ids=["joined", "corrected", "grown"],
)
def test_shards_of_text_that_has_changed_are_refused(tmp_path, byte_tokenizer, change, reason):
    byte_tokenizer.save_pretrained(tmp_path / "bytes")
    texts, shards = tmp_path / "texts", tmp_path / "shards"
    texts.mkdir()
    (texts / "a.txt").write_text("the cat and the hat\n" * 50)
    arguments = ["--input", texts / "*.txt", "--output", shards, "--tokenizer", tmp_path / "bytes"]
    prepare(*arguments)
    before = contents(shards)
    os.utime(texts / "a.txt", (0, 0))
    prepare(*arguments)  # the same text
    texts.rename(tmp_path / "moved")
    (tmp_path / "moved").rename(texts)
    (texts / "a.txt").rename(texts / "b.txt")
    prepare(*arguments)  # under another name
    (texts / "b.txt").rename(texts / "a.txt")
    change(texts)
    with pytest.raises(ValueError) as error:
        prepare(*arguments)
    assert str(error.value) == (
        f"{shards} was made from other text: {reason}; choose another output folder or delete it."
    )
    assert contents(shards) == before


def test_another_vocabulary_is_refused_and_the_same_one_continues(tmp_path):
    (tmp_path / "a.txt").write_text("the cat and the rat and the hat\n" * 50)
    arguments = ["--input", tmp_path / "a.txt", "--output", tmp_path / "shards", "--train_tokenizer"]
    prepare(*arguments, "270")
    before = contents(tmp_path / "shards")
    prepare(*arguments, "270")
    with pytest.raises(ValueError, match=r"made from other text: vocab_size 270, not 280; choose another output fold"):
        prepare(*arguments, "280")
    assert contents(tmp_path / "shards") == before


def test_a_folder_of_something_else_is_left_alone(tmp_path, documents):
    """Also where an input would be replaced."""
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "index.json").write_text('[{"text": "one"}, {"text": "two"}]')
    for arguments in (documents, [*documents, "--input", folder / "index.json"]):
        with pytest.raises(ValueError, match=r"index\.json is not an index of token shards; choose another folder"):
            prepare(*arguments, "--output", folder)
    assert contents(folder) == {"index.json": b'[{"text": "one"}, {"text": "two"}]'}
    text = (tmp_path / "text.jsonl").read_bytes()
    with pytest.raises(NotADirectoryError, match=r"text\.jsonl is a file; choose another output folder\.$"):
        prepare(*documents, "--output", tmp_path / "text.jsonl")
    assert (tmp_path / "text.jsonl").read_bytes() == text


def test_options_from_a_file_and_a_home_folder(tmp_path, documents, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "options.json").write_text(json.dumps({"input": ["~/text.jsonl"], "shard_tokens": 60}))
    prepare(tmp_path / "options.json", *documents[2:], "--output=~/shards")
    assert json.loads((tmp_path / "shards" / "index.json").read_text())["shard_tokens"] == 50  # the command line's
    assert not (tmp_path / "~").exists()


def other_tokenizer(folder):
    train_tokenizer(["the the the"], 259).save_pretrained(folder / "other")
    return folder / "other"


def test_standard_input_and_a_new_tokenizer(tmp_path, byte_tokenizer):
    byte_tokenizer.save_pretrained(tmp_path / "bytes")
    arguments = ["--input", "-", "--output", tmp_path / "a", "--shard_tokens", "5", "--document_separator", "|"]
    prepare(*arguments, "--tokenizer", tmp_path / "bytes", stdin="one|\ntwo|three\n")
    assert read_back(tmp_path / "a", byte_tokenizer) == ["one", "two", "three"]
    with pytest.raises(
        ValueError, match=r"a has shards, and standard input cannot be read again to continue them; delete it\.$"
    ):
        prepare(*arguments, "--tokenizer", tmp_path / "bytes", stdin="more")
    with pytest.raises(ValueError, match=r"^Standard input can be read only once: train the tokenizer on files"):
        prepare("--input", "-", "--output", tmp_path / "b", "--train_tokenizer", "300", stdin="one")
    (tmp_path / "text.txt").write_text("the cat and the rat and the hat\n" * 50)
    prepare("--input", tmp_path / "*.txt", "--output", tmp_path / "c", "--train_tokenizer", "270")
    assert len(load_tokenizer(tmp_path / "c" / "tokenizer")) == 270
    assert len(TokenShards(tmp_path / "c", 8)) > 20  # about twenty shards of a small text


def test_the_default_size_of_shards(tmp_path, byte_tokenizer):
    """About a twentieth of local text, also in Parquet; standard input has no known size, so its shard is split."""
    byte_tokenizer.save_pretrained(tmp_path / "bytes")
    table = pyarrow.table({"text": [f"document {i:05d}" for i in range(2000)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    arguments = ["--tokenizer", tmp_path / "bytes", "--output"]
    prepare(*arguments, tmp_path / "a", "--input", tmp_path / "a.parquet")
    size = (tmp_path / "a.parquet").stat().st_size
    assert json.loads((tmp_path / "a" / "index.json").read_text())["shard_tokens"] == size // 4 // 20
    prepare(*arguments, tmp_path / "b", "--input", "-", stdin="x" * 19_999)
    assert (TokenShards(tmp_path / "b", 8).tokens, TokenShards(tmp_path / "b", 8, "validation").tokens) == (
        18_000,
        2000,
    )


BAD_ARGUMENTS = {
    "--input a.txt --hub b": "Say where the text is: either --input with files or --hub with a data set.",
    "--part 0/2": "Say where the text is: either --input with files or --hub with a data set.",
    "--input TEXT --part 2/2": "--part 2/2 is not I/N with 0 <= I < N, such as 0/2.",
    "--input TEXT --shard_tokens 0": "shard_tokens is 0 but must be at least 1.",
    "--input EMPTY": "EMPTY is empty; leave it out.",
    "--input LATIN": "LATIN is not UTF-8 (byte 0xe9); convert it, e.g. with iconv.",
    "--input BREAKS --document_separator |": "The text has only 0 tokens, too few to train and to validate on",
    "--hub no/such": "The data set 'no/such' could not be downloaded from the Hugging Face Hub",
    "--check": "OUTPUT has no token shards (index.json is missing); make some with examples/prepare_text.py.",
    "--merge": "OUTPUT has no parts: no folder in it has an index.json.",
}


@pytest.mark.parametrize("line", BAD_ARGUMENTS)
def test_mistakes_leave_nothing_behind(tmp_path, byte_tokenizer, line):
    byte_tokenizer.save_pretrained(tmp_path / "bytes")
    files = {"TEXT": b"text", "EMPTY": b"", "LATIN": b"caf\xe9", "BREAKS": b"|\n|\n"}
    for name, content in files.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    names = {name: str(tmp_path / f"{name}.txt") for name in files} | {"OUTPUT": str(tmp_path / "output")}
    arguments = [names.get(word, word) for word in line.split()]
    message = BAD_ARGUMENTS[line]
    for name, path in names.items():
        message = message.replace(name, path)
    with pytest.raises((ValueError, OSError)) as error:
        prepare("--output", tmp_path / "output", "--tokenizer", tmp_path / "bytes", *arguments)
    assert str(error.value).startswith(message)
    assert not (tmp_path / "output").exists()


def test_help_and_the_end_of_a_mistake():
    result = subprocess.run([sys.executable, EXAMPLE, "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "--document_separator" in result.stdout
    result = run_python(EXAMPLE, "--input", "no.txt", "--output", "no")
    assert result.returncode == 1
    assert result.stderr == ("error: No file matches 'no.txt'; give existing files, globs, or - for standard input.\n")
