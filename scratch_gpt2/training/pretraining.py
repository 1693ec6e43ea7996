"""Pretraining with transformers' Trainer: the model to begin with, and what Trainer does not report by itself."""

import math

import torch
from transformers import PreTrainedTokenizerBase, Trainer

from ..configuration_scratch_gpt2 import ScratchGPT2Config
from ..modeling_scratch_gpt2 import ScratchGPT2ForCausalLM
from .callbacks import SpeedCallback, flops_per_token
from .optimizers import muon_for_trainer

# What must be the same in a checkpoint and in the model that continues from it.
SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")


def new_model(
    preset: str, tokenizer: PreTrainedTokenizerBase, dropout: float = 0.0, **sizes
) -> ScratchGPT2ForCausalLM:
    """A model with fresh weights, as wide and deep as `preset` says except for `sizes` that are not `None`, and with
    the vocabulary of `tokenizer`.

    Raises ValueError for an unknown preset and for sizes that do not fit together.
    """
    config = ScratchGPT2Config.from_preset(
        preset,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **_dropout(dropout),
        **{name: size for name, size in sizes.items() if size is not None},
    )
    return ScratchGPT2ForCausalLM(config)


def model_to_continue(name_or_folder: str, dropout: float = 0.0) -> ScratchGPT2ForCausalLM:
    """A checkpoint in float32, whatever it was saved in: autocast computes in bfloat16, but small updates to bfloat16
    weights would be rounded away."""
    return ScratchGPT2ForCausalLM.from_pretrained(name_or_folder, dtype=torch.float32, **_dropout(dropout))


def _dropout(probability: float) -> dict[str, float]:
    return dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), probability)


def check_same_sizes(model: ScratchGPT2ForCausalLM, checkpoint: str) -> None:
    """Raise ValueError where `checkpoint` is of another size than `model`: Trainer would load the layers that fit and
    say nothing about the rest."""
    saved = ScratchGPT2Config.from_pretrained(checkpoint)
    for name in SIZES:
        ours, theirs = getattr(model.config, name), getattr(saved, name)
        if ours != theirs:
            raise ValueError(
                f"{name} is {ours} here but {theirs} in {checkpoint}: resume with the settings that the run began "
                "with, or choose another output_dir."
            )


class PretrainingTrainer(Trainer):
    """Trainer for language models that also logs tokens per second, model-FLOPs utilisation and bits per byte.

    Args:
        optimizer: `adamw` (or whatever `args.optim` names) or `muon`.
        tokens_per_step, block_length: tokens of one optimizer step, over all processes, and of one row.
        peak_flops: peak FLOP/s of one device; `None` leaves the utilisation out.
        bytes_per_token: of the evaluation text; `None` leaves bits per byte out.
    """

    def __init__(
        self,
        model: ScratchGPT2ForCausalLM,
        args,
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
            settings["weight_decay"] = args.weight_decay
            kwargs["optimizer_cls_and_kwargs"] = (lambda: muon_for_trainer, settings)
        super().__init__(model, args, **kwargs)
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

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if prediction_loss_only:
            inputs = {**inputs, "skip_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
