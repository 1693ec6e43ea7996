"""Push the output folder of a training script to the Hugging Face Hub, with a model card.

A push is one commit, so the repository never contains half a model. It includes the model, its code, the tokenizer,
plots and metrics, but no data, pickles or optimizer states. The token is huggingface_hub's own (`hf auth login`).
"""

import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_relative_import_files

import scratch_gpt2

from ..checkpoint_files import TRAVELLING_FILES, adapter_fault
from ..tokenization import load_tokenizer
from .card import adapter_base, model_card, own_class, read_kind
from .run_record import RUN_FILE

WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
PUSHED = (
    *WEIGHTS,
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    *TRAVELLING_FILES,
    *("*.png", RUN_FILE, "metrics.json", "epochs.json", "confusion_matrix.json"),
)
# Left by an earlier push, these would be loaded instead of the pushed model, or into it.
REPLACED = (*WEIGHTS, "*.bin", "*.bin.index.json", "config.json", "generation_config.json", "adapter_config.json")


def push(
    folder_or_model,
    repo_id: str,
    *,
    tokenizer=None,
    private: bool | None = None,
    base: str | None = None,
    license: str | None = None,
    message: str = "Push model",
) -> CommitInfo:
    """Push a model or an adapter in one commit: either all files arrive or none.

    The pushed configuration has `use_cache=True`. The code is the checkpoint's own copy, or this package's if that is
    incomplete. Weights of an earlier push that are not replaced are deleted.

    Args:
        folder_or_model: output folder of a training script, or a model, which is saved with its `tokenizer` first.
        repo_id: `user/name`, or `name` in the logged-in account; created if it does not exist.
        private: whether a new repository is private; by default, the account's setting.
        base: Hub id of an adapter's base model, to replace a local path.

    Raises FileNotFoundError and ValueError for a folder that cannot be pushed, OSError if the Hub refuses the push or
    cannot be reached.
    """
    if not isinstance(folder_or_model, (str, os.PathLike)):
        with tempfile.TemporaryDirectory() as folder:
            for part in (folder_or_model, tokenizer):
                if part is not None:
                    part.save_pretrained(folder)
            return push(folder, repo_id, private=private, base=base, license=license, message=message)
    files = files_to_push(Path(folder_or_model), base)
    api = HfApi()
    with hub_errors_explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as described:
            for name, content in files.items():
                if name.endswith(".json") or name.endswith(".png"):
                    Path(described, name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
            card = model_card(described, repo_id, license)
        files["README.md"] = str(card).encode()
        present = api.list_repo_files(repo_id)
        stale = [path for path in present if path not in files and any(fnmatch.fnmatch(path, p) for p in REPLACED)]
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(path) for path in stale]
        return api.create_commit(repo_id, operations, commit_message=message)


def files_to_push(folder: Path, base: str | None = None) -> dict[str, Path | bytes]:
    """The files to push by their names in the repository: files in `folder`, or their new content."""
    config, _, _ = read_kind(folder)
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in PUSHED):
            files[path.name] = path
    if not any(fnmatch.fnmatch(name, pattern) for name in files for pattern in WEIGHTS):
        raise FileNotFoundError(f"{folder} contains no safetensors file with weights: save a model there first.")
    if "adapter_config.json" in files:
        files = {name: files[name] for name in files if not fnmatch.fnmatch(name, "model*") and name != "config.json"}
        config["base_model_name_or_path"] = adapter_base(config, base)
        return files | {"adapter_config.json": json_bytes(config)}
    # A checkpoint loaded from the Hub refers to the code there, although its own copy is saved with it.
    auto_map = {name: target.rpartition("--")[2] for name, target in (config.get("auto_map") or {}).items()}
    if not has_own_code(folder, auto_map):
        package = Path(scratch_gpt2.__file__).parent
        files |= {name: package / name for name in TRAVELLING_FILES}
        auto_map = scratch_gpt2.ScratchGPT2Config().auto_map
    return files | {"config.json": json_bytes(config | {"use_cache": True, "auto_map": auto_map})}


def has_own_code(folder: Path, auto_map: dict[str, str]) -> bool:
    """Whether `folder` contains the modules in `auto_map` and all modules that they import."""
    modules = {target.partition(".")[0] for target in auto_map.values()}
    try:
        for module in modules:
            get_relative_import_files(folder / f"{module}.py")
    except FileNotFoundError:
        return False
    return bool(modules)


def json_bytes(config: dict) -> bytes:
    return json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"


@contextmanager
def hub_errors_explained(repo_id: str) -> Iterator[None]:
    """Turn the exceptions of a failed upload into an OSError with one sentence."""
    try:
        yield
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:  # the types depend on huggingface_hub's HTTP library
        reason, remedy = explain_refusal(error)
        raise OSError(
            f"{repo_id} could not be pushed ({reason}), and the repository on the Hub is unchanged; {remedy}."
        ) from error


def explain_refusal(error: Exception) -> tuple[str, str]:
    """Why the Hub could not be reached or refused a request, and the remedy."""
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    statuses = [getattr(getattr(cause, "response", None), "status_code", None) for cause in causes]
    if isinstance(error, LocalTokenNotFoundError) or (401 in statuses and get_token() is None):
        return "not logged in", "log in with `hf auth login`"
    if 401 in statuses:
        return "the token is invalid", "log in again with `hf auth login`"
    if 403 in statuses:
        return "the logged-in account has no write access", "choose another repo_id, or log in with `hf auth login`"
    reason = " ".join(str(causes[-1]).split()).replace(get_token() or "\0", "<token>") or type(error).__name__
    return reason, "try again later, or log in with `hf auth login`"


TEXT = "The cat sat."


def check_pushed(folder: str | os.PathLike, repo_id: str, revision: str, base: str | None = None) -> float:
    """Load `revision` of `repo_id` in another process and compare its outputs with those of `folder`.

    That process cannot import this package, unless it loads an adapter. `base` is as for `push`. Returns the largest
    difference. Raises ValueError if it is not negligible or the pushed model cannot be loaded.
    """
    config, _, auto_class = read_kind(Path(folder))
    ids, output = local_outputs(folder, base)
    base = base or config.get("base_model_name_or_path")
    model_class = own_class(auto_class)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "output.safetensors")
        script = Path(__file__).with_name("load_back.py")
        options = [repo_id, revision, TEXT, str(file), *([model_class, base] if base else [auto_class])]
        environment = os.environ | {"HF_MODULES_CACHE": temporary}
        # -P keeps the script's folder out of sys.path
        result = subprocess.run(
            [sys.executable, "-P", str(script), *options], capture_output=True, text=True, env=environment, check=False
        )
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(f"{repo_id} was pushed but cannot be loaded from the Hub ({reason}).")
        pulled = load_file(file)
    same_tokens = torch.equal(ids, pulled["ids"])
    difference = (output - pulled["output"]).abs().max().item() if same_tokens else float("inf")
    if not difference <= 1e-4 * max(1.0, output.abs().max().item()):
        raise ValueError(
            f"{repo_id} was pushed but computes other outputs than {folder}: they differ by {difference:g}."
        )
    return difference


def local_outputs(folder: str | os.PathLike, base: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of a text and the outputs for them, of the model that `push` pushes.

    Raises ValueError or FileNotFoundError for a model or tokenizer that is missing or damaged.
    """
    config, _, auto_class = read_kind(Path(folder))
    base = base or config.get("base_model_name_or_path")
    ids = load_tokenizer(folder)(TEXT, return_tensors="pt").input_ids
    model = getattr(scratch_gpt2, own_class(auto_class)).from_pretrained(base or folder)
    if base:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, folder)
        except (RuntimeError, LookupError, TypeError, SafetensorError) as error:
            raise ValueError(adapter_fault(folder, error)) from error
    with torch.no_grad():
        output = model.eval()(ids)[0].float()
    if not output.isfinite().all():
        raise ValueError(f"{folder} has weights that are not finite; push an earlier checkpoint.")
    return ids, output
