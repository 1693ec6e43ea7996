"""The models of the Space: the embedded ones, those below one folder of this machine, and the Hub's, of bounded size.

Only safetensors are read, and no code that comes with a checkpoint is run.
"""

import json
from collections import OrderedDict
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from threading import Lock

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM, ScratchGPT2ForSequenceClassification
from scratch_gpt2.cpu_inference import optimize_if_faster
from scratch_gpt2.tokenization import CHAT_TEMPLATE, load_tokenizer

EMBEDDED_FOLDER = Path(__file__).parent / "checkpoints"
EMBEDDED = {
    "base": ScratchGPT2ForCausalLM,
    "assistant": ScratchGPT2ForCausalLM,
    "spam": ScratchGPT2ForSequenceClassification,
}
CLASSIFIER_ENDING = "ForSequenceClassification"
LOCAL = "folder:"
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json"]
HUB_FILES += ["tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"]

MAX_PARAMETERS = 400_000_000  # gpt2-medium has 355M
MAX_CHECKPOINT_BYTES = 2_000_000_000
OTHERS_IN_MEMORY = 2  # models besides the embedded ones
MAX_WAIT = 120  # seconds for a model that another visitor is loading
MAX_DOWNLOADS = 20  # different repositories until the next start, since each stays on the disk

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class Checkpoints:
    """Models by name: `base`, `assistant`, `spam`; `folder: quickstart`; `openai-community/gpt2`.

    Args:
        embedded: folder with the embedded models.
        local: the folder below which visitors may choose; nothing outside it is ever opened.
        optimize: give language models the fastest kernels for this CPU, and print their names.
    """

    def __init__(self, embedded: Path = EMBEDDED_FOLDER, local: Path | None = None, optimize: bool = True):
        self.optimize = optimize
        self.embedded = Path(embedded)
        self.local = Path(local).resolve() if local is not None else None
        self.loaded: OrderedDict[tuple[str, type], Loaded] = OrderedDict()
        self.downloaded: set[str] = set()
        self.loading: dict[tuple[str, type], Future] = {}
        self.lock = Lock()  # held for moments, never while a model is downloaded or read
        self.reading = Lock()  # two `from_pretrained` at the same time lose tied weights

    def preload(self) -> None:
        """Read the embedded models that are there, so that no visitor waits for them."""
        for name, model_class in EMBEDDED.items():
            if (self.embedded / name).is_dir():
                self.load(name, model_class)

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
        """Names to offer for `model_class`: embedded models, and the folders that hold a loadable model."""
        names = [name for name, its_class in EMBEDDED.items() if its_class is model_class]
        names = [name for name in names if (self.embedded / name).is_dir()]
        if self.local is None or not self.local.is_dir():
            return names
        folders = sorted(path for path in self.local.iterdir() if path.resolve().is_relative_to(self.local))
        return names + [f"{LOCAL} {folder.name}" for folder in folders if is_loadable(folder, model_class)]

    def load(self, name: str, model_class: type) -> Loaded:
        """The model in float32 for inference, and its tokenizer with the chat template of this project.

        Raises FileNotFoundError for a model that is not there or may not be looked for, and ValueError for one that
        is not a GPT-2, too large or damaged. A call for a model that is being loaded waits for it, and gets its
        result or its error; after MAX_WAIT seconds, ValueError.
        """
        name = str(name or "").strip()
        key = (name, model_class)
        with self.lock:
            if key in self.loaded:
                return self.loaded[key]
            future = self.loading.get(key)
            is_first = future is None
            if is_first:
                future = self.loading[key] = Future()
        if is_first:
            self.load_into(future, key)
        elif not wait([future], MAX_WAIT).done:
            raise ValueError(f"The model {name!r} is still being loaded; try again in a moment.")
        return future.result()

    def load_into(self, future: Future, key: tuple[str, type]) -> None:
        name, model_class = key
        try:
            folder = self.find(name)
            with self.reading:
                loaded = read(folder, model_class)
                if self.optimize:
                    print(f"{name}: {optimize_if_faster(loaded[0])}", flush=True)
            with self.lock:
                others = [other for other in self.loaded if other[0] not in EMBEDDED]
                if name not in EMBEDDED and len(others) >= OTHERS_IN_MEMORY:
                    del self.loaded[others[0]]
                self.loaded[key] = loaded
            future.set_result(loaded)
        except BaseException as error:
            future.set_exception(error)
        finally:
            with self.lock:
                del self.loading[key]

    def facts(self, name: str) -> dict:
        """What an embedded model's `run.json` says, or nothing."""
        file = self.embedded / name / "run.json"
        return read_object(file) if name in EMBEDDED and file.is_file() else {}

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
                f"{name[:50]!r} is not the name of a model; choose one from the list, or give the Hub id of a GPT-2, "
                "such as openai-community/gpt2."
            ) from None
        return self.download(name)

    def find_local(self, name: str) -> Path:
        with suppress(OSError, ValueError):  # a name that is too long or contains a null byte or half of an emoji
            folder = self.local and (self.local / name).resolve()
            if folder and folder != self.local and folder.is_relative_to(self.local) and folder.is_dir():
                return folder
        raise FileNotFoundError(f"{name[:50]!r} is not among the models of this machine; choose another.")

    def download(self, name: str) -> Path:
        if name not in self.downloaded and len(self.downloaded) >= MAX_DOWNLOADS:
            raise ValueError(
                f"{MAX_DOWNLOADS} models have been downloaded, and no more are until the next start; choose one from "
                "the list."
            )
        try:
            if constants.HF_HUB_OFFLINE:
                return Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
            revision = HfApi().model_info(name, timeout=10).sha
            files = HfApi().list_repo_tree(name, recursive=True, revision=revision)
            check_bytes(name, sum(file.size for file in files if file.path.endswith(".safetensors")))
            self.downloaded.add(name)
            return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
        except ValueError:
            raise
        except Exception as error:  # httpx's, huggingface_hub's and the system's
            raise FileNotFoundError(
                f"{name!r} could not be downloaded from the Hugging Face Hub (no network, no such model or no "
                "access); choose one from the list."
            ) from error


def read(folder: Path, model_class: type) -> Loaded:
    """The model of a folder; for a PEFT adapter its base with the adapter merged into it: a plain model."""
    if (folder / "adapter_config.json").is_file():
        return read_adapter(folder, model_class)
    check_checkpoint(folder, model_class)
    model = model_class.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.eval().requires_grad_(False), tokenizer_of(folder)


def read_adapter(folder: Path, model_class: type) -> Loaded:
    from peft import PeftModel

    base = check_adapter(folder, model_class)
    config = ScratchGPT2Config.from_pretrained(folder if (folder / "config.json").is_file() else base)
    model = model_class.from_pretrained(base, config=config, dtype=torch.float32, use_safetensors=True)
    try:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except RuntimeError:  # sizes that differ
        raise ValueError(f"The adapter {folder.name!r} does not fit its base {base.name!r}; choose another.") from None
    return model.eval().requires_grad_(False), tokenizer_of(folder if (folder / "tokenizer.json").is_file() else base)


def check_adapter(folder: Path, model_class: type) -> Path:
    """The folder of its base, next to the adapter: the last part of `base_model_name_or_path`; never a download.

    Raises ValueError for an adapter of another task or a classifier without its labels, and FileNotFoundError where
    its weights or its base are missing.
    """
    adapter = read_object(folder / "adapter_config.json")
    is_classifier = model_class is ScratchGPT2ForSequenceClassification
    if adapter.get("task_type") != ("SEQ_CLS" if is_classifier else "CAUSAL_LM"):
        wanted = "classifies texts, such as spam" if is_classifier else "writes texts, such as base"
        raise ValueError(f"The adapter {folder.name!r} is for another task; choose a model that {wanted}.")
    if is_classifier and not (folder / "config.json").is_file():
        raise ValueError(f"The adapter {folder.name!r} has no config.json that names its labels; add one.")
    base = folder.parent / Path(str(adapter.get("base_model_name_or_path"))).name
    if not (folder / "adapter_model.safetensors").is_file() or not (base / "config.json").is_file():
        raise FileNotFoundError(
            f"The adapter {folder.name!r} needs the file adapter_model.safetensors and its base {base.name!r} in the "
            "folder next to it."
        )
    check_checkpoint(base, ScratchGPT2ForCausalLM)
    return base


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = CHAT_TEMPLATE  # never the one of a checkpoint: a template is a program
    return tokenizer


def is_loadable(folder: Path, model_class: type) -> bool:
    """Whether the folder holds a model of this kind, as far as its small files tell."""
    try:
        if (folder / "adapter_config.json").is_file():
            check_adapter(folder, model_class)
        else:
            check_checkpoint(folder, model_class)
    except (ValueError, OSError):
        return False
    return True


def check_checkpoint(folder: Path, model_class: type) -> None:
    """Raise ValueError, before anything large is read, for what is not a GPT-2, has no safetensors or is too large."""
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder.name!r} holds no .safetensors file, the only format that is read here.")
    if (folder / "hparams.json").exists() or (folder / "ckpt.pt").exists():
        raise ValueError(f"{folder.name!r} holds a checkpoint of another format; only safetensors are read here.")
    check_bytes(folder.name, sum(file.stat().st_size for file in weights))
    config = read_object(folder / "config.json")
    if config.get("model_type") not in ("gpt2", "scratch_gpt2"):
        raise ValueError(f"{folder.name!r} is not a GPT-2; its model_type is {str(config.get('model_type'))[:50]!r}.")
    is_classifier = any(str(name).endswith(CLASSIFIER_ENDING) for name in config.get("architectures") or [])
    if is_classifier != (model_class is ScratchGPT2ForSequenceClassification):
        lacks, such_as = ("write", "base") if is_classifier else ("classify", "spam")
        raise ValueError(f"{folder.name!r} does not {lacks} texts; choose a model that does, such as {such_as}.")
    if (count := count_parameters(config)) > MAX_PARAMETERS:
        raise ValueError(f"{folder.name!r} has {count:,} parameters; at most {MAX_PARAMETERS:,} are loaded here.")


def check_bytes(name: str, size: int) -> None:
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


def read_object(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{file.parent.name!r} has no readable {file.name}; save the model again.")
    return content
