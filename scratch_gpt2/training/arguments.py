"""The recipe of a pretraining run, and the numbers that follow from what the user gives."""

import ctypes
import sys
from typing import Any

import torch

# GPT-3's 125M model (Brown et al. 2020, table 2.1 and appendix B) as build-nanogpt trains it: 19,073 steps of 524,288
# tokens are 10B tokens. The warm-up, 715 of these steps, is a share here, so that it fits shorter runs too.
GPT3_RECIPE = {
    "max_steps": 19_073,
    "learning_rate": 6e-4,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_steps": 715 / 19_073,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
}
TOKENS_PER_STEP = 524_288

# How Trainer logs, saves and evaluates unless the user says otherwise. `use_cache` belongs to the saved configuration;
# the model itself never caches in training.
TRAINER_DEFAULTS = {
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 250,
    "save_steps": 1000,
    "save_total_limit": 3,
    "dataloader_pin_memory": torch.cuda.is_available(),
    "ddp_find_unused_parameters": False,
    "prediction_loss_only": True,
    "use_cache": True,
}

# What differs for classifiers: epochs instead of steps, and the best of them is kept. Resuming also restores how long
# early stopping has been waiting. A checkpoint may lack the frozen blocks, so only the end is pushed.
CLASSIFICATION_DEFAULTS = {
    **TRAINER_DEFAULTS,
    "num_train_epochs": 5,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "weight_decay": 0.1,
    "warmup_steps": 0.1,
    "logging_steps": 20,
    "eval_strategy": "epoch",
    "eval_steps": None,
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "restore_callback_states_from_checkpoint": True,
    "prediction_loss_only": False,
    "hub_strategy": "end",
}
# For AdamW, by what is trained: the fewer weights, the larger the steps that they bear.
CLASSIFICATION_LEARNING_RATES = {"head": 1e-2, "last_block": 5e-4, "all": 5e-5, "lora": 5e-4}


def accumulation_steps(tokens_per_step: int, block_length: int, batch_size: int, world_size: int) -> int:
    """Forward passes per optimizer step, from the tokens that a step shall have.

    `batch_size` counts the rows of one process in one pass.

    Raises ValueError where the tokens cannot be divided so.
    """
    tokens_per_pass = block_length * batch_size * world_size
    if tokens_per_step < tokens_per_pass or tokens_per_step % tokens_per_pass != 0:
        raise ValueError(
            f"tokens_per_step is {tokens_per_step}, which is not a multiple of the {tokens_per_pass} tokens of one "
            f"pass ({world_size} process(es) x {batch_size} rows x {block_length} tokens); change tokens_per_step or "
            "per_device_train_batch_size."
        )
    return tokens_per_step // tokens_per_pass


def cpu_computes_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16; without them it is emulated, a hundred times slower."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13 has it
    return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)


def keep_freed_memory() -> None:
    """Have the C library keep what this process frees, for training on a CPU.

    glibc returns large buffers to Linux, which clears them page by page when the next step asks again: 12% of the CPU
    time of a training step of six of GPT-2 124M's blocks, against 7% more memory. Without glibc, do nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # /usr/include/malloc.h
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_max, 0)
