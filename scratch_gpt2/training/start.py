"""Everything before the first training step: the launch, the model, the header, and early checks."""

import logging
import math
import os

import torch
from huggingface_hub import whoami
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..configuration_scratch_gpt2 import ScratchGPT2Config
from ..evaluation.models import check_finite, find_revision, is_classifier
from ..hardware import cpu_computes_bfloat16
from ..hub.card import adapter_base
from ..hub.push import explain_refusal
from ..hub.run_record import describe_hardware
from ..modeling_scratch_gpt2 import ScratchGPT2ForCausalLM

logger = logging.getLogger(__name__)

# What must be the same in a checkpoint and in the model that continues from it.
SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")


def new_model(
    config: ScratchGPT2Config, tokenizer: PreTrainedTokenizerBase, dropout: float = 0.0
) -> ScratchGPT2ForCausalLM:
    """A model with fresh weights, the sizes of `config` and the vocabulary of `tokenizer`."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    vocabulary = {"vocab_size": len(tokenizer), "bos_token_id": eos, "eos_token_id": eos, "pad_token_id": pad}
    return ScratchGPT2ForCausalLM(ScratchGPT2Config(**config.to_diff_dict() | vocabulary | _dropout(dropout)))


def model_to_continue(name_or_folder: str, dropout: float = 0.0) -> ScratchGPT2ForCausalLM:
    """A checkpoint in float32, whatever it was saved in: autocast computes in bfloat16, but small updates to bfloat16
    weights would be rounded away. Raises ValueError for a classifier."""
    if is_classifier(name_or_folder, find_revision(name_or_folder)):
        raise ValueError(f"{name_or_folder} is a classifier; give a language model.")
    model = ScratchGPT2ForCausalLM.from_pretrained(name_or_folder, dtype=torch.float32, **_dropout(dropout))
    return check_finite(model, name_or_folder)


def _dropout(probability: float) -> dict[str, float]:
    return dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), probability)


def check_same_sizes(model: ScratchGPT2ForCausalLM, checkpoint: str) -> None:
    """Raise ValueError if `checkpoint` has other sizes than `model`: Trainer would load the layers that fit, and say
    nothing about the rest."""
    saved = ScratchGPT2Config.from_pretrained(checkpoint)
    for name in SIZES:
        ours, theirs = getattr(model.config, name), getattr(saved, name)
        if ours != theirs:
            raise ValueError(
                f"{name} is {ours} here but {theirs} in {checkpoint}: resume with the settings that the run began "
                "with, or choose another output_dir."
            )


def check_launch(args: TrainingArguments) -> None:
    """Raise ValueError if Trainer will not run what was launched or asked for.

    accelerate uses several processes only with GPUs or when told to use the CPU, and FSDP only with GPUs. It does not
    say so, and each process would train a model of its own into the same folder. Emulated bfloat16 is only warned of.
    """
    if args.bf16 and args.device.type == "cpu" and not cpu_computes_bfloat16():
        logger.warning("This CPU emulates bfloat16, which is about a hundred times slower: leave out --bf16.")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != args.world_size:
        raise ValueError(
            f"{launched} processes were launched but no GPU was found for them; add --use_cpu to train on the CPU, or "
            "launch one process."
        )
    if args.use_cpu and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError("accelerate runs FSDP on GPUs only; use ddp.yaml with --use_cpu instead.")


def describe(trainer: Trainer, checkpoint: str | None, block_length: int | None = None, **lines: str) -> str:
    """The header of a run: what is trained, how and on what, one line each.

    Args:
        checkpoint: where the run continues; `None` for a new run.
        block_length: tokens of a row, if all rows have the same number.
        lines: what else to tell, and what to tell instead; they come first.
    """
    args, model = trainer.args, trainer.model
    rows = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    parameters = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = (sum(count for count, learns in parameters if learns or every) for every in (True, False))
    steps = optimizer_steps(trainer)
    tokens = f", {rows * block_length:,} tokens" if block_length is not None else ""
    floor = (args.lr_scheduler_kwargs or {}).get("min_lr_rate")
    schedule = args.lr_scheduler_type.value + ("" if floor is None else f" to {floor:g} of it")
    common = {
        "step": f"{rows:,} rows{tokens} = {args.world_size} process(es) x {args.train_batch_size} rows x "
        f"{args.gradient_accumulation_steps} passes",
        "schedule": f"{steps:,} steps, {args.get_warmup_steps(steps)} of them warm-up, learning rate "
        f"{args.learning_rate:g}, {schedule}",
        "optimizer": f"{args.optim.value}, weight decay {args.weight_decay:g}",
        "trained": f"{trained:,} of {total:,} parameters",
        "precision": f"float32 weights, mixed precision: {trainer.accelerator.mixed_precision}",
        "device": describe_hardware(),
        "start": f"continues {checkpoint}" if checkpoint else "step 0",
    }
    return "\n".join(
        f"{name:<11}{line}" for name, line in (lines | {k: common[k] for k in common if k not in lines}).items()
    )


def optimizer_steps(trainer: Trainer) -> int:
    """The optimizer steps that a trainer will take, over all epochs."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    passes = math.ceil(len(trainer.train_dataset) / (args.train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * math.ceil(passes / args.gradient_accumulation_steps))


def fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation end and pad as the tokenizer says, here and in what is saved.

    Raises ValueError for a model that has fewer embeddings than the tokenizer has tokens.
    """
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens but the model's vocab_size is {model.config.vocab_size}; use "
            "the tokenizer that the model was trained with."
        )
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id


def check_push(args: TrainingArguments, base_of_adapter: str | None = None) -> None:
    """With `--push_to_hub`, raise an error before training if the push would fail.

    Args:
        base_of_adapter: the model that an adapter is trained on, if only the adapter will be pushed.

    Raises ValueError for arguments that cannot be used, ConnectionError if nobody is logged in or the Hub cannot be
    reached.
    """
    if not args.push_to_hub:
        return
    if args.hub_token is not None:
        raise ValueError("hub_token would be stored in training_args.bin: log in with `hf auth login` instead.")
    strategy = HubStrategy(args.hub_strategy)
    if strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
        raise ValueError(f"hub_strategy is {strategy.value}; choose every_save or end.")
    if base_of_adapter is not None:
        adapter_base({}, base_of_adapter)
    try:
        account = whoami()
    except Exception as error:  # the types depend on huggingface_hub's HTTP library
        reason, remedy = explain_refusal(error)
        raise ConnectionError(
            f"The Hugging Face Hub cannot be pushed to ({reason}); {remedy}, or leave out --push_to_hub and push the "
            "folder later."
        ) from error
    user, destination = account["name"], args.hub_model_id
    if destination is None:
        raise ValueError(f"--push_to_hub has no destination: add --hub_model_id {user}/NAME.")
    owners = [user, *(organization["name"] for organization in account.get("orgs", []))]
    if "/" in destination and destination.split("/")[0] not in owners:
        raise ValueError(
            f"hub_model_id is {destination}, but {user} is logged in and can push to "
            f"{' or '.join(f'{owner}/NAME' for owner in owners)} only."
        )


def accumulation_steps(tokens_per_step: int, block_length: int, batch_size: int, world_size: int) -> int:
    """Forward passes per optimizer step of `tokens_per_step` tokens; `batch_size` is in rows per process and pass.

    Raises ValueError if the tokens cannot be divided evenly.
    """
    tokens_per_pass = block_length * batch_size * world_size
    if tokens_per_step < tokens_per_pass or tokens_per_step % tokens_per_pass != 0:
        raise ValueError(
            f"tokens_per_step is {tokens_per_step}, which is not a multiple of the {tokens_per_pass} tokens of one "
            f"pass ({world_size} process(es) x {batch_size} rows x {block_length} tokens); change tokens_per_step or "
            "per_device_train_batch_size."
        )
    return tokens_per_step // tokens_per_pass
