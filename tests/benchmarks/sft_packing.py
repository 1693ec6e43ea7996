"""Instruction tuning on packed rows, compared with padded ones and with TRL's SFTTrainer on transformers' GPT-2.

    python tests/benchmarks/sft_packing.py --data alpaca_data.json
    python tests/benchmarks/sft_packing.py --data alpaca_data.json --tokenizer tiktoken:gpt2 --conversations 48 \\
        --steps 1 --rounds 1 --dtype float32

Each trainer runs in a process of its own, in turns, from the same random weights on the same conversations: those of
the file's first that fit into `--length` tokens. A step goes through all of them, in passes of `--batch` packed rows
or `--padded_batch` padded ones, so that the loss is the mean over the same response tokens and must agree step by
step. Speed is response tokens per second; memory is what the process (on a GPU: torch) held at most in training.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from train_step import TOLERANCE, peak_mb, reset_peak

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt2_vocabulary import use_packaged_vocabulary

NAMES = ("trl", "padded", "packed")


def train(name: str, args) -> dict:
    """A warm-up step and `args.steps` measured ones of one trainer, in this process."""
    import torch
    from transformers import TrainerCallback

    from scratch_gpt2.data.instructions import encode_conversation, read_instructions
    from scratch_gpt2.linear_cross_entropy import IGNORE_INDEX
    from scratch_gpt2.tokenization import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    conversations, examples = [], []
    for conversation in read_instructions(args.data):
        example = encode_conversation(tokenizer, conversation.messages, max_length=10**9)
        if len(examples) < args.conversations and len(example["input_ids"]) <= args.length:
            conversations.append(conversation)
            examples.append(example)

    class Watch(TrainerCallback):
        def __init__(self):
            self.seconds = []

        def on_train_begin(self, args, state, control, **kwargs):
            self.mark = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            now = time.perf_counter()
            self.seconds.append(now - self.mark)
            self.mark = now

    computed = []
    trainer = (trl_trainer if name == "trl" else own_trainer)(name, args, tokenizer, conversations, examples)
    collate = trainer.data_collator

    def counting_collator(rows):
        batch = collate(rows)
        computed.append(batch["input_ids"].numel())
        return batch

    trainer.data_collator = counting_collator
    watch = Watch()
    trainer.add_callback(watch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reset_peak(device)
    cpu = time.process_time()
    trainer.train()
    return {
        "model": name,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": watch.seconds[1:],
        "cpu_seconds": (time.process_time() - cpu) / (args.steps + 1),
        "peak_mb": peak_mb(device),
        "tokens": sum(len(example["input_ids"]) for example in examples),
        "response_tokens": sum(label != IGNORE_INDEX for example in examples for label in example["labels"]),
        "computed_tokens": sum(computed) / (args.steps + 1),
        "conversations": len(examples),
    }


def training_options(name: str, args) -> dict:
    """Accumulation without end: a step is then the whole epoch."""
    import torch

    return {
        "output_dir": args.weights,
        "max_steps": args.steps + 1,
        "per_device_train_batch_size": args.padded_batch if name == "padded" else args.batch,
        "gradient_accumulation_steps": 10**6,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": args.dtype == "bf16",
    }


def own_trainer(name: str, args, tokenizer, conversations, examples):
    from transformers import TrainingArguments

    from scratch_gpt2.data.collators import PackingCollator, PaddingCollator, pack
    from scratch_gpt2.training.start import model_to_continue
    from scratch_gpt2.training.trainer import LanguageModelTrainer

    packed = name == "packed"
    return LanguageModelTrainer(
        model_to_continue(args.weights),
        TrainingArguments(**training_options(name, args)),
        train_dataset=pack(examples, args.length) if packed else examples,
        data_collator=(PackingCollator if packed else PaddingCollator)(tokenizer.pad_token_id),
    )


def trl_trainer(name: str, args, tokenizer, conversations, examples):
    import torch
    from datasets import Dataset
    from transformers import GPT2LMHeadModel
    from trl import SFTConfig, SFTTrainer

    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    packing = {"packing": True, "max_length": args.length, "assistant_only_loss": True}
    return SFTTrainer(
        GPT2LMHeadModel.from_pretrained(args.weights, dtype=torch.float32, **no_dropout),
        SFTConfig(**training_options(name, args), **packing, gradient_checkpointing=False),
        train_dataset=Dataset.from_list([{"messages": conversation.messages} for conversation in conversations]),
        processing_class=tokenizer,
    )


def compare(args) -> list[dict]:
    """All rounds of all trainers, each in its own process; raises where the losses differ."""
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    with tempfile.TemporaryDirectory() as folder:
        set_seed(0)
        sizes = {name: getattr(args, name) for name in ("n_layer", "n_embd", "n_head", "vocab_size")}
        GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
        runs = []
        for _ in range(args.rounds):
            for name in NAMES:
                command = [sys.executable, __file__, "--only", name, "--weights", folder, *sys.argv[1:]]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                runs.append(json.loads(output.splitlines()[-1]))
    for run in runs:
        for loss, expected in zip(run["losses"], runs[0]["losses"], strict=True):
            if abs(loss - expected) > TOLERANCE[args.dtype] * expected:
                raise RuntimeError(f"The losses differ: {run['model']} {run['losses']}, {runs[0]['losses']}")
    return runs


def summarise(runs: list[dict]) -> dict[str, dict]:
    summary = {}
    for name in NAMES:
        mine = [run for run in runs if run["model"] == name]
        seconds = statistics.median(second for run in mine for second in run["seconds"])
        summary[name] = {
            "seconds_per_epoch": seconds,
            "cpu_seconds_per_epoch": statistics.median(run["cpu_seconds"] for run in mine),
            "response_tokens_per_second": mine[0]["response_tokens"] / seconds,
            "peak_mb": statistics.median(run["peak_mb"] for run in mine),
            "padding": 1 - mine[0]["tokens"] / statistics.mean(run["computed_tokens"] for run in mine),
            "losses": mine[0]["losses"],
        }
    return summary


def main():
    use_packaged_vocabulary()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="instructions in .json or .jsonl")
    parser.add_argument("--tokenizer", default="tiktoken:gpt2", help="folder, Hub id or tiktoken:gpt2")
    parser.add_argument("--conversations", type=int, default=256, help="conversations per step")
    parser.add_argument("--length", type=int, default=512, help="tokens per packed row")
    parser.add_argument("--batch", type=int, default=2, help="packed rows per pass")
    parser.add_argument("--padded_batch", type=int, default=8, help="padded conversations per pass")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bf16")
    parser.add_argument("--steps", type=int, default=2, help="measured steps per process")
    parser.add_argument("--rounds", type=int, default=2, help="processes per trainer")
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--n_head", type=int, default=12)
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(train(args.only, args)))
        return
    runs = compare(args)
    summary = summarise(runs)
    if args.json:
        print(json.dumps({"options": vars(args), "trainers": summary}))
        return
    first, trl = runs[0], summary["trl"]
    print(
        f"{first['conversations']} conversations of {first['tokens']:,} tokens, {first['response_tokens']:,} learned"
    )
    print(
        f"{'trainer':<9}{'s/epoch':>9}{'CPU s':>8}{'resp. tok/s':>13}{'speed':>8}{'padding':>9}{'peak MB':>9}   losses"
    )
    for name, result in summary.items():
        print(
            f"{name:<9}{result['seconds_per_epoch']:>9.2f}{result['cpu_seconds_per_epoch']:>8.2f}"
            f"{result['response_tokens_per_second']:>13.1f}"
            f"{trl['seconds_per_epoch'] / result['seconds_per_epoch']:>7.2f}x{result['padding']:>9.1%}"
            f"{result['peak_mb']:>9.0f}   {' '.join(f'{loss:.6f}' for loss in result['losses'])}"
        )


if __name__ == "__main__":
    main()
