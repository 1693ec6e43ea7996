"""Refuses, in one sentence and before the work starts, what would fail, mislead or destroy something after it."""

import importlib.util
import os
import re
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations

from .checkpoints import checkpoint_to_resume
from .recipes import RecipeArguments

# A folder with one of these contains a finished run.
FINISHED = ("model.safetensors", "model.safetensors.index.json", "adapter_config.json", "config.json", "run.json")
# What a training script writes into its output folder.
RESULTS = (
    *FINISHED,
    "model-*.safetensors",
    "adapter_model.safetensors",
    "generation_config.json",
    "adapter",
    "checkpoint-*",
    "identity.json",
    "judged_*.jsonl",
    "log.jsonl",
    "loss.json",
    "metrics.json",
    "preferences.json",
    "samples",
    "test.json",
    "*.png",
)


def check_training_arguments(args: TrainingArguments, metrics: Iterable[str], predictions: bool = False) -> None:
    """Raise ValueError for arguments of Trainer that a training script cannot honor.

    Args:
        metrics: names that `metric_for_best_model` may have, without `eval_`.
        predictions: whether the metrics are computed from predictions, which `prediction_loss_only` would leave out.
    """
    unsupported = {
        "bf16_full_eval": "would convert the trained weights to bfloat16; --bf16 evaluates by autocast",
        "fp16_full_eval": "would convert the trained weights to float16; --fp16 evaluates by autocast",
        "batch_eval_metrics": "computes metrics per batch, but here they are computed over all rows",
        "include_for_metrics": "has no effect on the metrics here",
    }
    if predictions:
        unsupported["prediction_loss_only"] = "leaves no predictions to compute the metrics from"
    for name, reason in unsupported.items():
        if getattr(args, name):
            raise ValueError(f"--{name} {reason}; leave it out.")
    if not args.eval_do_concat_batches:
        raise ValueError(
            "--eval_do_concat_batches False does not concatenate the batches, which the metrics need; leave it out."
        )
    if args.torch_compile_mode is not None:
        from torch._inductor import list_mode_options  # takes seconds

        if args.torch_compile_mode not in (modes := list_mode_options()):
            raise ValueError(f"--torch_compile_mode is {args.torch_compile_mode!r}; choose one of {', '.join(modes)}.")
    missing = set(args.report_to) - {"none", *get_available_reporting_integrations()}
    if missing:
        raise ValueError(f"--report_to {min(missing)} needs a package that is not installed; install or leave it out.")
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if best not in metrics:
        raise ValueError(f"metric_for_best_model is {best!r}; choose one of {', '.join(sorted(metrics))}.")
    check_schedule(args)


def check_schedule(args: TrainingArguments) -> None:
    """Raise ValueError for a learning rate schedule that lacks an argument, or has one that it does not know."""
    options = args.lr_scheduler_kwargs or {}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 1, scheduler_specific_kwargs=dict(options))
    except (TypeError, ValueError) as error:
        reason = re.sub(r"^\w+\(\) ", "", str(error))
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise ValueError(
            f"lr_scheduler_type {name} cannot be used with lr_scheduler_kwargs {options}: {reason}."
        ) from error


def check_row_count(args: TrainingArguments, rows: int) -> None:
    """Raise ValueError if `dataloader_drop_last` drops all training rows."""
    rows_per_pass = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < rows_per_pass:
        raise ValueError(
            f"--dataloader_drop_last drops all {rows} training rows, because a batch has {rows_per_pass}; leave it "
            "out, or choose a smaller per_device_train_batch_size."
        )


def check_installed(*packages: str, needed_for: str) -> None:
    """Raise ImportError for the first of `packages`, by the names they are imported by, that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            name = {"sklearn": "scikit-learn"}.get(package, package)
            raise ImportError(f"{needed_for} needs {name}: pip install {name}, or scratch_gpt2[train].")


def check_output_dir(
    output_dir: str, *, inputs: Iterable[str | None], resume: bool = False, overwrite: bool = False
) -> None:
    """Raise an error if training into `output_dir` would destroy something.

    Args:
        inputs: folders, files and Hub ids that the run reads. None of them may be replaced, even with `overwrite`.
        resume: the run continues what is in the folder.
        overwrite: the folder may hold a finished run, whose files `remove_results` will remove.

    Raises ValueError if an input would be replaced, FileExistsError if the folder contains a finished run.
    """
    folder = Path(output_dir)
    found = [path for pattern in RESULTS for path in folder.glob(pattern)]
    for name in inputs:
        if name is None or not os.path.exists(name):
            continue
        source = Path(name).resolve()
        if source == folder.resolve() or any(source.is_relative_to(path.resolve()) for path in found):
            raise ValueError(f"{name} is an input of this run and would be overwritten; choose another output_dir.")
    if overwrite or resume:
        return
    for name in FINISHED:
        if (folder / name).is_file():
            raise FileExistsError(
                f"{output_dir} contains a finished run ({name}); choose another output_dir, or add "
                "--overwrite_output_dir to replace it."
            )


def open_output_dir(args: RecipeArguments, *, resume: bool, inputs: Iterable[str | None]) -> tuple[str | None, bool]:
    """Check `args.output_dir` with `check_output_dir`; return the checkpoint that the run continues from, if any, and
    whether `remove_results` is to remove an earlier run. `resume` takes precedence over `overwrite_output_dir`."""
    path, folder = args.resume_from_checkpoint, str(args.output_dir)
    resume = resume or path is not None
    check_output_dir(folder, inputs=inputs, resume=resume, overwrite=args.overwrite_output_dir)
    overwrite = args.overwrite_output_dir and not resume
    return None if overwrite else checkpoint_to_resume(folder, resume=resume, path=path), overwrite


def remove_results(output_dir: str, overwrite: bool) -> None:
    """With `overwrite`, remove what an earlier run has left in `output_dir`; files of other names stay."""
    for pattern in RESULTS if overwrite else ():
        for path in Path(output_dir).glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_fits_checkpoint(model: nn.Module, checkpoint: str, advice: str) -> None:
    """Raise ValueError unless the weights and the optimizer of `checkpoint` are those of what `model` trains.

    Trainer loads the weights that fit and says nothing about the rest, and PyTorch's fused Adam reads beyond the end
    of states of another shape.

    Args:
        model: what Trainer is given: a model, one with adapters, or `TrainedTop`.
        advice: which options have to be those that the run began with.
    """
    adapter = hasattr(model, "peft_config")
    file = Path(checkpoint, "adapter_model.safetensors" if adapter else "model.safetensors")
    other = Path(checkpoint, "model.safetensors" if adapter else "adapter_model.safetensors")
    message = f"{checkpoint} was trained with other settings ({{}}); resume with the same {advice}."
    if other.is_file() and not file.is_file():
        raise ValueError(message.format("adapters" if other.name.startswith("adapter") else "no adapters"))
    if file.is_file():
        with safe_open(file, framework="pt") as saved:
            names = saved.keys()
            shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in names}
        expected = {name: tuple(tensor.shape) for name, tensor in state_to_save(model, adapter).items()}
        for name, shape in shapes.items():
            if expected.get(name) != shape:
                raise ValueError(message.format(f"it holds {name} of shape {list(shape)}"))
    trained = sorted(tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad)
    states = Path(checkpoint, "optimizer.pt")
    if states.is_file() and zipfile.is_zipfile(states):
        optimizer = torch.load(states, map_location="cpu", weights_only=True, mmap=True)
        count = sum(len(group["params"]) for group in optimizer["param_groups"])
        shapes_of_moments = [state["exp_avg"].shape for state in optimizer["state"].values() if "exp_avg" in state]
        if count != len(trained):
            raise ValueError(message.format(f"its optimizer has {count} tensors, not {len(trained)}"))
        if shapes_of_moments and sorted(map(tuple, shapes_of_moments)) != trained:
            raise ValueError(message.format("the states of its optimizer have other shapes"))


def state_to_save(model: nn.Module, adapter: bool) -> dict[str, torch.Tensor]:
    if not adapter:
        return model.state_dict()
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)
