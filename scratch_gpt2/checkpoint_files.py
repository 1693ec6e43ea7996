"""Checkpoints before they are loaded: their format, the revision on the Hub, and refusing hostile or damaged files."""

import json
import os
import pickle
from contextlib import contextmanager

from huggingface_hub import ResolvedRevision
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.hub import cached_file, get_checkpoint_shard_files, resolve_revision

from .configuration_scratch_gpt2 import ScratchGPT2Config

# What is copied beside the weights, so that a process without this package can load a checkpoint.
TRAVELLING_FILES = (
    "checkpoint_files.py",
    "configuration_scratch_gpt2.py",
    "heads_scratch_gpt2.py",
    "linear_cross_entropy.py",
    "modeling_scratch_gpt2.py",
)
# So many may be missing from a checkpoint, and are then made anew: what a small model lacks costs little.
FEW_WEIGHTS = 10_000_000
LOOKUP_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def pin_revision(name_or_path, hub_kwargs: dict) -> dict:
    """`hub_kwargs` with the exact commit, so that all files of one load are of one state; or, where the Hub does not
    answer at once, with `local_files_only`, because huggingface_hub would try again for most of a minute."""
    if name_or_path is None or os.path.exists(name_or_path):
        return hub_kwargs
    about_hub = {name: hub_kwargs[name] for name in ("token", "local_files_only", "cache_dir") if name in hub_kwargs}
    revision = resolve_revision(name_or_path, hub_kwargs.get("revision"), **about_hub)
    if isinstance(revision, ResolvedRevision):
        return {**hub_kwargs, "revision": revision}
    return {**hub_kwargs, "local_files_only": True}


def is_foreign_checkpoint(name_or_path, hub_kwargs: dict) -> bool:
    """Whether `name_or_path` is a GPT-2 checkpoint in somebody else's format. `hub_kwargs` come from `pin_revision`.

    Raises FileNotFoundError for what is neither here nor on the Hub.
    """
    if name_or_path is None or hub_kwargs.get("state_dict") is not None:
        return False
    path = os.fspath(name_or_path)
    if path.endswith(".pt") or any(os.path.isfile(os.path.join(path, name)) for name in ("hparams.json", "ckpt.pt")):
        return True
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, **hub_kwargs)
    except OSError as error:
        if os.path.exists(path) or not hub_kwargs.get("local_files_only"):
            return False  # an adapter, or nothing: the library knows what to do or say
        raise FileNotFoundError(
            f"{path!r} is no folder here, not in the local cache, and could not be had from the Hugging Face Hub (no "
            "network, no such repository, or no access); give the folder of a checkpoint instead."
        ) from error
    return config.get("model_type") == "gpt2"


@contextmanager
def reading_checkpoint(name_or_path, hub_kwargs: dict):
    """Refuse a checkpoint that would run code or fill the memory, and say in one sentence which one is damaged, where
    the libraries speak of headers and pickles. `hub_kwargs` come from `pin_revision`."""
    if name_or_path is not None and hub_kwargs.get("state_dict") is None:
        check_checkpoint(os.fspath(name_or_path), hub_kwargs)
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"The checkpoint {name_or_path} is damaged ({reason}); copy or download it again.") from error


def check_checkpoint(name: str, hub_kwargs: dict) -> None:
    """Raise ValueError where the weights are a pickle, lie outside the checkpoint, or are far fewer than announced."""
    lookup = {key: hub_kwargs[key] for key in LOOKUP_ARGUMENTS if key in hub_kwargs}
    suffix = f"{hub_kwargs['variant']}.safetensors" if hub_kwargs.get("variant") else "safetensors"
    files = []
    if hub_kwargs.get("use_safetensors") is not False:
        if file := find_file(name, f"model.{suffix}", lookup):
            files = [file]
        elif index := find_file(name, f"model.{suffix}.index.json", lookup):
            check_index(index)
            files, _ = get_checkpoint_shard_files(name, index, **lookup)
    for pickled in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if not files and find_file(name, pickled, lookup):
            raise ValueError(
                f"{name} has no model.safetensors, only a pickle, which could run code; ask for the former."
            )
    if files and (config := find_file(name, "config.json", lookup)):
        with open(config, encoding="utf-8") as opened:
            check_size(json.load(opened), files, name)


def find_file(name: str, file: str, lookup: dict) -> str | None:
    optional = dict.fromkeys(("missing_entries", "gated_repo", "connection_errors"), False)
    return cached_file(name, file, **{f"_raise_exceptions_for_{what}": no for what, no in optional.items()}, **lookup)


def check_index(index: str) -> None:
    """Raise ValueError for an index of weights that names other files than those beside it."""
    try:
        with open(index, encoding="utf-8") as opened:
            names = set(json.load(opened)["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read ({error}): it is damaged or incomplete; copy it again.") from error
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or "\\" in name or ".." in name:
            raise ValueError(f"{index} names {name!r} as a part of the weights, which is no file beside it.")


def check_size(fields: dict, files: list[str], origin: str) -> None:
    """Raise ValueError where config.json's `fields` describe more weights than `files` have room for, at half a byte
    each: the library would allocate them all before it found them missing. Few weights may be missing."""
    try:
        config = ScratchGPT2Config.from_dict(fields)
    except (StrictDataclassError, ValueError, TypeError):
        return  # the library will say so
    parameters = config.matrix_parameters + (config.vocab_size + config.n_positions) * config.n_embd
    stored = sum(map(os.path.getsize, files))
    if parameters > max(2 * stored, FEW_WEIGHTS):
        raise ValueError(
            f"The configuration of {origin} describes {parameters:,} weights, but its files have {stored:,} bytes: "
            "one of them is damaged or of another model, so copy both again."
        )
