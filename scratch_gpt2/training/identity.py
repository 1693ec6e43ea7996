"""What makes a resumed run the same run: kept beside its checkpoints, and compared when it continues."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..files import read_json, write_json

IDENTITY_FILE = "identity.json"
# The optimizer's state, the order of the data and the random numbers depend on these.
FIXED = ("seed", "data_seed", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "train_sampling_strategy")
# These take effect from the checkpoint on.
CHANGEABLE: tuple[str, ...] = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
)
CHANGEABLE += ("max_grad_norm", "label_smoothing_factor", "bf16", "fp16", "per_device_train_batch_size")
CHANGEABLE += ("logging_steps", "eval_steps", "save_steps")


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that stand for a value of JSON, such as the rows of a data set."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def same_path(name: str | None) -> str | None:
    """A folder or file by its one absolute path, a Hub id as it is."""
    return name if name is None or not os.path.exists(name) else os.path.realpath(name)


def check_identity(args: TrainingArguments, checkpoint: str | None, **own: Any) -> list[str]:
    """Compare a resumed run with what its folder says of it; return the changes that take effect, one line each.

    Writes identity.json into `args.output_dir`, from process 0. Folders of before this file existed are not compared.

    Args:
        checkpoint: where the run continues; `None` for a new run.
        own: what else must be the same, such as a `fingerprint` of the data: values of JSON.

    Raises ValueError if something differs that must be the same, and names the stored value.
    """
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    fixed = {name: plain(getattr(args, name)) for name in FIXED} | {"rows_per_step": rows} | own
    changeable = {name: plain(getattr(args, name)) for name in CHANGEABLE} | {"processes": args.world_size}
    changes = []
    file = None if checkpoint is None else Path(checkpoint).parent / IDENTITY_FILE
    if file is not None and file.is_file():
        stored = read_json(file)
        if not all(isinstance(stored.get(part), dict) for part in ("fixed", "changeable")):
            raise ValueError(f"{file} is damaged (it lacks the settings of the run); copy it again, or delete it.")
        for name, value in fixed.items():
            before = stored["fixed"].get(name)
            # A run of an earlier version began before `muon_momentum` was an option.
            if before == json.loads(json.dumps(value)) or (name == "muon_momentum" and name not in stored["fixed"]):
                continue
            if name == "data":  # a fingerprint
                raise ValueError(
                    f"The data differs from what the run in {file.parent} began with; resume with the same files and "
                    "options of the data, or choose another output_dir."
                )
            raise ValueError(
                f"{name} is {value}, but the run in {file.parent} began with {before}; resume with that value, or "
                "choose another output_dir."
            )
        before = stored["changeable"]
        changes = [
            f"{n}: {value} from here on, {before.get(n)} before"
            for n, value in changeable.items()
            if value != before.get(n, value)
        ]
    if args.process_index == 0:
        Path(str(args.output_dir)).mkdir(parents=True, exist_ok=True)
        write_json(Path(str(args.output_dir), IDENTITY_FILE), {"fixed": fixed, "changeable": changeable})
    return changes


def plain(value: Any) -> Any:
    return getattr(value, "value", value)  # of an enum
