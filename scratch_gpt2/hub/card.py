"""The model card of a model or an adapter, written from its configuration and its run.json."""

import json
import os
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import read_json
from .run_record import RUN_FILE, public_name

TASKS = {
    "ScratchGPT2ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "ScratchGPT2ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ScratchGPT2ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ScratchGPT2ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
}
ELSEWHERE = ("feature-extraction", "AutoModel")


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


def own_class(auto_class: str) -> str:
    return auto_class.replace("AutoModel", "ScratchGPT2") if auto_class != "AutoModel" else "ScratchGPT2Model"
