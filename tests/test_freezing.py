"""Which parameters are trained, and that frozen blocks have no dropout."""

import pytest
import torch
from model_fixtures import fill, random_ids, tiny_config

from scratch_gpt2 import ScratchGPT2ForSequenceClassification
from scratch_gpt2.training.freezing import train_only

BLOCK = {
    f"{layer}.{kind}"
    for layer in ("attn_norm", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp_norm")
    for kind in ("weight", "bias")
} | {f"mlp.{layer}.{kind}" for layer in ("up_proj", "down_proj") for kind in ("weight", "bias")}
LAST_BLOCK = {f"model.layers.2.{name}" for name in BLOCK} | {"model.norm.weight", "model.norm.bias", "score.weight"}


def make_classifier(dropout=0.0, **options):
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return fill(ScratchGPT2ForSequenceClassification(tiny_config(num_labels=2, **dropouts | options)))


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_is_trained():
    model = make_classifier()
    everything = trained_names(model)
    assert len(everything) == 2 + 3 * 16 + 2 + 1
    for part, expected in (("head", {"score.weight"}), ("last_block", LAST_BLOCK), ("all", everything)):
        train_only(model, part)
        assert trained_names(model) == expected


@pytest.mark.parametrize("part", ["head", "last_block"])
def test_only_the_trained_part_gets_gradients(part):
    model = make_classifier()
    train_only(model, part)
    model(random_ids(2, 5), labels=torch.tensor([0, 1])).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained_names(model)


def test_frozen_blocks_have_no_dropout_while_the_trained_one_has():
    model, ids = make_classifier(dropout=0.5), random_ids(4, 6)
    entering = []
    model.model.layers[-1].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    expected = model.eval()(ids).logits
    train_only(model, "last_block")
    logits = [model.train()(ids).logits for _ in range(2)]
    assert torch.equal(entering[0], entering[1]) and torch.equal(entering[0], entering[2])
    assert not torch.allclose(logits[0], logits[1])
    train_only(model, "head")
    torch.testing.assert_close(model.train()(ids).logits, expected)


def test_a_later_call_gives_dropout_back():
    model, ids = make_classifier(dropout=0.5), random_ids(4, 6)
    train_only(model, "head")
    train_only(model, "all")
    assert not torch.allclose(model.train()(ids).logits, model.train()(ids).logits)


def test_an_unknown_part():
    with pytest.raises(ValueError, match=r"^'tail' is not a trainable part .* head, last_block, all\.$"):
        train_only(make_classifier(), "tail")
