"""Freezing: which part of a classifier is trained."""

from torch import nn

from ..heads_scratch_gpt2 import ScratchGPT2ForSequenceClassification

# `last_block` is the recipe of Raschka 2024, "Build a Large Language Model (From Scratch)", section 6.5: the last
# block, the final norm and the new head.
TRAINABLE_PARTS = ("head", "last_block", "all")


def train_only(model: ScratchGPT2ForSequenceClassification, part: str) -> None:
    """Freeze all parameters of `model` except those of `part`: `head`, `last_block` (with the final norm and the head)
    or `all`.

    Frozen blocks run without dropout even in training mode, so that their output is the same in every epoch. A later
    call replaces an earlier one.

    Raises ValueError for another part.
    """
    if part not in TRAINABLE_PARTS:
        raise ValueError(f"{part!r} is not a trainable part of a classifier; use {', '.join(TRAINABLE_PARTS)}.")
    blocks = model.model.layers
    trained = {"head": [model.score], "last_block": [blocks[-1], model.model.norm, model.score], "all": [model]}[part]
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    for hook in getattr(model, "eval_hooks", []):
        hook.remove()
    frozen = {"head": [*blocks], "last_block": [*blocks[:-1]], "all": []}[part]
    if part != "all":
        frozen.append(model.model.embd_dropout)
    model.eval_hooks = [module.register_forward_pre_hook(switch_dropout_off) for module in frozen]


def switch_dropout_off(module: nn.Module, args) -> None:
    module.eval()
