"""Teach a GPT-2 to label texts: spam or not, for example, in minutes on a laptop.

    python examples/prepare_classification.py --input sms_spam_collection.tsv --output sms --balance
    python examples/classify.py --data sms --model openai-community/gpt2 --output_dir runs/spam
    python examples/classify.py --data sms --model runs/base --train lora --learning_rate 1e-3 --output_dir runs/lora
    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 2 examples/classify.py \\
        --data sms --model runs/base --train all --output_dir runs/spam2
    python examples/classify.py --model runs/spam --explain "You have won a prize!"   # classify with what was trained

`--data` is a folder from examples/prepare_classification.py. `--train` chooses what is trained: `head` (the new head
alone), `last_block` (with the last block and the final norm), `all`, or `lora` (adapters in all blocks).

With `head` and `last_block` the frozen blocks run once for each text, without dropout, and their hidden states are
kept on disk; the folder is removed at the end unless `--trunk_cache` names one for further runs. `--no_cache_trunk`
computes them anew in every epoch, with the same result but for rounding (and but for the random numbers of dropout).

All of transformers' TrainingArguments can be set too: `--num_train_epochs`, `--seed`, `--train_sampling_strategy
group_by_length` (batches of short texts only and of long texts only: of the SMS messages 1.05 tokens are computed for
each token of a text instead of 2.36). A run that was stopped goes on with `--resume` added to its command.

The output folder gets the model and its tokenizer (adapters are merged, and kept by themselves in adapter/),
metrics.json, epochs.png, confusion_matrix.png and the numbers in both as .json, and run.json for the model card.
`--push_to_hub --hub_model_id me/spam` pushes at the end what `pipeline` loads, with its card.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import HfArgumentParser, TrainingArguments, set_seed

from scratch_gpt2 import ScratchGPT2ForSequenceClassification
from scratch_gpt2.cli import run_main
from scratch_gpt2.data.rows import hub_id
from scratch_gpt2.data.text_classification import class_weights, load_prepared
from scratch_gpt2.evaluation.metrics import classification_metrics
from scratch_gpt2.files import write_atomically
from scratch_gpt2.hardware import keep_freed_memory
from scratch_gpt2.hub.run_record import record_run
from scratch_gpt2.inspection import token_attributions
from scratch_gpt2.prediction import classify_text
from scratch_gpt2.tokenization import load_tokenizer
from scratch_gpt2.training.adapters import add_lora
from scratch_gpt2.training.checkpoints import checkpoint_to_resume
from scratch_gpt2.training.classification import (
    check_labels,
    confident_mistakes,
    encode_rows,
    head_labels,
    load_classifier,
    make_trainer,
)
from scratch_gpt2.training.freezing import train_only
from scratch_gpt2.training.plots import plot_confusion_matrix, plot_epochs
from scratch_gpt2.training.recipes import CLASSIFICATION_DEFAULTS, CLASSIFICATION_LEARNING_RATES
from scratch_gpt2.training.start import check_launch, check_push
from scratch_gpt2.training.trunk_cache import CACHED_PARTS, cache_bytes


@dataclass
class Arguments:
    model: str = field(metadata={"help": "What to start from: folder or Hub id of a GPT-2, ours or OpenAI's."})
    data: str | None = field(default=None, metadata={"help": "Folder from examples/prepare_classification.py."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder, Hub id or tiktoken:gpt2; by default the model's."}
    )
    train: Literal["head", "last_block", "all", "lora"] = field(
        default="last_block", metadata={"help": "What is trained; the rest stays as it is."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Cut texts to so many tokens; by default to the model's n_positions."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout in what is trained."})
    class_weights: bool = field(
        default=False, metadata={"help": "Weigh rare labels more in the loss, so that all labels count the same."}
    )
    early_stopping: int = field(
        default=3, metadata={"help": "Stop when the best validation loss is so many epochs old; 0: never."}
    )
    cache_trunk: bool = field(
        default=True, metadata={"help": "Keep the hidden states of frozen blocks on disk (head and last_block)."}
    )
    trunk_cache: str | None = field(
        default=None, metadata={"help": "Folder for them, not removed; by default one in output_dir, removed."}
    )
    lora_rank: int = field(default=4, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=8, metadata={"help": "The adapters' output is scaled by alpha / rank."})
    explain: list[str] = field(
        default_factory=list,
        metadata={"help": "Classify these texts and show how much each token speaks for the label."},
    )
    resume: bool = field(default=False, metadata={"help": "Continue from the newest complete checkpoint."})


def parse_arguments() -> tuple[Arguments, TrainingArguments]:
    parser = HfArgumentParser(
        (Arguments, TrainingArguments), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(**CLASSIFICATION_DEFAULTS, learning_rate=None)
    arguments, args = parser.parse_args_into_dataclasses()
    if args.learning_rate is None:
        args.learning_rate = CLASSIFICATION_LEARNING_RATES[arguments.train]
    return arguments, args


def explain(model, tokenizer, texts: list[str]) -> None:
    for text in texts:
        label, probability = next(iter(classify_text(model, tokenizer, text)[0].items()))
        print(f"\n{label} {probability:.3f}  {one_line(text)}")
        for token, score in token_attributions(model, tokenizer, text, label):
            print(f"  {score:+.3f}  {one_line(repr(token))}")


def one_line(text: str, width: int = 100) -> str:
    """Safe to print: a stranger's text could hold characters that command a terminal or that it does not know."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    text = text if len(text) <= width else text[: width - 1] + "…"
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def explain_only(arguments: Arguments) -> None:
    if not arguments.explain:
        raise ValueError(
            "--data is missing: give a folder that examples/prepare_classification.py made, or --explain TEXT."
        )
    if Path(arguments.model, "adapter_config.json").is_file():
        raise ValueError(f"{arguments.model} is an adapter; give a model that it was merged into (merge_and_unload).")
    if head_labels(arguments.model) is None:
        raise ValueError(f"{arguments.model} is not a classifier; train one with --data first.")
    model = ScratchGPT2ForSequenceClassification.from_pretrained(arguments.model)
    explain(model, load_tokenizer(arguments.tokenizer or arguments.model), arguments.explain)


def choose_max_length(asked: int | None, n_positions: int) -> int:
    if asked is not None and not 1 <= asked <= n_positions:
        raise ValueError(f"max_length is {asked}, but the model reads 1 to {n_positions} tokens (n_positions).")
    return asked or n_positions


def weights_of(model, rows: list[dict]) -> list[float]:
    """In the order of the model's labels."""
    labels = [row["label"] for row in rows]
    by_name = dict(zip(sorted(set(labels)), class_weights(labels), strict=True))
    return [by_name[model.config.id2label[i]] for i in range(model.config.num_labels)]


def describe(model, arguments: Arguments, args, splits: dict, cut: int, cached: bool, checkpoint: str | None) -> str:
    """What was derived, one line each."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    texts = sum(len(rows) for rows in splits.values())
    size = sum(cache_bytes(rows, arguments.train, model) for rows in splits.values()) if cached else 0
    lines = {
        "model": f"{arguments.model}, {total / 1e6:.1f}M parameters, {trained:,} of them trained ({arguments.train})",
        "labels": ", ".join(model.config.id2label.values()),
        "data": ", ".join(f"{len(rows):,} {name}" for name, rows in splits.items()) + " texts",
        "length": f"{cut:,} of {texts:,} texts were cut to their first {arguments.max_length} tokens",
        "cache": f"{size / 1e6:.1f} MB of hidden states in {arguments.trunk_cache}" if cached else "none",
        "recipe": f"up to {args.num_train_epochs:g} epochs, batches of {args.train_batch_size} x {args.world_size}, "
        f"learning rate {args.learning_rate:g}, seed {args.seed}",
        "start": f"continues {checkpoint}" if checkpoint else "step 0",
    }
    return "\n".join(f"{name:<8}{one_line(line, 300)}" for name, line in lines.items())


def save(trainer, model, tokenizer, output_dir: str):
    """Write the model that `pipeline` loads; return it, with adapters merged."""
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(Path(output_dir, "adapter"))
        model = model.merge_and_unload()
    model.config.use_cache = True
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return model


def report(trainer, prediction, label_names: list[str], output_dir: str) -> dict:
    """Write, print and return the test metrics, and print the most confident mistakes."""
    logits, references = prediction.predictions, prediction.label_ids
    metrics = classification_metrics(logits.argmax(-1), references, logits, label_names=label_names)
    # Trainer's own counts a row twice where the last batch had to be filled up for several processes.
    metrics["loss"] = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(references)).item()
    content = json.dumps({"test": metrics, "best_validation_loss": trainer.state.best_metric}, indent=1).encode()
    write_atomically(Path(output_dir, "metrics.json"), lambda file: file.write(content + b"\n"))
    plot_epochs(trainer.state.log_history, Path(output_dir, "epochs.png"))
    plot_confusion_matrix(metrics["confusion_matrix"], label_names, Path(output_dir, "confusion_matrix.png"))

    print(f"\ntest    {len(references):,} texts")
    for name, value in metrics.items():
        print(f"  {name:<17} {value:.4f}" if name != "confusion_matrix" else f"  {name:<17} {value}")
    rows = [trainer.test_rows[i] for i in range(len(references))]
    mistakes = confident_mistakes(rows, logits)
    print("\nmost confident mistakes:" if mistakes else "\nno mistakes")
    for i, predicted, probability in mistakes:
        truth = label_names[rows[i]["labels"]]
        print(f"  {truth} taken for {label_names[predicted]} ({probability:.3f}): {one_line(rows[i]['text'], 80)}")
    return metrics


def main() -> None:
    arguments, args = parse_arguments()
    if arguments.data is None:
        return explain_only(arguments)
    check_launch(args)
    keep_freed_memory()
    check_push(args)
    data = load_prepared(arguments.data)
    check_labels(data)
    checkpoint = checkpoint_to_resume(args.output_dir, arguments.resume)
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
    set_seed(args.seed)
    model = load_classifier(arguments.model, data.label_names, tokenizer, arguments.dropout)
    label_names = list(model.config.id2label.values())
    arguments.max_length = tokenizer.model_max_length = choose_max_length(
        arguments.max_length, model.config.n_positions
    )
    splits, cut = {}, 0
    for name, rows in data.splits.items():
        splits[name], cut_here = encode_rows(rows, tokenizer, model.config.label2id, arguments.max_length)
        cut += cut_here

    if arguments.train == "lora":
        model = add_lora(model, "SEQ_CLS", arguments.lora_rank, arguments.lora_alpha, arguments.dropout)
    else:
        train_only(model, arguments.train)
    cached = arguments.cache_trunk and arguments.train in CACHED_PARTS
    temporary = arguments.trunk_cache is None
    if temporary:
        arguments.trunk_cache = str(Path(args.output_dir, "trunk_cache"))
    if args.process_index == 0:
        print(describe(model, arguments, args, splits, cut, cached, checkpoint), flush=True)
    trainer = make_trainer(
        model,
        args,
        tokenizer,
        splits,
        arguments.train if cached else None,
        arguments.trunk_cache,
        class_weights=weights_of(model, data.splits["train"]) if arguments.class_weights else None,
        patience=arguments.early_stopping,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    prediction = trainer.predict(trainer.test_rows)
    if trainer.is_world_process_zero():
        model = save(trainer, model, tokenizer, args.output_dir)
        metrics = report(trainer, prediction, label_names, args.output_dir)
        del metrics["confusion_matrix"]
        record_run(
            args.output_dir,
            arguments=(arguments, args),
            base=arguments.model,
            data=[hub_id(data.report["source"]) or arguments.data],
            metrics=metrics,
            split="test",
        )
        explain(model, tokenizer, arguments.explain)
        if cached and temporary:
            shutil.rmtree(arguments.trunk_cache)
        print("\nUse the model:\n\n    import scratch_gpt2, transformers")
        print(f"    print(transformers.pipeline('text-classification', {args.output_dir!r})('You have won!'))")
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
