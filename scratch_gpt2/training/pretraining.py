"""Pretraining with transformers' Trainer: its data, its model, and what Trainer does not report by itself."""

import dataclasses
import math

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..data.encoding import token_bytes
from ..modeling_scratch_gpt2 import ScratchGPT2ForCausalLM
from .callbacks import SpeedCallback, flops_per_token
from .optimizers import muon_for_trainer
from .trainer import LanguageModelTrainer


def predicted_bytes_per_token(blocks: Dataset, tokenizer: PreTrainedTokenizerBase) -> float | None:
    """Bytes of UTF-8 per predicted token of `blocks`: the first token of a block is not predicted. `None` for a
    tokenizer that is not byte-level."""
    lengths = token_bytes(tokenizer)
    if lengths is None:
        return None
    counts = [lengths[block["labels"][1:].numpy()] for block in (blocks[i] for i in range(len(blocks)))]
    return float(np.concatenate(counts).mean()) or None


def whole_steps(dataset: Dataset, rows_per_step: int) -> Subset:
    """The rows that fill whole optimizer steps, so that every step of every epoch has the same number of tokens.

    Raises ValueError for fewer rows than a step has.
    """
    rows = len(dataset) // rows_per_step * rows_per_step
    if rows == 0:
        raise ValueError(
            f"The training data has {len(dataset)} blocks, but a step takes {rows_per_step}; give more text or a "
            "smaller tokens_per_step."
        )
    return Subset(dataset, range(rows))


class PretrainingTrainer(LanguageModelTrainer):
    """Trainer that also logs tokens per second, model FLOPs utilization and bits per byte.

    Args:
        optimizer: `adamw`, which stands for the optimizer that `args.optim` names, or `muon`.
        tokens_per_step, block_length: tokens of one optimizer step, over all processes, and of one row.
        peak_flops: peak FLOP/s of one device; `None` leaves the utilization out.
        bytes_per_token: of the evaluated blocks, from `predicted_bytes_per_token`; `None` leaves bits per byte out.
    """

    def __init__(
        self,
        model: ScratchGPT2ForCausalLM,
        args: TrainingArguments,
        optimizer: str,
        tokens_per_step: int,
        block_length: int,
        peak_flops: float | None = None,
        bytes_per_token: float | None = None,
        **kwargs,
    ):
        if optimizer == "muon":
            betas = (args.adam_beta1, args.adam_beta2)
            settings = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
            settings |= {"weight_decay": args.weight_decay, "momentum": args.muon_momentum}
            kwargs["optimizer_cls_and_kwargs"] = (lambda: muon_for_trainer, settings)
        super().__init__(model, args, **kwargs)
        plugin = self.accelerator.state.fsdp_plugin if self.accelerator.is_fsdp2 else None
        if plugin is not None and plugin.mixed_precision_policy is not None:
            # accelerate would also sum the gradients of the processes and round the loss in bfloat16.
            precise = {"reduce_dtype": torch.float32, "output_dtype": torch.float32}
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, **precise)
        self.tokens_per_step = tokens_per_step
        self.flops_per_step = tokens_per_step * flops_per_token(model.config, block_length)
        self.peak_flops = peak_flops
        self.bytes_per_token = bytes_per_token
        self.speed = SpeedCallback()
        self.add_callback(self.speed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        seconds = self.speed.seconds_per_step() if "loss" in logs else None
        if seconds is not None:
            logs["tokens_per_second"] = self.tokens_per_step / seconds
            if self.peak_flops is not None:
                logs["mfu"] = self.flops_per_step / seconds / (self.peak_flops * self.args.world_size)
        if "eval_loss" in logs and self.bytes_per_token is not None:
            logs["eval_bits_per_byte"] = logs["eval_loss"] / math.log(2) / self.bytes_per_token
        super().log(logs, start_time)

    def _save(self, output_dir=None, state_dict=None):
        """Save under FSDP, which gives the model a class of its own in a module of torch: `save_pretrained` would name
        it in the configuration, copy that module instead of ours, and store the tied embeddings twice."""
        sharded_class = type(self.model)
        if not issubclass(sharded_class, FSDPModule):
            return super()._save(output_dir, state_dict)
        if self.model.config.tie_word_embeddings:
            tied = ScratchGPT2ForCausalLM._tied_weights_keys
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        self.model.__class__ = ScratchGPT2ForCausalLM
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.__class__ = sharded_class
