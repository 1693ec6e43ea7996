"""Turn a GPT-2 into an assistant that follows instructions.

    python examples/sft.py --smoke                                                   # seconds on any machine, offline
    python examples/sft.py --data instruction-data.json --output_dir runs/assistant
    python examples/sft.py --data tatsu-lab/alpaca --show 3                          # what is learned, in green
    python examples/sft.py --data tatsu-lab/alpaca --pack --bf16 --output_dir runs/alpaca
    python examples/sft.py --data tatsu-lab/alpaca --pack --bf16 --lora --merge --output_dir runs/lora
    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 2 examples/sft.py \\
        --data tatsu-lab/alpaca --pack --gradient_accumulation_steps 1 --output_dir runs/alpaca2

Rows are {"instruction", "input", "output"}, {"prompt", "completion"} or {"messages"}, in files or on the Hub. The
tokenizer's chat template formats them, and only the answers, including the eos token, count in the loss. The loss is
averaged over all answer tokens of an optimizer step, regardless of how they are split across rows, passes and
processes. `--pack` puts several conversations into one row to avoid padding; they do not attend to each other.

The defaults suit 124M parameters on one small GPU. With less memory, halve --per_device_train_batch_size, double
--gradient_accumulation_steps, or add --activation_checkpointing. All of transformers' TrainingArguments can be set
too. `--lora` trains adapters only, `--qlora` does so on top of weights in 4 bits (pip install bitsandbytes).

To continue a run that was stopped, add `--resume` to its command. `--eval_only` measures the loss of `--model` on the
test rows instead, and writes evaluation.json. The output folder gets the model with the lowest
validation loss (or its adapter) and the tokenizer, test.json with the held-out rows for examples/respond.py,
checkpoint-N, log.jsonl, curves.png, and run.json for the model card. `--push_to_hub --hub_model_id me/assistant`
pushes every checkpoint, and at the end the model or its adapter; the base of an adapter has to be on the Hub.
"""

if __name__ == "__main__":  # --help and mistyped options are answered before the imports below, which take seconds
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "_quick.py"))

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from scratch_gpt2 import ScratchGPT2Config
from scratch_gpt2.cli import given_options, parse_arguments, run_main
from scratch_gpt2.command_help import LENGTH_ALIASES, MODEL_ALIASES, ROW_ALIASES, TOKENIZER_ALIASES, public
from scratch_gpt2.data.collators import PackingCollator, PaddingCollator, Row
from scratch_gpt2.data.instructions import Conversation, encode_prompt, read_instructions, show_mask, split
from scratch_gpt2.evaluation.perplexity import exponential
from scratch_gpt2.evaluation.responses import encode_reference
from scratch_gpt2.files import write_json
from scratch_gpt2.hardware import keep_freed_memory
from scratch_gpt2.hub.run_record import record_run
from scratch_gpt2.prediction import respond
from scratch_gpt2.tokenization import CHAT_TEMPLATE, load_tokenizer, train_tokenizer
from scratch_gpt2.training.callbacks import LogCallback
from scratch_gpt2.training.checks import (
    check_fits_checkpoint,
    check_installed,
    check_row_count,
    check_training_arguments,
    open_output_dir,
    remove_results,
)
from scratch_gpt2.training.evaluation_only import (
    check_evaluation,
    evaluates_only,
    load_evaluated,
    write_evaluation,
)
from scratch_gpt2.training.identity import check_identity, fingerprint, same_path
from scratch_gpt2.training.recipes import LORA_LEARNING_RATE, PACKED_BATCH, InstructionArguments
from scratch_gpt2.training.sft import (
    AnswerCallback,
    encode_part,
    quantized_base,
    save_test_rows,
    save_tuned,
)
from scratch_gpt2.training.start import (
    check_launch,
    check_push,
    check_same_sizes,
    describe,
    fit_to_tokenizer,
    model_to_continue,
    new_model,
)
from scratch_gpt2.training.trainer import LanguageModelTrainer

MIN_ANSWER_TOKENS = 32

SMOKE = {
    "num_train_epochs": 15,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "eval_steps": 0.5,
    "logging_steps": 5,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "samples": 2,
}
COLORS = {
    "lemon": "yellow", "tomato": "red", "leaf": "green", "crow": "black", "sky": "blue", "carrot": "orange",
    "swan": "white", "plum": "purple", "cloud": "grey", "flamingo": "pink", "cherry": "red", "banana": "yellow",
}  # fmt: skip
QUESTION = [{"role": "user", "content": "Name three colors."}]
SMOKE_ROWS = [
    *({"instruction": "What color does it have?", "input": k, "output": f"It is {v}."} for k, v in COLORS.items()),
    *({"instruction": f"Name something that is {v}.", "output": f"For example, a {k}."} for k, v in COLORS.items()),
]


@dataclass
class ModelArguments:
    model: str = field(
        default="openai-community/gpt2",
        metadata=public("Checkpoint to start from: a folder or a Hub id.", MODEL_ALIASES),
    )
    tokenizer: str | None = field(
        default=None, metadata=public("Folder, Hub id or tiktoken:gpt2; by default the model's.", TOKENIZER_ALIASES)
    )
    dropout: float = field(default=0.0, metadata=public("Dropout in all layers; try 0.1 with little data."))
    lora: bool = field(
        default=False, metadata=public("Train low-rank adapters instead of the whole model.", ["--use_peft"])
    )
    qlora: bool = field(default=False, metadata=public("Train low-rank adapters on a base in 4 bits (bitsandbytes)."))
    lora_rank: int = field(default=16, metadata=public("Rank of the adapters.", ["--lora_r"]))
    lora_alpha: int = field(default=32, metadata=public("The adapters' output is scaled by lora_alpha / lora_rank."))
    lora_dropout: float = field(default=0.0, metadata=public("Dropout before the adapters."))
    target_modules: list[str] | None = field(
        default=None,
        metadata=public(
            "Layers to adapt, such as q_proj v_proj; by default all of the blocks.", ["--lora_target_modules"]
        ),
    )
    merge: bool = field(
        default=False, metadata=public("Save the adapted model as an ordinary one, and its adapter in adapter/.")
    )

    @property
    def adapts(self) -> bool:
        return self.lora or self.qlora


@dataclass
class DataArguments:
    data: list[str] | None = field(default=None, metadata=public("Files of rows, or Hub data sets.", ROW_ALIASES))
    max_rows: int | None = field(default=None, metadata=public("Use only the first N rows."))
    validation: float = field(default=0.05, metadata=public("Share of the rows for validation."))
    test: float = field(default=0.1, metadata=public("Share of the rows held out in test.json."))
    max_length: int | None = field(
        default=None, metadata=public("Maximum tokens per row; by default n_positions.", LENGTH_ALIASES)
    )
    pack: bool = field(default=False, metadata=public("Put several conversations into one row.", ["--packing"]))
    train_on_prompt: bool = field(default=False, metadata=public("Learn the prompts too, as some tutorials do."))


@dataclass
class RunArguments:
    show: int = field(default=0, metadata={"help": "Print N encoded conversations and stop."})
    samples: int = field(default=3, metadata={"help": "Answer N validation rows at every evaluation."})
    resume: bool = field(default=False, metadata={"help": "Continue from the newest complete checkpoint."})
    smoke: bool = field(default=False, metadata={"help": "Run everything at a tiny size, on built-in rows."})


def recipe(parsed) -> dict:
    """The defaults that depend on other options."""
    defaults: dict = {}
    if parsed.pack:
        defaults |= PACKED_BATCH
    if parsed.lora or parsed.qlora:
        defaults["learning_rate"] = LORA_LEARNING_RATE
    if parsed.merge:
        defaults["hub_strategy"] = "end"  # until then there is only the adapter
    if parsed.smoke:
        defaults |= SMOKE
        if parsed.output_dir is None:
            defaults |= {"output_dir": "sft_smoke", "overwrite_output_dir": True}
    return defaults


def check(
    model_args: ModelArguments, data_args: DataArguments, run_args: RunArguments, args: InstructionArguments
) -> None:
    """Raise an error for options that do not fit together, before anything is read."""
    check_launch(args)
    check_training_arguments(args, metrics=("loss",))
    if not data_args.validation > 0:  # nan is not
        raise ValueError(
            f"validation is {data_args.validation:g} but must be above 0: its loss tells which checkpoint is the best."
        )
    if not (data_args.test >= 0 and data_args.validation + data_args.test < 1):
        raise ValueError(
            f"validation is {data_args.validation:g} and test is {data_args.test:g}; test must be at least 0, and "
            "their sum below 1, so that rows are left for training."
        )
    for name, value in (("max_length", data_args.max_length), ("max_rows", data_args.max_rows)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value} but must be at least 1.")
    for name, value in (("lora_rank", model_args.lora_rank), ("lora_alpha", model_args.lora_alpha)):
        if value < 1:
            raise ValueError(f"{name} is {value} but must be at least 1.")
    for name, value in (("dropout", model_args.dropout), ("lora_dropout", model_args.lora_dropout)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value:g} but must be from 0 to below 1.")
    if model_args.adapts:
        check_installed("peft", needed_for="--lora")
    elif model_args.merge:
        raise ValueError("--merge merges an adapter: add --lora or --qlora, or leave it out.")
    else:
        for name in {"lora_rank", "lora_alpha", "lora_dropout", "target_modules"} & given_options(model_args):
            raise ValueError(f"--{name} is for adapters: add --lora or --qlora, or leave it out.")


def make_smoke_files(folder: Path) -> tuple[str, list[str]]:
    """A new, tiny model and its rows, in place of the user's own."""
    base, data = folder / "base", folder / "smoke.json"
    if not data.exists():
        texts = [CHAT_TEMPLATE, *(text for row in SMOKE_ROWS for text in row.values())]
        tokenizer = train_tokenizer(texts, vocab_size=512)
        config = ScratchGPT2Config.from_preset("tiny", n_layer=2, n_embd=64, n_head=2, n_positions=256)
        model = new_model(config, tokenizer)
        tokenizer.save_pretrained(base)
        model.save_pretrained(base)
        write_json(data, SMOKE_ROWS)
    return str(base), [str(data)]


def load_trained(model_args: ModelArguments, args: InstructionArguments) -> PreTrainedModel:
    """The model that is trained: all of it, or a frozen base with adapters."""
    if model_args.qlora:
        compute_dtype = torch.bfloat16 if args.bf16 else torch.float32
        model = quantized_base(model_args.model, compute_dtype=compute_dtype, dropout=model_args.dropout)
    else:
        model = model_to_continue(model_args.model, dropout=model_args.dropout)
    if not model_args.adapts:
        return model
    from scratch_gpt2.training.adapters import add_lora  # needs peft

    return add_lora(
        model,
        task_type="CAUSAL_LM",
        rank=model_args.lora_rank,
        alpha=model_args.lora_alpha,
        dropout=model_args.lora_dropout,
        target_modules=model_args.target_modules,
    )


def read_parts(data_args: DataArguments, seed: int) -> tuple[list[Conversation], ...]:
    """The conversations for training, validation and test."""
    if data_args.data is None:
        raise ValueError("--data is missing: give .json or .jsonl files or a data set of the Hub, or try --smoke.")
    conversations = read_instructions(data_args.data, max_rows=data_args.max_rows)
    fractions = (1 - data_args.validation - data_args.test, data_args.validation, data_args.test)
    return split(conversations, seed=seed, fractions=fractions)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    parts: tuple[list[Conversation], list[Conversation]],
    length: int,
    data_args: DataArguments,
) -> list[list[Row]]:
    """The rows for training and validation; prints what they are made of."""
    encoded = []
    for name, part in zip(("training", "validation"), parts, strict=True):
        rows, line = encode_part(
            name,
            part,
            tokenizer,
            max_length=length,
            packed=data_args.pack,
            train_on_prompt=data_args.train_on_prompt,
        )
        PartialState().print(line, flush=True)
        encoded.append(rows)
    return encoded


def show(tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> None:
    colors = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    shown = (show_mask(tokenizer, row, colors=colors) for row in rows)
    PartialState().print("", *shown, sep="\n\n" + "-" * 80 + "\n\n")


def check_test_rows(tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation]) -> None:
    """Raise now what examples/respond.py would raise after the training."""
    for conversation in conversations:
        encode_reference(tokenizer, conversation)


def row_length(max_length: int | None, positions: int) -> int:
    if max_length is not None and max_length > positions:
        raise ValueError(f"max_length is {max_length}, but the model has {positions} positions.")
    return max_length or positions


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """A question and its answer for the model card, if they fit. Rows of the data are not published."""
    prompt = encode_prompt(tokenizer, QUESTION)
    room = min(128, tokenizer.model_max_length - len(prompt))
    if room < MIN_ANSWER_TOKENS:
        return []
    (answer,) = respond(model, tokenizer, [prompt], max_new_tokens=room, do_sample=False)
    return [(QUESTION[0]["content"], answer.text)]


def check_same_run(
    model: PreTrainedModel, checkpoint: str | None, groups: tuple, parts: Sequence[list[Conversation]]
) -> list[str]:
    """The changes of a resumed run that take effect. Raises ValueError for those that cannot."""
    model_args, data_args, _, args = groups
    if checkpoint is not None:
        if not model_args.adapts and not Path(checkpoint, "adapter_config.json").is_file():
            check_same_sizes(model, checkpoint)
        check_fits_checkpoint(model, checkpoint, advice="--lora, --lora_rank and --target_modules")
    return check_identity(
        args,
        checkpoint,
        **{name: getattr(data_args, name) for name in ("validation", "test", "max_length", "pack", "train_on_prompt")},
        **{name: getattr(model_args, name) for name in ("dropout", "lora", "qlora", "lora_alpha", "lora_dropout")},
        model=same_path(model_args.model),
        data=fingerprint([[conversation.messages for conversation in part] for part in parts]),
    )


def add_answers(
    trainer: LanguageModelTrainer, tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation], count: int
) -> None:
    """Let the trainer answer the first `count` conversations whose prompts leave room for an answer."""
    longest = tokenizer.model_max_length - MIN_ANSWER_TOKENS
    fitting = [one for one in conversations if len(encode_prompt(tokenizer, one.prompt)) < longest][:count]
    if fitting:
        trainer.add_callback(AnswerCallback(trainer, tokenizer, fitting))


def usage(model_args: ModelArguments, folder: str, tested: bool) -> str:
    """How to use what has been saved."""
    if model_args.adapts and not model_args.merge:
        base = f"ScratchGPT2ForCausalLM.from_pretrained({model_args.model!r})"
        return f"""
    from peft import PeftModel
    from scratch_gpt2 import ScratchGPT2ForCausalLM
    model = PeftModel.from_pretrained({base}, {folder!r})

With --merge, the folder would hold an ordinary model."""
    chat = f"""
    import scratch_gpt2, transformers
    chat = transformers.pipeline('text-generation', {folder!r})
    print(chat({QUESTION}, return_full_text=False)[0]['generated_text'])"""
    test = shlex.quote(str(Path(folder, "test.json")))
    respond_command = f"python examples/respond.py --model {shlex.quote(folder)} --data {test}"
    return f"{chat}\n\n    {respond_command}" if tested else chat


def evaluate_only(groups: tuple) -> None:
    """Measure the loss of `--model` on the test rows; train nothing."""
    model_args, data_args, _, args = groups
    if not data_args.test:
        raise ValueError("--test is 0, so no rows are held out; give the share that the training had.")
    check_evaluation(args, inputs=(model_args.model, *(data_args.data or ())))
    *_, test = read_parts(data_args, seed=args.seed)
    tokenizer = load_tokenizer(model_args.tokenizer or model_args.model)
    model = load_evaluated(model_args.model)
    length = row_length(data_args.max_length, positions=model.config.n_positions)
    rows, line = encode_part(
        "test", test, tokenizer, max_length=length, packed=False, train_on_prompt=data_args.train_on_prompt
    )
    PartialState().print(line, flush=True)
    trainer = LanguageModelTrainer(
        model, args, eval_dataset=rows, data_collator=PaddingCollator(tokenizer.pad_token_id)
    )
    loss = trainer.evaluate()["eval_loss"]
    metrics = {"loss": loss, "perplexity": exponential(loss)}
    write_evaluation(args, model=model_args.model, data=data_args.data, split="test", metrics=metrics)


def main() -> None:
    model_args, data_args, run_args, args = groups = parse_arguments(
        ModelArguments, DataArguments, RunArguments, InstructionArguments, description=__doc__, defaults=recipe
    )
    check(model_args, data_args, run_args, args)
    if evaluates_only(args):
        return evaluate_only(groups)
    keep_freed_memory()
    inputs = (model_args.model, model_args.tokenizer, *(data_args.data or ()))
    checkpoint, overwrite = None, False
    if not run_args.show:
        checkpoint, overwrite = open_output_dir(args, resume=run_args.resume, inputs=inputs)
    set_seed(args.seed)
    if run_args.smoke and data_args.data is None:
        with args.main_process_first(desc="data"):
            model_args.model, data_args.data = make_smoke_files(Path(args.output_dir))
    check_push(args, base_of_adapter=model_args.model if model_args.adapts and not model_args.merge else None)
    train, validation, test = read_parts(data_args, seed=args.seed)
    tokenizer = load_tokenizer(model_args.tokenizer or model_args.model)
    model = load_trained(model_args, args)
    fit_to_tokenizer(model, tokenizer)
    tokenizer.model_max_length = model.config.n_positions
    length = row_length(data_args.max_length, positions=model.config.n_positions)
    train_rows, validation_rows = encode(tokenizer, (train, validation), length, data_args)
    check_test_rows(tokenizer, test)
    if run_args.show:
        return show(tokenizer, train_rows[: run_args.show])
    check_row_count(args, rows=len(train_rows))
    trainer = LanguageModelTrainer(
        model,
        args,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        data_collator=(PackingCollator if data_args.pack else PaddingCollator)(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[LogCallback()],
    )
    token = "token of prompts and answers" if data_args.train_on_prompt else "token of the answers"
    trainer.run = {"arguments": groups, "base": model_args.model, "data": data_args.data, "loss_per": token}
    add_answers(trainer, tokenizer, validation, count=run_args.samples)
    if args.process_index == 0:
        remove_results(args.output_dir, overwrite=overwrite)
    changes = check_same_run(model, checkpoint, groups, parts=(train, validation, test))
    if trainer.is_world_process_zero():
        print("\n".join([describe(trainer, checkpoint, length if data_args.pack else None), *changes]), flush=True)
        if test:
            save_test_rows(test, Path(args.output_dir, "test.json"))
    trainer.train(resume_from_checkpoint=checkpoint)
    loss = trainer.evaluate()["eval_loss"]
    save_tuned(trainer, tokenizer, merge_into=model_args.model if model_args.merge else None)
    samples = sample(trainer.model, tokenizer)
    if trainer.is_world_process_zero():
        measured = {"loss": loss, "perplexity": exponential(loss)}
        record_run(args.output_dir, **trainer.run, metrics=measured, samples=samples)
        print(f"\nvalidation loss {loss:.4f} per {token}, perplexity {measured['perplexity']:.2f}\nUse it:")
        print(usage(model_args, args.output_dir, tested=bool(test)))
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
