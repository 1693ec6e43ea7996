"""The plan of a pretraining run: its bytes against real allocations, its times against sums done by hand."""

from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from example_scripts import run_in_process
from model_fixtures import random_ids, tiny_model
from test_token_shards import write_by_hand
from torch.utils.data import DataLoader

from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM
from scratch_gpt2.data.token_shards import TokenShards
from scratch_gpt2.training.optimizers import muon_for_trainer
from scratch_gpt2.training.plan import activation_bytes, checkpoint_bytes, device_memory, tokens_per_second
from scratch_gpt2.training.pretraining import whole_steps

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parameters_gradients_and_optimizer_take_these_bytes(optimizer):
    model = tiny_model()
    if optimizer == "muon":
        step = muon_for_trainer(model, 0.1, lr=1e-3)
    else:
        step = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = random_ids(2, 16)
    model(ids, labels=ids).loss.backward()
    step.step()
    states = [value for state in step.state.values() for value in state.values() if torch.is_tensor(value)]
    memory = device_memory(model.config, "ddp", devices=2, rows=2, length=16, optimizer=optimizer)
    assert memory.parameters == sum(weight.nbytes for weight in model.parameters())
    assert memory.gradients == sum(weight.grad.nbytes for weight in model.parameters())
    assert memory.optimizer == sum(value.nbytes for value in states if value.ndim > 0)


def saved_for_backward(config: ScratchGPT2Config, ids: torch.Tensor) -> int:
    """Bytes that autograd keeps, except the weights and their copies in bfloat16."""
    torch.manual_seed(0)
    model = ScratchGPT2ForCausalLM(config).train()
    sizes = {weight.numel() for weight in model.parameters()}
    storages = {}

    def keep(tensor):
        if tensor.untyped_storage().nbytes() // tensor.element_size() not in sizes:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(ids.numel()))
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def test_activations_are_what_autograd_keeps():
    sizes = {"n_embd": 80, "n_head": 4, "n_positions": 32, "vocab_size": 300}
    sizes |= NO_DROPOUT | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    shallow, deep = (ScratchGPT2Config(n_layer=layers, **sizes) for layers in (1, 3))
    measured = saved_for_backward(deep, ids) - saved_for_backward(shallow, ids)
    planned = activation_bytes(deep, 64) - activation_bytes(shallow, 64)
    assert planned == 2 * 64 * 36 * 80
    # Beside these: mean and variance of both norms and one number per head for each token.
    assert measured == planned + 2 * 64 * 4 * (4 + 4)


def test_bytes_of_124m():
    gpt2 = ScratchGPT2Config.from_preset("gpt2")
    memory = device_memory(gpt2, "ddp", devices=8, rows=16, length=1024)
    assert (memory.parameters, memory.gradients, memory.optimizer) == (497_759_232, 497_759_232, 995_518_464)
    # 16,384 tokens, 12 blocks, 36 bytes for each of the 768 features
    assert memory.activations == 5_435_817_984
    assert checkpoint_bytes(gpt2) == 1_493_277_696  # 12 bytes for each of 124,439,808 parameters
    assert checkpoint_bytes(gpt2, "muon") == 1_493_277_696 - 4 * 84_934_656  # the matrices in the blocks


def test_shards_are_rounded_up():
    """50,257 rows of embeddings: the first of 8 devices holds 6,283."""
    config = ScratchGPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=16)
    memory = device_memory(config, "fsdp2", devices=8, rows=1, length=16)
    # Embeddings; q, k, v, out (8 x 8), up (32 x 8) and down (8 x 32); their biases; three norms.
    elements = 6283 * 8 + 2 * 8 + 4 * 8 + 4 * 8 + 1 * 32 + 4 * 1 + 4 + 1 + 3 * 2
    assert memory.parameters == memory.gradients == 4 * elements
    assert memory.optimizer == 8 * elements


def test_tensor_parallelism_splits_the_matrices_and_not_the_embeddings():
    config = ScratchGPT2Config(n_layer=1, n_embd=8, n_head=4, n_positions=16, vocab_size=50, eos_token_id=0)
    memory = device_memory(config, "tp", devices=4, rows=1, length=16)
    embeddings, norms = (50 + 16) * 8, 3 * 16
    columns = 3 * (8 * 8 + 8) // 4 + (32 * 8 + 32) // 4  # q, k, v and up, with their biases
    rows = (8 * 8 + 8 * 32) // 4 + 2 * 8  # out and down; every device adds their biases
    assert memory.parameters == 4 * (embeddings + norms + columns + rows)
    assert memory.activations == 16 * (12 * 8 + 24 * 8 // 4)
    with pytest.raises(ValueError, match=r"^Tensor parallelism divides the 4 heads, but 4 is not divisible by 3\.$"):
        device_memory(config, "tp", devices=3, rows=1, length=16)
    with pytest.raises(ValueError, match=r"^Unknown strategy 'fsdp': choose one of ddp, fsdp2, tp\.$"):
        device_memory(config, "fsdp", devices=2, rows=1, length=16)


def test_gradient_checkpointing_keeps_one_block_and_what_enters_the_others():
    config = ScratchGPT2Config(n_layer=10, n_embd=8, n_head=2)
    assert activation_bytes(config, 100, gradient_checkpointing=True) == 100 * (10 * 4 * 8 + 36 * 8)


def test_speed_and_days(monkeypatch, capsys):
    gpt2 = ScratchGPT2Config.from_preset("gpt2")
    # (6 * (84,934,656 + 38,597,376) + 12 * 12 * 768 * 1,024) FLOPs per token
    assert tokens_per_second(gpt2, 1024, devices=8, peak_flops=989e12, mfu=0.4) == pytest.approx(3_703_953, abs=1)
    arguments = ("--preset", "gpt2", "--gpus", "8", "--tokens", "10e9", "1e11")
    code, output, _ = run_in_process(EXAMPLES / "plan_run.py", monkeypatch, capsys, *arguments)
    assert code == 0 and "gpt2: 124.4M parameters; 8 x H100, 16 rows of 1024 tokens per GPU, adamw\n" in output
    assert "\n40%      3,703,953     0.14          0.03          0.31\n" in output
    assert "\ntp                 Tensor parallelism divides the 12 heads, but 12 is not divisible by 8.\n" in output
    assert "restart: a checkpoint of 1.49 GB every 1,000 steps; a failure loses 1.2 minutes on average" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "H900"), "The peak of 'H900' is not known; choose one of B200, "),
        (("--gpus", "0"), "gpus is 0 but must be at least 1."),
        (("--mfu", "40"), "mfu is 40 but must be above 0 and at most 1."),
        (("--block_length", "2048"), "block_length is 2048, but gpt2 has 1024 positions."),
    ],
)
def test_impossible_plans(arguments, message, monkeypatch, capsys):
    code, _, stderr = run_in_process(EXAMPLES / "plan_run.py", monkeypatch, capsys, *arguments)
    assert code == 1 and f"error: {message}" in stderr


@pytest.mark.parametrize("ranks", [1, 2, 4, 64])
def test_ranks_share_the_tokens(ranks, tmp_path):
    """Every token but the first is predicted by one rank, once: what Trainer's loader reads of real shards."""
    train = TokenShards(write_by_hand(tmp_path, [1], range(1000), range(1000, 1537)), 4)
    assert len(train) == 512
    data = whole_steps(train, 128)
    predicted = []
    for rank in range(ranks):
        loader = DataLoader(data, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(5))
        loader = prepare_data_loader(loader, num_processes=ranks, process_index=rank, use_seedable_sampler=True)
        mine = [token for batch in loader for row in batch["labels"].tolist() for token in row[1:]]
        assert len(mine) == 1536 // ranks
        predicted += mine
    assert sorted(predicted) == list(range(1, 1537))
