"""The record of a training run, run.json, from which the model card is written."""

import dataclasses
import glob
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from transformers import TrainingArguments

from .. import __version__
from ..files import write_json

RUN_FILE = "run.json"
OTHER_PACKAGES = ("accelerate", "tokenizers", "datasets", "peft", "trl")  # recorded where they are used
START = time.monotonic()  # a script imports this file before its work begins
# What may be published of transformers' TrainingArguments: what decides the result of a run. The rest names folders,
# accounts and tokens, or describes the machine.
PUBLIC_TRAINING_ARGUMENTS = {
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy", "seed", "data_seed"),
    *("bf16", "fp16", "tf32", "torch_compile", "use_liger_kernel", "full_determinism", "use_cpu"),
    *("eval_strategy", "eval_steps", "per_device_eval_batch_size", "load_best_model_at_end", "metric_for_best_model"),
}


def record_run(
    output_dir: str | os.PathLike,
    *,
    arguments: Iterable,
    base: str | None,
    data: Iterable[str],
    metrics: dict[str, float],
    samples: Iterable[tuple[str, str]] = (),
    split: str = "validation",
    loss_per: str | None = None,
) -> None:
    """Write run.json, which `model_card` reads.

    Args:
        arguments: the dataclasses that the script was called with, from which `public_options` are kept.
        base: folder or Hub id of the checkpoint that training started from; None for random initial weights.
        data: files, folders or Hub ids of the training data. Only the name of a local file or folder is kept.
        metrics: by their names on the Hub, such as `loss`, `perplexity`, `accuracy`, measured on `split` of the data.
        samples: pairs of a prompt and the model's output.
        loss_per: the unit of `loss`, such as `token of the answers`.
    """
    run = {
        "base": None if base is None else public_name(base),
        "data": [public_name(name) for name in data],
        "split": split,
        "loss_per": loss_per,
        "arguments": public_options(arguments),
        "metrics": {name: float(value) for name, value in metrics.items() if math.isfinite(value)},
        "samples": [list(sample) for sample in samples],
        "hardware": describe_hardware(),
        "command": public_command(sys.argv),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - START, 1),
        "versions": {
            "scratch_gpt2": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            **{name: version(name) for name in OTHER_PACKAGES if name in sys.modules},
            "python": platform.python_version(),
        },
    }
    write_json(Path(output_dir, RUN_FILE), run)


def public_options(groups: Iterable) -> dict:
    """The options that differ from their defaults and may be published.

    Those are the fields marked with `"public": True` in their metadata, and `PUBLIC_TRAINING_ARGUMENTS` that differ
    from the library's defaults, whatever a recipe's are. Only the last part of a path is kept.
    """
    options = {}
    for group in groups:
        of_library = dataclasses.fields(TrainingArguments) if isinstance(group, TrainingArguments) else ()
        library = {entry.name: entry for entry in of_library}
        for entry in dataclasses.fields(group):
            value = getattr(group, entry.name)
            value = getattr(value, "value", value)  # of an enum
            is_public = entry.metadata.get("public") or (
                entry.name in library and entry.name in PUBLIC_TRAINING_ARGUMENTS
            )
            if is_public and (value or None) != (default_of(library.get(entry.name, entry)) or None):
                options[entry.name] = without_folder(value)
    return options


def public_command(arguments: list[str]) -> str:
    """A command line as one types it, without the folders of paths and without tokens."""
    words, hidden = [], False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        is_token = option.replace("-", "_").strip("_") in ("hub_token", "push_to_hub_token")
        if hidden or (is_token and equals):
            words.append("..." if hidden else f"{option}=...")
        elif equals and option.startswith("--"):
            words.append(f"{option}={without_folder(value)}")
        else:
            words.append(without_folder(argument))
        hidden = is_token and not equals
    return shlex.join(words)


def without_folder(value):
    if isinstance(value, list):
        return [without_folder(part) for part in value]
    if not isinstance(value, str):
        return value
    expanded = os.path.expanduser(value)
    return Path(value).name if os.path.isabs(expanded) or glob.glob(expanded) else value


def default_of(entry: dataclasses.Field):
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return getattr(entry.default, "value", entry.default)


def public_name(name: str) -> dict:
    """A Hub id unchanged, and the last part of a local path."""
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not os.path.exists(name)
    return {"name": name if on_hub else Path(name).name, "on_hub": on_hub}


def describe_hardware() -> str:
    """What the processes of this run compute on: with `--use_cpu`, the CPU even if there is a GPU."""
    state, threads = PartialState(), torch.get_num_threads()
    if state.device.type == "cuda":
        return f"{state.num_processes} x {torch.cuda.get_device_name()}"
    processor = f"{platform.machine()} processor with {os.cpu_count()} cores"
    return f"{state.device.type}, {processor}, {state.num_processes} process(es) of {threads} thread(s)"
