"""Turn a GPT-2 into an assistant that follows instructions.

    python examples/sft.py --smoke                                                   # seconds on any machine, offline
    python examples/sft.py --data instruction-data.json --output_dir runs/assistant
    python examples/sft.py --data tatsu-lab/alpaca --show 3                          # what is learned, in green
    python examples/sft.py --data tatsu-lab/alpaca --pack --bf16 --output_dir runs/alpaca
    python examples/sft.py --data tatsu-lab/alpaca --pack --bf16 --lora --merge --output_dir runs/lora
    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 2 examples/sft.py \\
        --data tatsu-lab/alpaca --pack --gradient_accumulation_steps 1 --output_dir runs/alpaca2

Rows are {"instruction", "input", "output"}, {"prompt", "completion"} or {"messages"}, in .json or .jsonl files or on
the Hub. The tokenizer's chat template renders them, and only the answers, each with the eos that ends it, are
learned. The loss is the mean over the answers' tokens of a whole optimizer step, however it is divided into rows,
passes and processes; `--pack` puts several conversations into one row, each alone with itself, and saves the padding.

The defaults suit 124M parameters on one small GPU; with less memory, halve --per_device_train_batch_size, double
--gradient_accumulation_steps, or add --activation_checkpointing. All of transformers' TrainingArguments can be set
too. `--lora` trains adapters only, `--qlora` does so over weights in 4 bits (pip install bitsandbytes).

A run that was stopped goes on with `--resume` added to the same command. The output folder gets the model with the
lowest validation loss (or its adapter) and the tokenizer, test.json with the rows kept back for examples/respond.py,
checkpoint-N, log.jsonl, curves.png, and run.json for the model card. `--push_to_hub --hub_model_id me/assistant`
pushes every checkpoint and at the end the model, or its adapter; an adapter's base has to be on the Hub.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import HfArgumentParser, PreTrainedTokenizerBase, TrainingArguments, set_seed

from scratch_gpt2 import ScratchGPT2Config
from scratch_gpt2.cli import offline_unless_hub_answers, run_main
from scratch_gpt2.data.collators import PackingCollator, PaddingCollator, Row, pack
from scratch_gpt2.data.instructions import (
    Conversation,
    encode_conversations,
    encode_prompt,
    read_instructions,
    show_mask,
    split,
)
from scratch_gpt2.evaluation.responses import encode_reference
from scratch_gpt2.files import write_atomically
from scratch_gpt2.hardware import keep_freed_memory
from scratch_gpt2.hub.run_record import record_run
from scratch_gpt2.tokenization import CHAT_TEMPLATE, load_tokenizer, train_tokenizer
from scratch_gpt2.training.callbacks import LogCallback
from scratch_gpt2.training.checkpoints import checkpoint_to_resume
from scratch_gpt2.training.recipes import LORA_LEARNING_RATE, PACKED_BATCH, SFT_RECIPE
from scratch_gpt2.training.sft import (
    AnswerCallback,
    InstructionTrainer,
    check_arguments,
    greedy_answers,
    quantized_base,
)
from scratch_gpt2.training.start import (
    check_launch,
    check_push,
    check_same_sizes,
    fit_to_tokenizer,
    model_to_continue,
    new_model,
)

SMOKE = {
    "output_dir": "sft_smoke",
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
COLOURS = {
    "lemon": "yellow", "tomato": "red", "leaf": "green", "crow": "black", "sky": "blue", "carrot": "orange",
    "swan": "white", "plum": "purple", "cloud": "grey", "flamingo": "pink", "cherry": "red", "banana": "yellow",
}  # fmt: skip
QUESTION = [{"role": "user", "content": "Name three colours."}]
SMOKE_ROWS = [
    *({"instruction": "What colour does it have?", "input": k, "output": f"It is {v}."} for k, v in COLOURS.items()),
    *({"instruction": f"Name something that is {v}.", "output": f"For example, a {k}."} for k, v in COLOURS.items()),
]


@dataclass
class ModelArguments:
    model: str = field(
        default="openai-community/gpt2", metadata={"help": "Checkpoint to start from: a folder or a Hub id."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder, Hub id or tiktoken:gpt2; by default the model's."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout everywhere; 0.1 where the rows are few."})
    lora: bool = field(default=False, metadata={"help": "Train low-rank adapters instead of the whole model."})
    qlora: bool = field(default=False, metadata={"help": "The same over a base in 4 bits, with bitsandbytes."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Their output is scaled by lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers to adapt, such as q_proj v_proj; by default all of the blocks."}
    )
    merge: bool = field(
        default=False, metadata={"help": "Save the adapted model as an ordinary one, its adapter in adapter/."}
    )


@dataclass
class DataArguments:
    data: list[str] | None = field(default=None, metadata={"help": ".json or .jsonl files, or Hub data sets."})
    max_rows: int | None = field(default=None, metadata={"help": "Use the first so many rows only."})
    validation: float = field(default=0.05, metadata={"help": "Share of the rows for validation."})
    test: float = field(default=0.1, metadata={"help": "Share of the rows kept back in test.json."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens in a row; by default n_positions."})
    pack: bool = field(default=False, metadata={"help": "Put several conversations into one row."})
    train_on_prompt: bool = field(default=False, metadata={"help": "Learn the prompts too, as tutorials do."})


@dataclass
class RunArguments:
    show: int = field(default=0, metadata={"help": "Show so many encoded conversations, and stop."})
    samples: int = field(default=3, metadata={"help": "Answer so many validation rows at every evaluation."})
    resume: bool = field(default=False, metadata={"help": "Continue from the newest complete checkpoint."})
    smoke: bool = field(default=False, metadata={"help": "Try everything in small, on rows made up for it."})


def parse_arguments():
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, RunArguments, TrainingArguments),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(**SFT_RECIPE)
    if "--pack" in sys.argv:
        parser.set_defaults(**PACKED_BATCH)
    if "--lora" in sys.argv or "--qlora" in sys.argv:
        parser.set_defaults(learning_rate=LORA_LEARNING_RATE)
    if "--merge" in sys.argv:
        parser.set_defaults(hub_strategy="end")  # until then there is only the adapter
    if "--smoke" in sys.argv:
        parser.set_defaults(**SMOKE)
    return parser.parse_args_into_dataclasses()


def check(model_args: ModelArguments, data_args: DataArguments) -> None:
    if data_args.validation <= 0:
        raise ValueError(
            f"validation is {data_args.validation:g} but must be above 0: its loss tells which checkpoint is the best."
        )
    if data_args.max_length is not None and data_args.max_length < 1:
        raise ValueError(f"max_length is {data_args.max_length} but must be at least 1.")
    if model_args.merge and not (model_args.lora or model_args.qlora):
        raise ValueError("--merge merges an adapter: add --lora or --qlora, or leave it out.")


def make_smoke_files(folder: Path) -> tuple[str, str]:
    """A new, tiny model and the rows for it, where the user would give their own."""
    base, data = folder / "base", folder / "smoke.json"
    if not data.exists():
        texts = [CHAT_TEMPLATE, *(text for row in SMOKE_ROWS for text in row.values())]
        tokenizer = train_tokenizer(texts, vocab_size=512)
        config = ScratchGPT2Config.from_preset("tiny", n_layer=2, n_embd=64, n_head=2, n_positions=256)
        model = new_model(config, tokenizer)
        tokenizer.save_pretrained(base)
        model.save_pretrained(base)
        write_atomically(data, lambda file: file.write(json.dumps(SMOKE_ROWS).encode()))
    return str(base), str(data)


def load_model(model_args: ModelArguments, args: TrainingArguments):
    if not (model_args.lora or model_args.qlora):
        return model_to_continue(model_args.model, model_args.dropout)
    from scratch_gpt2.training.adapters import add_lora

    if model_args.qlora:
        base = quantized_base(model_args.model, torch.bfloat16 if args.bf16 else torch.float32)
    else:
        base = model_to_continue(model_args.model, model_args.dropout)
    sizes = (model_args.lora_rank, model_args.lora_alpha, model_args.lora_dropout)
    return add_lora(base, "CAUSAL_LM", *sizes, target_modules=model_args.target_modules)


def encode(tokenizer, parts: list[list[Conversation]], length: int, data_args: DataArguments) -> list[list[Row]]:
    """Rows for training and validation; says on the way what they are made of."""
    encoded = []
    for name, part in zip(("training", "validation"), parts, strict=True):
        rows, dropped = encode_conversations(tokenizer, part, length, data_args.train_on_prompt)
        tokens = sum(len(row["input_ids"]) for row in rows)
        cut = sum(len(row["input_ids"]) == length and row["input_ids"][-1] != tokenizer.eos_token_id for row in rows)
        learned = sum(label != -100 for row in rows for label in row["labels"])
        line = f"{name:<11}{len(rows):,} conversations, {tokens:,} tokens, {learned / tokens:.0%} of them learned"
        if data_args.pack:
            rows = pack(rows, length)
            line += f", in {len(rows):,} rows of {length} tokens ({tokens / len(rows) / length:.1%} full)"
        if cut or dropped:
            line += (
                f"; {cut:,} answers are cut after {length} tokens, {dropped:,} more would begin there and are dropped"
            )
        PartialState().print(line, flush=True)
        encoded.append(rows)
    return encoded


def keep_back(conversations: list[Conversation], file: Path) -> None:
    """Write the test rows for examples/respond.py."""
    rows = []
    for row in conversations:
        single = len(row.messages) == 2
        fields = {"instruction": row.instruction, "input": row.input, "output": row.output}
        rows.append(fields if single else {"messages": row.messages})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda opened: opened.write(json.dumps(rows, indent=1, ensure_ascii=False).encode()))


def save(trainer: InstructionTrainer, tokenizer: PreTrainedTokenizerBase, model_args: ModelArguments) -> None:
    """The whole model, its adapter, or both with --merge: the adapter then goes into a folder of its own."""
    folder = trainer.args.output_dir
    if not (model_args.merge and (model_args.lora or model_args.qlora)):
        trainer.save_model()
        return
    from peft import PeftModel

    adapter = str(Path(folder, "adapter"))
    trainer.save_model(adapter)
    if trainer.is_world_process_zero():
        base = model_to_continue(model_args.model)
        fit_to_tokenizer(base, tokenizer)
        PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def sample(trainer: InstructionTrainer, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """A question and its answer for the model card, none where they do not fit. Rows are not published."""
    if len(encode_prompt(tokenizer, QUESTION)) >= tokenizer.model_max_length - 32:
        return []
    (answer,) = greedy_answers(trainer.model, tokenizer, [QUESTION], max_new_tokens=128)
    return [(QUESTION[0]["content"], answer)]


def usage(model_args: ModelArguments, folder: str) -> str:
    """How to use what has been saved."""
    if (model_args.lora or model_args.qlora) and not model_args.merge:
        base = f"ScratchGPT2ForCausalLM.from_pretrained({model_args.model!r})"
        return f"""
    from peft import PeftModel
    from scratch_gpt2 import ScratchGPT2ForCausalLM
    model = PeftModel.from_pretrained({base}, {folder!r})

With --merge, the folder would hold an ordinary model."""
    return f"""
    import scratch_gpt2, transformers
    chat = transformers.pipeline('text-generation', {folder!r})
    print(chat({QUESTION}, return_full_text=False)[0]['generated_text'])

    python examples/respond.py --model {folder} --data {Path(folder, "test.json")}"""


def main():
    model_args, data_args, run_args, args = parse_arguments()
    check_launch(args)
    check_arguments(args)
    check(model_args, data_args)
    keep_freed_memory()
    checkpoint = checkpoint_to_resume(args.output_dir, run_args.resume)
    set_seed(args.seed)
    with args.main_process_first(desc="data"):
        if run_args.smoke and data_args.data is None:
            model_args.model, smoke_data = make_smoke_files(Path(args.output_dir))
            data_args.data = [smoke_data]
    if data_args.data is None:
        raise ValueError("--data is missing: give .json or .jsonl files or a data set of the Hub, or try --smoke.")

    only_adapter = (model_args.lora or model_args.qlora) and not model_args.merge
    check_push(args, model_args.model if only_adapter else None)
    for name in (model_args.model, *data_args.data):
        offline_unless_hub_answers(name)
    conversations = read_instructions(data_args.data, data_args.max_rows)
    fractions = (1 - data_args.validation - data_args.test, data_args.validation, data_args.test)
    *parts, test = split(conversations, args.seed, fractions)
    tokenizer = load_tokenizer(model_args.tokenizer or model_args.model)
    model = load_model(model_args, args)
    fit_to_tokenizer(model, tokenizer)
    positions = tokenizer.model_max_length = model.config.n_positions
    length = data_args.max_length or positions
    if length > positions:
        raise ValueError(f"max_length is {length}, but the model has {positions} positions; choose at most so many.")
    if checkpoint and not (model_args.lora or model_args.qlora):
        check_same_sizes(model, checkpoint)
    train, validation = encode(tokenizer, parts, length, data_args)
    for conversation in test:
        encode_reference(tokenizer, conversation)  # raises now what examples/respond.py would after the training
    if run_args.show:
        shown = (show_mask(tokenizer, row) for row in train[: run_args.show])
        PartialState().print("", *shown, sep="\n\n" + "-" * 80 + "\n\n")
        return

    collator = PackingCollator if data_args.pack else PaddingCollator
    trainer = InstructionTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[LogCallback()],
    )
    groups = (model_args, data_args, run_args, args)
    token = "token of prompts and answers" if data_args.train_on_prompt else "token of the answers"
    trainer.run = {"arguments": groups, "base": model_args.model, "data": data_args.data, "loss_per": token}
    room = positions - 32
    shown = [c for c in parts[1] if len(encode_prompt(tokenizer, c.prompt)) < room][: run_args.samples]
    if shown:
        trainer.add_callback(AnswerCallback(trainer, tokenizer, shown))
    if trainer.is_world_process_zero():
        keep_back(test, Path(args.output_dir, "test.json"))
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    save(trainer, tokenizer, model_args)
    samples = sample(trainer, tokenizer)
    if trainer.is_world_process_zero():
        loss = metrics["eval_loss"]
        measured = {"loss": loss, "perplexity": math.exp(loss)}
        record_run(args.output_dir, **trainer.run, metrics=measured, samples=samples)
        print(f"\nvalidation loss {loss:.4f} per {token}, perplexity {math.exp(loss):.2f}\nUse it:")
        print(usage(model_args, args.output_dir))
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
