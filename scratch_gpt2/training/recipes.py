"""How each kind of training is run unless the user says otherwise."""

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


# Steps below 1 are shares of the run: the same ten evaluations for a thousand rows and for Alpaca's 52,000.
SFT_RECIPE = TRAINER_DEFAULTS | {
    "num_train_epochs": 3,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "eval_steps": 0.1,
    "save_steps": 0.1,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "label_names": ["labels"],
}


# A packed row of 1,024 tokens holds about nine of Alpaca's conversations, so this step has as many as the one above.
PACKED_BATCH = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2}


# Adapters start at zero and are few: they bear, and need, larger steps (Biderman et al. 2024, arXiv:2405.09673).
LORA_LEARNING_RATE = 3e-4
