"""Time to train the last block of a GPT-2 124M as a classifier, with and without cached hidden states, beside
transformers' GPT-2 with the same layers frozen.

    python tests/benchmarks/classification_epoch.py --data sms_balanced         # examples/prepare_classification.py
    python tests/benchmarks/classification_epoch.py --data sms_balanced --rows 64 --epochs 1 --n_layer 2 --n_embd 64

Each training is a process of its own, one after the other: the same random weights, batches, learning rate and
evaluations (of the validation rows and as many training rows, after every epoch), float32, texts cut to 128 tokens and
padded to the longest of a batch. The time is that of training with its evaluations, and of making the cache. Cached
and uncached, our losses must agree to 1e-4 and the other metrics to 4 digits; transformers' losses to 1e-3.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt2_vocabulary import use_packaged_vocabulary

NAMES = ("cached", "uncached", "transformers")
METRICS = ("loss", "accuracy", "precision", "recall", "f1", "roc_auc")


def train(name: str, args, folder: Path) -> dict:
    """One training, in this process."""
    from transformers import GPT2ForSequenceClassification, set_seed
    from transformers.utils import logging

    from scratch_gpt2 import ScratchGPT2ForSequenceClassification, load_tokenizer
    from scratch_gpt2.data.text_classification import load_prepared
    from scratch_gpt2.training.classification import encode_rows, make_trainer
    from scratch_gpt2.training.freezing import train_only
    from scratch_gpt2.training.recipes import ClassificationArguments

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(args.tokenizer)
    data = load_prepared(args.data)
    label2id = {label: number for number, label in enumerate(data.label_names)}
    splits = {
        split: encode_rows(rows[: args.rows], tokenizer, label2id, args.max_length)[0]
        for split, rows in data.splits.items()
    }
    set_seed(0)
    if name == "transformers":
        model = GPT2ForSequenceClassification.from_pretrained(folder / "weights", use_cache=False)
        freeze_as_ours(model)
    else:
        model = ScratchGPT2ForSequenceClassification.from_pretrained(folder / "weights", use_cache=False)
        train_only(model, "last_block")
    options = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    options |= {"load_best_model_at_end": False, "num_train_epochs": args.epochs, "learning_rate": 5e-5}
    arguments = ClassificationArguments(str(folder / name), **options)
    start, cpu_start = time.perf_counter(), time.process_time()
    cached_part = "last_block" if name == "cached" else None
    trainer = make_trainer(model, arguments, tokenizer, splits, cached_part, folder / "states")
    cache_seconds = time.perf_counter() - start
    trainer.train()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    test = trainer.predict(trainer.test_rows).metrics
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return {
        "model": name,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "cache_seconds": cache_seconds if name == "cached" else 0.0,
        "metrics": [{key: entry[f"eval_{key}"] for key in METRICS} for entry in evaluations]
        + [{key: test[f"test_{key}"] for key in METRICS}],
    }


def freeze_as_ours(model) -> None:
    """Last block, final norm and head of transformers' GPT-2."""
    model.requires_grad_(False)
    for module in (model.transformer.h[-1], model.transformer.ln_f, model.score):
        module.requires_grad_(True)


def write_weights(args, folder: Path) -> None:
    """Random weights that all three start from, without dropout, which each would draw differently."""
    from transformers import GPT2Config, GPT2ForSequenceClassification, set_seed

    from scratch_gpt2 import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    sizes = {"n_layer": args.n_layer, "n_embd": args.n_embd, "n_head": max(1, args.n_embd // 64)}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**sizes, **dropout, num_labels=2, pad_token_id=tokenizer.pad_token_id)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"The tokenizer has {len(tokenizer)} tokens, GPT-2 {config.vocab_size}; use a smaller one.")
    set_seed(0)
    GPT2ForSequenceClassification(config).save_pretrained(folder / "weights")


def check_same_work(results: list[dict]) -> None:
    cached, uncached, reference = (result["metrics"] for result in results)
    for ours, plain, theirs in zip(cached, uncached, reference, strict=True):
        for name in METRICS:
            if abs(ours[name] - plain[name]) > (1e-4 if name == "loss" else 5e-5):
                raise RuntimeError(f"{name} is {ours[name]} cached but {plain[name]} uncached.")
        if abs(ours["loss"] - theirs["loss"]) > 1e-3:
            raise RuntimeError(f"The loss is {ours['loss']} here but {theirs['loss']} in transformers' GPT-2.")


def main():
    use_packaged_vocabulary()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder from examples/prepare_classification.py")
    parser.add_argument("--tokenizer", default="tiktoken:gpt2", help="folder, Hub id or tiktoken:gpt2")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rows", type=int, help="use only the first N rows of each split")
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--only", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(train(args.only, args, Path(args.folder))))
        return
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as folder:
        write_weights(args, Path(folder))
        results = []
        for name in NAMES:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--folder", folder]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            results.append(json.loads(output.splitlines()[-1]))
    check_same_work(results)
    slowest = results[-1]["seconds"]
    if args.json:
        print(json.dumps({"settings": vars(args), "results": results}))
        return
    print(
        f"{'training':<14}{'seconds':>9}{'CPU s':>9}{'of which cache':>16}{'speed':>8}   test loss  accuracy        F1"
    )
    for result in results:
        test = result["metrics"][-1]
        print(
            f"{result['model']:<14}{result['seconds']:>9.1f}{result['cpu_seconds']:>9.1f}"
            f"{result['cache_seconds']:>16.1f}{slowest / result['seconds']:>7.2f}x"
            f"{test['loss']:>12.4f}{test['accuracy']:>10.4f}{test['f1']:>10.4f}"
        )


if __name__ == "__main__":
    main()
