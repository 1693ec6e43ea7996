"""Evaluating a checkpoint without training it: `--eval_only` of the training scripts."""

import math
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

from ..cli import given_options
from ..evaluation.models import adapter_config, find_revision, load_causal_lm
from ..files import check_outputs, write_json
from ..hub.run_record import public_name
from .recipes import RecipeArguments
from .start import model_to_continue

EVALUATION_FILE = "evaluation.json"


def evaluates_only(args: RecipeArguments) -> bool:
    """Whether to evaluate and not to train: with `--eval_only`, and with `--do_eval` or `--do_predict` but without
    `--do_train`, which mean that in transformers' own scripts."""
    return args.eval_only or (bool(given_options(args) & {"do_eval", "do_predict"}) and not args.do_train)


def check_evaluation(args: RecipeArguments, inputs: Iterable[str | None] = ()) -> None:
    """Raise an error if evaluation.json cannot be written, or exists and `overwrite_output_dir` is not set."""
    file = Path(str(args.output_dir), EVALUATION_FILE)
    if args.process_index == 0:
        check_outputs([file], inputs=[name for name in inputs if name], overwrite=args.overwrite_output_dir)


def load_evaluated(name: str) -> PreTrainedModel:
    """The language model to evaluate: one of ours or OpenAI's, or a base with an adapter."""
    if adapter_config(name, find_revision(name)) is not None:
        return load_causal_lm(name)
    return model_to_continue(name)


def write_evaluation(
    args: RecipeArguments, *, model: str, data: Iterable[str], split: str, metrics: dict[str, float]
) -> None:
    """Write evaluation.json into the output folder, and print the metrics; in process 0."""
    if args.process_index != 0:
        return
    known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    content = {"model": public_name(model), "data": [public_name(name) for name in data], "split": split}
    file = Path(str(args.output_dir), EVALUATION_FILE)
    write_json(file, content | {"metrics": known})
    print(f"\n{model}, {split} split")
    for name, value in metrics.items():
        print(f"  {name:<17} {value:.4f}")
    print(f"written to {file}")
