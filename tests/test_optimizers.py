"""The optimizers of pretraining: which parameter goes where, and Muon with AdamW as a single optimizer."""

import copy

import pytest
import torch
from model_fixtures import random_ids, tiny_model
from transformers import Trainer, TrainingArguments, get_scheduler

from scratch_gpt2.training import optimizers
from scratch_gpt2.training.optimizers import MuonWithAdamW, muon_for_trainer, parameter_groups

EMBEDDINGS = ["model.embed_positions.weight", "model.embed_tokens.weight"]
HIDDEN = [
    "attn.k_proj.weight",
    "attn.out_proj.weight",
    "attn.q_proj.weight",
    "attn.v_proj.weight",
    "mlp.down_proj.weight",
    "mlp.up_proj.weight",
]


def names_in(model, group) -> list[str]:
    members = {id(parameter) for parameter in group["params"]}
    return sorted(name for name, parameter in model.named_parameters() if id(parameter) in members)


def train(model, optimizer, steps, scheduler=None):
    ids = random_ids(4, 16)
    model.train()
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def test_groups_by_name_and_decay():
    model = tiny_model(n_layer=1)
    groups = parameter_groups(model, weight_decay=0.1)
    assert names_in(model, groups["hidden"]) == [f"model.layers.0.{name}" for name in HIDDEN]
    assert names_in(model, groups["embeddings"]) == EMBEDDINGS
    assert len(groups["vectors"]["params"]) == 6 + 3 * 2  # six biases of linear layers, three norms
    assert [group["weight_decay"] for group in groups.values()] == [0.1, 0.1, 0.0]


def test_an_untied_output_layer_is_no_hidden_matrix():
    model = tiny_model(tie_word_embeddings=False)
    assert names_in(model, parameter_groups(model, 0.1)["embeddings"]) == ["lm_head.weight", *EMBEDDINGS]


def test_frozen_parameters_stay_out():
    model = tiny_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    assert names_in(model, parameter_groups(model, 0.1)["embeddings"]) == ["model.embed_positions.weight"]


def test_trainers_adamw_decays_the_same_parameters(tmp_path):
    model = tiny_model()
    trainer = Trainer(model, TrainingArguments(tmp_path, report_to="none", weight_decay=0.1))
    decayed, not_decayed = trainer.create_optimizer().param_groups
    groups = parameter_groups(model, 0.1)
    assert names_in(model, decayed) == sorted(
        names_in(model, groups["hidden"]) + names_in(model, groups["embeddings"])
    )
    assert names_in(model, not_decayed) == names_in(model, groups["vectors"])


def test_equals_muon_and_adamw_side_by_side(monkeypatch):
    monkeypatch.setattr(optimizers, "cpu_computes_bfloat16", lambda: True)
    one, two = tiny_model(), tiny_model()
    train(one, muon_for_trainer(one, 0.1, lr=0.01), steps=5)

    groups = parameter_groups(two, 0.1)
    muon = torch.optim.Muon([groups["hidden"]], lr=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([groups["embeddings"], groups["vectors"]], lr=0.01, betas=(0.9, 0.95))
    ids = random_ids(4, 16)
    two.train()
    for _ in range(5):
        two(ids, labels=ids).loss.backward()
        muon.step()
        adamw.step()
        two.zero_grad()
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(name)), name


@pytest.mark.parametrize("name", ["attn.q_proj", "mlp.up_proj", "mlp.down_proj"])  # square, tall, wide
def test_two_steps_in_float32_where_bfloat16_is_emulated(name, monkeypatch):
    """Muon's formulas in float64, with the gradients of both steps; torch's own Muon, in bfloat16, is off by 1e-2."""
    monkeypatch.setattr(optimizers, "cpu_computes_bfloat16", lambda: False)
    model = tiny_model()
    optimizer = muon_for_trainer(model, 0.1, lr=0.01, momentum=0.9)
    weight = model.get_submodule(f"model.layers.1.{name}").weight
    expected, momentum = weight.detach().double(), torch.zeros_like(weight, dtype=torch.float64)
    ids = random_ids(4, 16)
    model.train()
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        gradient = weight.grad.double()
        momentum = 0.9 * momentum + 0.1 * gradient
        x = 0.1 * gradient + 0.9 * momentum
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        expected = (1 - 0.01 * 0.1) * expected - 0.01 * 0.2 * max(weight.shape) ** 0.5 * x
        optimizer.step()
        optimizer.zero_grad()
        assert (weight - expected).abs().max() < 2e-6


def test_orthogonalize_keeps_singular_vectors_and_zeros():
    u, _, vh = torch.linalg.svd(torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    small = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01])
    update = optimizers.orthogonalize(u @ torch.diag_embed(small.expand(3, 8)) @ vh, (3.4445, -4.7750, 2.0315), 5)
    diagonal = u.mT @ update @ vh.mT
    assert (diagonal - torch.diag_embed(diagonal.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-4
    assert diagonal.diagonal(dim1=-2, dim2=-1).min() > 0.65 and diagonal.diagonal(dim1=-2, dim2=-1).max() < 1.25
    assert optimizers.orthogonalize(torch.zeros(8, 20), (3.4445, -4.7750, 2.0315), 5).count_nonzero() == 0


def test_first_muon_step_has_the_size_of_adamws():
    """An orthogonal (C, 4C) matrix has entries of RMS 1 / sqrt(4C); scaled by 0.2 * sqrt(4C) that is 0.2 (Liu et al.
    2025). Newton-Schulz leaves singular values between about 0.7 and 1.2."""
    model = tiny_model()
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    train(model, muon_for_trainer(model, 0.0, lr=0.01), steps=1)
    update = (weight.detach() - before) / 0.01
    singular_values = torch.linalg.svdvals(update) / (0.2 * 96**0.5)  # 96 = 4C rows
    assert singular_values.min() > 0.5 and singular_values.max() < 1.3
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_state_round_trip_continues_bit_for_bit():
    model = tiny_model()
    optimizer = muon_for_trainer(model, 0.1, lr=0.01)
    train(model, optimizer, steps=2)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, steps=2)

    resumed = tiny_model()
    resumed.load_state_dict(weights)
    other = muon_for_trainer(resumed, 0.5, lr=0.7)
    other.load_state_dict(state)
    assert [group["lr"] for group in other.param_groups] == [0.01, 0.01, 0.01]
    train(resumed, other, steps=2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_one_scheduler_drives_both_parts():
    model = tiny_model()
    optimizer = muon_for_trainer(model, 0.1, lr=0.01)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=4)
    train(model, optimizer, steps=3, scheduler=scheduler)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0025] * 3
    assert all(group["lr"] == 0.0025 for part, _ in optimizer.parts for group in optimizer.param_groups)


def test_step_returns_the_loss_of_its_closure():
    model = tiny_model()
    optimizer = MuonWithAdamW(parameter_groups(model, 0.1), lr=0.01)
    ids = random_ids(2, 8)

    def closure():
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    assert optimizer.step(closure).item() < first
