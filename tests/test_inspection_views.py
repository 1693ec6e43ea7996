"""Attention maps, logit lens, token probabilities and the size of the cache, against transformers' GPT-2."""

import pytest
import torch
import transformers
from model_fixtures import random_ids, tiny_model, twins
from transformers import DynamicCache

from scratch_gpt2.inspection import (
    activation_patching,
    attention_maps,
    cache_bytes,
    head_ablations,
    logit_lens,
    show_token,
    token_probabilities,
)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_maps_are_those_of_transformers(attention):
    reference, ours = twins(scale_attn_by_inverse_layer_idx=True)
    ours.set_attn_implementation(attention)
    ids = random_ids(1, 11)
    with torch.no_grad():
        expected = reference(ids, output_attentions=True).attentions
    for layer in range(3):
        maps = attention_maps(ours, ids, layer)
        assert maps.shape == (4, 11, 11)
        close(maps, expected[layer][0])
    with pytest.raises(ValueError) as error:
        attention_maps(ours, ids, 3)
    assert str(error.value) == "There is no layer 3: this model has layers 0 to 2."


def test_logit_lens_reads_every_layer_through_the_final_norm():
    reference, ours = twins()
    ids = random_ids(1, 9)
    with torch.no_grad():
        outputs = reference(ids, output_hidden_states=True)
        states = [reference.transformer.ln_f(state) for state in outputs.hidden_states[:-1]]
        logits = [reference.lm_head(state)[0] for state in states] + [outputs.logits[0]]
    probabilities, tokens = logit_lens(ours, ids, top_k=3)
    expected = torch.stack(logits).softmax(-1).topk(3)  # (4, 9, 3)
    assert tokens.tolist() == expected.indices.tolist()
    close(probabilities, expected.values)


def test_token_probabilities_multiply_to_the_loss():
    model, ids = tiny_model(), random_ids(1, 12)
    probabilities, top, top_ids = token_probabilities(model, ids, top_k=2)
    with torch.no_grad():
        outputs = model(ids, labels=ids)
    assert -probabilities.log().mean().item() == pytest.approx(outputs.loss.item(), abs=1e-5)
    assert top.shape == top_ids.shape == (11, 2)
    assert top_ids[:, 0].tolist() == outputs.logits[0, :-1].argmax(-1).tolist()
    close(top[:, 0], outputs.logits[0, :-1].softmax(-1).amax(-1))


def test_an_untrained_model_finds_all_tokens_equally_probable():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    probabilities, _, _ = token_probabilities(model, random_ids(1, 5))
    assert probabilities.tolist() == pytest.approx([1 / 61] * 4)


def test_long_texts_are_scored_in_pieces(monkeypatch):
    model, ids = tiny_model(), random_ids(1, 30)
    whole = token_probabilities(model, ids)
    monkeypatch.setattr("scratch_gpt2.inspection.LOGITS_AT_ONCE", 7)
    for piece, expected in zip(token_probabilities(model, ids), whole, strict=True):
        torch.testing.assert_close(piece, expected)


@pytest.mark.parametrize("top_k", [0, 62])
def test_more_tokens_than_the_vocabulary(top_k):
    with pytest.raises(ValueError) as error:
        logit_lens(tiny_model(), random_ids(1, 3), top_k)
    assert str(error.value) == f"top_k is {top_k} but must lie between 1 and 61, the vocabulary."


def test_cache_bytes_count_keys_and_values():
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    assert cache_bytes(cache) == 0
    with torch.no_grad():
        model(random_ids(1, 10), past_key_values=cache)
        assert cache_bytes(cache) == 2 * 3 * 24 * 10 * 4  # keys and values, layers, width, positions, bytes of a float
        model(random_ids(1, 1), past_key_values=cache)
    assert cache_bytes(cache) == 2 * 3 * 24 * 11 * 4


def test_the_largest_gpt2_keeps_600_kilobytes_a_token_without_building_it():
    config = transformers.GPT2Config(n_layer=48, n_embd=1600, n_head=25)
    with torch.device("meta"):
        cache = DynamicCache(config=config)
        for layer in range(48):
            cache.update(torch.empty(1, 25, 1, 64), torch.empty(1, 25, 1, 64), layer)
    assert cache_bytes(cache) == 614_400


def test_looking_changes_nothing_in_the_model():
    model = tiny_model(attn_implementation="sdpa")
    ids = random_ids(1, 6)
    before = model(ids).logits
    attention_maps(model, ids, 0), logit_lens(model, ids), token_probabilities(model, ids)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, before)


def test_tokens_for_the_eye(tiny_tokenizer):
    ids = tiny_tokenizer("The hat\n\t\x00\U0001f600<b>")["input_ids"]
    assert "".join(show_token(tiny_tokenizer, token) for token in ids) == "The·hat↵⇥<00><f0><9f><98><80><b>"
    assert show_token(tiny_tokenizer, tiny_tokenizer.eos_token_id) == "<|endoftext|>"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_head_ablations_are_those_of_transformers_with_the_heads_rows_set_to_zero(attention):
    reference, ours = twins(scale_attn_by_inverse_layer_idx=True)
    ours.set_attn_implementation(attention)
    ids = random_ids(1, 11)
    width = ours.config.head_dim
    for layer in (0, 2):
        ablations = head_ablations(ours, ids, layer)
        projection = reference.transformer.h[layer].attn.c_proj
        weight = projection.weight.detach().clone()
        with torch.no_grad():
            close(ablations[0], reference(ids).logits[0, -1].softmax(-1))
            for head in range(4):
                projection.weight[head * width : (head + 1) * width] = 0
                close(ablations[1 + head], reference(ids).logits[0, -1].softmax(-1))
                projection.weight.copy_(weight)
    assert ablations.shape == (5, 61)


def test_activation_patching_is_that_of_transformers_with_a_hook():
    reference, ours = twins()
    clean, corrupted = random_ids(1, 6), random_ids(1, 6).flip(-1)
    patched = activation_patching(ours, clean, corrupted)
    assert patched.shape == (3, 6, 61)
    with torch.no_grad():
        states = reference(clean, output_hidden_states=True).hidden_states
    for layer, position in ((0, 2), (1, 5), (2, 0)):

        def replace(module, arguments, position=position, layer=layer):
            hidden_states = arguments[0].clone()
            hidden_states[0, position] = states[layer][0, position]
            return (hidden_states, *arguments[1:])

        hook = reference.transformer.h[layer].register_forward_pre_hook(replace)
        with torch.no_grad():
            close(patched[layer, position], reference(corrupted).logits[0, -1].softmax(-1))
        hook.remove()
    with pytest.raises(ValueError) as error:
        activation_patching(ours, clean, corrupted[:, :5])
    assert str(error.value) == "The texts have 6 and 5 tokens; make them equal."
