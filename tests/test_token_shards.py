"""Token shards: what is written, after interruptions too, and what is read back."""

import errno
import itertools
import json
import multiprocessing
import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from transformers import PreTrainedTokenizerFast
from warm_python import run_python

from scratch_gpt2 import ScratchGPT2Config
from scratch_gpt2.data import encoding, token_shards
from scratch_gpt2.data.token_shards import TokenShards, merge_parts, verify, write_token_shards

EOS = 256
DOCUMENTS = [(f"Document {i} says {'so ' * (i % 7)}.\n", True) for i in range(40)]


@pytest.fixture(scope="module")
def word_tokenizer():
    """70,000 words w0, w1, ...: too many for uint16."""
    words = Tokenizer(WordLevel({"<eos>": 0} | {f"w{i}": i for i in range(1, 70_000)}, unk_token="<eos>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


def write(folder, tokenizer, texts, shard_tokens, **options):
    pieces = [(text, True) if isinstance(text, str) else text for text in texts]
    return write_token_shards(pieces, tokenizer, folder, "a test", shard_tokens, **options)


def stored(folder):
    return [np.load(file).tolist() for file in sorted(Path(folder).glob("**/*.npy"))]


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).glob("**/*")) if f.is_file()}


def write_by_hand(folder, *shards):
    """Shards of these tokens, the first one for validation."""
    folder.mkdir(exist_ok=True)
    entries = []
    for number, tokens in enumerate(shards):
        file = folder / f"shard_{number:05d}.npy"
        np.save(file, np.array(tokens, np.uint16))
        split = "train" if number else "validation"
        size = {"tokens": len(tokens), "bytes": 3 * len(tokens), "file_bytes": file.stat().st_size}
        entries.append({"file": file.name, "split": split, **size})
    index = {"format": 2, "tokenizer": "none", "vocab_size": 1000, "shards": entries, "complete": True}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


# What is written


def test_documents_end_with_eos_and_straddle_shards(tmp_path, byte_tokenizer):
    index = write(tmp_path, byte_tokenizer, ["ab", "", "abcde", ("a", False), ("bc", True), "", "é"], 4)
    assert stored(tmp_path) == [[64, 65, EOS, 64], [65, 66, 67, 68], [EOS, 64, 65, 66], [EOS, 127, 102, EOS]]
    assert [(s["split"], s["tokens"], s["bytes"]) for s in index["shards"]] == [
        ("validation", 4, 3),
        ("train", 4, 4),
        ("train", 4, 3),
        ("train", 4, 2),
    ]
    assert np.load(tmp_path / "shard_00000.npy").dtype == np.uint16
    assert index == json.loads((tmp_path / "index.json").read_text())
    assert index["complete"] and index["eos_token_id"] == EOS and index["dtype"] == "uint16"


def test_bytes_are_those_of_the_text(tmp_path, tiny_tokenizer):
    texts = ["The cat's hat 日本 🙂\r\n", "naïve <|endoftext|> rat", "x" * 50]
    index = write(tmp_path, tiny_tokenizer, texts, 30)
    assert sum(shard["bytes"] for shard in index["shards"]) == sum(len(text.encode()) for text in texts)
    train, validation = TokenShards(tmp_path, 3), TokenShards(tmp_path, 3, "validation")
    assert train.bytes_per_token() == train.bytes / train.tokens
    assert train.bytes + validation.bytes == sum(len(text.encode()) for text in texts)


def test_more_than_65536_tokens_take_uint32(tmp_path, word_tokenizer):
    index = write(tmp_path, word_tokenizer, ["w69999 w3", "w65536", "w7 w8"], 4)
    assert stored(tmp_path) == [[69999, 3, 0, 65536], [0, 7, 8, 0]]
    assert np.load(tmp_path / "shard_00001.npy").dtype == np.uint32
    assert index["vocab_size"] == 70_000
    assert TokenShards(tmp_path, 2).bytes_per_token() is None  # not a byte-level vocabulary
    assert TokenShards(tmp_path, 2, "validation")[2]["input_ids"].tolist() == [0, 65536]


def test_end_of_text_in_a_text_is_ordinary_characters(tmp_path, gpt2_tokenizer, byte_tokenizer):
    write(tmp_path / "gpt2", gpt2_tokenizer, ["a<|endoftext|>", "b"], 4)
    tokens = list(itertools.chain(*stored(tmp_path / "gpt2")))
    assert tokens == [64, 27, 91, 437, 1659, 5239, 91, 29, 50256, 65, 50256]
    write(tmp_path / "bytes", byte_tokenizer, ["<|endoftext|>"], 4)
    tokens = list(itertools.chain(*stored(tmp_path / "bytes")))
    assert tokens == [ord(character) - 33 for character in "<|endoftext|>"] + [EOS]
    assert byte_tokenizer("<|endoftext|>")["input_ids"] == [EOS]  # the tokenizer itself was not changed


def test_documents_keep_their_order_on_many_threads(tmp_path, monkeypatch, byte_tokenizer):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 20)
    write(tmp_path, byte_tokenizer, [text for text, _ in DOCUMENTS], 100)
    expected = list(itertools.chain(*(byte_tokenizer(text)["input_ids"] + [EOS] for text, _ in DOCUMENTS)))
    assert list(itertools.chain(*stored(tmp_path))) == expected


@pytest.mark.parametrize("texts", [[], [""]])
def test_fewer_than_two_tokens_are_too_few(tmp_path, byte_tokenizer, texts):
    with pytest.raises(ValueError, match=r"^The text has only 0 tokens, too few to train and to validate on; give m"):
        write(tmp_path, byte_tokenizer, texts, 4)
    assert list(tmp_path.iterdir()) == []


# A tenth of the text is for validation, or one shard if that is less; of a short text 1,024 tokens or half.
SPLITS = {  # tokens: (tokens for validation, tokens in each shard for training), in shards of 5,000
    2: (1, [1]),
    1001: (500, [501]),
    3000: (1024, [1976]),
    5000: (1024, [3976]),
    12_000: (1200, [3800, 5000, 2000]),
    49_999: (4999, [1] + [5000] * 8 + [4999]),
    50_000: (5000, [5000] * 9),
}


def write_tokens(folder, tokenizer, count):
    """One document of `count` tokens, in shards of 5,000; returns the tokens."""
    text = ("abc" * count)[: count - 1]
    write(folder, tokenizer, [text], 5000)
    return [64 + "abc".index(character) for character in text] + [EOS]


@pytest.mark.parametrize("count", SPLITS)
def test_validation_gets_no_more_than_it_needs(tmp_path, byte_tokenizer, count):
    tokens = write_tokens(tmp_path, byte_tokenizer, count)
    shards = json.loads((tmp_path / "index.json").read_text())["shards"]
    assert [shard["split"] for shard in shards] == ["validation"] + ["train"] * (len(shards) - 1)
    assert (shards[0]["tokens"], [shard["tokens"] for shard in shards[1:]]) == SPLITS[count]
    assert list(itertools.chain(*stored(tmp_path))) == tokens  # in the order of the files' names
    assert [shard["file"] for shard in shards] == sorted(file.name for file in tmp_path.glob("*.npy"))
    assert sum(shard["bytes"] for shard in shards) == count - 1
    assert verify(tmp_path) == len(shards)


def test_a_small_part_of_a_large_text_is_for_validation_as_it_is(tmp_path, byte_tokenizer):
    index = write(tmp_path, byte_tokenizer, ["a" * 2999], 5000, part=(0, 10))
    assert [(shard["split"], shard["tokens"]) for shard in index["shards"]] == [("validation", 3000)]
    assert write(tmp_path / "empty", byte_tokenizer, [], 5000, part=(1, 10))["shards"] == []


# Stopped and continued


def write_documents(folder, tokenizer):
    encoding.BATCH_CHARACTERS = 100
    write(folder, tokenizer, DOCUMENTS, 60)


def write_until_killed(folder, tokenizer, function, call):
    """Dies by SIGKILL at the given call of a function, in the middle of writing if that is np.save."""
    calls = itertools.count(1)
    holder = token_shards.np if function == "save" else token_shards
    real = getattr(holder, function)

    def dying(*args):
        if next(calls) == call:
            if function == "save":
                args[0].write(b"half of a shard")
                args[0].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    setattr(holder, function, dying)
    write_documents(folder, tokenizer)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, byte_tokenizer):
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BATCH_CHARACTERS", 100)
        write_documents(folder, byte_tokenizer)
    assert len(contents(folder)) == 20
    return contents(folder)


KILLED_AT = {
    "before the first index": ("write_index", 1, 0),
    "after the first shard": ("write_index", 2, 1),
    "during a shard": ("save", 5, 4),
    "between a shard and the index": ("sha256", 8, 7),
    "before it is marked as complete": ("write_index", 20, 19),
}


@pytest.mark.parametrize("point", KILLED_AT)
def test_a_killed_run_continues_at_the_exact_token(tmp_path, byte_tokenizer, uninterrupted, point, monkeypatch):
    function, call, finished = KILLED_AT[point]
    process = multiprocessing.get_context("fork").Process(
        target=write_until_killed, args=(tmp_path, byte_tokenizer, function, call)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    if finished:
        index = json.loads((tmp_path / "index.json").read_text())
        assert len(index["shards"]) == finished == verify(tmp_path)
        with pytest.raises(ValueError, match=r"is not finished; run examples/prepare_text\.py again"):
            TokenShards(tmp_path, 8)
    else:
        assert not (tmp_path / "index.json").exists()
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 100)
    write_documents(tmp_path, byte_tokenizer)
    assert contents(tmp_path) == uninterrupted


def test_a_run_stopped_at_every_shard_in_turn(tmp_path, byte_tokenizer, uninterrupted, monkeypatch):
    """Each call writes one shard more, whether a document ends at the border or continues."""
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 100)
    real = token_shards.write_index

    def stop_after(folder, index):
        real(folder, index)
        raise KeyboardInterrupt

    monkeypatch.setattr(token_shards, "write_index", stop_after)
    for _ in range(len(uninterrupted)):
        with pytest.raises(KeyboardInterrupt):
            write_documents(tmp_path, byte_tokenizer)
    assert contents(tmp_path) == uninterrupted
    written = (tmp_path / "index.json").stat().st_mtime_ns
    write_documents(tmp_path, byte_tokenizer)  # complete: nothing to do
    assert (tmp_path / "index.json").stat().st_mtime_ns == written


def test_a_run_stopped_at_the_split_of_the_first_shard(tmp_path, byte_tokenizer, monkeypatch):
    write_tokens(tmp_path / "uninterrupted", byte_tokenizer, 12_000)

    def stop(self, total):
        real(self, total)
        raise KeyboardInterrupt

    real = token_shards.ShardWriter.split_first
    with monkeypatch.context() as patch:
        patch.setattr(token_shards.ShardWriter, "split_first", stop)
        with pytest.raises(KeyboardInterrupt):
            write_tokens(tmp_path / "stopped", byte_tokenizer, 12_000)
    write_tokens(tmp_path / "stopped", byte_tokenizer, 12_000)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "uninterrupted")


def test_a_folder_begun_with_other_arguments(tmp_path, byte_tokenizer, tiny_tokenizer):
    write(tmp_path, byte_tokenizer, ["abcdef"], 4)
    with pytest.raises(
        ValueError, match=r" was begun with shard_tokens 4, not 5; choose another folder or delete it\.$"
    ):
        write(tmp_path, byte_tokenizer, ["abcdef"], 5)
    with pytest.raises(
        ValueError, match=r" was made from other text: a test, not other; choose another output folder or delete it\.$"
    ):
        write_token_shards([("abcdef", True)], byte_tokenizer, tmp_path, "other", 4)
    with pytest.raises(ValueError, match=r" was begun with tokenizer '[0-9a-f]{64}', not '[0-9a-f]{64}'; "):
        write(tmp_path, tiny_tokenizer, ["abcdef"], 4)
    with pytest.raises(ValueError, match=r" was begun with part \[0, 1\], not \[1, 2\]; "):
        write(tmp_path, byte_tokenizer, ["abcdef"], 4, part=(1, 2))


@pytest.mark.parametrize("full", ["save", "fsync"])
def test_a_full_disk_leaves_no_partial_file_and_the_run_continues(
    tmp_path, byte_tokenizer, uninterrupted, full, monkeypatch
):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 100)
    calls = itertools.count(1)
    holder = np if full == "save" else os
    real = getattr(holder, full)

    def no_space(*args):
        if next(calls) == 6:
            if full == "save":
                args[0].write(b"half of a shard")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(holder, full, no_space)
        with pytest.raises(OSError, match="No space left on device"):
            write_documents(tmp_path, byte_tokenizer)
    assert not list(tmp_path.glob("*.unfinished"))
    assert len(json.loads((tmp_path / "index.json").read_text())["shards"]) == verify(tmp_path) > 0
    write_documents(tmp_path, byte_tokenizer)
    assert contents(tmp_path) == uninterrupted


# Reading blocks


def test_blocks_predict_every_token_but_the_first_once(tmp_path):
    folder = write_by_hand(tmp_path, [1, 2, 3], [10, 11, 12, 13, 14], [15, 16], [17, 18, 19, 20])
    train = TokenShards(folder, 4)
    assert (len(train), train.tokens) == (3, 11)
    assert [item["input_ids"].tolist() for item in (train[0], train[1], train[2])] == [
        [10, 11, 12, 13],
        [13, 14, 15, 16],
        [16, 17, 18, 19],  # 20 does not fill a block
    ]
    assert train[1]["labels"].tolist() == [13, 14, 15, 16]
    assert train[1]["labels"].dtype == train[1]["input_ids"].dtype == torch.int64
    predicted = [token for block in train for token in block["labels"][1:].tolist()]
    assert predicted == list(range(11, 20))
    assert TokenShards(folder, 3, "validation")[0]["input_ids"].tolist() == [1, 2, 3]
    assert TokenShards(folder, 11)[0]["input_ids"].tolist() == list(range(10, 21))
    assert train.bytes_per_token() == 3.0


@pytest.mark.parametrize("index", [3, -1])
def test_blocks_outside_do_not_exist(tmp_path, index):
    train = TokenShards(write_by_hand(tmp_path, [1], range(10, 21)), 4)
    with pytest.raises(IndexError, match=f"^Block {index} does not exist; there are 3.$"):
        train[index]


@pytest.mark.parametrize("shuffle", [False, True])
def test_two_ranks_with_two_workers_share_the_blocks(tmp_path, shuffle):
    train = TokenShards(write_by_hand(tmp_path, [1], range(0, 20), range(20, 49)), 4)
    shares = []
    for rank in (0, 1):
        sampler = DistributedSampler(train, num_replicas=2, rank=rank, shuffle=shuffle)
        loader = DataLoader(train, batch_size=2, sampler=sampler, num_workers=2)
        shares.append({row[0] for batch in loader for row in batch["input_ids"].tolist()})
    assert len(train) == 16 and shares[0].isdisjoint(shares[1])
    assert sorted(shares[0] | shares[1]) == list(range(0, 48, 3))


def test_accelerate_shares_the_blocks(tmp_path):
    train = TokenShards(write_by_hand(tmp_path, [1], range(49)), 4)
    shares = []
    for rank in (0, 1):
        loader = prepare_data_loader(DataLoader(train, batch_size=2), num_processes=2, process_index=rank)
        shares.append([row[0] for batch in loader for row in batch["input_ids"].tolist()])
    assert sorted(shares[0] + shares[1]) == list(range(0, 48, 3))


def test_a_pickle_holds_no_tokens(tmp_path):
    train = TokenShards(write_by_hand(tmp_path, [1], [7] * 1_000_000), 4)
    before = train[5]["input_ids"].tolist()
    data = pickle.dumps(train)
    assert len(data) < 3000
    assert pickle.loads(data)[5]["input_ids"].tolist() == before == [7, 7, 7, 7]


def test_more_shards_than_files_may_be_open(tmp_path):
    folder = write_by_hand(tmp_path, [1], *([i, i] for i in range(300)))
    script = (
        "import resource, sys\n"
        "from scratch_gpt2.data.token_shards import TokenShards\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "train = TokenShards(sys.argv[1], 3)\n"
        "print(sum(train[i]['input_ids'][0].item() for i in range(len(train))), train[0]['input_ids'].tolist())\n"
    )
    assert run_python(script, folder).stdout == f"{sum(range(299))} [0, 0, 1]\n"


def test_a_shard_that_is_no_array_is_named(tmp_path):
    """NumPy would say that the file may be a pickle, and how to run its code."""
    folder = write_by_hand(tmp_path, [1], [7] * 100)
    file = folder / "shard_00001.npy"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(ValueError) as error:
        TokenShards(folder, 4)[0]
    assert str(error.value) == f"{file} is not a file of tokens; it is damaged: make the shards again."


@pytest.mark.parametrize("change", ["truncate", "unlink"])
def test_a_truncated_or_missing_shard_is_named_at_once(tmp_path, change):
    folder = write_by_hand(tmp_path, [1], [7] * 100)
    file = folder / "shard_00001.npy"
    if change == "truncate":
        os.truncate(file, 300)
        message = f"{file} has 300 bytes, not 328; it is damaged: make the shards again."
    else:
        file.unlink()
        message = f"{file} is missing; make the shards again."
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        TokenShards(folder, 4)
    assert str(error.value) == message


def test_wrong_uses_of_shards(tmp_path, byte_tokenizer, tiny_tokenizer):
    write(tmp_path, byte_tokenizer, ["abcdefgh"], 4)
    with pytest.raises(ValueError, match=r"^block_length is 1, but predicting"):
        TokenShards(tmp_path, 1)
    with pytest.raises(
        ValueError, match=r"^The train split of .* has 5 tokens, fewer than one block of 6; give more "
    ):
        TokenShards(tmp_path, 6)
    with pytest.raises(ValueError, match=r"^The test split of .* has 0 tokens"):
        TokenShards(tmp_path, 6, "test")
    with pytest.raises(FileNotFoundError, match=r"has no token shards \(index\.json is missing\); make some with"):
        TokenShards(tmp_path / "nowhere", 4)
    shards = TokenShards(tmp_path, 4)
    fitting = ScratchGPT2Config(vocab_size=257, n_positions=4, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=EOS)
    assert shards.check_fits(byte_tokenizer, fitting) is None
    with pytest.raises(ValueError) as error:
        shards.check_fits(tiny_tokenizer, fitting)
    assert str(error.value) == (
        f"The shards in {tmp_path} were made with another tokenizer; use {tmp_path}/tokenizer."
    )
    with pytest.raises(ValueError) as error:
        small = ScratchGPT2Config(vocab_size=256, n_positions=4, bos_token_id=0, eos_token_id=0, pad_token_id=0)
        shards.check_fits(byte_tokenizer, small)
    assert str(error.value) == (
        f"The shards in {tmp_path} have 257 token ids, but the model's vocab_size is 256; use a model with at least "
        "as many."
    )
    with pytest.raises(ValueError) as error:
        TokenShards(tmp_path, 5).check_fits(byte_tokenizer, fitting)
    assert str(error.value) == "A block has 5 tokens, but the model's n_positions is 4; shorten the blocks."


def test_damaged_shards_are_named(tmp_path, byte_tokenizer):
    write(tmp_path, byte_tokenizer, ["abcdefgh"], 4)
    assert verify(tmp_path) == 3
    data = bytearray((tmp_path / "shard_00001.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "shard_00001.npy").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"shard_00001\.npy does not have the checksum of the index; it is damaged: make"
    ):
        verify(tmp_path)
    (tmp_path / "shard_00001.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard_00001\.npy is missing; make the shards again\.$"):
        verify(tmp_path)
    (tmp_path / "index.json").write_text('{"format": 1, "shards": []}')
    with pytest.raises(
        ValueError, match=r"index\.json is of format 1, but this version reads 2 and 3; make the shards again\.$"
    ):
        verify(tmp_path)
    for foreign in ("[1]", '{"weight_map": {}}'):
        (tmp_path / "index.json").write_text(foreign)
        with pytest.raises(ValueError, match=r"index\.json is not an index of token shards; choose another folder"):
            verify(tmp_path)
    for damaged in ('{"form', "[" * 100_000):
        (tmp_path / "index.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"index\.json is damaged; delete the folder and make the shards again\."):
            verify(tmp_path)


def test_shards_of_an_earlier_version_are_read_but_not_continued(tmp_path, byte_tokenizer):
    folder = write_by_hand(tmp_path / "old", [1, 2, 3], range(10, 21))
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"source": "a.txt (9 bytes); column text, separator None"}))
    assert TokenShards(folder, 11)[0]["input_ids"].tolist() == list(range(10, 21))
    with pytest.raises(ValueError) as error:
        write(folder, byte_tokenizer, ["abc"], 4)
    assert str(error.value) == (
        f"{folder} has no record of its source text; train on it with --data, or delete it to make the shards again."
    )


# Parts


def test_parts_that_cannot_be_merged(tmp_path, byte_tokenizer, tiny_tokenizer):
    with pytest.raises(FileNotFoundError, match=r" has no parts: no folder in it has an index\.json\.$"):
        merge_parts(tmp_path)
    write(tmp_path / "part_00000", byte_tokenizer, ["abcdefgh"], 4, part=(0, 2))
    with pytest.raises(FileNotFoundError, match=r" has 1 of 2 parts; part 1 is missing\.$"):
        merge_parts(tmp_path)
    index = write(tmp_path / "part_00001", byte_tokenizer, ["ijklm"], 4, part=(1, 2))
    token_shards.write_index(tmp_path / "part_00001", index | {"complete": False})
    with pytest.raises(ValueError, match=r"part_00001 is not finished; run it again to continue it\.$"):
        merge_parts(tmp_path)
    token_shards.write_index(tmp_path / "part_00001", index | {"tokenizer": "other"})
    with pytest.raises(ValueError, match=r"part_00001 has another tokenizer than .*part_00000; make it again\.$"):
        merge_parts(tmp_path)
    token_shards.write_index(tmp_path / "part_00001", index | {"part": [1, 3]})
    with pytest.raises(ValueError, match=r"part_00001 is one of 3 parts, not of 2; delete it\.$"):
        merge_parts(tmp_path)
    token_shards.write_index(tmp_path / "part_00001", index)
    merge_parts(tmp_path)
    merge_parts(tmp_path)  # again
    train = TokenShards(tmp_path, 6)
    assert [block["input_ids"].tolist() for block in train] == [[68, 69, 70, 71, EOS, 72], [72, 73, 74, 75, 76, EOS]]
    assert TokenShards(tmp_path, 4, "validation")[0]["input_ids"].tolist() == [64, 65, 66, 67]
    assert verify(tmp_path) == 5


def test_merging_does_not_replace_shards(tmp_path, byte_tokenizer):
    write(tmp_path, byte_tokenizer, ["abcdefgh"], 4)
    write(tmp_path / "part_00000", byte_tokenizer, ["abcdefgh"], 4, part=(0, 1))
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=r" has shards of its own, which merging would replace; choose another folder"
    ):
        merge_parts(tmp_path)
    assert contents(tmp_path) == before
