"""The model card of a model or an adapter, written from its configuration and its run.json."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_scratch_gpt2 import OLDEST_TRANSFORMERS
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
TEMPLATE = Path(__file__).with_name("card_template.md")
OTHER_TASK = ("feature-extraction", "AutoModel")


def model_card(
    folder: str | os.PathLike, repo_id: str, license: str | None = None, base: str | None = None
) -> ModelCard:
    """The card of the model or adapter in `folder`, written from its configuration and its run.json.

    `license` is the Hub's identifier of a license, such as `mit`. `base` is as for `push`.

    Raises FileNotFoundError and ValueError for a folder without a model of this package.
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
    plots = sorted(path.stem for path in folder.glob("*.png"))
    return render_card(
        data,
        name=repo_id.split("/")[-1],
        config=config,
        run=run,
        base=origin,
        plots=plots,
        repo_id=repo_id,
        auto_class=auto_class,
    )


def render_card(
    data: ModelCardData,
    *,
    name: str,
    config: dict,
    run: dict | None,
    base: dict | None = None,
    plots: Iterable[str] = (),
    notes: str = "",
    repo_id: str | None = None,
    auto_class: str = "AutoModel",
    with_code: bool = True,
) -> ModelCard:
    """Render `card_template.md`.

    Args:
        name: the heading.
        config: config.json of a model, or adapter_config.json.
        run: what `record_run` wrote; None if the run was not recorded.
        base: the checkpoint that training started from, as in `run`.
        plots: names of the PNG files to show, without their suffix.
        notes: Markdown to insert after the introduction.
        repo_id, auto_class: the model to load, and the class to load it with. Without `repo_id`, the section on using
            the model is left out.
        with_code: whether the model's code is saved with it, so that it can be loaded without the package.
    """
    targets = config.get("target_modules") or []
    has_labels = "Classification" in (config.get("architectures") or [""])[0]
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        auto_class=auto_class,
        with_code=with_code,
        oldest_transformers=OLDEST_TRANSFORMERS,
        model_class=own_class(auto_class),
        config=config,
        adapter=config if "peft_type" in config else None,
        kind="LoRA" if config.get("peft_type") == "LORA" else config.get("peft_type"),
        targets=targets if isinstance(targets, str) else ", ".join(sorted(targets)),
        labels=list(config["id2label"].values()) if has_labels else None,
        base=base,
        notes=notes,
        run=run,
        arguments=json.dumps(run["arguments"], indent=1, ensure_ascii=False) if run else None,
        samples=[[indented(text) for text in sample] for sample in run["samples"]] if run else None,
        plots=plots,
    )


def read_kind(folder: Path) -> tuple[dict, str, str]:
    """The configuration of the model or adapter in `folder`, its task, and the Auto class that loads it."""
    if (folder / "adapter_config.json").is_file():
        config = read_json(folder / "adapter_config.json")
        return config, *TASKS.get(config.get("task_type", ""), OTHER_TASK)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} contains neither config.json nor adapter_config.json: save a model there first."
        )
    config = read_json(folder / "config.json")
    if config.get("model_type") != "scratch_gpt2":
        kind = config.get("model_type")
        raise ValueError(f"{folder} contains a model of type {kind!r}: load it with scratch_gpt2 and save it first.")
    return config, *TASKS.get((config.get("architectures") or [""])[0], OTHER_TASK)


def adapter_base(config: dict, base: str | None = None) -> str:
    """The Hub id of an adapter's base model. Raises ValueError for a local one."""
    name = str(base or config.get("base_model_name_or_path"))
    if not public_name(name)["on_hub"]:
        raise ValueError(
            f"The adapter's base model {name} is not on the Hub: push it first, and pass its Hub id (user/name) as "
            "the base."
        )
    return name


def evaluation_results(run: dict, task: str) -> list[EvalResult]:
    name = ", ".join(entry["name"] for entry in run["data"]) or "unknown"
    kind = next((entry["name"] for entry in run["data"] if entry["on_hub"]), "custom")
    about = {"task_type": task, "dataset_type": kind, "dataset_name": name, "dataset_split": run["split"]}
    return [EvalResult(**about, metric_type=metric, metric_value=value) for metric, value in run["metrics"].items()]


def indented(text: str) -> str:
    """An indented code block, which no content can end."""
    return "\n".join(f"    {line}" for line in text.splitlines() or ["(empty)"])


def own_class(auto_class: str) -> str:
    return auto_class.replace("AutoModel", "ScratchGPT2") if auto_class != "AutoModel" else "ScratchGPT2Model"
