"""Layers of a cache with spare room: the same keys, values and text as with the library's layers."""

import copy

import pytest
import torch
from model_fixtures import random_ids, tiny_model
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from scratch_gpt2 import growing_cache
from scratch_gpt2.growing_cache import GrowingLayer


@pytest.fixture(autouse=True)
def small_caches_grow_too(monkeypatch):
    monkeypatch.setattr(growing_cache, "MIN_BYTES", 0)


def numbers(*rows):
    """(1, 1, len(rows), 1)"""
    return torch.tensor(rows, dtype=torch.float32).view(1, 1, -1, 1)


def filled(*rows):
    layer = GrowingLayer()
    for row in rows:
        layer.update(numbers(row), numbers(-row))
    return layer


def listed(layer):
    return layer.keys.flatten().tolist(), layer.values.flatten().tolist()


def test_a_position_is_written_once():
    layer = filled(1.0, 2.0)
    address, kept = layer.keys.data_ptr(), layer.keys
    keys, values = layer.update(numbers(3.0), numbers(-3.0))
    assert keys.flatten().tolist() == [1, 2, 3] and values.flatten().tolist() == [-1, -2, -3]
    assert layer.keys.data_ptr() == address and layer.get_seq_length() == 3
    assert kept.flatten().tolist() == [1, 2]
    layer.update(numbers(4.0), numbers(-4.0))
    assert layer.keys.data_ptr() == address
    layer.update(numbers(5.0, 6.0, 7.0), numbers(-5.0, -6.0, -7.0))  # no more room: twice as much
    assert layer.keys.data_ptr() != address
    assert listed(layer) == ([1, 2, 3, 4, 5, 6, 7], [-1, -2, -3, -4, -5, -6, -7])
    assert layer.buffers[0].tensor.shape[-2] == 14


def test_a_tensor_that_somebody_keeps_stays_as_it_is_after_cropping():
    layer = filled(1.0, 2.0, 3.0)
    kept = layer.keys
    layer.crop(-2)
    layer.update(numbers(8.0), numbers(-8.0))
    assert listed(layer) == ([1, 8], [-1, -8])
    assert kept.flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy])
def test_copies_go_on_by_themselves(make_copy):
    layer = filled(1.0, 2.0)
    twin = make_copy(layer)
    layer.update(numbers(3.0), numbers(-3.0))
    twin.update(numbers(9.0), numbers(-9.0))
    assert listed(layer) == ([1, 2, 3], [-1, -2, -3])
    assert listed(twin) == ([1, 2, 9], [-1, -2, -9])


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.crop(-1),
        lambda layer: layer.crop(0),
        lambda layer: layer.offload(),
        lambda layer: layer.prefetch(),
        lambda layer: layer.reset(),
    ],
    ids=["reorder", "repeat", "select", "crop", "crop nothing", "offload", "prefetch", "reset"],
)
def test_operations_equal_those_of_the_library(change):
    generator = torch.Generator().manual_seed(0)
    layers = [DynamicLayer(), GrowingLayer()]
    for length in (3, 1, 1, 1, 1):
        new = torch.randn(2, 2, 2, length, 4, generator=generator)
        for layer in layers:
            layer.update(*new)
    for _ in range(2):
        for layer in layers:
            change(layer)
        rows = layers[0].keys.shape[0] if layers[0].is_initialized else 2
        new = torch.randn(2, rows, 2, 1, 4, generator=generator)
        for layer in layers:
            layer.update(*new)
        if rows < 2:
            break
    assert torch.equal(layers[0].keys, layers[1].keys) and torch.equal(layers[0].values, layers[1].values)


def test_gradients_and_inference_mode():
    layer, key = filled(1.0, 2.0), numbers(3.0).requires_grad_()
    layer.update(key, numbers(-3.0))[0].sum().backward()
    assert key.grad.flatten().tolist() == [1]
    with torch.inference_mode():
        layer = filled(1.0, 2.0)
    layer.update(numbers(3.0), numbers(-3.0))
    layer.update(numbers(4.0), numbers(-4.0))
    assert listed(layer) == ([1, 2, 3, 4], [-1, -2, -3, -4])


def test_another_dtype_is_promoted_as_by_the_library():
    layer = filled(1.0, 2.0)
    keys, _ = layer.update(numbers(3.0).double(), numbers(-3.0).double())
    assert keys.dtype == torch.float64 and keys.flatten().tolist() == [1, 2, 3]


def generate(model, ids, **options):
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "return_dict_in_generate": True,
    } | options
    return model.generate(ids, **options)


def kinds(cache):
    return {type(layer) for layer in cache.layers}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_text_and_cache_equal_those_of_the_library(attention, padded):
    model, ids = tiny_model(attn_implementation=attention), random_ids(3, 6)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    ours = generate(model, ids, attention_mask=mask)
    expected = generate(model, ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config))
    assert kinds(ours.past_key_values) == {GrowingLayer} and kinds(expected.past_key_values) == {DynamicLayer}
    assert torch.equal(ours.sequences, expected.sequences)
    for layer, other in zip(ours.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, rtol=1e-5, atol=1e-6)
    more = torch.cat([ours.sequences, random_ids(3, 2, seed=5)], 1)
    mask = torch.nn.functional.pad(mask, (0, 14), value=1)
    ours, expected = (
        generate(model, more, attention_mask=mask, past_key_values=done.past_key_values) for done in (ours, expected)
    )
    assert kinds(ours.past_key_values) == {GrowingLayer}
    assert torch.equal(ours.sequences, expected.sequences)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}],
    ids=["beams", "assisted", "static"],
)
def test_other_strategies_keep_the_cache_of_the_library(options):
    model, ids = tiny_model(), random_ids(1, 6)
    assert GrowingLayer not in kinds(
        generate(model, ids, attention_mask=torch.ones_like(ids), **options).past_key_values
    )


def test_no_cache_is_no_cache():
    assert generate(tiny_model(), random_ids(1, 6), use_cache=False).past_key_values is None
