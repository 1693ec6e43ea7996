"""Train a small GPT-2 from scratch on two CPU cores in about three minutes, save it, load it again, generate text.

    python examples/quickstart.py
    python examples/quickstart.py --text book.txt --prompt "It was" --output runs/book
    python examples/quickstart.py --smoke                            # seconds: only shows that everything works

Without `--text` it learns from text that every Python installation has: the language reference in `pydoc_data` and the
docstrings of the standard library. The model, its tokenizer, the loss curve and run.json for the model card are
written to `--output`. No network.

`--seconds` limits the whole command. On a busy machine it reads less text and takes fewer steps; if no time is left to
generate text, it prints the command that does. Ctrl-C during the training saves the model that has been reached.
"""

if __name__ == "__main__":  # --help and mistyped options are answered before the imports below, which take seconds
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "_quick.py"))

import argparse
import math
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed

from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM
from scratch_gpt2.cli import Stopped, parse_arguments, run_main
from scratch_gpt2.command_help import public
from scratch_gpt2.data.python_text import python_documents
from scratch_gpt2.data.text_sources import Piece, read_whole_text, split_documents
from scratch_gpt2.evaluation.perplexity import exponential
from scratch_gpt2.hardware import cpu_computes_bfloat16, keep_freed_memory
from scratch_gpt2.hub.run_record import record_run
from scratch_gpt2.tokenization import check_text, train_tokenizer
from scratch_gpt2.training.checks import check_installed, check_output_dir, remove_results
from scratch_gpt2.training.optimizers import muon_for_trainer
from scratch_gpt2.training.plots import plot_history
from scratch_gpt2.training.pretraining import predicted_bytes_per_token
from scratch_gpt2.training.start import new_model
from scratch_gpt2.training.trainer import LanguageModelTrainer

LEARNING_RATE = 5e-3  # high, which Muon tolerates: in so few steps it learns far more than AdamW
SIZES = {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 256, "vocab_size": 3072}
SMOKE_SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 400}
MAX_ROWS = 8  # of a step
SHORT_TRAINING = 90  # seconds in which several small steps learn more than few large ones
CHARACTERS_PER_TOKEN = 4  # at most, of English text with so small a vocabulary
PROMPTS = ["The statement", "If the argument is", "Return a"]

# Run in another process, which knows only the folder.
LOAD = """\
import scratch_gpt2
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained({0!r}), AutoTokenizer.from_pretrained({0!r})
"""
WRITE = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
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
    text: str | None = field(default=None, metadata=public("UTF-8 file to learn from instead of Python's own text."))
    output: str = field(default="runs/quickstart", metadata={"help": "Folder for the model and the loss curve."})
    prompt: list[str] = field(default_factory=lambda: PROMPTS, metadata={"help": "Texts for the model to continue."})
    steps: int = field(default=700, metadata=public("Number of optimizer steps."))
    seconds: float = field(default=180, metadata=public("Time limit of the whole command."))
    seed: int = field(default=0, metadata=public("Seed for the weights, the order of the rows and the samples."))
    overwrite: bool = field(
        default=False,
        metadata={"help": "Replace the finished model in --output.", "aliases": ["--overwrite_output_dir"]},
    )
    smoke: bool = field(default=False, metadata=public("A much smaller model, 10 steps, part of the text."))


def smoke_defaults(options: argparse.Namespace) -> dict:
    return {"steps": 10} if options.smoke else {}


def main(seconds_used: float = 0.0) -> None:
    """`seconds_used` have passed since the command was started."""
    (arguments,) = parse_arguments(Arguments, description=__doc__, defaults=smoke_defaults)
    limit = TimeLimit(arguments.seconds, used=seconds_used)
    check_arguments(arguments)
    keep_freed_memory()
    set_seed(arguments.seed)
    sizes = SMOKE_SIZES if arguments.smoke else SIZES
    new_tokens = 16 if arguments.smoke else 120
    train_pieces, valid_pieces = split_text(arguments, sizes["n_positions"], seconds=limit.left() / 6)
    tokenizer = train_tokenizer((text for text, _ in train_pieces), sizes["vocab_size"])
    check_prompts(arguments.prompt, tokenizer, max_tokens=sizes["n_positions"] - new_tokens)
    train_rows = make_rows(train_pieces, tokenizer, sizes["n_positions"], seconds=limit.left() / 6)
    valid_rows = make_rows(valid_pieces, tokenizer, sizes["n_positions"])
    network = {name: size for name, size in sizes.items() if name != "vocab_size"}  # the tokenizer says that
    model = new_model(ScratchGPT2Config(**network), tokenizer)  # without dropout: too few epochs to overfit
    deadline = Deadline(arguments.steps, limit.for_training())
    batch_size = 4 if arguments.smoke else MAX_ROWS if deadline.seconds > SHORT_TRAINING else 2
    tokens_per_step = batch_size * sizes["n_positions"]
    print(
        f"Training a GPT-2 with {model.num_parameters():,} parameters, a vocabulary of {len(tokenizer):,} tokens and "
        f"a context of {sizes['n_positions']} on {train_rows.numel():,} tokens:\n{arguments.steps} steps of "
        f"{tokens_per_step:,} tokens, at most {deadline.seconds:.0f} of the {arguments.seconds:g} seconds in all.",
        flush=True,
    )
    trainer = make_trainer(model, arguments, deadline, batch_size, train_rows, valid_rows)
    remove_results(arguments.output, overwrite=arguments.overwrite)
    train_and_save(trainer, tokenizer, arguments)
    if limit.left() < limit.startup:
        command = ["python", "examples/generate.py", "--model", arguments.output, "--prompt", *arguments.prompt[:1]]
        print(f"No time is left to generate text; run: {shlex.join(command)}")
        return
    load_and_write(arguments, new_tokens)


class TimeLimit:
    """The time of the whole command, which on a busy machine leaves less for each part.

    Attributes:
        startup: seconds of the imports, about as many as the process needs that loads the model.
    """

    def __init__(self, seconds: float, used: float):
        self.startup, self.end = used, time.monotonic() + seconds - used

    def left(self) -> float:
        return self.end - time.monotonic()

    def for_training(self) -> float:
        """Seconds until the training has to end, so that evaluating, saving and loading the model fit in too."""
        return max(self.left() - 2 * self.startup, self.left() / 3, 0.001)


def check_arguments(arguments: Arguments) -> None:
    if arguments.steps < 1 or not arguments.seconds > 0:
        raise ValueError(f"--steps {arguments.steps} and --seconds {arguments.seconds} must both be above 0.")
    check_output_dir(arguments.output, inputs=[arguments.text], overwrite=arguments.overwrite)
    check_installed("matplotlib", needed_for="The loss curve")


def split_text(arguments: Arguments, n_positions: int, seconds: float) -> tuple[list[Piece], list[Piece]]:
    """The text for training, and a twentieth of it, from all over it, for validation. Of a file, what the steps can
    read; of Python's text, what can be collected in about `seconds`."""
    if arguments.text:
        characters = max(10**6, arguments.steps * MAX_ROWS * n_positions * CHARACTERS_PER_TOKEN)
        pieces = read_pieces(arguments.text, characters)
    else:
        pieces = [(text, True) for text in python_documents(docstrings=not arguments.smoke, seconds=seconds)]
    return [piece for number, piece in enumerate(pieces) if number % 20 != 9], pieces[9::20]


def read_pieces(path: str, characters: int) -> list[Piece]:
    """The documents in the first `characters` of a text file, in about 100 pieces or more: the validation part comes
    from all over them."""
    text = read_whole_text(path)
    if len(text) > characters:
        print(f"Of {path}, the first {characters:,} of {len(text):,} characters are used: the steps read no more.")
    documents = [document for document in split_documents(text[:characters]) if document]
    size = sum(map(len, documents)) // 100 + 1
    return [
        (document[start : start + size], start + size >= len(document))
        for document in documents
        for start in range(0, len(document), size)
    ]


def check_prompts(prompts: list[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
    for prompt in prompts:
        length = len(tokenizer(check_text(prompt)).input_ids)
        if not 0 < length <= max_tokens:
            raise ValueError(f"The prompt {prompt!r} has {length} tokens; give 1 to {max_tokens}.")


def make_rows(
    pieces: list[Piece], tokenizer: PreTrainedTokenizerBase, length: int, seconds: float = math.inf
) -> torch.Tensor:
    """The pieces as one sequence, <|endoftext|> after each document, in rows: (rows, length) token ids. After about
    `seconds`, the remaining pieces are left out."""
    ids: list[int] = []
    end = time.monotonic() + seconds
    for text, ends_document in pieces:
        if time.monotonic() > end and len(ids) >= length:
            break
        ids += tokenizer(text, verbose=False).input_ids
        ids += [tokenizer.eos_token_id] if ends_document else []
    if len(ids) < length:
        raise ValueError(f"The text is too short: {len(ids)} tokens for training or validation, fewer than {length}.")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def make_trainer(
    model: ScratchGPT2ForCausalLM,
    arguments: Arguments,
    deadline: "Deadline",
    batch_size: int,
    train_rows: torch.Tensor,
    valid_rows: torch.Tensor,
) -> LanguageModelTrainer:
    optimizer = muon_for_trainer(model, lr=LEARNING_RATE, weight_decay=0.1)
    return LanguageModelTrainer(
        model,
        training_arguments(arguments, batch_size),
        train_dataset=[{"input_ids": row, "labels": row} for row in train_rows],
        eval_dataset=[{"input_ids": row, "labels": row} for row in valid_rows],
        optimizers=(optimizer, LambdaLR(optimizer, deadline.learning_rate)),
        callbacks=[deadline],
    )


def train_and_save(trainer: LanguageModelTrainer, tokenizer: PreTrainedTokenizerBase, arguments: Arguments) -> None:
    try:
        trainer.train()
    except Stopped as stopped:
        save(trainer, tokenizer, arguments)
        progress = f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}"
        message = f"{progress}; the model up to there is in {arguments.output}"
        raise Stopped(stopped.signal_number, message) from None
    save(trainer, tokenizer, arguments)


def save(trainer: LanguageModelTrainer, tokenizer: PreTrainedTokenizerBase, arguments: Arguments) -> None:
    """Write the model, its tokenizer, the loss curve and run.json, and print the validation loss."""
    history = trainer.state.log_history
    evaluated = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if evaluated and evaluated[-1][0] == trainer.state.global_step:
        loss = evaluated[-1][1]
    else:
        loss = trainer.evaluate()["eval_loss"]
    bytes_per_token = predicted_bytes_per_token(trainer.eval_dataset, tokenizer)
    bits_per_byte = loss / math.log(2) / bytes_per_token
    trainer.save_model(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    metrics = {"loss": loss, "perplexity": exponential(loss), "bits_per_byte": bits_per_byte}
    data = [arguments.text or "documentation of Python"]
    record_run(arguments.output, arguments=(arguments, trainer.args), base=None, data=data, metrics=metrics)
    curve = Path(arguments.output, "loss.png")
    plot_history(history, curve)
    print(f"Validation loss {loss:.3f} nats per token, {bits_per_byte:.3f} bits per byte.")
    print(f"Loss curve: {curve}, its numbers: {curve.with_suffix('.json')}", flush=True)


def load_and_write(arguments: Arguments, new_tokens: int) -> None:
    """Generate text in another process."""
    load = LOAD.format(arguments.output)
    print(f"Another process loads the model with these lines and generates text:\n\n{load}", flush=True)
    command = [sys.executable, "-c", load + WRITE, str(new_tokens), str(arguments.seed), *arguments.prompt]
    code = subprocess.run(command).returncode
    if code:
        raise ChildProcessError(f"The other process has ended with code {code}; the model is in {arguments.output}.")


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
        logging_steps=0.02,
        logging_first_step=True,
        eval_strategy="steps",
        eval_steps=0.3,
        prediction_loss_only=True,
        use_cache=True,  # in the saved configuration
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
    )


class Deadline(TrainerCallback):
    """Ends the training after a number of seconds, by which the learning rate has decayed."""

    def __init__(self, steps: int, seconds: float):
        self.steps, self.seconds, self.start = steps, seconds, time.monotonic()

    def learning_rate(self, step: int) -> float:
        """Share of the highest rate: a linear warm-up over the first tenth, then a cosine decay."""
        time_used = (time.monotonic() - self.start) / self.seconds
        progress = min(1.0, max(step / self.steps, time_used**2))  # squared, so that a slow start does not count
        return min(10 * progress, 0.5 + 0.5 * math.cos(math.pi * progress))

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() - self.start > self.seconds and state.global_step < self.steps:
            print(f"\n{self.seconds:.0f} seconds are over at step {state.global_step} of {self.steps}: stopping.")
            control.should_log = control.should_evaluate = control.should_training_stop = True


if __name__ == "__main__":
    run_main(lambda: main(seconds_used=time.time() - psutil.Process().create_time()))
