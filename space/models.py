"""The models of the Space: embedded ones, those below one folder of this machine, and the Hub's, all of bounded size.

Only safetensors are read, and no code that comes with a checkpoint is run.
"""

import json
from collections import OrderedDict
from pathlib import Path
from threading import Lock

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM, ScratchGPT2ForSequenceClassification
from scratch_gpt2.tokenization import CHAT_TEMPLATE, load_tokenizer

EMBEDDED_FOLDER = Path(__file__).parent / "checkpoints"
EMBEDDED = {
    "base": ScratchGPT2ForCausalLM,
    "assistant": ScratchGPT2ForCausalLM,
    "spam": ScratchGPT2ForSequenceClassification,
}
LOCAL = "folder:"
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json"]
HUB_FILES += ["tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"]

MAX_PARAMETERS = 400_000_000  # gpt2-medium has 355M
MAX_CHECKPOINT_BYTES = 2_000_000_000
OTHERS_IN_MEMORY = 2  # models besides the embedded ones
MAX_DOWNLOADS = 20  # different repositories until the next start, since each stays on the disk

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class Checkpoints:
    """Models by name: `base`, `assistant`, `spam`; `folder: quickstart`; `openai-community/gpt2`.

    Args:
        embedded: folder with the embedded models.
        local: the folder below which visitors may choose; nothing outside it is ever opened.
    """

    def __init__(self, embedded: Path = EMBEDDED_FOLDER, local: Path | None = None):
        self.embedded = Path(embedded)
        self.local = Path(local).resolve() if local is not None else None
        self.loaded: OrderedDict[tuple[str, type], Loaded] = OrderedDict()
        self.downloaded: set[str] = set()
        self.lock = Lock()

    def missing(self) -> str | None:
        """One sentence about the embedded models that are not there."""
        names = [name for name in EMBEDDED if not (self.embedded / name).is_dir()]
        if not names:
            return None
        return (
            f"The folder {self.embedded} lacks the embedded models {', '.join(names)}: start with --checkpoints and a "
            "folder that holds them, or choose other models on the page."
        )

    def choices(self, model_class: type) -> list[str]:
        """Names to offer for `model_class`."""
        names = [name for name, its_class in EMBEDDED.items() if its_class is model_class]
        names = [name for name in names if (self.embedded / name).is_dir()]
        if self.local is None or not self.local.is_dir():
            return names
        folders = sorted(path.parent for path in self.local.glob("*/config.json"))
        ending = "ForSequenceClassification"
        wanted = model_class.__name__.endswith(ending)
        return names + [
            f"{LOCAL} {folder.name}" for folder in folders if any_ends(architectures(folder), ending) == wanted
        ]

    def load(self, name: str, model_class: type) -> Loaded:
        """The model in float32 for inference, and its tokenizer with the chat template of this project.

        Raises FileNotFoundError for a model that is not there or may not be looked for, and ValueError for one that
        is not a GPT-2, too large or damaged.
        """
        name = str(name or "").strip()
        key = (name, model_class)
        if key in self.loaded:
            return self.loaded[key]
        with self.lock:
            if key not in self.loaded:
                loaded = read(self.find(name), model_class)
                others = [other for other in self.loaded if other[0] not in EMBEDDED]
                if name not in EMBEDDED and len(others) >= OTHERS_IN_MEMORY:
                    del self.loaded[others[0]]
                self.loaded[key] = loaded
            return self.loaded[key]

    def find(self, name: str) -> Path:
        if name in EMBEDDED:
            folder = self.embedded / name
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"The embedded model {name!r} is not in {self.embedded.name}/; choose another."
                )
            return folder
        if name.startswith(LOCAL):
            return self.find_local(name.removeprefix(LOCAL).strip())
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise FileNotFoundError(
                f"{name[:50]!r} is no model; choose one of the list, or the Hub id of a GPT-2, as in "
                "openai-community/gpt2."
            ) from None
        return self.download(name)

    def find_local(self, name: str) -> Path:
        if self.local is not None and "\0" not in name:
            folder = (self.local / name).resolve()
            if folder != self.local and folder.is_relative_to(self.local) and folder.is_dir():
                return folder
        raise FileNotFoundError(f"There is no folder {name[:50]!r} among the models of this machine; choose another.")

    def download(self, name: str) -> Path:
        if name not in self.downloaded and len(self.downloaded) >= MAX_DOWNLOADS:
            raise ValueError(f"{MAX_DOWNLOADS} models have been downloaded since the start; choose one in the list.")
        try:
            if constants.HF_HUB_OFFLINE:
                return Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
            revision = HfApi().model_info(name, timeout=10).sha
            files = HfApi().list_repo_tree(name, recursive=True, revision=revision)
            check_size(name, sum(file.size for file in files if file.path.endswith(".safetensors")))
            self.downloaded.add(name)
            return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
        except ValueError:
            raise
        except Exception as error:  # httpx's, huggingface_hub's and the system's
            raise FileNotFoundError(
                f"{name!r} could not be had from the Hugging Face Hub (no network, no such model, or no access); "
                "choose one of the list."
            ) from error


def read(folder: Path, model_class: type) -> Loaded:
    """The model of a folder; for a PEFT adapter its base with the adapter merged into it: a plain model."""
    if (folder / "adapter_config.json").is_file():
        return read_adapter(folder, model_class)
    check_checkpoint(folder, model_class)
    model = model_class.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return for_inference(model), tokenizer_of(folder)


def read_adapter(folder: Path, model_class: type) -> Loaded:
    from peft import PeftModel

    base = check_adapter(folder, model_class)
    config = ScratchGPT2Config.from_pretrained(folder if (folder / "config.json").is_file() else base)
    model = model_class.from_pretrained(base, config=config, dtype=torch.float32, use_safetensors=True)
    try:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except RuntimeError:  # sizes that differ
        raise ValueError(f"The adapter {folder.name!r} does not fit its base {base.name!r}.") from None
    return for_inference(model), tokenizer_of(folder if (folder / "tokenizer.json").is_file() else base)


def check_adapter(folder: Path, model_class: type) -> Path:
    """The folder of its base: beside the adapter, by the last part of `base_model_name_or_path`, never a download.

    Raises ValueError for an adapter of another task or a classifier without its labels, and FileNotFoundError where
    its weights or its base are missing.
    """
    adapter = read_json(folder / "adapter_config.json")
    is_classifier = model_class is ScratchGPT2ForSequenceClassification
    task = "SEQ_CLS" if is_classifier else "CAUSAL_LM"
    if adapter.get("task_type") != task:
        raise ValueError(f"The adapter {folder.name!r} has task_type {adapter.get('task_type')!r}; {task} is needed.")
    if is_classifier and not (folder / "config.json").is_file():
        raise ValueError(f"The adapter {folder.name!r} needs a config.json with its labels beside it.")
    base = folder.parent / Path(str(adapter.get("base_model_name_or_path"))).name
    if not (folder / "adapter_model.safetensors").is_file() or not (base / "config.json").is_file():
        raise FileNotFoundError(
            f"The adapter {folder.name!r} needs adapter_model.safetensors, and its base {base.name!r} beside it."
        )
    check_checkpoint(base, ScratchGPT2ForCausalLM)
    return base


def for_inference(model: PreTrainedModel) -> PreTrainedModel:
    return model.eval().requires_grad_(False)


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = CHAT_TEMPLATE  # never a stranger's, which is a program
    return tokenizer


def check_checkpoint(folder: Path, model_class: type) -> None:
    """Raise ValueError before anything large is read, for what is no GPT-2, holds no safetensors or is too large."""
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder.name!r} holds no .safetensors file, the only format that is read here.")
    if (folder / "hparams.json").exists() or (folder / "ckpt.pt").exists():
        raise ValueError(f"{folder.name!r} holds a checkpoint of another format; only safetensors are read here.")
    check_size(folder.name, sum(file.stat().st_size for file in weights))
    config = read_json(folder / "config.json")
    if config.get("model_type") not in ("gpt2", "scratch_gpt2"):
        raise ValueError(f"{folder.name!r} is no GPT-2 (its model_type is {str(config.get('model_type'))[:50]!r}).")
    needs_head = model_class is ScratchGPT2ForSequenceClassification
    if needs_head and not any_ends(config.get("architectures") or [], "ForSequenceClassification"):
        raise ValueError(f"{folder.name!r} is no classifier; choose one, such as spam.")
    if (count := count_parameters(config)) > MAX_PARAMETERS:
        raise ValueError(f"{folder.name!r} has {count:,} parameters; at most {MAX_PARAMETERS:,} are loaded here.")


def check_size(name: str, size: int) -> None:
    if not 0 < size <= MAX_CHECKPOINT_BYTES:
        raise ValueError(
            f"{name!r} has {size:,} bytes of safetensors; between 1 and {MAX_CHECKPOINT_BYTES:,} are loaded here."
        )


def count_parameters(config: dict) -> int:
    """Of the network that `config` asks for, without biases and norms: embeddings, attention and MLP."""
    sizes = ScratchGPT2Config()
    vocab, positions, width, layers, inner = (
        int(config.get(name) or getattr(sizes, name) or 0)
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_inner")
    )
    return (vocab + positions) * width + layers * (4 * width**2 + 2 * width * (inner or 4 * width))


def architectures(folder: Path) -> list[str]:
    try:
        return read_json(folder / "config.json").get("architectures") or []
    except ValueError:
        return []


def any_ends(names: list[str], ending: str) -> bool:
    return any(str(name).endswith(ending) for name in names)


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{file.parent.name!r} has no readable config.json.")
    return content
