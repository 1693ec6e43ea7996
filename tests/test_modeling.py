"""The model file: its written-out functions equal the fused kernels, and its source suits the tools that read it."""

import ast
import doctest
import inspect
import textwrap

import pytest
import torch
import torch.nn.functional as F
from model_fixtures import random_ids, tiny_model
from torch import nn
from transformers.activations import ACT2FN

from scratch_gpt2 import modeling_scratch_gpt2
from scratch_gpt2.modeling_scratch_gpt2 import (
    ScratchGPT2Attention,
    eager_attention_forward,
    gelu,
    layer_norm,
    one_head,
)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_layer_norm_equals_the_kernel():
    norm = nn.LayerNorm(24, eps=1e-3, dtype=torch.float64)
    norm.weight.data, norm.bias.data = random(24), random(2, 24)[1]
    x = 5 * random(2, 9, 24) + 3
    torch.testing.assert_close(layer_norm(x, norm.weight, norm.bias, norm.eps), norm(x), rtol=0, atol=1e-12)
    # Mean 3, variance (4 + 0 + 4) / 3: the biased one.
    literal = layer_norm(
        torch.tensor([1.0, 3.0, 5.0]), torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0.0, 7.0, 0.0]), 0
    )
    torch.testing.assert_close(literal, torch.tensor([-1.224745, 7.0, 2.449490]))


def test_gelu_equals_the_kernel():
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    torch.testing.assert_close(gelu(x), ACT2FN["gelu_pytorch_tanh"](x), rtol=0, atol=1e-12)
    literal = gelu(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(
        literal, torch.tensor([-0.158808, 0.0, 0.841192], dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_example_of_the_causal_mask():
    assert doctest.testmod(modeling_scratch_gpt2) == (0, 1)


def test_one_head_equals_the_kernel():
    query, key, value = random(3, 9, 8)
    expected = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0]
    torch.testing.assert_close(one_head(query, key, value), expected, rtol=0, atol=1e-12)


def test_heads_one_by_one_equal_all_at_once():
    queries, keys, values = random(3, 2, 4, 9, 8)  # (B, H, T, D) each
    one_by_one = torch.stack(
        [one_head(queries[row, head], keys[row, head], values[row, head]) for row in range(2) for head in range(4)]
    )
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)
    together, weights = eager_attention_forward(nn.Module(), queries, keys, values, mask, scaling=8**-0.5)
    assert together.shape == (2, 9, 4, 8) and weights.shape == (2, 4, 9, 9)
    # The softmax of `eager_attention_forward` computes in float32, as transformers' does.
    torch.testing.assert_close(together.transpose(1, 2).flatten(0, 1), one_by_one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [16, 256])
def test_scores_divided_by_the_root_of_the_width_have_variance_one(width):
    scores = (random(2, 20_000, width).prod(0)).sum(-1)
    assert scores.var().item() == pytest.approx(width, rel=0.05)
    assert (scores / width**0.5).var().item() == pytest.approx(1, rel=0.05)


def test_network_of_written_out_functions_equals_the_fused_one():
    model = tiny_model(attn_implementation="eager").double()
    ids = random_ids(2, 32)
    expected = model(ids).logits
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 7
    for norm in norms:
        norm.forward = lambda x, norm=norm: layer_norm(x, norm.weight, norm.bias, norm.eps)
    for block in model.model.layers:
        block.mlp.act.forward = gelu
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-11)


def test_projections_are_plain_calls_on_the_argument_of_forward():
    """vLLM joins q, k and v into one matrix where `forward` calls each of them once, in one block, on its argument
    (vllm/model_executor/models/transformers/fusers/qkv.py). A cast in between, or a loop, stops it."""
    source = ast.parse(textwrap.dedent(inspect.getsource(ScratchGPT2Attention.forward))).body[0]
    calls = [node for node in ast.walk(source) if isinstance(node, ast.Call)]
    assert source.args.args[1].arg == "hidden_states"
    for name in ("q_proj", "k_proj", "v_proj"):
        assert [ast.unparse(call) for call in calls if ast.unparse(call.func) == f"self.{name}"] == [
            f"self.{name}(hidden_states)"
        ]
    stored = [node.id for node in ast.walk(source) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    assert "hidden_states" not in stored


def test_autocast_casts_once_for_three_projections():
    """Each would cast its input, and keep its own copy for the backward pass."""
    model = tiny_model().train()
    attention = model.model.layers[0].attn
    inputs = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        attention.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.__setitem__(name, args[0])
        )
    with torch.autocast("cpu", torch.bfloat16):
        model(random_ids(2, 9))
    assert inputs["q_proj"].dtype == torch.bfloat16
    assert inputs["q_proj"] is inputs["k_proj"] is inputs["v_proj"]
    model(random_ids(2, 9))
    assert inputs["q_proj"].dtype == torch.float32
