"""Every argument of transformers' TrainingArguments works in the training scripts, or is refused in one sentence
before the training. A new argument of a later transformers fails the first test until it is sorted into a group."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import test_classify
import test_sft
import torch
from transformers import TrainingArguments

from scratch_gpt2.training.recipes import ClassificationArguments, InstructionArguments, PretrainingArguments

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# Arguments that work; each group is one run.
ACCEPTED = [
    {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 1,
        "label_smoothing_factor": 0.1,
        "optim": "adafactor",
        "weight_decay": 0,
        "max_grad_norm": 0,
        "average_tokens_across_devices": False,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": True,
        "log_level": "error",
        "log_level_replica": "error",
        "log_on_each_node": False,
        "include_num_input_tokens_seen": True,
        "torch_empty_cache_steps": 1,
        "eval_on_start": True,
        "eval_delay": 1,
        "eval_accumulation_steps": 1,
        "eval_use_gather_object": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "save_total_limit": 1,
        "save_on_each_node": True,
        "ignore_data_skip": True,
        "restore_callback_states_from_checkpoint": False,
        "data_seed": 3,
        "seed": 4,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": True,
        "dataloader_in_order": False,
        "remove_unused_columns": False,
        "label_names": "labels",
        "train_sampling_strategy": "group_by_length",
        "length_column_name": "length",
        "ddp_find_unused_parameters": True,
        "ddp_bucket_cap_mb": 20,
        "ddp_broadcast_buffers": True,
        "ddp_static_graph": False,
        "ddp_timeout": 100,
        "run_name": "run",
        "project": "project",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cache": False,
        "hub_strategy": "end",
        "hub_always_push": True,
    },
    {
        "max_steps": 2,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}',
        "optim_args": "amsgrad=True",
        "optim": "adamw_torch",
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-7,
        "auto_find_batch_size": True,
        "eval_strategy": "no",
        "eval_steps": 1,
        "save_strategy": "no",
        "save_steps": 1,
        "save_only_model": True,
        "load_best_model_at_end": False,
        "full_determinism": True,
        "dataloader_num_workers": 1,
        "dataloader_prefetch_factor": 1,
        "dataloader_persistent_workers": True,
        "dataloader_multiprocessing_context": "fork",
        "enable_jit_checkpoint": True,
        "skip_memory_metrics": False,
        "use_cpu": True,
    },
]
# Arguments that only work without the trunk cache of classify.py, one run of the whole model.
WITHOUT_CACHE = {
    "max_steps": 2,
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": '{"use_reentrant": false}',
    "neftune_noise_alpha": 5,
}
# Arguments that are refused, with their sentences.
REFUSED = [
    (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": "{}"},
        r"lr_scheduler_type cosine_with_min_lr",
    ),
    ({"lr_scheduler_type": "warmup_stable_decay"}, r"cannot be used with .*missing .* 'num_decay_steps'"),
    ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'}, r"unexpected .* 'min_lr_rate'"),
    (
        {"lr_scheduler_type": "polynomial", "max_steps": 1, "warmup_steps": 1},
        r"polynomial needs more steps than the 1 of its warm-up, but the run has 1",
    ),
    ({"torch_compile_mode": "fast"}, r"--torch_compile_mode is 'fast'; choose one of default, "),
    ({"accelerator_config": '{"split": true}'}, r"The training arguments cannot be used: .*'split'"),
    ({"bf16_full_eval": True}, r"--bf16_full_eval would convert the trained weights to bfloat16"),
    ({"fp16_full_eval": True}, r"--fp16_full_eval would convert the trained weights to float16"),
    ({"eval_do_concat_batches": False}, r"--eval_do_concat_batches False does not concatenate the batches"),
    ({"include_for_metrics": "inputs"}, r"--include_for_metrics has no effect"),
    ({"include_for_metrics": "loss"}, r"--include_for_metrics has no effect"),
    ({"batch_eval_metrics": True}, r"batch_eval_metrics"),
    ({"metric_for_best_model": "unknown"}, r"metric_for_best_model is 'unknown'; choose one of .*loss"),
    ({"report_to": "wandb"}, r"--report_to wandb needs a package that is not installed"),
    ({"report_to": "nothing"}, r"--report_to nothing"),
    ({"label_smoothing_factor": 2}, r"label_smoothing_factor is 2"),
    ({"per_device_train_batch_size": 0}, r"per_device_train_batch_size is 0 but must be at least 1"),
    ({"per_device_eval_batch_size": 0}, r"per_device_eval_batch_size is 0 but must be at least 1"),
    ({"gradient_accumulation_steps": 0}, r"gradient_accumulation_steps is 0 but must be at least 1"),
    ({"num_train_epochs": 0}, r"num_train_epochs is 0"),
    ({"num_train_epochs": -1}, r"num_train_epochs is -1"),
    ({"learning_rate": -1}, r"learning_rate is -1"),
    ({"learning_rate": "nan"}, r"learning_rate is nan"),
    ({"dataloader_prefetch_factor": 2}, r"dataloader_num_workers > 0"),
    *([] if torch.cuda.is_available() else [({"tf32": True}, r"tf32")]),
]
NO_EVALUATION = ({"eval_strategy": "no"}, r"requires the save and eval strategy to match")
TOO_FEW_ROWS = {"dataloader_drop_last": True, "per_device_train_batch_size": 99}
REFUSED_BY = {
    "classify": [
        NO_EVALUATION,
        (TOO_FEW_ROWS, r"drops all \d+ training rows"),
        ({"prediction_loss_only": True}, r"--prediction_loss_only leaves no predictions"),
        ({"activation_checkpointing": True}, r"--activation_checkpointing needs the blocks .*--no_cache_trunk"),
        ({"gradient_checkpointing": True}, r"--activation_checkpointing needs the blocks .*--no_cache_trunk"),
        ({"neftune_noise_alpha": 5}, r"--neftune_noise_alpha needs the blocks .*--no_cache_trunk"),
    ],
    "sft": [
        NO_EVALUATION,
        (TOO_FEW_ROWS, r"drops all \d+ training rows"),
        ({"metric_for_best_model": "accuracy"}, r"metric_for_best_model is 'accuracy'; choose one of loss"),
    ],
    "pretrain": [
        (TOO_FEW_ROWS, r"tokens_per_step is 96, which is not a multiple of the 1584 tokens of one pass"),
        ({"gradient_accumulation_steps": 3}, r"gradient_accumulation_steps"),
    ],
}
# A small model and steps of 6 rows, which is what the batches of the first group add up to.
PRETRAINING = {"vocab_size": 300, "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 16, "eval_tokens": 64}
PRETRAINING |= {"tokens_per_step": 96, "per_device_train_batch_size": 6, "sample_steps": 0}
# Needs a GPU, another package, the network or several processes; tested elsewhere or not ours.
NOT_TRIED = {"bf16", "fp16", "torch_compile", "torch_compile_backend", "use_liger_kernel"}
NOT_TRIED |= {"liger_kernel_config", "optim_target_modules", "parallelism_config", "ddp_backend"}
NOT_TRIED |= {"fsdp", "fsdp_config", "deepspeed", "debug", "local_rank", "push_to_hub", "hub_token", "hub_model_id"}
NOT_TRIED |= {"hub_private_repo", "hub_revision", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"}
NOT_TRIED |= {
    "do_train",
    "do_eval",
    "do_predict",
    "resume_from_checkpoint",
    "output_dir",
    "gradient_checkpointing_kwargs",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The options that each script cannot do without."""
    folder = tmp_path_factory.mktemp("arguments")
    test_classify.make_inputs(folder)
    test_sft.make_files(folder / "sft")
    rows = {"validation": 0.2, "test": 0.2, "samples": 0, "eval_steps": 2, "save_steps": 2}
    text = folder / "text.txt"
    text.write_text("One fine day, a dog ran home. " * 40)
    return {
        "classify": {"data": folder / "data", "model": folder / "base"},
        "sft": {"data": folder / "sft" / "rows.json", "model": folder / "sft" / "base"} | rows,
        "pretrain": PRETRAINING | {"data": text},
    }


def run(script, base, options, output_dir):
    specification = importlib.util.spec_from_file_location(script, EXAMPLES / f"{script}.py")
    module = importlib.util.module_from_spec(specification)
    options = base | {"use_cpu": True, "disable_tqdm": True, "output_dir": output_dir} | options
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, script, module)  # dataclasses look their module up by its name
        specification.loader.exec_module(module)
        patch.setattr(sys, "argv", [f"{script}.py", *words])
        module.main()


def test_every_argument_is_in_a_group():
    refused = [options for group in (REFUSED, *REFUSED_BY.values()) for options, _ in group]
    known = {name for options in (*ACCEPTED, WITHOUT_CACHE, *refused) for name in options} | NOT_TRIED
    assert {field.name for field in dataclasses.fields(TrainingArguments)} == known
    for recipe in (ClassificationArguments, InstructionArguments, PretrainingArguments):
        own = {field.name for field in dataclasses.fields(recipe)} - known
        muon = {"muon_momentum"} if recipe is PretrainingArguments else set()  # tested in test_optimizers.py
        assert own == {"overwrite_output_dir", "eval_only"} | muon


@pytest.mark.parametrize("group", range(len(ACCEPTED)))
@pytest.mark.parametrize("script", ["classify", "sft", "pretrain"])
def test_arguments_that_work(script, group, bases, tmp_path):
    run(script, bases[script], ACCEPTED[group], tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert 0 < record["metrics"]["loss"] < 20


@pytest.mark.parametrize(
    ("script", "own"), [("classify", {"train": "all", "cache_trunk": False}), ("sft", {}), ("pretrain", {})]
)
def test_arguments_for_the_whole_model(script, own, bases, tmp_path):
    run(script, bases[script], WITHOUT_CACHE | own, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("script", ["classify", "sft", "pretrain"])
def test_arguments_that_are_refused(script, bases, tmp_path):
    for options, message in REFUSED + REFUSED_BY[script]:
        with pytest.raises((ValueError, ImportError), match=message):
            steps = {"max_steps": 2} if script == "pretrain" and "num_train_epochs" not in options else {}
            run(script, bases[script], steps | options, tmp_path / "out")
        assert not list(tmp_path.glob("out/checkpoint-*")) and not (tmp_path / "out" / "log.jsonl").exists()
