"""Teach a GPT-2 to label texts: spam or not, for example, in minutes on a laptop.

    python examples/prepare_classification.py --input sms_spam_collection.tsv --output sms --balance
    python examples/classify.py --data sms --model openai-community/gpt2 --output_dir runs/spam
    python examples/classify.py --data sms --model runs/base --train lora --learning_rate 1e-3 --output_dir runs/lora
    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 2 examples/classify.py \\
        --data sms --model runs/base --train all --output_dir runs/spam2
    python examples/classify.py --model runs/spam --explain "You have won a prize!"   # use the trained model

`--data` is a folder from examples/prepare_classification.py. `--train` chooses what is trained: `head` (the new head
only), `last_block` (with the last block and the final norm), `all`, or `lora` (adapters in all blocks).

With `head` and `last_block`, the frozen blocks run once per text, without dropout, and their hidden states are kept on
disk. That folder is removed at the end unless `--trunk_cache` names one to use again. `--no_cache_trunk` computes them
in every epoch instead; the result is the same up to rounding and the random numbers of dropout.

`--max_length` cuts the training texts. The validation and test texts are read whole, up to the model's context, as the
trained model will read texts. Precision, recall and F1 are those of the rarer of two labels, or of `--positive`.

All of transformers' TrainingArguments can be set too: `--num_train_epochs`, `--seed`, `--train_sampling_strategy
group_by_length` (batches of texts of similar length: for the SMS messages 1.05 tokens are computed per token of text
instead of 2.36). To continue a run that was stopped, add `--resume` to its command. `--eval_only`
measures the classifier `--model` on the test texts instead, and writes evaluation.json.

The output folder gets the model and its tokenizer (adapters are merged, and also saved in adapter/), metrics.json,
epochs.png, confusion_matrix.png and the numbers in both as .json, and run.json for the model card.
`--push_to_hub --hub_model_id me/spam` pushes at the end what `pipeline` loads, with its card.
"""

if __name__ == "__main__":  # --help and mistyped options are answered before the imports below, which take seconds
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "_quick.py"))

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from scratch_gpt2 import ScratchGPT2ForSequenceClassification
from scratch_gpt2.cli import given_options, parse_arguments, run_main
from scratch_gpt2.command_help import LENGTH_ALIASES, MODEL_ALIASES, TOKENIZER_ALIASES, public
from scratch_gpt2.data.rows import hub_id
from scratch_gpt2.data.text_classification import load_prepared
from scratch_gpt2.evaluation.models import check_finite
from scratch_gpt2.hardware import keep_freed_memory
from scratch_gpt2.hub.run_record import record_run
from scratch_gpt2.tokenization import load_tokenizer
from scratch_gpt2.training.checks import (
    check_fits_checkpoint,
    check_installed,
    check_row_count,
    check_training_arguments,
    open_output_dir,
    remove_results,
)
from scratch_gpt2.training.classification import (
    ClassificationTrainer,
    check_labels,
    encode_splits,
    fit_tokenizer,
    head_labels,
    label_weights,
    load_classifier,
    make_trainer,
    positive_label,
)
from scratch_gpt2.training.classification_report import check_explainable, explain, one_line, report
from scratch_gpt2.training.evaluation_only import check_evaluation, evaluates_only, write_evaluation
from scratch_gpt2.training.freezing import train_only
from scratch_gpt2.training.identity import check_identity, fingerprint, same_path
from scratch_gpt2.training.recipes import CLASSIFICATION_LEARNING_RATES, ClassificationArguments
from scratch_gpt2.training.start import check_launch, check_push, describe
from scratch_gpt2.training.trunk_cache import CACHED_PARTS, states_bytes

USAGE = """
Use the model:

    import scratch_gpt2, transformers
    print(transformers.pipeline('text-classification', {output_dir!r})('You have won!'))"""
METRICS = ("loss", "accuracy", "precision", "recall", "f1", "roc_auc")


@dataclass
class Arguments:
    model: str = field(
        metadata=public("Model to start from: folder or Hub id of a GPT-2, ours or OpenAI's.", MODEL_ALIASES)
    )
    data: str | None = field(default=None, metadata=public("Folder from examples/prepare_classification.py."))
    tokenizer: str | None = field(
        default=None, metadata=public("Folder, Hub id or tiktoken:gpt2; by default the model's.", TOKENIZER_ALIASES)
    )
    train: Literal["head", "last_block", "all", "lora"] = field(
        default="last_block", metadata=public("What is trained; the rest is frozen.")
    )
    max_length: int | None = field(
        default=None,
        metadata=public("Cut training texts to this many tokens; by default to n_positions.", LENGTH_ALIASES),
    )
    dropout: float = field(default=0.0, metadata=public("Dropout in what is trained."))
    class_weights: bool = field(
        default=False, metadata=public("Weight the rows in the loss so that every label counts the same.")
    )
    positive: str | None = field(
        default=None, metadata=public("The label of precision, recall and F1; by default the rarer of two.")
    )
    early_stopping: int = field(
        default=3, metadata=public("Stop after this many evaluations without a better one; 0: never.")
    )
    cache_trunk: bool = field(
        default=True, metadata={"help": "Keep the hidden states of frozen blocks on disk (head and last_block)."}
    )
    trunk_cache: str | None = field(
        default=None, metadata={"help": "Folder to keep them in; by default one in output_dir, removed at the end."}
    )
    lora_rank: int = field(default=4, metadata=public("With --train lora: rank of the adapters.", ["--lora_r"]))
    lora_alpha: int = field(
        default=8, metadata=public("With --train lora: the scale of the adapters is alpha / rank.")
    )
    explain: list[str] = field(
        default_factory=list,
        metadata={"help": "Classify these texts and show how much each token speaks for the label."},
    )
    resume: bool = field(default=False, metadata={"help": "Continue from the newest complete checkpoint."})


def recipe(parsed) -> dict:
    """The defaults that depend on other options."""
    return {"learning_rate": CLASSIFICATION_LEARNING_RATES[parsed.train]}


def explain_only(arguments: Arguments) -> None:
    if not arguments.explain:
        raise ValueError(
            "--data is missing: give a folder that examples/prepare_classification.py made, or --explain TEXT."
        )
    if Path(arguments.model, "adapter_config.json").is_file():
        raise ValueError(f"{arguments.model} is an adapter; give the model that it was merged into.")
    if head_labels(arguments.model) is None:
        raise ValueError(f"{arguments.model} is not a classifier; train one with --data first.")
    model = check_finite(ScratchGPT2ForSequenceClassification.from_pretrained(arguments.model), arguments.model)
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
    check_explainable(tokenizer, arguments.explain, n_positions=model.config.n_positions)
    explain(model, tokenizer, arguments.explain)


def check(arguments: Arguments, args: ClassificationArguments) -> None:
    """Raise an error for options that do not fit together."""
    check_launch(args)
    check_training_arguments(args, metrics=METRICS, predictions=True)
    check_installed("evaluate", "sklearn", "matplotlib", needed_for="examples/classify.py")
    if arguments.train == "lora":
        check_installed("peft", needed_for="--train lora")
    for name in ("lora_rank", "lora_alpha"):
        if name in given_options(arguments) and arguments.train != "lora":
            raise ValueError(f"--{name} is for adapters: add --train lora, or leave it out.")
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} is {getattr(arguments, name)} but must be at least 1.")
    if not 0 <= arguments.dropout < 1:
        raise ValueError(f"dropout is {arguments.dropout:g} but must be from 0 to below 1.")
    if arguments.dropout and arguments.train == "head":
        raise ValueError("--dropout acts in trained blocks, but --train head trains none; leave it out.")
    cached = arguments.cache_trunk and arguments.train in CACHED_PARTS
    if arguments.trunk_cache is not None and not cached:
        raise ValueError("--trunk_cache is for --train head or last_block without --no_cache_trunk; leave it out.")
    for name in ("activation_checkpointing", "neftune_noise_alpha"):
        if cached and getattr(args, name):
            raise ValueError(f"--{name} needs the blocks that the trunk cache replaces: add --no_cache_trunk.")
    check_push(args)


def choose_trained(model: PreTrainedModel, arguments: Arguments) -> PreTrainedModel:
    if arguments.train != "lora":
        train_only(model, arguments.train)
        return model
    from scratch_gpt2.training.adapters import add_lora  # needs peft

    return add_lora(
        model, task_type="SEQ_CLS", rank=arguments.lora_rank, alpha=arguments.lora_alpha, dropout=arguments.dropout
    )


def header(trainer: ClassificationTrainer, model, arguments: Arguments, splits: dict, cut: str, checkpoint) -> str:
    """What was derived, one line each."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    head = "" if head_labels(arguments.model) else " (a new head)"
    cache = "none"
    if arguments.trunk_cache:
        size = sum(states_bytes(rows, arguments.train, model) for rows in splits.values())
        cache = f"{size / 1e6:.1f} MB of hidden states in {arguments.trunk_cache}"
    lines = {
        "model": arguments.model,
        "labels": ", ".join(model.config.id2label.values()) + head,
        "data": ", ".join(f"{len(rows):,} {name}" for name, rows in splits.items()) + " texts",
        "length": cut,
        "cache": cache,
        "trained": f"{trained:,} of {total:,} parameters ({arguments.train})",
    }
    return describe(trainer, checkpoint, **{name: one_line(line, 300) for name, line in lines.items()})


def check_same_run(trainer: ClassificationTrainer, arguments: Arguments, args, checkpoint, splits: dict) -> list[str]:
    """The changes of a resumed run that take effect. Raises ValueError for those that cannot."""
    if checkpoint is not None:
        check_fits_checkpoint(trainer.model, checkpoint, advice="--train, adapters and --cache_trunk")
    names = ("train", "max_length", "dropout", "class_weights", "lora_alpha")
    return check_identity(
        args,
        checkpoint,
        **{name: getattr(arguments, name) for name in names},
        model=same_path(arguments.model),
        data=fingerprint([[rows[i]["text"] for i in range(len(rows))] for rows in splits.values()]),
    )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output_dir: str) -> PreTrainedModel:
    """Write the model that `pipeline` loads; return it, with adapters merged."""
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(Path(output_dir, "adapter"))
        model = model.merge_and_unload()
    model.config.use_cache = True
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return model


def record(arguments: Arguments, args: ClassificationArguments, source: str | None, metrics: dict[str, float]) -> None:
    record_run(
        args.output_dir,
        arguments=(arguments, args),
        base=arguments.model,
        data=[source or arguments.data],
        metrics=metrics,
        split="test",
    )


def evaluate_only(arguments: Arguments, args: ClassificationArguments) -> None:
    """Measure a classifier on the test texts; train nothing."""
    check_evaluation(args, inputs=(arguments.model, arguments.data))
    data = load_prepared(arguments.data)
    if head_labels(arguments.model) is None:
        raise ValueError(f"{arguments.model} is not a classifier; leave out --eval_only to train one.")
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
    model = load_classifier(arguments.model, data.label_names, tokenizer)
    fit_tokenizer(tokenizer, model)
    positive = positive_label(data.splits["train"], list(model.config.id2label.values()), wanted=arguments.positive)
    splits, _ = encode_splits(data, tokenizer, model.config)
    trainer = make_trainer(model, args, tokenizer, splits, positive=positive)
    measured = trainer.predict(trainer.test_rows).metrics
    metrics = {name: measured[f"test_{name}"] for name in METRICS if f"test_{name}" in measured}
    source = hub_id(data.report["source"]) or arguments.data
    write_evaluation(args, model=arguments.model, data=[source], split="test", metrics=metrics)


def main() -> None:
    arguments, args = parse_arguments(Arguments, ClassificationArguments, description=__doc__, defaults=recipe)
    if arguments.data is None:
        return explain_only(arguments)
    check(arguments, args)
    if evaluates_only(args):
        return evaluate_only(arguments, args)
    keep_freed_memory()
    data = load_prepared(arguments.data)
    check_labels(data)
    check_row_count(args, rows=len(data.splits["train"]))
    inputs = (arguments.model, arguments.data, arguments.tokenizer)
    checkpoint, overwrite = open_output_dir(args, resume=arguments.resume, inputs=inputs)
    set_seed(args.seed)
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
    model = load_classifier(arguments.model, data.label_names, tokenizer, dropout=arguments.dropout)
    fit_tokenizer(tokenizer, model)
    label_names = list(model.config.id2label.values())
    arguments.positive = positive_label(data.splits["train"], label_names, wanted=arguments.positive)
    check_explainable(tokenizer, arguments.explain, n_positions=model.config.n_positions)
    splits, cut = encode_splits(data, tokenizer, model.config, max_length=arguments.max_length)
    model = choose_trained(model, arguments)
    cached = arguments.cache_trunk and arguments.train in CACHED_PARTS
    temporary = Path(args.output_dir, "trunk_cache") if cached and arguments.trunk_cache is None else None
    arguments.trunk_cache = str(temporary) if temporary else arguments.trunk_cache
    if args.process_index == 0:
        remove_results(args.output_dir, overwrite=overwrite)
    trainer = make_trainer(
        model,
        args,
        tokenizer,
        splits,
        cached_part=arguments.train if cached else None,
        cache_folder=arguments.trunk_cache,
        class_weights=label_weights(data.splits["train"], label_names) if arguments.class_weights else None,
        patience=arguments.early_stopping,
        positive=arguments.positive,
    )
    changes = check_same_run(trainer, arguments, args, checkpoint, splits)
    if trainer.is_world_process_zero():
        print(header(trainer, model, arguments, splits, cut, checkpoint), *changes, sep="\n", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    validation_loss = trainer.validation_loss()
    prediction = trainer.predict(trainer.test_rows)
    if trainer.is_world_process_zero():
        model = save(model, tokenizer, args.output_dir)
        metrics = report(trainer, prediction, validation_loss, args.output_dir)
        record(arguments, args, hub_id(data.report["source"]), metrics)
        explain(model, tokenizer, arguments.explain)
        if temporary:
            shutil.rmtree(temporary)
        print(USAGE.format(output_dir=args.output_dir))
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
