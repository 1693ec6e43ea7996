"""Publishing: what a training script has left in a folder goes to the Hugging Face Hub, with a model card.

A push is one commit, so the repository never holds half a model, and only the model, its code, tokenizer, plots and
numbers are pushed: no data, no pickles, no optimizer states. The token is huggingface_hub's own (`hf auth login`).
"""

import dataclasses
import fnmatch
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
)
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.torch import load_file
from transformers import AutoTokenizer

import scratch_gpt2 as package

from .data.token_shards import write_atomically

RUN_FILE = "run.json"
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
    *("configuration_scratch_gpt2.py", "modeling_scratch_gpt2.py", "linear_cross_entropy.py"),
    *("*.png", RUN_FILE, "metrics.json", "epochs.json", "confusion_matrix.json"),
)
# What an earlier push may have left that would be loaded instead of, or into, what is pushed now.
REPLACED = (*WEIGHTS, "*.bin", "*.bin.index.json", "config.json", "generation_config.json", "adapter_config.json")
TASKS = {
    "ScratchGPT2ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "ScratchGPT2ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ScratchGPT2ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ScratchGPT2ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
}
ELSEWHERE = ("feature-extraction", "AutoModel")
# Fields of a run's arguments that say nothing about the model, or say something about the machine or its user.
UNTOLD = (
    r"_|dataloader_|ddp_|do_|explain|hub_|label_names|local_rank|log_|logging_|project|push_to|report_to|resume|"
    r"restore_|run_name|save_|show|trackio|trunk_cache|use_cache|.*(dir|_config|deepspeed|tqdm|_token)$"
)


# What a run was


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
        for entry in dataclasses.fields(group):
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


def data_behind(folder: str, source: str) -> str:
    """What data a folder of examples/prepare_*.py holds: the Hub id in the `source` that it has noted, or its name."""
    on_hub = re.match(r"([\w.-]+/[\w.-]+), configuration ", source)
    return on_hub[1] if on_hub else folder


def describe_hardware() -> str:
    """What this process and those beside it compute on: a GPU that `--use_cpu` leaves idle is not told of."""
    state, threads = PartialState(), torch.get_num_threads()
    if state.device.type == "cuda":
        return f"{state.num_processes} x {torch.cuda.get_device_name()}"
    processor = f"{platform.machine()} processor with {os.cpu_count()} cores"
    return f"{state.device.type}, {processor}, {state.num_processes} process(es) of {threads} thread(s)"


# The card


def model_card(
    folder: str | os.PathLike, repo_id: str, license: str | None = None, base: str | None = None
) -> ModelCard:
    """The card of the model or adapter in `folder`, written from its configuration and its run.json.

    `license` is the Hub's name of one, such as `mit`; without it the card names none. `base` is as for `push`.

    Raises FileNotFoundError and ValueError for a folder that holds no model of this package.
    """
    folder = Path(folder)
    config, task, auto_class = read_kind(folder)
    run = read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else None
    is_adapter = (folder / "adapter_config.json").is_file()
    origin = (run or {}).get("base")
    if is_adapter:
        config["base_model_name_or_path"] = adapter_base(config, base)
        origin = {"name": config["base_model_name_or_path"], "on_hub": True}
    data = ModelCardData(
        license=license,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=task,
        tags=["scratch_gpt2", "gpt2", *(["lora"] if is_adapter else [])],
        base_model=origin["name"] if origin and origin["on_hub"] else None,
        datasets=[entry["name"] for entry in (run or {}).get("data", []) if entry["on_hub"]] or None,
        model_name=repo_id.split("/")[-1],
        eval_results=evaluation_results(run, task) if run and run["metrics"] else None,
    )
    parts = [
        f"# {repo_id.split('/')[-1]}",
        introduction(config, origin, is_adapter),
        usage(repo_id, config, auto_class),
    ]
    parts += training_section(run) if run else ["## Training\n\nHow it was trained was not recorded."]
    plots = sorted(path.name for path in folder.glob("*.png"))
    parts += ["\n".join(f"![{name}]({name})" for name in plots)] if plots else []
    parts += [limits(config, run)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def read_kind(folder: Path) -> tuple[dict, str, str]:
    """The configuration of the model or adapter in `folder`, its task, and the Auto class that loads it."""
    if (folder / "adapter_config.json").is_file():
        config = read_json(folder / "adapter_config.json")
        return config, *TASKS.get(config.get("task_type", ""), ELSEWHERE)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds neither config.json nor adapter_config.json: train a model into it.")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "scratch_gpt2":
        raise ValueError(f"{folder} holds a model of type {config.get('model_type')!r}, not one of scratch_gpt2.")
    return config, *TASKS.get((config.get("architectures") or [""])[0], ELSEWHERE)


def adapter_base(config: dict, base: str | None = None) -> str:
    """The Hub id of an adapter's base. Raises ValueError for one that only this machine has."""
    name = str(base or config.get("base_model_name_or_path"))
    if not public_name(name)["on_hub"]:
        raise ValueError(
            f"The adapter's base is {name}, which nobody else has: push it first, and give its Hub id (user/name) as "
            "the base."
        )
    return name


def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); save the model again.") from error


def evaluation_results(run: dict, task: str) -> list[EvalResult]:
    name = ", ".join(entry["name"] for entry in run["data"]) or "unknown"
    kind = next((entry["name"] for entry in run["data"] if entry["on_hub"]), "custom")
    about = {"task_type": task, "dataset_type": kind, "dataset_name": name, "dataset_split": run["split"]}
    return [EvalResult(**about, metric_type=metric, metric_value=value) for metric, value in run["metrics"].items()]


def introduction(config: dict, base: dict | None, is_adapter: bool) -> str:
    if is_adapter:
        name = config["base_model_name_or_path"]
        targets = ", ".join(sorted(config.get("target_modules") or []))
        kind = f"A {config['peft_type']} adapter of rank {config.get('r')} ({targets}) for `{name}`"
    else:
        kind = (
            f"A GPT-2 with {config['n_layer']} layers of width {config['n_embd']}, {config['n_head']} heads, "
            f"{config['vocab_size']:,} kinds of tokens and a context of {config['n_positions']:,}"
        )
        if "Classification" in (config.get("architectures") or [""])[0]:
            kind += f", with a head for the labels {', '.join(config['id2label'].values())}"
        kind += f", trained from `{base['name']}`" if base else ""
    return f"{kind}, made with scratch_gpt2."


def usage(repo_id: str, config: dict, auto_class: str) -> str:
    if "peft_type" in config:
        base, model_class = config["base_model_name_or_path"], own_class(auto_class)
        return (
            "## Use\n\nWith the package `scratch_gpt2`:\n\n```python\nfrom peft import PeftModel\n"
            f"from scratch_gpt2 import {model_class}\nfrom transformers import AutoTokenizer\n\n"
            f'base = {model_class}.from_pretrained("{base}")\n'
            f'model = PeftModel.from_pretrained(base, "{repo_id}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n```\n\n'
            "Without it, if the base is a model of scratch_gpt2 too, whose code is then downloaded and run (the "
            "layers of transformers' own GPT-2 have other names):\n\n```python\nfrom peft import PeftModel\n"
            f"from transformers import {auto_class}, AutoTokenizer\n\n"
            f'base = {auto_class}.from_pretrained("{base}", trust_remote_code=True)\n'
            f'model = PeftModel.from_pretrained(base, "{repo_id}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n```'
        )
    task = next((task for task, name in TASKS.values() if name == auto_class), ELSEWHERE[0])
    return (
        "## Use\n\nWith the package `scratch_gpt2`:\n\n```python\n"
        "import scratch_gpt2\nfrom transformers import pipeline\n\n"
        f'pipe = pipeline("{task}", "{repo_id}")\n```\n\n'
        "Without it; the code in this repository is then downloaded and run:\n\n```python\n"
        f"from transformers import {auto_class}, AutoTokenizer\n\n"
        f'model = {auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n```'
    )


def training_section(run: dict) -> list[str]:
    data = ", ".join(f"`{entry['name']}`" for entry in run["data"]) or "not recorded"
    base = f"`{run['base']['name']}`" if run["base"] else "nothing: fresh weights"
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines = [f"- Started from: {base}", f"- Data: {data}", f"- Hardware: {run['hardware']}", f"- Versions: {versions}"]
    arguments = json.dumps(run["arguments"], indent=1, ensure_ascii=False)
    parts = ["## Training\n\n" + "\n".join(lines)]
    parts.append(f"Arguments that differ from their defaults:\n\n```json\n{arguments}\n```")
    if run["metrics"]:
        rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in run["metrics"].items())
        unit = f", the loss in nats per {run['loss_per']}" if run.get("loss_per") else ""
        parts.append(f"## Results\n\nOn the {run['split']} data{unit}:\n\n| metric | value |\n| --- | ---: |\n{rows}")
    if run["samples"]:
        shown = "\n\n".join(f"{indented(prompt)}\n\ngave\n\n{indented(text)}" for prompt, text in run["samples"])
        parts.append(f"## Samples\n\nNot chosen and not edited.\n\n{shown}")
    return parts


def indented(text: str) -> str:
    """A code block that no content can end."""
    return "\n".join(f"    {line}" for line in (text or "(nothing)").splitlines() or ["(nothing)"])


def limits(config: dict, run: dict | None) -> str:
    known = "the numbers above" if run and run["metrics"] else "nothing that is recorded here"
    length = f"It reads at most {config['n_positions']:,} tokens. " if "n_positions" in config else ""
    return (
        f"## Limits\n\n{length}What it knows comes from its training data, with their errors and prejudices; it "
        f"states falsehoods as fluently as facts. It was measured by {known}: not for safety, not for "
        "bias, and not on other data."
    )


# The push


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
    """Push a model or an adapter in one commit: all of it arrives or nothing.

    `use_cache` is true in what is pushed, the code is the checkpoint's own copy, and weights of an earlier push that
    are not replaced are deleted.

    Args:
        folder_or_model: folder of a training script, or a model, which is saved with its `tokenizer` first.
        repo_id: `user/name`, or `name` under the user who is logged in; created where it does not exist.
        private: whether a new repository is private; by default what the account says.
        base: Hub id of the base of an adapter, in place of a folder on this machine.

    Raises FileNotFoundError and ValueError for what cannot be pushed, OSError where the Hub refuses or is not reached.
    """
    if not isinstance(folder_or_model, (str, os.PathLike)):
        with tempfile.TemporaryDirectory() as folder:
            for part in (folder_or_model, tokenizer):
                if part is not None:
                    part.save_pretrained(folder)
            return push(folder, repo_id, private=private, base=base, license=license, message=message)
    files = files_to_push(Path(folder_or_model), base)
    api = HfApi()
    with speaking_to_hub(repo_id):
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
    """By their names in the repository, the files of `folder` that are pushed, or what is pushed in their place."""
    config, _, _ = read_kind(folder)
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in PUSHED):
            files[path.name] = path
    if not any(fnmatch.fnmatch(name, pattern) for name in files for pattern in WEIGHTS):
        raise FileNotFoundError(f"{folder} has no safetensors file with weights: train or save a model into it.")
    if "adapter_config.json" in files:
        files = {name: files[name] for name in files if not fnmatch.fnmatch(name, "model*") and name != "config.json"}
        config["base_model_name_or_path"] = adapter_base(config, base)
        return files | {"adapter_config.json": as_json(config)}
    for name in ("configuration_scratch_gpt2.py", "modeling_scratch_gpt2.py", "linear_cross_entropy.py"):
        files.setdefault(name, Path(__file__).with_name(name))
    # A checkpoint that began as one of the Hub's refers to the code there, though its own is beside it.
    auto_map = {name: target.rpartition("--")[2] for name, target in (config.get("auto_map") or {}).items()}
    return files | {"config.json": as_json(config | {"use_cache": True, "auto_map": auto_map})}


def as_json(config: dict) -> bytes:
    return json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"


@contextmanager
def speaking_to_hub(repo_id: str) -> Iterator[None]:
    """Turn what the libraries raise where an upload fails into an OSError of one sentence."""
    try:
        yield
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:  # the types depend on huggingface_hub's HTTP library
        reason, remedy = explain_refusal(error)
        raise OSError(
            f"{repo_id} could not be pushed ({reason}) and is on the Hugging Face Hub as it was; {remedy}."
        ) from error


def explain_refusal(error: Exception) -> tuple[str, str]:
    """Why the Hub was not reached or refused, and what helps."""
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    statuses = [getattr(getattr(cause, "response", None), "status_code", None) for cause in causes]
    if isinstance(error, LocalTokenNotFoundError) or (401 in statuses and get_token() is None):
        return "nobody is logged in", "log in with `hf auth login`"
    if 401 in statuses:
        return "the Hub does not know the token", "log in again with `hf auth login`"
    if 403 in statuses:
        return "who is logged in may not write there", "choose a name of your own, or log in with `hf auth login`"
    reason = " ".join(str(causes[-1]).split()).replace(get_token() or "\0", "<token>") or type(error).__name__
    return reason, "try again when the Hub can be reached, or log in with `hf auth login`"


LOAD_BACK = """
import sys


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "scratch_gpt2":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NotInstalled())
import torch, transformers
from safetensors.torch import save_file

repo_id, revision, auto_class, text, file = sys.argv[1:]
options = {"revision": revision, "code_revision": revision, "trust_remote_code": True}
model = getattr(transformers, auto_class).from_pretrained(repo_id, **options)
ids = transformers.AutoTokenizer.from_pretrained(repo_id, revision=revision)(text, return_tensors="pt").input_ids
with torch.no_grad():
    save_file({"ids": ids, "output": model.eval()(ids)[0].float().contiguous()}, file)
"""
# An adapter has no code of its own: what it adapts is a GPT-2 of any origin, in this package's class.
LOAD_BACK_ADAPTER = """
import sys
import scratch_gpt2, torch, transformers
from peft import PeftModel
from safetensors.torch import save_file

repo_id, revision, model_class, text, file, base = sys.argv[1:]
model = PeftModel.from_pretrained(getattr(scratch_gpt2, model_class).from_pretrained(base), repo_id, revision=revision)
ids = transformers.AutoTokenizer.from_pretrained(repo_id, revision=revision)(text, return_tensors="pt").input_ids
with torch.no_grad():
    save_file({"ids": ids, "output": model.eval()(ids)[0].float().contiguous()}, file)
"""
TEXT = "What arrives is sent."


def own_class(auto_class: str) -> str:
    return auto_class.replace("AutoModel", "ScratchGPT2") if auto_class != "AutoModel" else "ScratchGPT2Model"


def check_pushed(folder: str | os.PathLike, repo_id: str, revision: str, base: str | None = None) -> float:
    """Load `revision` of `repo_id` in another process, where this package is hidden unless it is an adapter, and
    compare its outputs with those of `folder`. `base` is as for `push`.

    Returns the largest difference. Raises ValueError where it is not negligible or the pushed model cannot be loaded.
    """
    config, _, auto_class = read_kind(Path(folder))
    base = base or config.get("base_model_name_or_path")
    model_class = own_class(auto_class)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "output.safetensors")
        code = (
            [LOAD_BACK_ADAPTER, repo_id, revision, model_class] if base else [LOAD_BACK, repo_id, revision, auto_class]
        )
        command = [sys.executable, "-c", *code, TEXT, str(file), *([base] if base else [])]
        environment = os.environ | {"HF_MODULES_CACHE": temporary}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(f"{repo_id} was pushed but cannot be loaded from there ({reason}).")
        pulled = load_file(file)
    model = getattr(package, model_class).from_pretrained(base or folder)
    if base:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        output = model.eval()(ids)[0].float()
    same_tokens = torch.equal(ids, pulled["ids"])
    difference = (output - pulled["output"]).abs().max().item() if same_tokens else float("inf")
    if not difference <= 1e-4 * max(1.0, output.abs().max().item()):
        raise ValueError(f"{repo_id} was pushed but computes something else there: outputs differ by {difference:g}.")
    return difference
