"""Continuations that share their context get the scores that each has alone."""

import pytest
import torch
import transformers
from model_fixtures import TINY, fill, twins

from scratch_gpt2.evaluation.continuations import (
    PADDING,
    can_share_context,
    lay_out,
    log_likelihoods,
    predictions,
    segment_mask,
)


def test_layout_of_a_row():
    item = ([7, 8, 9], [[1, 2], [3], [4, 5, 6]])
    ids, positions, segments, predicting = lay_out(item)
    assert ids == [7, 8, 9, 1, 4, 5]
    assert positions == [0, 1, 2, 3, 3, 4]
    assert segments == [0, 0, 0, 1, 3, 3]
    assert predicting == [False, False, True, True, True, True]
    # of the predicting positions 9, 1, 4, 5 and then those of the second row
    assert predictions([item, ([1], [[2], [3, 4]])]) == ([0, 1, 0, 0, 2, 3, 4, 4, 5], [1, 2, 3, 4, 5, 6, 2, 3, 4])
    mask = segment_mask(torch.tensor([[0, 0, 1, 2, 2, PADDING]]), torch.float32)
    assert mask.shape == (1, 1, 6, 6)
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert mask.min() == torch.finfo(torch.float32).min


SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
LONGER = SIZES | {"intermediate_size": 48, "max_position_embeddings": 64}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("config", "shares"),
    [
        (transformers.GPT2Config(**TINY), True),
        (transformers.LlamaConfig(**LONGER, num_key_value_heads=2), True),
        (transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=24, max_position_embeddings=64), True),
        (transformers.MistralConfig(**LONGER, num_key_value_heads=2, sliding_window=4), False),
        (transformers.MambaConfig(**SIZES), False),  # a state runs through all tokens
        (transformers.BloomConfig(vocab_size=61, hidden_size=24, n_layer=2, n_head=4), False),  # ALiBi
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_any_causal_model_equals_a_plain_loop(config, shares, attention):
    if config.model_type in ("mamba", "bloom") and attention == "sdpa":
        pytest.skip("this architecture has one attention only")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = fill(model).eval() if config.model_type != "mamba" else model.eval()
    assert can_share_context(model) == shares
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(3, 61, (length,), generator=generator).tolist()

    items = [
        (ids(context), [ids(n) for n in lengths]) for context, lengths in ((7, (5, 1, 3)), (1, (2, 9)), (12, (1,)))
    ]
    results = dict(pair for batch in log_likelihoods(model, items, 2) for pair in batch)
    for number, (context, continuations) in enumerate(items):
        expected = []
        for continuation in continuations:
            with torch.no_grad():
                log_probs = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
            steps = enumerate(continuation, start=len(context) - 1)
            expected.append(sum(log_probs[position, target].item() for position, target in steps))
        assert results[number] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("model", "_is_stateful", True),
        ("model", "_supports_attention_backend", False),
        ("config", "sliding_window", 8),
        ("config", "layer_types", ["full_attention", "linear_attention"]),
        ("config", "_attn_implementation", "flex_attention"),
    ],
)
def test_what_keeps_a_model_from_sharing_the_context(place, name, value):
    model = twins()[0]
    assert can_share_context(model)
    setattr(model if place == "model" else model.config, name, value)
    assert not can_share_context(model)
