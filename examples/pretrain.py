"""Pretrain a GPT-2, from a text file on a laptop to token shards on many GPUs.

    python examples/pretrain.py --smoke                                             # a minute on any machine, offline
    python examples/pretrain.py --data book.txt --vocab_size 8192 --preset tiny --output_dir runs/book \\
        --tokens_per_step 16384 --max_steps 1000 --learning_rate 1e-3 --eval_steps 100 --save_steps 100
    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 8 examples/pretrain.py \\
        --data fineweb_edu_shards --preset gpt2 --per_device_train_batch_size 16 --bf16 --output_dir runs/gpt2
    python examples/pretrain.py --data book.txt --model openai-community/gpt2 --learning_rate 5e-5 ...   # continue it
    python examples/pretrain.py --dataset HuggingFaceFW/fineweb-edu --dataset_config sample-10BT --streaming ...
    python examples/pretrain.py book.yaml --max_steps 2000                       # options from a YAML or JSON file

`--data` is a folder of token shards (examples/prepare_text.py makes them) or text files, which are then tokenized into
shards beside the checkpoints. With `--streaming` the text is tokenized while the model trains: `--data` is then a data
set on the Hub, a folder of one, or files. Resuming reads a stream again from its beginning; shards are faster.

The defaults are the recipe of GPT-3's 125M model on 10B tokens: AdamW, 19,073 steps of 524,288 tokens, learning rate
6e-4, no dropout. `--num_train_epochs` replaces the number of steps. `--recipe muon` sets other defaults: Muon for the
matrices in the blocks, learning rate 4e-3. All of transformers' TrainingArguments work too, such as
`--activation_checkpointing`, `--torch_compile` and `--report_to wandb`.

A run that was stopped, even by kill -9, continues if `--resume` is added to the same command. It starts from the
newest complete checkpoint and becomes the same run: the same data in the same order and the same random numbers, if
the number of processes and the rows per process are the same. The learning rate, the weight decay, the schedule and
the number of steps may change; data, seed, sizes and tokens per step may not. Ctrl-C saves a checkpoint first.
`--eval_only` measures the loss of `--model` on the validation text instead, and writes evaluation.json.

The output folder gets the model and its tokenizer, checkpoint-N, log.jsonl, curves.png, samples/, and run.json for the
model card. `--push_to_hub --hub_model_id me/gpt2` pushes every checkpoint, and the model at the end.
"""

if __name__ == "__main__":  # --help and mistyped options are answered before the imports below, which take seconds
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "_quick.py"))

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase, set_seed

from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM
from scratch_gpt2.cli import given_options, parse_arguments, run_main
from scratch_gpt2.command_help import LENGTH_ALIASES, MODEL_ALIASES, ROW_ALIASES, TOKENIZER_ALIASES, public
from scratch_gpt2.data.rows import hub_id
from scratch_gpt2.data.text_files import STDIN
from scratch_gpt2.data.text_sources import find_files, find_matches, parse_separator
from scratch_gpt2.data.text_to_shards import TextSource, make_tokenizer, text_to_shards
from scratch_gpt2.data.token_shards import INDEX, TokenShards, read_index
from scratch_gpt2.data.token_stream import TokenStream
from scratch_gpt2.evaluation.hellaswag import Example, read_hellaswag
from scratch_gpt2.evaluation.perplexity import exponential
from scratch_gpt2.hardware import keep_freed_memory, known_peak_flops
from scratch_gpt2.hub.run_record import record_run
from scratch_gpt2.tokenization import load_tokenizer
from scratch_gpt2.training.callbacks import HellaSwagCallback, LogCallback, SampleCallback
from scratch_gpt2.training.checkpoints import checkpoint_to_resume
from scratch_gpt2.training.checks import check_output_dir, check_training_arguments, remove_results
from scratch_gpt2.training.evaluation_only import check_evaluation, evaluates_only, load_evaluated, write_evaluation
from scratch_gpt2.training.identity import check_identity, fingerprint, same_path
from scratch_gpt2.training.pretraining import PretrainingTrainer, predicted_bytes_per_token, whole_steps
from scratch_gpt2.training.recipes import PRETRAINING_RECIPES, PretrainingArguments
from scratch_gpt2.training.start import (
    accumulation_steps,
    check_launch,
    check_push,
    check_same_sizes,
    describe,
    model_to_continue,
    new_model,
    optimizer_steps,
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
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
SIZES = ("n_layer", "n_embd", "n_head", "n_positions")


@dataclass
class ModelArguments:
    preset: Literal["tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = field(
        default="gpt2", metadata=public("Size of a new model.")
    )
    model: str | None = field(
        default=None, metadata=public("Checkpoint to continue: a folder or a Hub id.", MODEL_ALIASES)
    )
    n_layer: int | None = field(default=None, metadata=public("Blocks, instead of the preset's."))
    n_embd: int | None = field(default=None, metadata=public("Width, instead of the preset's."))
    n_head: int | None = field(default=None, metadata=public("Heads, instead of the preset's."))
    n_positions: int | None = field(default=None, metadata=public("Context length, instead of the preset's."))
    dropout: float = field(default=0.0, metadata=public("Dropout probability everywhere; 0.1 for repeated data."))


@dataclass
class DataArguments:
    data: str | None = field(
        default=None,
        metadata=public(
            "Folder of token shards, text file, or quoted glob; with --streaming also a Hub data set.", ROW_ALIASES
        ),
    )
    streaming: bool = field(default=False, metadata=public("Tokenize the text while training, without making shards."))
    dataset_config: str | None = field(
        default=None,
        metadata=public("Configuration of a streamed Hub data set, such as sample-10BT.", ["--dataset_config_name"]),
    )
    text_column: str | None = field(
        default=None,
        metadata=public("Column of a streamed data set with the text; by default text.", ["--text_column_name"]),
    )
    tokenizer: str | None = field(
        default=None,
        metadata=public(
            "Folder, Hub id or tiktoken:gpt2; by default that of the shards, of the model, or GPT-2's.",
            TOKENIZER_ALIASES,
        ),
    )
    vocab_size: int | None = field(
        default=None, metadata=public("Train a BPE with this many tokens on the text files.")
    )
    document_separator: str = field(
        default="<|endoftext|>", metadata=public("Text between documents in the text files; '' switches it off.")
    )
    block_length: int | None = field(
        default=None, metadata=public("Tokens per row; n_positions by default.", [*LENGTH_ALIASES, "--max_length"])
    )
    tokens_per_step: int = field(default=524_288, metadata=public("Tokens per optimizer step, over all processes."))
    eval_tokens: int = field(default=2**20, metadata=public("Number of validation tokens to evaluate on."))


@dataclass
class RunArguments:
    recipe: Literal["gpt3", "muon"] = field(
        default="gpt3", metadata=public("Defaults of optimizer and learning rate.")
    )
    optimizer: Literal["adamw", "muon"] = field(
        default="adamw", metadata=public("AdamW, or Muon for the matrices in the blocks.")
    )
    resume: bool = field(default=False, metadata={"help": "Continue from the newest complete checkpoint."})
    sample_steps: int = field(default=500, metadata={"help": "Steps between sample texts; 0: no samples."})
    prompt: str = field(default="", metadata={"help": "Beginning of the samples."})
    hellaswag: str | None = field(default=None, metadata=public("HellaSwag's validation data, original jsonl."))
    hellaswag_steps: int = field(default=250, metadata={"help": "Steps between evaluations on HellaSwag; 0: none."})
    hellaswag_rows: int = field(default=200, metadata=public("Number of HellaSwag rows, spread over the file."))
    peak_flops: float | None = field(
        default=None, metadata={"help": "Peak FLOP/s of one device, for the utilization; known for common GPUs."}
    )
    smoke: bool = field(default=False, metadata={"help": "Run everything on a tiny scale, on Python source code."})


def recipe_defaults(options: argparse.Namespace) -> dict:
    """The defaults that `--recipe` and `--smoke` set."""
    defaults = dict(PRETRAINING_RECIPES[options.recipe])
    if not options.smoke:
        return defaults
    unused = {"max_steps"} if options.num_train_epochs is not None else set()
    unused |= {*SIZES, "vocab_size"} if options.model is not None else set()
    return defaults | {name: value for name, value in SMOKE.items() if name not in unused}


def check_options(model_args, data_args, run_args, args) -> None:
    """Raise ValueError for options that would be ignored."""
    given = set().union(*map(given_options, (model_args, data_args, run_args, args)))
    conflicts = [
        (model_args.model is not None, ("preset", *SIZES), f"is for a new model; {model_args.model} has its own size"),
        (data_args.tokenizer is not None, ("vocab_size",), "trains a tokenizer, and --tokenizer names another one"),
        (run_args.optimizer == "muon", ("optim",), "chooses another optimizer than --optimizer muon"),
        (run_args.optimizer != "muon", ("muon_momentum",), "is for --optimizer muon"),
        (run_args.hellaswag is None, ("hellaswag_steps", "hellaswag_rows"), "needs --hellaswag and its data"),
        (not data_args.streaming, ("dataset_config", "text_column"), "is for --streaming"),
        (data_args.streaming, ("num_train_epochs",), "needs data whose length is known before, which a stream is not"),
        (data_args.streaming, ("dataloader_num_workers",), "would read a stream once in each worker"),
        (evaluates_only(args), ("streaming",), "is for training; the validation text is evaluated from shards"),
    ]
    for conflicting, names, reason in conflicts:
        for name in names:
            if conflicting and name in given:
                raise ValueError(f"--{name} {reason}; leave it out.")
    if run_args.recipe == "muon" and run_args.optimizer != "muon" and "learning_rate" not in given:
        raise ValueError(
            f"The learning rate of --recipe muon is for Muon; give --optimizer {run_args.optimizer} its "
            "--learning_rate too."
        )
    for name in ("sample_steps", "hellaswag_steps"):
        if getattr(run_args, name) < 0:
            raise ValueError(f"{name} is {getattr(run_args, name)} but must be at least 0.")


def start_model(model_args: ModelArguments) -> tuple[ScratchGPT2ForCausalLM | None, ScratchGPT2Config]:
    """The model to continue and its configuration; of a new model only the configuration."""
    if model_args.model is not None:
        model = model_to_continue(model_args.model, model_args.dropout)
        return model, model.config
    sizes = {name: getattr(model_args, name) for name in SIZES if getattr(model_args, name) is not None}
    return None, ScratchGPT2Config.from_preset(model_args.preset, **sizes)


def divide_step(data_args: DataArguments, args: PretrainingArguments, block_length: int) -> None:
    """Derive the passes per step from tokens_per_step or, where only these are given, tokens_per_step from them."""
    accumulation_given = "gradient_accumulation_steps" in given_options(args)
    if accumulation_given and "tokens_per_step" not in given_options(data_args):
        rows = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        data_args.tokens_per_step = rows * block_length
    passes = accumulation_steps(data_args.tokens_per_step, block_length, args.train_batch_size, args.world_size)
    if accumulation_given and passes != args.gradient_accumulation_steps:
        raise ValueError(
            f"gradient_accumulation_steps is {args.gradient_accumulation_steps}, but tokens_per_step "
            f"{data_args.tokens_per_step} takes {passes}; leave one of them out."
        )
    args.gradient_accumulation_steps = passes


def open_data(data_args, model_args, run_args, args) -> tuple[str, PreTrainedTokenizerBase]:
    """The folder of token shards and their tokenizer."""
    data, vocab_size = data_args.data, data_args.vocab_size
    if run_args.smoke and data is None:
        data = str(Path(args.output_dir, "smoke.txt"))
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        Path(data).write_text(Path(argparse.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    if data is None:
        raise ValueError("--data is missing: give a folder of token shards or a text file, or try --smoke.")
    if Path(data).is_dir():
        read_index(Path(data))  # raises if the folder holds something else
        if "vocab_size" in given_options(data_args):
            raise ValueError(f"--vocab_size trains a tokenizer, but the shards in {data} have one; leave it out.")
        return data, load_tokenizer(data_args.tokenizer or Path(data, "tokenizer"))
    if not find_matches(data) and re.fullmatch(HUB_ID, data):
        raise FileNotFoundError(
            f"--data {data} is not a file; if it is a data set on the Hub, add --streaming, or make shards of it with "
            f"examples/prepare_text.py --hub {data}."
        )
    folder = Path(args.output_dir, "shards")
    source = TextSource(files=tuple(find_files([data])), separator=parse_separator(data_args.document_separator))
    tokenizer, _ = text_to_shards(
        source, folder, tokenizer=tokenizer_name(data_args, model_args), vocab_size=vocab_size
    )
    return str(folder), tokenizer


def tokenizer_name(data_args: DataArguments, model_args: ModelArguments) -> str:
    return data_args.tokenizer or model_args.model or "openai-community/gpt2"


def open_stream(
    data_args: DataArguments, model_args: ModelArguments, args: PretrainingArguments, block_length: int
) -> tuple[TokenStream, PreTrainedTokenizerBase]:
    data = data_args.data
    if data is None or data == STDIN:
        raise ValueError("--streaming needs --data with a data set on the Hub, a folder of one, or files.")
    if Path(data, INDEX).is_file():
        raise ValueError(f"{data} holds token shards, which --streaming would not use; leave it out.")
    common = {"text_column": data_args.text_column, "separator": parse_separator(data_args.document_separator)}
    if find_matches(data):
        if data_args.dataset_config is not None:
            raise ValueError(f"--dataset_config is for data sets, but --data {data} names files; leave it out.")
        source = TextSource(files=tuple(find_files([data])), **common)
    else:
        source = TextSource(hub=data, config=data_args.dataset_config, **common)
    name, saved = tokenizer_name(data_args, model_args), Path(args.output_dir, "tokenizer")
    tokenizer = make_tokenizer(source, saved, name, data_args.vocab_size, begun=False)
    seed = args.seed if args.data_seed is None else args.data_seed
    blocks = max(1, data_args.eval_tokens // block_length)
    return TokenStream(source, tokenizer, block_length, validation_blocks=blocks, seed=seed), tokenizer


def load_data(groups: tuple, block_length: int) -> tuple[Dataset, Dataset, PreTrainedTokenizerBase, str | None]:
    """Blocks to train on and to evaluate on, their tokenizer, and the folder of the shards, if there are any."""
    model_args, data_args, run_args, args = groups
    if data_args.streaming:
        stream, tokenizer = open_stream(data_args, model_args, args, block_length)
        return stream, stream.validation(), tokenizer, None
    folder, tokenizer = open_data(data_args, model_args, run_args, args)
    train, validation = (TokenShards(folder, block_length, split) for split in ("train", "validation"))
    rows_per_step = data_args.tokens_per_step // block_length
    return whole_steps(train, rows_per_step), evaluated_blocks(validation, data_args), tokenizer, folder


def hellaswag_examples(run_args: RunArguments) -> list[Example]:
    if run_args.hellaswag is None or not run_args.hellaswag_steps:
        return []
    if run_args.hellaswag_rows < 1:
        raise ValueError(f"hellaswag_rows is {run_args.hellaswag_rows} but must be at least 1.")
    examples = read_hellaswag(run_args.hellaswag)
    rows = min(run_args.hellaswag_rows, len(examples))
    return [examples[i * len(examples) // rows] for i in range(rows)]


def header(trainer: PretrainingTrainer, optimizer: str, checkpoint: str | None) -> str:
    """What was derived, one line each."""
    config, train, validation = trainer.model.config, trainer.train_dataset, trainer.eval_dataset
    block_length = len(validation[0]["input_ids"])
    if isinstance(train, TokenStream):
        data = f"a stream of blocks of {block_length}; validation on its first {len(validation):,} blocks"
    else:
        repeats = optimizer_steps(trainer) * trainer.tokens_per_step / (len(train) * block_length)
        data = (
            f"{train.dataset.tokens:,} tokens in {len(train):,} blocks of {block_length}, seen {repeats:.2f} times; "
        )
        data += f"validation on {len(validation):,} blocks"
    name = (
        "Muon for the matrices in the blocks, AdamW for the rest" if optimizer == "muon" else trainer.args.optim.value
    )
    return describe(
        trainer,
        checkpoint,
        block_length,
        model=f"{trainer.model.num_parameters() / 1e6:.1f}M parameters, {config.n_layer} layers, width "
        f"{config.n_embd}, {config.n_head} heads, a vocabulary of {config.vocab_size:,} tokens, "
        f"{config.n_positions:,} positions",
        data=data,
        optimizer=f"{name}, weight decay {trainer.args.weight_decay:g} on all matrices, including the embeddings",
    )


def evaluated_blocks(validation: TokenShards, data_args: DataArguments) -> Subset:
    blocks = max(1, data_args.eval_tokens // validation.block_length)
    return Subset(validation, range(min(len(validation), blocks)))


def make_trainer(groups: tuple, examples: list[Example]) -> tuple[PretrainingTrainer, SampleCallback]:
    """The trainer with its model, data and callbacks; nothing has been trained or written except token shards."""
    model_args, data_args, run_args, args = groups
    model, config = start_model(model_args)
    block_length = data_args.block_length or config.n_positions
    divide_step(data_args, args, block_length)
    with args.main_process_first(desc="tokenization"):
        train, evaluated, tokenizer, folder = load_data(groups, block_length)
    model = model or new_model(config, tokenizer, model_args.dropout)
    blocks = train.dataset if isinstance(train, Subset) else train
    blocks.check_fits(tokenizer, model.config)
    tokenizer.model_max_length = config.n_positions
    trainer = PretrainingTrainer(
        model,
        args,
        run_args.optimizer,
        tokens_per_step=data_args.tokens_per_step,
        block_length=block_length,
        peak_flops=run_args.peak_flops or known_peak_flops(),
        bytes_per_token=predicted_bytes_per_token(evaluated, tokenizer),
        train_dataset=train,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        callbacks=[LogCallback()],
    )
    trainer.run = run_for_card(groups, folder)
    sampler = SampleCallback(trainer, tokenizer, run_args.prompt, run_args.sample_steps)
    if run_args.sample_steps:
        trainer.add_callback(sampler)
    if examples:
        trainer.add_callback(HellaSwagCallback(trainer, tokenizer, examples, run_args.hellaswag_steps))
    return trainer, sampler


def run_for_card(groups: tuple, folder: str | None) -> dict:
    """`folder` is that of the token shards, the user's own or one that was made; `None` for a stream."""
    model_args, data_args, _, _ = groups
    data = data_args.data or "smoke.txt"
    if folder is not None and data == folder:
        data = hub_id(read_index(Path(folder))["source"]) or folder
    return {"arguments": groups, "base": model_args.model, "data": [data]}


def check_same_run(trainer: PretrainingTrainer, groups: tuple, checkpoint: str | None) -> list[str]:
    """The changes of a resumed run that take effect. Raises ValueError for those that cannot."""
    model_args, data_args, run_args, args = groups
    if checkpoint:
        check_same_sizes(trainer.model, checkpoint)
    train = trainer.train_dataset
    data = train.describe() if isinstance(train, TokenStream) else [s["sha256"] for s in train.dataset.index["shards"]]
    return check_identity(
        args,
        checkpoint,
        data=fingerprint(data),
        model=same_path(model_args.model),
        optimizer=run_args.optimizer,
        muon_momentum=args.muon_momentum,
        tokens_per_step=data_args.tokens_per_step,
        block_length=len(trainer.eval_dataset[0]["input_ids"]),
        dropout=model_args.dropout,
    )


def report(trainer: PretrainingTrainer, metrics: dict, prompt: str, sample: str) -> None:
    """Write run.json, and say what came out and how to use it."""
    folder, loss = trainer.args.output_dir, metrics["eval_loss"]
    measured = metrics_of_step(trainer.state.log_history, trainer.state.global_step)
    measured["perplexity"] = exponential(loss)
    record_run(folder, **trainer.run, metrics=measured, samples=[(prompt, sample)] if sample else [])
    bits = metrics.get("eval_bits_per_byte")
    bits = "" if bits is None else f", {bits:.3f} bits per byte"
    print(f"\nvalidation loss {loss:.4f}, perplexity {measured['perplexity']:.2f}{bits}\nUse the model:\n")
    print("    import scratch_gpt2, transformers")
    print(f"    print(transformers.pipeline('text-generation', {folder!r})('The'))")


def evaluate_only(groups: tuple) -> None:
    """Measure the loss of `--model` on the validation text of `--data`; train nothing."""
    model_args, data_args, run_args, args = groups
    if model_args.model is None:
        raise ValueError("--model is missing: name the checkpoint to evaluate.")
    check_evaluation(args, inputs=(model_args.model, data_args.data, data_args.tokenizer))
    model = load_evaluated(model_args.model)
    with args.main_process_first(desc="tokenization"):
        folder, tokenizer = open_data(data_args, model_args, run_args, args)
    validation = TokenShards(folder, data_args.block_length or model.config.n_positions, "validation")
    validation.check_fits(tokenizer, model.config)
    trainer = PretrainingTrainer(
        model,
        args,
        run_args.optimizer,
        tokens_per_step=data_args.tokens_per_step,
        block_length=validation.block_length,
        bytes_per_token=predicted_bytes_per_token(evaluated := evaluated_blocks(validation, data_args), tokenizer),
        eval_dataset=evaluated,
        processing_class=tokenizer,
    )
    trainer.evaluate()
    metrics = metrics_of_step(trainer.state.log_history, 0)
    metrics["perplexity"] = exponential(metrics["loss"])
    data = run_for_card(groups, folder)["data"]
    write_evaluation(args, model=model_args.model, data=data, split="validation", metrics=metrics)


def main() -> None:
    groups = parse_arguments(
        ModelArguments,
        DataArguments,
        RunArguments,
        PretrainingArguments,
        description=__doc__,
        defaults=recipe_defaults,
    )
    model_args, data_args, run_args, args = groups
    check_launch(args)
    check_training_arguments(args, metrics=("loss", "bits_per_byte"))
    check_options(*groups)
    if evaluates_only(args):
        return evaluate_only(groups)
    resuming = run_args.resume or args.resume_from_checkpoint is not None
    inputs = (model_args.model, data_args.data, data_args.tokenizer, run_args.hellaswag)
    check_output_dir(args.output_dir, inputs=inputs, resume=resuming, overwrite=args.overwrite_output_dir)
    overwriting = args.overwrite_output_dir and not resuming
    checkpoint = (
        None if overwriting else checkpoint_to_resume(args.output_dir, run_args.resume, args.resume_from_checkpoint)
    )
    check_push(args)
    keep_freed_memory()
    examples = hellaswag_examples(run_args)
    set_seed(args.seed)
    trainer, sampler = make_trainer(groups, examples)
    changes = check_same_run(trainer, groups, checkpoint)
    if trainer.is_world_process_zero():
        remove_results(args.output_dir, overwrite=overwriting)
        print("\n".join([header(trainer, run_args.optimizer, checkpoint), *changes]), flush=True)

    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    if run_args.sample_steps and not sampler.text:  # resumed after its last step
        sampler.text = sampler.sample(trainer.model, args.seed)
    if trainer.is_world_process_zero():
        report(trainer, metrics, run_args.prompt, sampler.text)
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
