"""The record of a training run, run.json, from which the model card is written."""

import dataclasses
import json
import math
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from accelerate import PartialState

import scratch_gpt2 as package

from ..files import write_atomically

RUN_FILE = "run.json"
# Fields of a run's arguments that say nothing about the model, or say something about the machine or its user.
UNTOLD = (
    r"_|dataloader_|ddp_|do_|explain|hub_|label_names|local_rank|log_|logging_|project|push_to|report_to|resume|"
    r"restore_|run_name|save_|show|trackio|trunk_cache|use_cache|.*(dir|_config|deepspeed|tqdm|_token)$"
)


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
    """Write run.json, from which `model_card` tells how the model in `output_dir` was made.

    Args:
        arguments: the dataclasses that the script was called with; what differs from their defaults is kept, but for
            tokens and folders.
        base: folder or Hub id of the checkpoint that training began with; None for fresh weights.
        data: files, folders or Hub ids of the training data. Of what lies on this machine only the name is kept.
        metrics: by the Hub's names, such as `loss`, `perplexity`, `accuracy`, measured on `split` of the data.
        samples: pairs of a prompt and what the model made of it.
        loss_per: what `loss` is the mean over, such as `token of the answers`.
    """
    changed = {}
    for group in arguments:
        # A recipe's own defaults are part of how the model was made.
        is_training = isinstance(group, transformers.TrainingArguments)
        for entry in dataclasses.fields(transformers.TrainingArguments if is_training else group):
            value = getattr(group, entry.name)
            value = getattr(value, "value", value)  # of an enum
            plain = isinstance(value, (bool, int, float, str, list, dict))
            if plain and (value or None) != (default_of(entry) or None) and not re.match(UNTOLD, entry.name):
                changed[entry.name] = value
    for name in ("model", "data", "tokenizer", "text", "hellaswag"):
        if name in changed:
            value = changed[name]
            several = isinstance(value, list)
            changed[name] = [public_name(one)["name"] for one in value] if several else public_name(value)["name"]
    run = {
        "base": None if base is None else public_name(base),
        "data": [public_name(name) for name in data],
        "split": split,
        "loss_per": loss_per,
        "arguments": changed,
        "metrics": {name: float(value) for name, value in metrics.items() if math.isfinite(value)},
        "samples": [list(sample) for sample in samples],
        "hardware": describe_hardware(),
        "versions": {
            "scratch_gpt2": package.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    content = json.dumps(run, indent=1, ensure_ascii=False, default=str).encode() + b"\n"
    write_atomically(Path(output_dir, RUN_FILE), lambda file: file.write(content))


def default_of(entry: dataclasses.Field):
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return getattr(entry.default, "value", entry.default)


def public_name(name: str) -> dict:
    """A Hub id as it is, and of a path on this machine only its last part."""
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not os.path.exists(name)
    return {"name": name if on_hub else Path(name).name, "on_hub": on_hub}


def describe_hardware() -> str:
    """What this process and those beside it compute on: a GPU that `--use_cpu` leaves idle is not told of."""
    state, threads = PartialState(), torch.get_num_threads()
    if state.device.type == "cuda":
        return f"{state.num_processes} x {torch.cuda.get_device_name()}"
    processor = f"{platform.machine()} processor with {os.cpu_count()} cores"
    return f"{state.device.type}, {processor}, {state.num_processes} process(es) of {threads} thread(s)"
