"""Blocks straight from text: which tokens, in which order, and that a streamed run resumes as the same run."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY_TEXT
from safetensors.torch import load_file
from test_pretrain import NEW, SMALL, TEXT, read_log, run_script

from scratch_gpt2.data import token_stream
from scratch_gpt2.data.text_to_shards import TextSource
from scratch_gpt2.data.token_stream import TokenStream, shuffled

STREAM = NEW | SMALL | {"--eval_tokens": 64, "--streaming": "true"}


@pytest.fixture
def letters(tmp_path):
    """Three documents: ab, cdef and g."""
    file = tmp_path / "letters.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ab", "cdef", "g")))
    return TextSource(files=(str(file),))


def test_blocks_share_a_token_and_documents_end_with_the_eos_id(letters, byte_tokenizer):
    stream = TokenStream(letters, byte_tokenizer, block_length=4, validation_blocks=1, seed=0)
    a, eos = 64, 256  # of the byte tokenizer
    assert [block.tolist() for block in stream.read_once()] == [
        [a, a + 1, eos, a + 2],
        [a + 2, a + 3, a + 4, a + 5],
        [a + 5, eos, a + 6, eos],
    ]
    assert [block["input_ids"].tolist() for block in stream.validation()] == [[a, a + 1, eos, a + 2]]


def test_training_leaves_the_validation_blocks_out_and_begins_again(letters, byte_tokenizer, caplog):
    stream = iter(TokenStream(letters, byte_tokenizer, block_length=4, validation_blocks=1, seed=0))
    firsts = [next(stream)["labels"][0].item() for _ in range(4)]
    assert sorted(firsts[:2]) == sorted(firsts[2:]) == [66, 69]
    assert "ended after 2 blocks and is read again" in caplog.text


@pytest.mark.parametrize("validation_blocks", [3, 9])
def test_text_that_validation_takes_whole(letters, byte_tokenizer, validation_blocks):
    stream = TokenStream(letters, byte_tokenizer, 4, validation_blocks, seed=0)
    for read in (stream.validation, lambda: next(iter(stream))):
        with pytest.raises(ValueError, match=rf"no more than the {validation_blocks} blocks .* smaller --eval_tokens"):
            read()


def test_shuffling_shows_every_block_once_and_none_long_before_its_turn(monkeypatch):
    monkeypatch.setattr(token_stream, "SHUFFLED_BLOCKS", 10)
    order = [int(block) for block in shuffled((np.array(i) for i in range(100)), np.random.default_rng(0))]
    assert sorted(order) == list(range(100)) and order != list(range(100))
    assert all(block < place + 10 for place, block in enumerate(order))
    assert order == [int(block) for block in shuffled((np.array(i) for i in range(100)), np.random.default_rng(0))]


def test_a_streamed_data_set_resumes_as_the_same_run(tiny_tokenizer, tmp_path, monkeypatch, capsys):
    """A folder that the library `datasets` streams, as it streams one of the Hub."""
    data, folder = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for part in range(2):
        rows = [{"words": f"{number}. {TINY_TEXT}"} for number in range(part, 40, 2)]
        (data / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = STREAM | {"--dataset": data, "--text_column": "words", "--tokenizer": tmp_path / "tokenizer"}
    options |= {"--output_dir": folder}
    run_script(monkeypatch, options)
    assert "a stream of blocks of 16; validation on its first 4 blocks" in capsys.readouterr().out
    assert not (folder / "shards").exists()
    expected, losses = load_file(folder / "model.safetensors"), read_log(folder)
    for name in ("checkpoint-6", "checkpoint-8"):
        shutil.rmtree(folder / name)
    run_script(monkeypatch, options, "--resume")
    assert [entry.get("loss") for entry in read_log(folder)] == [entry.get("loss") for entry in losses]
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
    with pytest.raises(ValueError, match=r"^The data differs from what the run in .* began with"):
        run_script(monkeypatch, options | {"--eval_tokens": 32}, "--resume")
    text = (data / "1.jsonl").read_text()
    (data / "1.jsonl").write_text(text[:-20] + text[-20:].replace("e", "E"))
    with pytest.raises(ValueError, match=r"^The data differs from what the run in .* began with"):
        run_script(monkeypatch, options, "--resume")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--data": "FILE", "--dataloader_num_workers": 2}, r"--dataloader_num_workers would read a stream once in"),
        ({"--data": "FILE", "--dataset_config": "a"}, r"--dataset_config is for data sets, but --data .* names files"),
        ({"--data": "-"}, r"--streaming needs --data with a data set on the Hub, a folder of one, or files"),
        ({"--data": "FILE", "--eval_only": "true"}, r"--streaming is for training"),
        ({"--data": "roneneldan/TinyStories"}, r"'roneneldan/TinyStories' could not be downloaded from the Hugging"),
        ({"--data": "me/data", "--streaming": "false"}, r"me/data is not a file; .* add --streaming, or make shards"),
        ({"--data": "FILE", "--streaming": "false", "--text_column": "a"}, r"--text_column is for --streaming"),
    ],
)
def test_bad_options(options, message, tmp_path, monkeypatch):
    (tmp_path / "file.txt").write_text(TINY_TEXT)
    options = {name: tmp_path / "file.txt" if value == "FILE" else value for name, value in options.items()}
    with pytest.raises((ValueError, OSError), match=message):
        run_script(monkeypatch, TEXT | STREAM | options | {"--output_dir": tmp_path / "out"})
