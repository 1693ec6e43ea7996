"""The network against what we did not write: transformers' GPT-2, number for number and gradient for gradient.

The relative error of a tensor is max|ours - theirs| / max|theirs|, with its own maximum for every single output and
every single parameter's gradient. All is float32.
"""

import pytest
import torch
from model_fixtures import TINY, own_names, random_ids, relative_error, tiny_model, twins
from torch import nn
from transformers import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from scratch_gpt2.reference import gpt2_logits

TOLERANCE = 1e-5
SIZE_124M = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
WIDE = SIZE_124M | {"vocab_size": 61, "n_layer": 2}
HEADS = {
    GPT2Model: lambda ids: {},
    GPT2LMHeadModel: lambda ids: {"labels": ids.masked_fill(ids % 4 == 0, -100)},
    GPT2ForSequenceClassification: lambda ids: {"labels": ids[:, 0] % 5},
    GPT2ForTokenClassification: lambda ids: {"labels": (ids % 5).masked_fill(ids % 4 == 0, -100)},
    GPT2ForQuestionAnswering: lambda ids: {"start_positions": ids[:, 0] % 4, "end_positions": 4 + ids[:, 1] % 4},
}


def flat_outputs(outputs) -> dict[str, torch.Tensor]:
    """The output's tensors by name; members of tuples are numbered."""
    flat = {}
    for name, value in outputs.items():
        if name == "past_key_values":
            value = [tensor for layer in value.layers for tensor in (layer.keys, layer.values)]
        if isinstance(value, torch.Tensor):
            flat[name] = value
        elif value is not None:
            flat |= {f"{name}.{number}": tensor for number, tensor in enumerate(value)}
    return flat


def objective(outputs) -> torch.Tensor:
    """What is differentiated: the losses, or without a head a sum in which every number has a weight of its own."""
    if "last_hidden_state" in outputs:
        hidden_states = outputs.last_hidden_state
        return (hidden_states * torch.linspace(-1, 1, hidden_states.numel()).view_as(hidden_states)).sum()
    return outputs.loss + (outputs.mc_loss if "mc_loss" in outputs else 0)


def run(model, inputs):
    """All outputs and all gradients."""
    model.zero_grad()
    outputs = model(**inputs)
    objective(outputs).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return flat_outputs(outputs), gradients


def errors(reference, ours, inputs) -> dict[str, float]:
    """Relative error of every output and of the gradient of every parameter."""
    inputs = {"use_cache": True} | inputs  # ours keeps none by default where there are labels
    expected, expected_gradients = run(reference, inputs)
    actual, gradients = run(ours, inputs)
    prefix = "model." if isinstance(reference, GPT2Model) else ""
    gradients = {f"{prefix}{name}": gradient for name, gradient in gradients.items()}
    expected_gradients = own_names(expected_gradients)
    assert actual.keys() == expected.keys()
    assert gradients.keys() == expected_gradients.keys()
    # Of (B, N, T) texts transformers returns the last hidden state in that shape and the others as (B * N, T).
    found = {name: relative_error(actual[name].view_as(expected[name]), expected[name]) for name in expected}
    for name, gradient in gradients.items():
        scale = gradients[name.replace("bias", "weight")] if vanishes(name, reference) else expected_gradients[name]
        found[f"{name}.grad"] = ((gradient - expected_gradients[name]).abs().max() / scale.abs().max()).item()
    return found


def vanishes(name, model):
    """Whether the gradient is zero but for rounding, since softmax ignores what is added to all its arguments: such a
    bias is compared on the scale of its weight."""
    of_the_head = {
        GPT2ForQuestionAnswering: ["model.norm.bias", "qa_outputs.bias"],
        GPT2DoubleHeadsModel: ["multiple_choice_head.bias"],
    }
    return name.endswith("k_proj.bias") or name in of_the_head.get(type(model), [])


def assert_equal(reference, ours, inputs):
    found = errors(reference, ours, inputs)
    gradients = max(error for name, error in found.items() if name.endswith(".grad"))
    outputs = max(error for name, error in found.items() if not name.endswith(".grad"))
    print(f"largest relative error: outputs and loss {outputs:.1e}, gradients {gradients:.1e}")  # shown by pytest -rP
    wrong = {name: error for name, error in found.items() if not error <= TOLERANCE}
    assert not wrong, wrong


def padded(ids, side):
    """Keyword arguments for rows of which the second has three pads, with the positions said explicitly."""
    if side is None:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    pads = slice(0, 3) if side == "left" else slice(-3, None)
    mask[1, pads] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "position_ids": positions}


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_every_head_equals_transformers(head, attention, side):
    reference, ours = twins(head, attention, num_labels=5)
    ids = random_ids(3, 9)
    inputs = padded(ids, side) | HEADS[head](ids) | {"output_hidden_states": True}
    assert_equal(reference, ours, inputs | {"output_attentions": attention == "eager"})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_multiple_choice_equals_transformers(attention):
    reference, ours = twins(GPT2DoubleHeadsModel, attention)
    ids = random_ids(2, 3, 7)
    inputs = {"input_ids": ids, "labels": ids, "mc_labels": torch.tensor([2, 0]), "output_hidden_states": True}
    inputs |= {"token_type_ids": ids % 2 + 3, "mc_token_ids": torch.tensor([[6, 3, 5], [2, 6, 4]])}
    assert_equal(reference, ours, inputs | {"output_attentions": attention == "eager"})
    del inputs["mc_token_ids"]  # the last token is the default
    assert_equal(reference, ours, inputs)


@pytest.mark.parametrize(
    "options",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"n_inner": 40},
        {"layer_norm_epsilon": 0.1},
        {"activation_function": "relu"},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_options_equal_transformers(options, attention):
    # Scores that are not divided saturate the softmax, whose gradients then vanish into rounding: smaller weights.
    reference, ours = twins(GPT2LMHeadModel, attention, std=0.1, **options)
    ids = random_ids(2, 9)
    assert_equal(reference, ours, {"input_ids": ids, "labels": ids, "output_hidden_states": True})
    if not options.keys() & {"tie_word_embeddings", "n_inner"}:  # the weights are the same: the option must tell
        plain = twins(GPT2LMHeadModel, attention, std=0.1)[1]
        assert relative_error(plain(ids).logits, reference(ids).logits) > 100 * TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_token_types_and_embeddings_equal_transformers(attention):
    reference, ours = twins(GPT2LMHeadModel, attention)
    ids = random_ids(2, 9)
    types = random_ids(2, 9, seed=1)
    assert_equal(reference, ours, {"input_ids": ids, "token_type_ids": types, "labels": ids})
    embeddings = torch.randn(2, 9, TINY["n_embd"], generator=torch.Generator().manual_seed(0))
    assert_equal(reference, ours, {"inputs_embeds": embeddings, "labels": ids})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_training_without_logits_equals_transformers(attention):
    reference, ours = twins(GPT2LMHeadModel, attention)
    ids = random_ids(3, 9)
    for extra in ({}, {"num_items_in_batch": 7}):
        inputs = padded(ids, "left") | {"labels": ids.masked_fill(ids % 4 == 0, -100), "use_cache": False} | extra
        expected = run(reference.train(), inputs)
        actual = run(ours.train(), inputs | {"skip_logits": True})
        assert "logits" not in actual[0]
        assert relative_error(actual[0]["loss"], expected[0]["loss"]) <= TOLERANCE
        for name, gradient in own_names(expected[1]).items():
            if not name.endswith("k_proj.bias"):
                assert relative_error(actual[1][name], gradient) <= TOLERANCE, name


def test_124m_equals_transformers():
    """OpenAI's smallest shape, with weights of the size that training leaves."""
    pair = twins(GPT2LMHeadModel, std=0.02, sizes=SIZE_124M)
    ids = random_ids(2, 12, vocab_size=50257)
    inputs = padded(ids, "left") | {"labels": ids, "output_hidden_states": True}
    for attention in ("eager", "sdpa"):
        for model in pair:
            model.set_attn_implementation(attention)
        assert_equal(*pair, inputs | {"output_attentions": attention == "eager"})


def exact_gelu(model):
    for block in model.model.layers:
        block.mlp.act = nn.GELU()


def swapped_query_and_key(model):
    for block in model.model.layers:
        block.attn.q_proj, block.attn.k_proj = block.attn.k_proj, block.attn.q_proj


def untransposed_square_matrix(model):
    for block in model.model.layers:
        block.attn.out_proj.weight.data = block.attn.out_proj.weight.data.T.contiguous()


@pytest.mark.parametrize("mistake", [exact_gelu, swapped_query_and_key, untransposed_square_matrix])
@pytest.mark.parametrize(("std", "sizes"), [(0.2, TINY), (0.02, WIDE)], ids=["tiny", "wide"])
def test_comparison_notices_mistake(mistake, std, sizes):
    """The mistakes that the comparison is there for are well above its tolerance, in outputs and in gradients."""
    reference, ours = twins(GPT2LMHeadModel, "sdpa", std, sizes)
    mistake(ours)
    ids = random_ids(2, 9)
    found = errors(reference, ours, {"input_ids": ids, "labels": ids})
    assert found["logits"] > 3 * TOLERANCE
    assert found["model.layers.0.mlp.up_proj.weight.grad"] > 3 * TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_network_equals_its_definition(attention):
    model = tiny_model(attn_implementation=attention)
    ids = random_ids(2, 32)
    assert relative_error(model(ids).logits, gpt2_logits(model.state_dict(), ids, n_head=4)) <= TOLERANCE


def test_definition_equals_transformers():
    reference, _ = twins(GPT2LMHeadModel)
    ids = random_ids(2, 32)
    weights = own_names(reference.state_dict())
    assert relative_error(gpt2_logits(weights, ids, n_head=4), reference(ids).logits) <= TOLERANCE


def test_float64_equals_transformers_to_its_own_precision():
    reference, ours = (model.double() for model in twins(GPT2LMHeadModel, "sdpa"))
    ids = random_ids(2, 9)
    assert relative_error(ours(ids).logits, reference(ids).logits) <= 1e-13


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_is_near_float32(attention):
    """bfloat16 has 8 bits; transformers' GPT-2 ends as far away."""
    reference, ours = twins(GPT2LMHeadModel, attention)
    ids = random_ids(2, 9)
    logits = ours.bfloat16()(ids).logits
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits.float(), reference(ids).logits) <= 2**-6


def test_ten_steps_of_training_equal_transformers():
    losses = []
    for model in twins(GPT2LMHeadModel, "sdpa"):
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
        ids = random_ids(4, 16)
        for _ in range(10):
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
