"""Checkpoints before and after they are loaded: their format, the revision on the Hub, damaged and hostile files."""

import functools
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterable
from contextlib import contextmanager

import torch
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.hub import cached_file, get_checkpoint_shard_files, is_offline_mode
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

from .configuration_scratch_gpt2 import ScratchGPT2Config

try:
    from huggingface_hub import ResolvedRevision
    from transformers.utils.hub import resolve_revision
except ImportError:  # older than the versions that the package needs, but not than those that a checkpoint needs
    resolve_revision = None

# What is saved with the weights, so that a process without this package can load a checkpoint.
TRAVELLING_FILES = (
    "checkpoint_files.py",
    "configuration_scratch_gpt2.py",
    "heads_scratch_gpt2.py",
    "linear_cross_entropy.py",
    "modeling_scratch_gpt2.py",
)
# In the order in which the library looks for them. A variant is named before the last dot: model.fp16.safetensors.
WEIGHT_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
# The library prefers these to all others, in a local folder.
DISTRIBUTED_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
# Configurations that describe at most this many weights are not compared with the size of the files.
MIN_CHECKED_WEIGHTS = 10_000_000
LOOKUP_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
HUB_TIMEOUT = 5  # seconds

READ_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    EOFError,
    RuntimeError,
    SafetensorError,
    zipfile.BadZipFile,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


# The Hub


def hub_answers() -> bool:
    """Whether the Hugging Face Hub can be reached: not in offline mode, nor if it does not answer within 5 seconds.

    The result is cached for the process, for each endpoint. Without this check, huggingface_hub retries for most of a
    minute.
    """
    return not is_offline_mode() and _endpoint_answers(constants.ENDPOINT)


@functools.cache
def _endpoint_answers(endpoint: str) -> bool:
    try:
        get_session().head(endpoint, timeout=HUB_TIMEOUT)
    except Exception:  # the types depend on huggingface_hub's HTTP library
        return False
    return True


def pin_revision(name_or_path, hub_kwargs: dict) -> dict:
    """`hub_kwargs` with the exact commit, so that all files of one load are of one state; or with `local_files_only`,
    where the Hub does not know the commit or does not answer.

    Raises FileNotFoundError for a path that does not exist, ValueError for a folder whose configuration is damaged.
    """
    if name_or_path is None:
        return hub_kwargs
    if os.path.exists(name_or_path):
        check_descriptions(os.path.join(name_or_path, hub_kwargs.get("subfolder") or ""))
        return hub_kwargs
    try:
        validate_repo_id(os.fspath(name_or_path))
    except HFValidationError as error:
        raise FileNotFoundError(f"{name_or_path} does not exist; give an existing folder or a Hub id.") from error
    if not hub_answers():
        hub_kwargs = {**hub_kwargs, "local_files_only": True}
    if resolve_revision is None:
        return hub_kwargs
    about_hub = {name: hub_kwargs[name] for name in ("token", "local_files_only", "cache_dir") if name in hub_kwargs}
    revision = resolve_revision(name_or_path, hub_kwargs.get("revision"), **about_hub)
    if isinstance(revision, ResolvedRevision):
        return {**hub_kwargs, "revision": revision}
    return {**hub_kwargs, "local_files_only": True}


# Which checkpoint it is


def is_foreign_checkpoint(name_or_path, hub_kwargs: dict) -> bool:
    """Whether `name_or_path`, or the state dict in `hub_kwargs`, is a GPT-2 checkpoint in somebody else's format. The
    names of the tensors decide, as many configurations lack a model type. `hub_kwargs` come from `pin_revision`.

    Raises FileNotFoundError for a name that is neither a local path nor on the Hub.
    """
    if hub_kwargs.get("state_dict") is not None:
        return has_gpt2_names(hub_kwargs["state_dict"])
    if name_or_path is None:
        return False
    path = os.fspath(name_or_path)
    if path.endswith(".pt") or any(os.path.isfile(os.path.join(path, name)) for name in ("hparams.json", "ckpt.pt")):
        return True
    if os.path.isfile(path):
        raise NotADirectoryError(f"{path} is a file; give the folder of a checkpoint.")
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, **hub_kwargs)
    except OSError as error:
        config = {}  # as in the folder of an adapter
        if not os.path.exists(path) and not hub_kwargs.get("local_files_only"):
            return False  # the library knows what to say
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"{path!r} is not a local folder, is not in the local cache and could not be downloaded from the Hub "
                "(no network, no such repository, or no access); give the folder of a checkpoint instead."
            ) from error
    if config.get("model_type") == "gpt2":
        return True
    files = find_weight_files(path, hub_kwargs, config)
    if config.get("model_type") == ScratchGPT2Config.model_type:
        files = [file for file in files if file.endswith(".safetensors")]
    return any(has_gpt2_names(stored_names(file)) for file in files)


def has_gpt2_names(names: Iterable[str]) -> bool:
    return any(re.search(r"(^|\.)h\.\d+\.attn\.c_attn\.weight$", name) for name in names)


def has_own_names(names: Iterable[str]) -> bool:
    return not {"embed_positions.weight", "model.embed_positions.weight"}.isdisjoint(names)


def stored_names(file: str) -> list[str]:
    """Names of the tensors in a file of weights; none where it is damaged, which loading it will say."""
    if not file.endswith(".safetensors"):
        return list(load_pickle(file))
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError):
        return []


def base_of_adapter(name_or_path, hub_kwargs: dict) -> str | None:
    """Name of the model that the adapter in `name_or_path` belongs to, which is `name_or_path` itself where the model
    is next to the adapter; `None` where there is no adapter."""
    if name_or_path is None or os.path.isfile(name_or_path) or not is_peft_available():
        return None
    lookup = {key: hub_kwargs[key] for key in LOOKUP_ARGUMENTS if key in hub_kwargs}
    options = lookup | (hub_kwargs.get("adapter_kwargs") or {})
    file = find_adapter_config_file(os.fspath(name_or_path), **options)
    if file is None:
        return None
    if os.path.isfile(os.path.join(name_or_path, "config.json")):
        return os.fspath(name_or_path)
    return base_in(read_json_object(file), file)


def base_in(adapter_config: dict, origin: str) -> str:
    base = adapter_config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(f"{origin} names no base_model_name_or_path; add the model that the adapter was trained on.")
    return base


# Files of weights


def find_weight_files(name: str, hub_kwargs: dict, config: dict) -> list[str]:
    """The files that the library will read the weights from, downloaded if needed; an empty list if there are none.

    Args:
        hub_kwargs: those of `from_pretrained`, with `variant` and `use_safetensors`.
        config: what config.json says; its `transformers_weights` names the file.

    Raises ValueError for an index that is damaged or names files elsewhere.
    """
    lookup = {key: hub_kwargs[key] for key in LOOKUP_ARGUMENTS if key in hub_kwargs}
    folder = os.path.join(name, lookup.get("subfolder") or "")
    if os.path.isdir(folder):
        shards = [os.path.join(folder, file) for file in os.listdir(folder) if DISTRIBUTED_SHARD.fullmatch(file)]
        if shards:
            return sorted(shards)
    variant, use_safetensors = hub_kwargs.get("variant"), hub_kwargs.get("use_safetensors")
    explicit = hub_kwargs.get("transformers_weights") or config.get("transformers_weights")
    for candidate in (explicit,) if explicit else WEIGHT_FILES:
        if not explicit and use_safetensors not in (None, "safetensors" in candidate):
            continue
        if variant and not explicit:
            stem, extension = candidate.rsplit(".", 1)
            candidate = f"{stem}.{variant}.{extension}"
        check_name(candidate, "The configuration")
        if (file := find_file(name, candidate, lookup)) is None:
            continue
        if not file.endswith(".json"):
            return [file]
        check_index(file)
        with reading(file):
            files, _ = get_checkpoint_shard_files(name, file, **lookup)
        return files
    return []


def find_file(name: str, file: str, lookup: dict) -> str | None:
    optional = dict.fromkeys(("missing_entries", "gated_repo", "connection_errors"), False)
    return cached_file(name, file, **{f"_raise_exceptions_for_{what}": no for what, no in optional.items()}, **lookup)


def check_index(index: str) -> None:
    """Raise ValueError for an index of weights that is damaged or names files outside its own folder."""
    content = read_json_object(index)
    with reading(index):
        names = set(content["weight_map"].values())
    for name in names:
        check_name(name, index)


def check_name(name: object, origin: str) -> None:
    if not isinstance(name, str) or name != os.path.basename(name) or "\\" in name or ".." in name:
        raise ValueError(f"{origin} names {name!r} as a weight file, which is not a file in the same folder.")


def load_pickle(file: str) -> dict:
    """`torch.load` of tensors and plain values only: no code of the file is run, and nothing is decompressed."""
    with reading(file):
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("PyTorch never compresses, and a small file could fill the memory")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        return dict(checkpoint)


@contextmanager
def reading(file: str, *more_errors: type[Exception]):
    """Turn the exceptions that libraries raise for damaged and dangerous files into a ValueError of one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename or file} is missing; the checkpoint is not complete.") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is damaged, or contains Python objects that could run code when loaded; ask for a safetensors "
            "file."
        ) from error
    except (*READ_ERRORS, *more_errors) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{file} cannot be read ({reason}): it is damaged or incomplete; copy it again.") from error


# Checks before and after loading


def read_json_object(file: str) -> dict:
    with reading(file), open(file, encoding="utf-8") as opened:
        content = json.load(opened)
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    return content


def check_descriptions(folder: str) -> None:
    """Raise ValueError for a configuration in `folder` that is not valid, for which libraries raise all kinds of
    exceptions."""
    for name in ("config.json", "generation_config.json", "adapter_config.json"):
        file = os.path.join(folder, name)
        if not os.path.isfile(file):
            continue
        content = read_json_object(file)
        if name == "config.json" and content.get("model_type") == ScratchGPT2Config.model_type:
            try:
                ScratchGPT2Config.from_dict(content)
            except (StrictDataclassError, TypeError) as error:
                reason = str(error).strip().splitlines()[-1].strip()
                raise ValueError(f"{file} cannot be used ({reason}); copy it again.") from error


@contextmanager
def reading_checkpoint(name_or_path, hub_kwargs: dict):
    """Refuse a checkpoint of ours that would run code or fill the memory, and report a damaged one in one sentence,
    without the library's report. `hub_kwargs` come from `pin_revision`."""
    if name_or_path is not None:
        check_checkpoint(os.fspath(name_or_path), hub_kwargs)
    try:
        with reports_kept_back():
            yield
    except (SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"The checkpoint {name_or_path} is damaged ({reason}); copy or download it again.") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"The tensors of {name_or_path} do not have the shapes that its configuration describes; one of the two "
            "is damaged, missing or of another model, so copy both again."
        ) from error


@contextmanager
def reports_kept_back():
    """The library's reports on a checkpoint come after its errors: not at all, if there is one."""
    reports = []

    def keep_back(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        if is_report:
            reports.append(record)
        return not is_report

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep_back)
    try:
        yield
    finally:
        logger.removeFilter(keep_back)
    for report in reports:
        logger.handle(report)


def check_checkpoint(name: str, hub_kwargs: dict) -> None:
    """Raise ValueError if the weights are of another architecture or a pickle, lie outside the checkpoint, or are
    far fewer than announced; FileNotFoundError if a folder has none."""
    lookup = {key: hub_kwargs[key] for key in LOOKUP_ARGUMENTS if key in hub_kwargs}
    file = find_file(name, "config.json", lookup)
    config = read_json_object(file) if file else {}
    files = find_weight_files(name, hub_kwargs, config)
    if not files and os.path.isdir(name) and not hub_kwargs.get("gguf_file"):
        raise FileNotFoundError(f"{name} has no model.safetensors; give the folder of a whole checkpoint.")
    if denied := [file for file in files if not os.access(file, os.R_OK)]:
        raise PermissionError(f"{denied[0]} cannot be opened; change its permissions or give another path.")
    if any(not file.endswith(".safetensors") for file in files):
        raise ValueError(
            f"{name} has no safetensors file, only a pickle, which could run code; ask for a safetensors file."
        )
    model_type = config.get("model_type") or ScratchGPT2Config.model_type
    if model_type != ScratchGPT2Config.model_type and not any(map(has_own_names, map(stored_names, files))):
        raise ValueError(
            f"{name} is a checkpoint of {model_type!r}, not of GPT-2; load it with transformers' AutoModel."
        )
    if files and config:
        check_size(config, files, name)


def check_size(fields: dict, files: list[str], origin: str) -> None:
    """Raise ValueError if config.json's `fields` describe more weights than `files` have room for, at half a byte
    each: the library would allocate them all before it found them missing. Small models are not checked."""
    try:
        config = ScratchGPT2Config.from_dict(fields)
    except (StrictDataclassError, ValueError, TypeError):
        return  # the library will say so
    stored = sum(map(os.path.getsize, files))
    if config.n_parameters > max(2 * stored, MIN_CHECKED_WEIGHTS):
        raise ValueError(
            f"The configuration of {origin} describes {config.n_parameters:,} weights, but its files have {stored:,} "
            "bytes: one of them is damaged or of another model, so copy both again."
        )


def check_loaded(model, report: dict, origin: str) -> None:
    """Raise ValueError if a checkpoint left gaps in the network, or a part of a head, that the library has filled
    with random numbers, or has blocks that the network lacks. A whole new head is what fine-tuning begins with.

    Args:
        report: what `from_pretrained(output_loading_info=True)` reports.
    """
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    missing = sorted(report["missing_keys"])
    of_network = [name for name in missing if name.startswith(prefix)]
    if len(of_network) == len(model.base_model.state_dict()):
        raise ValueError(f"{origin} is not a checkpoint of GPT-2: no tensor of the network was found in it.")
    stored = model.state_dict().keys() - report["missing_keys"]
    begun = {name.split(".")[0] for name in stored}
    if gaps := of_network + [name for name in missing if name not in of_network and name.split(".")[0] in begun]:
        raise ValueError(f"The checkpoint {origin} lacks {listed(gaps)}; copy it again, or correct the configuration.")
    if surplus := sorted(name for name in report["unexpected_keys"] if re.match(r"(model\.)?layers\.\d+\.", name)):
        raise ValueError(
            f"The checkpoint {origin} has unexpected tensors: {listed(surplus)}; correct the "
            "configuration, which may describe too few blocks."
        )


def adapter_fault(name, error: Exception) -> str:
    """PEFT's exceptions name the tensors that do not fit in their last line."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
    return f"The adapter {name} is damaged or was trained on another model ({reason}); copy it and its base again."


def listed(names: list[str]) -> str:
    """The first three names: `'a', 'b', 'c' and 2 more`."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(map(repr, names[:3]))}{more}"


class CheckpointReader:
    """`from_pretrained` for every class of the model."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Like `PreTrainedModel.from_pretrained`, but also converts other GPT-2 checkpoints (`openai_weights.py`):
        any repository, folder or state dict with GPT-2's names, OpenAI's TensorFlow folders, nanoGPT's `ckpt.pt`.

        Raises ValueError if the checkpoint lacks weights of the network, unless `output_loading_info` requests a
        report instead.
        """
        name, given = pretrained_model_name_or_path, kwargs
        kwargs = pin_revision(name, kwargs)
        base = base_of_adapter(name, kwargs)
        if base is not None and (base != os.fspath(name) or is_foreign_checkpoint(base, kwargs)):
            return cls._from_adapter(name, base, *model_args, **given)
        if is_foreign_checkpoint(name, kwargs):
            return cls._from_foreign(name, *model_args, **kwargs)
        with_report = kwargs.pop("output_loading_info", False)
        with reading_checkpoint(name, kwargs):
            model, report = super().from_pretrained(name, *model_args, output_loading_info=True, **kwargs)
            if name is not None and not with_report:
                check_loaded(model, report, name)
        return (model, report) if with_report else model

    @classmethod
    def _from_foreign(cls, name, *model_args, **kwargs):
        """A checkpoint in the format of transformers' GPT-2, OpenAI or nanoGPT."""
        try:
            from scratch_gpt2.openai_weights import read_checkpoint
        except ImportError as error:
            raise ImportError(f"Install scratch_gpt2 to convert the checkpoint {name}.") from error
        config, state_dict, kwargs = read_checkpoint(cls, name, kwargs)
        loaded = super().from_pretrained(None, *model_args, config=config, state_dict=state_dict, **kwargs)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        model.name_or_path = model.config.name_or_path = str(name or "")
        return loaded

    @classmethod
    def _from_adapter(cls, name, base, *model_args, adapter_name="default", adapter_kwargs=None, **kwargs):
        """PEFT's adapter `name` on the model `base`, which the library alone would neither check nor convert."""
        lookup = {key: kwargs[key] for key in LOOKUP_ARGUMENTS if key in kwargs}
        with_report = kwargs.pop("output_loading_info", False)
        if base == os.fspath(name):
            model = cls._from_foreign(base, *model_args, **pin_revision(base, kwargs))
        else:
            of_adapter = ("revision", "subfolder")
            kwargs = {key: value for key, value in kwargs.items() if key not in of_adapter}
            model = cls.from_pretrained(base, *model_args, **kwargs)
        options = {"adapter_name": adapter_name, "adapter_kwargs": lookup | (adapter_kwargs or {})}
        try:
            with reports_kept_back():
                report = model.load_adapter(os.fspath(name), **options)
        except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            if not isinstance(error, ValueError):
                raise ValueError(adapter_fault(name, error)) from error
            raise ValueError(
                f"The adapter {name} does not fit {cls.__name__}; if it was made for transformers' GPT-2, merge it "
                f"into its base there (merge_and_unload), save that, and load it here. ({error})"
            ) from error
        return (model, report.to_dict()) if with_report else model
