"""Train a small GPT-2 from scratch on two CPU cores in about three minutes, save it, load it again, let it write.

    python examples/quickstart.py
    python examples/quickstart.py --text book.txt --prompt "It was" --output runs/book
    python examples/quickstart.py --smoke                            # seconds: only shows that everything works

Without `--text` it learns from what every Python brings along: the language reference in `pydoc_data` and the
docstrings of the standard library. The model, its tokenizer and the loss curve are written to `--output`. No network.
"""

import math
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments, set_seed

from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM
from scratch_gpt2.cli import run_main
from scratch_gpt2.data.python_text import python_documents
from scratch_gpt2.data.text_sources import Piece, read_whole_text, split_documents
from scratch_gpt2.hardware import cpu_computes_bfloat16, keep_freed_memory
from scratch_gpt2.tokenization import check_text, train_tokenizer
from scratch_gpt2.training.optimizers import muon_for_trainer
from scratch_gpt2.training.plots import plot_history

LEARNING_RATE = 5e-3  # Muon bears a high one, and in so few steps learns far more than AdamW
PROMPTS = ["The statement", "If the argument is", "Return a"]

# Run in a process of its own, which knows nothing but the folder.
LOAD = """\
import scratch_gpt2
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained({0!r}), AutoTokenizer.from_pretrained({0!r})
"""
WRITE = """
import sys
from transformers import TextStreamer, set_seed
how = dict(max_new_tokens=int(sys.argv[1]), do_sample=True, temperature=0.7, top_k=50)
for prompt in sys.argv[3:]:
    set_seed(int(sys.argv[2]))
    print("-" * 20, flush=True)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**tokenizer(prompt, return_tensors="pt"), streamer=streamer, **how)
"""


@dataclass
class Arguments:
    text: str | None = field(default=None, metadata={"help": "UTF-8 file to learn from instead of Python's own text."})
    output: str = field(default="runs/quickstart", metadata={"help": "Folder for the model and the loss curve."})
    prompt: list[str] = field(default_factory=lambda: PROMPTS, metadata={"help": "Texts for the model to continue."})
    steps: int = field(default=700, metadata={"help": "Updates of the weights."})
    seconds: float = field(default=180, metadata={"help": "Training ends after this time, however far it has come."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights, of the order of the rows, of the samples."})
    smoke: bool = field(default=False, metadata={"help": "A far smaller model, a few steps, a part of the text."})


def main():
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    sizes = {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 256}
    vocab_size, batch_size, new_tokens = 3072, 8, 120
    if arguments.smoke:
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}
        vocab_size, batch_size, new_tokens, arguments.steps = 400, 4, 16, 10

    if arguments.steps < 1 or arguments.seconds <= 0:
        raise ValueError(f"--steps {arguments.steps} and --seconds {arguments.seconds} must both be above 0.")
    if arguments.text:
        pieces = read_pieces(arguments.text)
    else:
        pieces = [(text, True) for text in python_documents(docstrings=not arguments.smoke)]
    valid_pieces = pieces[9::20]
    train_pieces = [piece for number, piece in enumerate(pieces) if number % 20 != 9]
    tokenizer = train_tokenizer((text for text, _ in train_pieces), vocab_size)
    check_prompts(arguments.prompt, tokenizer, longest=sizes["n_positions"] - new_tokens)
    train_rows = make_rows(train_pieces, tokenizer, sizes["n_positions"])
    valid_rows = make_rows(valid_pieces, tokenizer, sizes["n_positions"])

    special_tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)  # too few epochs to learn by heart
    config = ScratchGPT2Config(vocab_size=len(tokenizer), **sizes, **special_tokens, **no_dropout)
    model = ScratchGPT2ForCausalLM(config)
    print(
        f"A GPT-2 of {model.num_parameters():,} parameters, with {len(tokenizer):,} kinds of tokens and a context of "
        f"{config.n_positions}, learns from {train_rows.numel():,} tokens:\n{arguments.steps} steps of "
        f"{batch_size * config.n_positions:,} tokens."
    )
    optimizer = muon_for_trainer(model, lr=LEARNING_RATE, weight_decay=0.1)
    deadline = Deadline(arguments.steps, arguments.seconds)
    trainer = Trainer(
        model,
        training_arguments(arguments, batch_size),
        train_dataset=[{"input_ids": row, "labels": row} for row in train_rows],
        eval_dataset=[{"input_ids": row, "labels": row} for row in valid_rows],
        optimizers=(optimizer, LambdaLR(optimizer, deadline.learning_rate)),
        callbacks=[deadline],
    )
    keep_freed_memory()
    trainer.train()
    history = trainer.state.log_history
    loss = [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1]
    valid_bytes = len(tokenizer.decode(valid_rows.flatten(), skip_special_tokens=True).encode())
    bits_per_byte = loss / math.log(2) * valid_rows.numel() / valid_bytes

    model.config.use_cache = True  # Trainer has switched it off
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    curve = Path(arguments.output, "loss.png")
    plot_history(history, curve)
    print(f"Validation loss {loss:.3f} nats per token, {bits_per_byte:.3f} bits per byte.")
    print(f"Loss curve: {curve}, its numbers: {curve.with_suffix('.json')}")

    load = LOAD.format(arguments.output)
    print(f"A fresh process loads the model with these lines and writes:\n\n{load}", flush=True)
    command = [sys.executable, "-c", load + WRITE, str(new_tokens), str(arguments.seed), *arguments.prompt]
    subprocess.run(command, check=True)


def read_pieces(path: str) -> list[Piece]:
    """The documents of a text file in about 100 pieces or more: the validation part comes from all over it."""
    documents = [document for document in split_documents(read_whole_text(path)) if document]
    size = sum(map(len, documents)) // 100 + 1
    return [
        (document[start : start + size], start + size >= len(document))
        for document in documents
        for start in range(0, len(document), size)
    ]


def check_prompts(prompts, tokenizer, longest: int):
    for prompt in prompts:
        length = len(tokenizer(check_text(prompt)).input_ids)
        if not 0 < length <= longest:
            raise ValueError(f"The prompt {prompt!r} has {length} tokens; give 1 to {longest}.")


def make_rows(pieces: list[Piece], tokenizer, length: int) -> torch.Tensor:
    """The pieces as one sequence, <|endoftext|> after each document, in rows: (rows, length) token ids."""
    ids: list[int] = []
    for text, ends_document in pieces:
        ids += tokenizer(text, verbose=False).input_ids
        ids += [tokenizer.eos_token_id] if ends_document else []
    if len(ids) < length:
        raise ValueError(f"The text is too short: {len(ids)} tokens for training or validation, less than {length}.")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def training_arguments(arguments: Arguments, batch_size: int) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    fast_bfloat16 = on_gpu or cpu_computes_bfloat16()
    return TrainingArguments(
        arguments.output,
        max_steps=arguments.steps,
        per_device_train_batch_size=batch_size,
        bf16=fast_bfloat16,  # autocast; the weights stay float32
        use_cpu=not on_gpu and fast_bfloat16,
        dataloader_pin_memory=on_gpu,
        logging_steps=0.05,
        eval_strategy="steps",
        eval_steps=0.3,
        prediction_loss_only=True,
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
    )


class Deadline(TrainerCallback):
    """Ends the training after so many seconds, and has the learning rate come down by then."""

    def __init__(self, steps: int, seconds: float):
        self.steps, self.seconds, self.start = steps, seconds, time.monotonic()

    def learning_rate(self, step: int) -> float:
        """Share of the highest rate: up over the first tenth, then down along a cosine."""
        time_used = (time.monotonic() - self.start) / self.seconds
        progress = min(1.0, max(step / self.steps, time_used**2))  # squared: a slow start shall not count
        return min(10 * progress, 0.5 + 0.5 * math.cos(math.pi * progress))

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() - self.start > self.seconds and state.global_step < self.steps:
            print(f"\n{self.seconds:.0f} seconds are over at step {state.global_step} of {self.steps}: stopping.")
            control.should_evaluate = control.should_training_stop = True


if __name__ == "__main__":
    run_main(main)
