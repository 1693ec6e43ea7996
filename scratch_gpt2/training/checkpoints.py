"""Which of Trainer's checkpoints can be continued: a process may be killed while it writes one."""

import logging
import os
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..files import read_json

logger = logging.getLogger(__name__)

FINISHED = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def newest_intact_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The complete checkpoint-N folder with the highest N; broken ones are skipped with a warning.

    `None` if there is no such folder.
    """
    for checkpoint in sorted(list_checkpoints(output_dir), key=step_of, reverse=True):
        fault = find_fault(checkpoint)
        if fault is None:
            return str(checkpoint)
        logger.warning(f"Skipping the broken checkpoint {checkpoint}: {fault}.")
    return None


def checkpoint_to_resume(output_dir: str, resume: bool, path: str | None = None) -> str | None:
    """The checkpoint that a run continues from, `path` or with `resume` the newest complete one; `None` for a new run.

    With `resume`, a folder without any checkpoint begins a new run: an earlier one was stopped before its first.

    Raises ValueError if `path` or all checkpoints are broken, if `output_dir` holds checkpoints and neither `resume`
    nor `path` is given, and if `resume` would begin a new run over a finished model.
    """
    checkpoints = list_checkpoints(output_dir)
    if path is not None and path.lower() not in ("true", "1"):
        fault = find_fault(Path(path)) if Path(path).is_dir() else "there is no such folder"
        if fault is not None:
            raise ValueError(f"--resume_from_checkpoint {path} cannot be continued: {fault}.")
        return path
    if not resume and path is None:
        if checkpoints:
            raise ValueError(
                f"{output_dir} contains checkpoints of an earlier run; add --resume to continue it, or choose another "
                "output_dir."
            )
        return None
    newest = newest_intact_checkpoint(output_dir)
    if newest is None and checkpoints:
        last = max(checkpoints, key=step_of)
        raise ValueError(
            f"No checkpoint in {output_dir} is complete, so none can be continued ({last.name}: {find_fault(last)}). "
            f"Choose another output_dir, or start from the model in {last.name} with --model."
        )
    if newest is None and any(Path(output_dir, name).is_file() for name in FINISHED):
        raise ValueError(
            f"{output_dir} contains a finished model but no checkpoint to continue from; choose another output_dir."
        )
    return newest


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The folders that Trainer has written into `output_dir`, complete or not."""
    return [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]


def find_fault(checkpoint: Path) -> str | None:
    """Why training cannot continue from a checkpoint; `None` if it can.

    Trainer (5.23) writes weights, optimizer, schedule and random state in this order, and `trainer_state.json` last,
    so an interrupted save lacks it. The other files are checked too, because disks fill up and copies break off: each
    must have the length that its own header or directory states. Random states of processes other than the first may
    be written after `trainer_state.json` and are not checked.
    """
    if not (checkpoint / "trainer_state.json").is_file():
        return "trainer_state.json, which is written last, is missing"
    try:
        state = read_json(checkpoint / "trainer_state.json")
    except ValueError:
        return "trainer_state.json is cut off"
    if state.get("global_step") != step_of(checkpoint):
        return f"trainer_state.json is of step {state.get('global_step')}"
    for name in ("config.json", "adapter_config.json"):
        try:
            if (checkpoint / name).is_file():
                read_json(checkpoint / name)
        except ValueError:
            return f"{name} is damaged"
    sharded = (checkpoint / "pytorch_model_fsdp_0" / ".metadata").is_file()
    weights = None if sharded else _fault_in_weights(checkpoint)
    return weights or _fault_in_training_state(checkpoint)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _fault_in_weights(checkpoint: Path) -> str | None:
    is_adapter = (checkpoint / "adapter_config.json").is_file()
    names = ["adapter_model.safetensors" if is_adapter else "model.safetensors"]
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (ValueError, LookupError, AttributeError):
            return f"{index.name} cannot be read"
    for name in names:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if not _is_whole_safetensors(checkpoint / name):
            return f"{name} is cut off"
    return None


def _is_whole_safetensors(path: Path) -> bool:
    """Opening a file compares its length with what its header announces."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def _fault_in_training_state(checkpoint: Path) -> str | None:
    """`torch.save` writes zip files, whose directory comes last. FSDP's optimizer is a .bin file or, sharded, a folder
    whose .metadata is written last."""
    for stem, name in (("optimizer", "optimizer.pt"), ("scheduler", "scheduler.pt"), ("rng_state", "rng_state.pth")):
        found = [path for path in checkpoint.glob(f"{stem}*") if path.is_file() or (path / ".metadata").is_file()]
        if not found:
            return f"{name} is missing"
    for path in checkpoint.iterdir():
        if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
    return None
