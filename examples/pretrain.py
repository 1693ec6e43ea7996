"""Pretrain a GPT-2, from a text file on a laptop to token shards on many GPUs.

    python examples/pretrain.py --smoke                                             # a minute on any machine, offline
    python examples/pretrain.py --data book.txt --vocab_size 8192 --preset tiny --output_dir runs/book \\
        --tokens_per_step 16384 --max_steps 1000 --learning_rate 1e-3 --eval_steps 100 --save_steps 100
    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 8 examples/pretrain.py \\
        --data fineweb_edu_shards --preset gpt2 --per_device_train_batch_size 16 --bf16 --output_dir runs/gpt2
    python examples/pretrain.py --data book.txt --model openai-community/gpt2 --learning_rate 5e-5 ...   # continue it

`--data` is a folder of token shards (examples/prepare_text.py makes them) or text files, which are then tokenized into
shards beside the checkpoints. The defaults are the recipe of GPT-3's 125M model on 10B tokens: AdamW, 19,073 steps of
524,288 tokens, learning rate 6e-4, no dropout. `--optimizer muon` uses Muon for the matrices in the blocks. All of
transformers' TrainingArguments can be set too: `--activation_checkpointing`, `--torch_compile`, `--report_to wandb`.

A run that was stopped, even by kill -9, goes on with `--resume` added to the same command, from the newest checkpoint
that is complete, and becomes the same run: the same data in the same order and the same random numbers. Promised for
the same number of processes and rows per process.

The output folder gets the model and its tokenizer, checkpoint-N, log.jsonl, curves.png, samples/, and run.json for the
model card. `--push_to_hub --hub_model_id me/gpt2` pushes every checkpoint and at the end the model.
"""

import argparse
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch.utils.data import Subset
from transformers import HfArgumentParser, TrainingArguments, set_seed

from scratch_gpt2 import ScratchGPT2Config
from scratch_gpt2.cli import run_main
from scratch_gpt2.configuration_scratch_gpt2 import PRESETS
from scratch_gpt2.data.rows import hub_id
from scratch_gpt2.data.text_sources import find_files, parse_separator
from scratch_gpt2.data.text_to_shards import TextSource, text_to_shards
from scratch_gpt2.data.token_shards import TokenShards, read_index
from scratch_gpt2.evaluation.hellaswag import Example, read_hellaswag
from scratch_gpt2.hardware import keep_freed_memory, known_peak_flops
from scratch_gpt2.hub.run_record import record_run
from scratch_gpt2.tokenization import END_OF_TEXT, load_tokenizer
from scratch_gpt2.training.callbacks import HellaSwagCallback, LogCallback, SampleCallback
from scratch_gpt2.training.checkpoints import checkpoint_to_resume
from scratch_gpt2.training.pretraining import PretrainingTrainer, whole_steps
from scratch_gpt2.training.recipes import GPT3_RECIPE, TOKENS_PER_STEP, TRAINER_DEFAULTS
from scratch_gpt2.training.start import (
    accumulation_steps,
    check_launch,
    check_push,
    check_same_sizes,
    model_to_continue,
    new_model,
)
from scratch_gpt2.training.trainer import metrics_of_step

SMOKE = {
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 2,
    "n_positions": 64,
    "vocab_size": 512,
    "tokens_per_step": 1024,
    "eval_tokens": 4096,
    "max_steps": 20,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 8,
    "logging_steps": 5,
    "eval_steps": 10,
    "save_strategy": "no",
    "sample_steps": 20,
    "output_dir": "pretrain_smoke",
}


@dataclass
class ModelArguments:
    preset: str = field(default="gpt2", metadata={"help": "Size of a new model.", "choices": list(PRESETS)})
    model: str | None = field(default=None, metadata={"help": "Continue this checkpoint: a folder or a Hub id."})
    n_layer: int | None = field(default=None, metadata={"help": "Number of blocks, instead of the preset's."})
    n_embd: int | None = field(default=None, metadata={"help": "Width, instead of the preset's."})
    n_head: int | None = field(default=None, metadata={"help": "Attention heads, instead of the preset's."})
    n_positions: int | None = field(default=None, metadata={"help": "Longest context, instead of the preset's."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout everywhere; 0.1 where the data are repeated."})


@dataclass
class DataArguments:
    data: str | None = field(default=None, metadata={"help": "Folder of token shards, text file, or quoted glob."})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder, Hub id or tiktoken:gpt2; by default the shards', the model's, or GPT-2's."},
    )
    vocab_size: int | None = field(default=None, metadata={"help": "Train a BPE of this size on the text files."})
    document_separator: str = field(
        default=END_OF_TEXT,
        metadata={"help": "What stands between documents in the text files; '' switches it off."},
    )
    block_length: int | None = field(default=None, metadata={"help": "Tokens in a row; by default n_positions."})
    tokens_per_step: int = field(default=TOKENS_PER_STEP, metadata={"help": "Tokens of one optimizer step."})
    eval_tokens: int = field(default=2**20, metadata={"help": "Evaluate on so many tokens of the validation shard."})


@dataclass
class RunArguments:
    optimizer: Literal["adamw", "muon"] = field(default="adamw", metadata={"help": "AdamW, or Muon with AdamW."})
    resume: bool = field(default=False, metadata={"help": "Continue from the newest complete checkpoint."})
    sample_steps: int = field(default=500, metadata={"help": "Show a sample text every so many steps; 0: never."})
    prompt: str = field(default="", metadata={"help": "What the samples begin with."})
    hellaswag: str | None = field(default=None, metadata={"help": "HellaSwag's validation data, original jsonl."})
    hellaswag_steps: int = field(default=250, metadata={"help": "Log its accuracy every so many steps; 0: never."})
    hellaswag_rows: int = field(default=200, metadata={"help": "Use so many of its rows, spread over the file."})
    peak_flops: float | None = field(
        default=None, metadata={"help": "Peak FLOP/s of one device, for the utilisation; known for common GPUs."}
    )
    smoke: bool = field(default=False, metadata={"help": "Try everything in small, on Python source code."})


def parse_arguments():
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, RunArguments, TrainingArguments),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(**GPT3_RECIPE, **TRAINER_DEFAULTS)
    if "--smoke" in sys.argv:
        parser.set_defaults(**SMOKE)
    return parser.parse_args_into_dataclasses()


def open_data(data_args, model_args, run_args, args) -> tuple[str, object]:
    """The folder of token shards and their tokenizer."""
    data, vocab_size = data_args.data, data_args.vocab_size
    if run_args.smoke and data is None:
        data = str(Path(args.output_dir, "smoke.txt"))
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        Path(data).write_text(Path(argparse.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    if data is None:
        raise ValueError("--data is missing: give a folder of token shards or a text file, or try --smoke.")
    if Path(data).is_dir():
        read_index(Path(data))  # raises where the folder holds something else
        return data, load_tokenizer(data_args.tokenizer or Path(data, "tokenizer"))
    folder = Path(args.output_dir, "shards")
    name = data_args.tokenizer or model_args.model or "openai-community/gpt2"
    source = TextSource(files=tuple(find_files([data])), separator=parse_separator(data_args.document_separator))
    tokenizer, _ = text_to_shards(source, folder, tokenizer=name, vocab_size=vocab_size)
    return str(folder), tokenizer


def hellaswag_examples(run_args) -> list[Example]:
    if run_args.hellaswag is None or not run_args.hellaswag_steps:
        return []
    if run_args.hellaswag_rows < 1:
        raise ValueError(f"hellaswag_rows is {run_args.hellaswag_rows} but must be at least 1.")
    examples = read_hellaswag(run_args.hellaswag)
    rows = min(run_args.hellaswag_rows, len(examples))
    return [examples[i * len(examples) // rows] for i in range(rows)]


def describe(trainer: PretrainingTrainer, optimizer: str, checkpoint: str | None) -> str:
    """What was derived, one line each."""
    config, args, tokens_per_step = trainer.model.config, trainer.args, trainer.tokens_per_step
    train, validation = trainer.train_dataset, trainer.eval_dataset
    block_length = train.dataset.block_length
    tokens_per_epoch = len(train) * block_length
    steps = args.max_steps if args.max_steps > 0 else int(args.num_train_epochs * tokens_per_epoch / tokens_per_step)
    muon = "Muon for the matrices in the blocks, AdamW for the rest" if optimizer == "muon" else args.optim.value
    lines = {
        "model": f"{trainer.model.num_parameters() / 1e6:.1f}M parameters, {config.n_layer} layers, width "
        f"{config.n_embd}, {config.n_head} heads, {config.vocab_size} tokens, {config.n_positions} positions",
        "data": f"{train.dataset.tokens:,} tokens in {len(train):,} blocks of {block_length}, seen "
        f"{steps * tokens_per_step / tokens_per_epoch:.2f} times; validation on {len(validation):,} blocks",
        "step": f"{tokens_per_step:,} tokens = {args.world_size} process(es) x {args.train_batch_size} rows x "
        f"{block_length} tokens x {args.gradient_accumulation_steps} passes",
        "schedule": f"{steps:,} steps, {args.get_warmup_steps(steps)} of them warm-up, learning rate "
        f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
        "optimizer": f"{muon}, weight decay {args.weight_decay:g} on all matrices, embeddings among them",
        "precision": f"float32 weights, mixed precision: {trainer.accelerator.mixed_precision}",
        "start": f"continues {checkpoint}" if checkpoint else "step 0",
    }
    return "\n".join(f"{name:<11}{line}" for name, line in lines.items())


def run_for_card(groups: tuple, folder: str) -> dict:
    """`folder` is that of the token shards, the user's own or one that was made."""
    model_args, data_args, _, _ = groups
    data = data_args.data or "smoke.txt"
    if data == folder:
        data = hub_id(read_index(Path(folder))["source"]) or folder
    return {"arguments": groups, "base": model_args.model, "data": [data]}


def main():
    model_args, data_args, run_args, args = parse_arguments()
    check_launch(args)
    keep_freed_memory()
    check_push(args)
    checkpoint = checkpoint_to_resume(args.output_dir, run_args.resume)
    examples = hellaswag_examples(run_args)
    set_seed(args.seed)

    sizes = {name: getattr(model_args, name) for name in ("n_layer", "n_embd", "n_head", "n_positions")}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    if model_args.model is None:
        model, config = None, ScratchGPT2Config.from_preset(model_args.preset, **sizes)
    elif sizes:
        raise ValueError(f"--{next(iter(sizes))} is for a new model; {model_args.model} has its sizes already.")
    else:
        model = model_to_continue(model_args.model, model_args.dropout)
        config = model.config
    block_length = data_args.block_length or config.n_positions
    args.gradient_accumulation_steps = accumulation_steps(
        data_args.tokens_per_step, block_length, args.train_batch_size, args.world_size
    )

    with args.main_process_first(desc="tokenization"):
        folder, tokenizer = open_data(data_args, model_args, run_args, args)
    tokenizer.model_max_length = config.n_positions
    train, validation = (TokenShards(folder, block_length, split) for split in ("train", "validation"))
    bytes_per_token = validation.bytes_per_token()
    model = model or new_model(config, tokenizer, model_args.dropout)
    train.check_fits(tokenizer, model.config)
    train = whole_steps(train, data_args.tokens_per_step // block_length)
    validation = Subset(validation, range(min(len(validation), max(1, data_args.eval_tokens // block_length))))
    if checkpoint:
        check_same_sizes(model, checkpoint)

    trainer = PretrainingTrainer(
        model,
        args,
        run_args.optimizer,
        tokens_per_step=data_args.tokens_per_step,
        block_length=block_length,
        peak_flops=run_args.peak_flops or known_peak_flops(),
        bytes_per_token=bytes_per_token,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[LogCallback()],
    )
    trainer.run = run_for_card((model_args, data_args, run_args, args), folder)
    sampler = SampleCallback(trainer, tokenizer, run_args.prompt, run_args.sample_steps)
    if run_args.sample_steps:
        trainer.add_callback(sampler)
    if examples:
        trainer.add_callback(HellaSwagCallback(trainer, tokenizer, examples, run_args.hellaswag_steps))
    if trainer.is_world_process_zero():
        print(describe(trainer, run_args.optimizer, checkpoint), flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        bits = f", {metrics['eval_bits_per_byte']:.3f} bits per byte" if bytes_per_token else ""
        loss = metrics["eval_loss"]
        measured = metrics_of_step(trainer.state.log_history, trainer.state.global_step)
        measured["perplexity"] = math.exp(loss)
        samples = [(run_args.prompt, sampler.text)] if sampler.text else []
        record_run(args.output_dir, **trainer.run, metrics=measured, samples=samples)
        print(f"\nvalidation loss {loss:.4f}, perplexity {math.exp(loss):.2f}{bits}\nUse the model:\n")
        print("    import scratch_gpt2, transformers")
        print(f"    print(transformers.pipeline('text-generation', {args.output_dir!r})('The'))")
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
