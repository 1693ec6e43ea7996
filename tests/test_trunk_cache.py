"""Hidden states of frozen blocks on disk: the right ones, never stale, whole after an interruption, equal training."""

import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from test_freezing import make_classifier

from scratch_gpt2.training import trunk_cache
from scratch_gpt2.training.freezing import train_only
from scratch_gpt2.training.trunk_cache import TrainedTop, cache_trunk, collate_states, states_bytes

ROWS = [
    {"input_ids": [5, 6, 7], "labels": 0},
    {"input_ids": [8], "labels": 1},
    {"input_ids": [9, 10, 11, 12, 13], "labels": 1},
    {"input_ids": [14, 15, 16], "labels": 0},
]
WIDTH = 24


def cache(model, part, folder, rows=ROWS):
    return cache_trunk(model, part, {"train": rows}, folder)["train"]


def stored(states):
    return [states[i]["hidden_states"].clone() for i in range(len(states))]


@pytest.fixture
def computed(monkeypatch):
    """The texts whose states were computed and not found."""
    texts = []
    compute = trunk_cache.compute_states

    def record(trunk, part, batch):
        texts.extend(batch)
        return compute(trunk, part, batch)

    monkeypatch.setattr(trunk_cache, "compute_states", record)
    return texts


@pytest.mark.parametrize("batch_tokens", [1, 6, 4096])
def test_the_states_are_those_of_the_whole_model(tmp_path, monkeypatch, batch_tokens):
    monkeypatch.setattr(trunk_cache, "BATCH_TOKENS", batch_tokens)
    model = make_classifier().eval()
    before_last, before_head = (cache(model, part, tmp_path / part) for part in ("last_block", "head"))
    for i, row in enumerate(ROWS):
        states = model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states
        assert len(states) == 4  # what enters blocks 0, 1 and 2, and the normalised output
        torch.testing.assert_close(before_last[i]["hidden_states"], states[2][0])
        torch.testing.assert_close(before_head[i]["hidden_states"], states[3][0, -1])
        assert before_last[i]["labels"] == row["labels"]


@pytest.mark.parametrize("options", [{}, {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
@pytest.mark.parametrize("part", ["head", "last_block"])
def test_logits_and_gradients_are_those_of_the_whole_model(tmp_path, part, options):
    model = make_classifier(**options).double()
    train_only(model, part)
    states = cache(model, part, tmp_path)
    batch = collate_states([states[i] for i in range(len(ROWS))])
    top = TrainedTop(model, part).train()
    gradients, logits = [], []
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in ROWS], batch_first=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    for run in (lambda: top(**batch), lambda: model.train()(ids, attention_mask=mask)):
        model.zero_grad()
        logits.append(run().logits)
        torch.nn.functional.cross_entropy(logits[-1], batch["labels"]).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-11, atol=1e-11)
    assert len(gradients[0]) == {"head": 1, "last_block": 19}[part]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


def test_dropout_acts_in_the_trained_block_only_in_training(tmp_path):
    model = make_classifier(dropout=0.5)
    batch = collate_states([cache(model, "last_block", tmp_path)[i] for i in range(len(ROWS))])
    top = TrainedTop(model, "last_block")
    assert torch.equal(top.eval()(**batch).logits, top(**batch).logits)
    assert not torch.allclose(top.train()(**batch).logits, top(**batch).logits)


def test_states_are_found_again_and_read_by_memory_map(tmp_path, computed):
    model = make_classifier()
    first = stored(cache(model, "last_block", tmp_path))
    assert len(computed) == 4
    with torch.no_grad():  # these are trained, and the states do not depend on them
        model.score.weight.add_(1.0)
        model.model.layers[-1].mlp.up_proj.weight.add_(1.0)
        model.model.norm.bias.add_(1.0)
    again = cache(model, "last_block", tmp_path)
    assert len(computed) == 4
    assert isinstance(again.chunks[0], np.memmap)
    torch.testing.assert_close(stored(again), first, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    ["embedding", "block", "token", "length", "epsilon", "version"],
)
def test_stale_states_are_never_served(tmp_path, computed, monkeypatch, change):
    model, rows = make_classifier(), ROWS
    cache(model, "last_block", tmp_path)
    with torch.no_grad():
        if change == "embedding":
            model.model.embed_positions.weight[0, 0] += 1e-6
        if change == "block":
            model.model.layers[1].attn.q_proj.bias[3] += 1e-6
    if change == "token":
        rows = [*ROWS[:3], {"input_ids": [14, 15, 17], "labels": 0}]
    if change == "length":  # the same ids in a row, but cut into texts elsewhere
        rows = [{"input_ids": [5, 6], "labels": 0}, {"input_ids": [7, 8], "labels": 1}, *ROWS[2:]]
    if change == "epsilon":
        model.config.layer_norm_epsilon = 1e-3
    if change == "version":
        monkeypatch.setattr(torch, "__version__", "9.9")
    cache(model, "last_block", tmp_path, rows)
    assert len(computed) == 8


def test_an_interrupted_computation_goes_on(tmp_path, computed, monkeypatch):
    monkeypatch.setattr(trunk_cache, "CHUNK_BYTES", 6 * 4 * WIDTH)
    model = make_classifier()
    expected = stored(cache(model, "last_block", tmp_path / "expected"))
    assert computed == [[9, 10, 11, 12, 13], [5, 6, 7], [14, 15, 16], [8]]
    del computed[:]
    save, saved = np.save, []

    def save_one(file, array):
        if saved:
            file.write(b"half")
            raise KeyboardInterrupt
        saved.append(array.shape)
        save(file, array)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", save_one)
        cache(model, "last_block", tmp_path / "cache")
    assert saved == [(5, WIDTH)]
    (folder,) = (tmp_path / "cache").iterdir()
    assert [file.name for file in folder.iterdir()] == ["states_00000.npy"]
    del computed[:]
    torch.testing.assert_close(stored(cache(model, "last_block", tmp_path / "cache")), expected, rtol=0, atol=0)
    assert computed == [[5, 6, 7], [14, 15, 16], [8]]


def test_a_damaged_file_is_computed_again(tmp_path, computed):
    model = make_classifier()
    cache(model, "last_block", tmp_path)
    (file,) = tmp_path.glob("*/states_00000.npy")
    file.write_bytes(file.read_bytes()[:-1])
    cache(model, "last_block", tmp_path)
    assert len(computed) == 8


def test_the_size_on_disk_is_known_before(tmp_path, monkeypatch):
    model = make_classifier()
    for part, expected in (("last_block", 12 * WIDTH * 4), ("head", 4 * WIDTH * 4)):
        cache(model, part, tmp_path / part)
        (file,) = (tmp_path / part).glob("*/*.npy")
        assert states_bytes(ROWS, part, model) == expected == file.stat().st_size - 128  # NumPy's header
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2000, 1000, 1000))
    with pytest.raises(OSError, match=r"take 1,152 bytes but .* has 1,000 free; .*--trunk_cache"):
        cache(model, "last_block", tmp_path / "full")
