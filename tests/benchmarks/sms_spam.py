"""Accuracy and F1 on the SMS Spam Collection, mean and standard deviation over seeds, beside TF-IDF with logistic
regression on the same splits.

    python tests/benchmarks/sms_spam.py --sms SMSSpamCollection --model runs/base --seeds 5 --json sms_spam.json
    python tests/benchmarks/sms_spam.py --sms SMSSpamCollection --model runs/base --setting full --train all \\
        --epochs 4 --learning_rate 1e-4 --best_by f1

Settings: `balanced` is the tutorials' (747 messages of either kind, duplicates kept), `full` all messages without
duplicates. Each seed makes a split of its own (70/10/20), draws its own head and its own order of batches. The epoch
with the lowest validation loss (`--best_by f1`: with the highest F1 there) is tested, once. All runs in one process.

`--adapt_epochs` first trains the base as a language model on the training messages of the split, and on no others
(ULMFiT's second stage, Howard and Ruder 2018, arXiv:1801.06146, section 3.2). The filter of the Space has a benchmark
of its own, spam_filter.py.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "space"))

METRICS = ("accuracy", "precision", "recall", "f1", "roc_auc")
SETTINGS = {"balanced": {"balance_labels": True, "keep_duplicates": True}, "full": {}}


def adapt(base: str, texts: list[str], args, seed: int, folder: str) -> str:
    """Train `base` as a language model on `texts`, each by itself, for `args.adapt_epochs`; return its folder."""
    from transformers import Trainer, set_seed

    from scratch_gpt2 import load_tokenizer
    from scratch_gpt2.data.collators import PackingCollator, pack
    from scratch_gpt2.training.recipes import RecipeArguments
    from scratch_gpt2.training.start import model_to_continue

    set_seed(seed)
    tokenizer = load_tokenizer(base)
    encoded = tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]
    documents = [[*ids[: args.max_length], tokenizer.eos_token_id] for ids in encoded]
    options = {"report_to": "none", "disable_tqdm": True, "seed": seed, "num_train_epochs": args.adapt_epochs}
    options |= {"learning_rate": args.adapt_learning_rate, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
    options |= {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "weight_decay": 0.1}
    trainer = Trainer(
        model_to_continue(base),
        RecipeArguments(folder, **options, per_device_train_batch_size=4),
        train_dataset=pack([{"input_ids": ids, "labels": ids} for ids in documents], 512),
        data_collator=PackingCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(folder)
    return folder


def train_gpt2(data, args, seed: int, folder: str):
    """The trainer of the finished classifier."""
    from transformers import set_seed

    from scratch_gpt2 import load_tokenizer
    from scratch_gpt2.training.adapters import add_lora
    from scratch_gpt2.training.classification import encode_rows, load_classifier, make_trainer
    from scratch_gpt2.training.freezing import train_only
    from scratch_gpt2.training.recipes import CLASSIFICATION_LEARNING_RATES, ClassificationArguments
    from scratch_gpt2.training.trunk_cache import CACHED_PARTS

    base = args.model
    if args.adapt_epochs:
        base = adapt(base, [row["text"] for row in data.splits["train"]], args, seed, str(Path(folder, "adapted")))
    set_seed(seed)
    tokenizer = load_tokenizer(base)
    model = load_classifier(base, data.label_names, tokenizer, args.dropout)
    splits = {
        name: encode_rows(rows, tokenizer, model.config.label2id, args.max_length)[0]
        for name, rows in data.splits.items()
    }
    if args.train == "lora":
        model = add_lora(model, "SEQ_CLS", rank=4, alpha=8, dropout=args.dropout)
    else:
        train_only(model, args.train)
    options = {"report_to": "none", "disable_tqdm": True, "seed": seed, "num_train_epochs": args.epochs}
    options |= {"per_device_train_batch_size": args.batch_size, "logging_strategy": "no"}
    if args.group_by_length:
        options["train_sampling_strategy"] = "group_by_length"
    options["metric_for_best_model"] = args.best_by
    options["learning_rate"] = args.learning_rate or CLASSIFICATION_LEARNING_RATES[args.train]
    arguments = ClassificationArguments(folder, **options)
    cached_part = args.train if args.train in CACHED_PARTS else None
    trainer = make_trainer(model, arguments, tokenizer, splits, cached_part, Path(folder, "states"))
    trainer.train()
    for entry in trainer.state.log_history:
        if "eval_loss" in entry:
            numbers = " ".join(f"{name} {entry[f'eval_{name}']:.4f}" for name in ("loss", "accuracy", "f1"))
            print(f"  epoch {entry['epoch']:.0f}, validation: {numbers}", file=sys.stderr)
    return trainer


def gpt2_metrics(trainer) -> dict:
    metrics = trainer.predict(trainer.test_rows).metrics
    return {name: metrics[f"test_{name}"] for name in METRICS}


def tfidf_metrics(data) -> dict:
    from make_messages import fit_tfidf

    from scratch_gpt2.evaluation.metrics import classification_metrics

    model = fit_tfidf(data)
    probabilities = model.predict_log_proba([row["text"] for row in data.splits["test"]])
    references = [data.label_names.index(row["label"]) for row in data.splits["test"]]
    metrics = classification_metrics(probabilities.argmax(-1), references, probabilities, label_names=data.label_names)
    return {name: metrics[name] for name in METRICS}


def mean_and_deviation(results: list[dict]) -> dict[str, tuple[float, float]]:
    """Standard deviation of a sample (divided by n - 1); 0 for a single seed."""
    summary = {}
    for name in results[0]:
        values = [result[name] for result in results]
        summary[name] = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return summary


def read_data(args, setting: str, seed: int):
    from scratch_gpt2.data.text_classification import prepare, read_labelled_text

    return prepare(read_labelled_text(args.sms), args.sms, seed, unescape_entities=True, **SETTINGS[setting])


def measure(args, setting: str) -> dict[str, list[dict]]:
    results = {"gpt2": [], "tfidf": []}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        start = time.perf_counter()
        data = read_data(args, setting, seed)
        results["tfidf"].append(tfidf_metrics(data))
        if args.model:
            with tempfile.TemporaryDirectory() as folder:
                results["gpt2"].append(gpt2_metrics(train_gpt2(data, args, seed, folder)))
        for name, runs in results.items():
            if runs:
                numbers = ", ".join(f"{metric} {value:.4f}" for metric, value in runs[-1].items())
                print(f"{setting}, seed {seed}, {name}: {numbers}", file=sys.stderr)
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    return {name: runs for name, runs in results.items() if runs}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sms", required=True, help="the SMS Spam Collection, label<TAB>text")
    parser.add_argument("--model", help="base to start from, folder or Hub id; without it, only the baseline")
    parser.add_argument("--setting", choices=[*SETTINGS, "both"], default="both")
    parser.add_argument("--train", choices=["head", "last_block", "all", "lora"], default="last_block")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning_rate", type=float, help="by default examples/classify.py's")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--best_by", choices=["loss", "f1"], default="loss", help="metric that selects the epoch")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--adapt_epochs", type=float, default=0, help="epochs of language modeling before")
    parser.add_argument("--adapt_learning_rate", type=float, default=1e-3)
    parser.add_argument("--group_by_length", action="store_true", help="batches of texts of similar length")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--threads", type=int, help="PyTorch's threads; by default all cores")
    parser.add_argument("--json", help="file for the results of every seed")
    args = parser.parse_args()
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    settings = list(SETTINGS) if args.setting == "both" else [args.setting]
    results = {setting: measure(args, setting) for setting in settings}
    for setting, by_model in results.items():
        for name, runs in by_model.items():
            print(f"{setting} {name}")
            for metric, (mean, deviation) in mean_and_deviation(runs).items():
                print(f"  {metric:<28}{mean:.4f} ±{deviation:.4f}")
    if args.json:
        unfinished = f"{args.json}.tmp"
        Path(unfinished).write_text(json.dumps({"settings": vars(args), "results": results}, indent=1) + "\n")
        os.replace(unfinished, args.json)


if __name__ == "__main__":
    main()
