"""Models to be measured: found by name, told apart by their weights, timed while they write."""

import hashlib
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from ..checkpoint_files import is_foreign_checkpoint
from ..modeling_scratch_gpt2 import ScratchGPT2ForCausalLM

PROMPT_LENGTH = 16


def is_first_process() -> bool:
    """Whether this process does the work. Evaluation runs in one process; the others that a launcher such as torchrun
    has started would do the same work again and write to the same files."""
    state = PartialState()
    state.destroy_process_group()  # nobody waits for the others
    return state.is_main_process


def load_causal_lm(name: str) -> PreTrainedModel:
    """A folder, Hub id or nanoGPT's ckpt.pt. GPT-2 checkpoints of any origin become our model, other architectures are
    transformers' own."""
    if is_foreign_checkpoint(name, {}):
        return ScratchGPT2ForCausalLM.from_pretrained(name)
    return AutoModelForCausalLM.from_pretrained(name)


def load_model(name: str, reference: bool = False) -> PreTrainedModel:
    """A classifier where the checkpoint is one, otherwise a causal language model.

    Args:
        reference: compute GPT-2 checkpoints with transformers' GPT-2 instead of ours, to compare the two.
    """
    if os.path.isfile(name):
        return load_causal_lm(name)
    architectures = AutoConfig.from_pretrained(name).architectures or []
    if any(architecture.endswith("ForSequenceClassification") for architecture in architectures):
        return AutoModelForSequenceClassification.from_pretrained(name)
    return AutoModelForCausalLM.from_pretrained(name) if reference else load_causal_lm(name)


def weights_digest(model: torch.nn.Module) -> str:
    """A short fingerprint of all weights, their names, shapes and dtype."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def measure_generation(model: PreTrainedModel, new_tokens: int, repeats: int = 3) -> dict[str, float]:
    """Speed and memory of greedy generation with the cache: one row, a prompt of 16 tokens.

    `tokens_per_second` is the median of the repeats, after one that is not counted. `peak_mb` is what the process held
    at most meanwhile, weights and libraries included; on a GPU, what torch had allocated there. NaN where the system
    does not tell.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and PROMPT_LENGTH + new_tokens > positions:
        raise ValueError(
            f"{new_tokens} new tokens after a prompt of {PROMPT_LENGTH} are more than the model's {positions} "
            "positions; generate fewer."
        )
    ids = torch.arange(PROMPT_LENGTH, device=model.device)[None] % model.config.vocab_size
    reset_peak(model.device)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        output.tolist()  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    return {"tokens_per_second": new_tokens / statistics.median(seconds[1:]), "peak_mb": peak_mb(model.device)}


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform != "linux":
        return float("nan")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
