"""Recipes: transformers' TrainingArguments with the defaults of pretraining, classification and instruction tuning."""

import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType

# GPT-3's 125M model (Brown et al. 2020, table 2.1 and appendix B) as build-nanogpt trains it: 19,073 steps of 524,288
# tokens are 10B tokens. The warm-up, 715 of these steps, is a share here, so that it fits shorter runs too.
PRETRAINING_STEPS = 19_073
TOKENS_PER_STEP = 524_288
# What `--recipe` of examples/pretrain.py changes in the defaults; docs/pretraining.md compares them at 10M parameters.
PRETRAINING_RECIPES: dict[str, dict] = {
    "gpt3": {},
    "muon": {"optimizer": "muon", "learning_rate": 4e-3},
}
# For AdamW, by what is trained: the fewer weights, the larger the steps that they need.
CLASSIFICATION_LEARNING_RATES = {"head": 1e-2, "last_block": 5e-4, "all": 5e-5, "lora": 5e-4}
# Adapters start at zero and are small: they need larger steps (Biderman et al. 2024, arXiv:2405.09673).
LORA_LEARNING_RATE = 3e-4
# A packed row of 1,024 tokens holds about nine of Alpaca's conversations, so a step has as many as without packing.
PACKED_BATCH = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2}


@dataclass
class RecipeArguments(TrainingArguments):
    """What the recipes share: how a run logs, evaluates and saves.

    `use_cache` is for the saved configuration; the model itself never caches in training. Our trainers stop at a loss
    that is not finite, so the logs need no filter for it.

    Raises ValueError for values that TrainingArguments accepts but that cannot train a model.
    """

    output_dir: str | None = field(
        default=None, metadata={"help": "Output folder for the model and all other files.", "aliases": ["--out_dir"]}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the finished model in output_dir.", "aliases": ["--overwrite"]}
    )
    eval_only: bool = field(
        default=False, metadata={"help": "Do not train: evaluate --model and write evaluation.json to output_dir."}
    )
    logging_steps: float = 10
    logging_nan_inf_filter: bool = False
    eval_strategy: IntervalStrategy | str = "steps"
    eval_steps: float | None = 250
    save_steps: float = 1000
    save_total_limit: int | None = 3
    ddp_find_unused_parameters: bool | None = False
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    prediction_loss_only: bool = True
    use_cache: bool = True

    def __post_init__(self):
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 1.")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)} but must be a finite number, at least 0.")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(f"label_smoothing_factor is {self.label_smoothing_factor} but must be in [0, 1).")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps is {self.max_steps} but must be at least 1, or -1 to use num_train_epochs.")
        if self.max_steps == -1 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs} but must be above 0.")
        try:
            super().__post_init__()
        except TypeError as error:  # an unknown name in a dict of options
            raise ValueError(f"The training arguments cannot be used: {error}.") from error
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()


@dataclass
class PretrainingArguments(RecipeArguments):
    """GPT-3's recipe for 10B tokens: 19,073 steps, unless `max_steps` or `num_train_epochs` is given.

    The default schedule ends at a tenth of the learning rate, unless `lr_scheduler_kwargs` says otherwise.
    """

    max_steps: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Number of optimizer steps; 19,073 unless num_train_epochs is given."}
    )
    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Number of passes over the data, instead of max_steps."}
    )
    learning_rate: float = 6e-4
    lr_scheduler_type: SchedulerType | str = "cosine_with_min_lr"
    warmup_steps: float = 715 / 19_073
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    muon_momentum: float = field(
        default=0.95, metadata={"help": "Momentum of Muon; in runs of a few hundred steps, 0.9 can be better."}
    )
    max_grad_norm: float = 1.0

    def __post_init__(self):
        if not 0 <= self.muon_momentum < 1:
            raise ValueError(f"muon_momentum is {self.muon_momentum} but must be in [0, 1).")
        if self.max_steps is None:
            self.max_steps = PRETRAINING_STEPS if self.num_train_epochs is None else -1
        elif self.max_steps > 0 and self.num_train_epochs:
            raise ValueError(
                f"max_steps is {self.max_steps} and num_train_epochs is {self.num_train_epochs:g}; give one of them."
            )
        if self.num_train_epochs is None:
            self.num_train_epochs = 0.0 if self.max_steps > 0 else TrainingArguments.num_train_epochs
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        super().__post_init__()


@dataclass
class ClassificationArguments(RecipeArguments):
    """Epochs instead of steps, of which the best is kept; the learning rate is that of the last block.

    Resuming also restores how long early stopping has waited. A checkpoint may lack the frozen blocks, so only the
    final model is pushed.
    """

    num_train_epochs: float = 5
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 32
    learning_rate: float = CLASSIFICATION_LEARNING_RATES["last_block"]
    weight_decay: float = 0.1
    warmup_steps: float = 0.1
    logging_steps: float = 20
    eval_strategy: IntervalStrategy | str = "epoch"
    eval_steps: float | None = None
    save_strategy: SaveStrategy | str = "epoch"
    save_total_limit: int | None = 1
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "loss"
    restore_callback_states_from_checkpoint: bool = True
    prediction_loss_only: bool = False
    hub_strategy: HubStrategy | str = "end"


@dataclass
class InstructionArguments(RecipeArguments):
    """Three epochs, with ten evaluations for any number of rows: steps below 1 are shares of the run."""

    num_train_epochs: float = 3
    learning_rate: float = 5e-5
    lr_scheduler_type: SchedulerType | str = "cosine"
    warmup_steps: float = 0.03
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 4
    eval_steps: float | None = 0.1
    save_steps: float = 0.1
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = True
