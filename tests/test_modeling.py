"""What the model file promises to those who read it, and to tools that read its source."""

import ast
import inspect
import textwrap

import torch
from model_fixtures import random_ids, tiny_model

from scratch_gpt2.modeling_scratch_gpt2 import ScratchGPT2Attention


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
