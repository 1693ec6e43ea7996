"""Validation loss against CPU time, wall time and tokens: nanoGPT's train.py, transformers' Trainer and our recipes.

    python tests/benchmarks/time_to_loss.py --text input.txt --nanogpt ~/nanoGPT --output time_to_loss.png
    python tests/benchmarks/time_to_loss.py --text books/*.txt --vocab_size 4096 --length 128 --reference run_clm \\
        --shares 0.25 --output run_clm.png

Without `--vocab_size` every character is a token, and the first 90% of each text are for training, as nanoGPT splits
Tiny Shakespeare (its data/shakespeare_char/prepare.py downloads the text). The reference runs first, with the settings
of its own README or script. Each contender then runs with a share of the reference's CPU time (for nanoGPT) or tokens
(for run_clm), with a learning rate schedule of that length. All models have the same size, and the loss is that of the
same held-out windows, each position predicted once. Evaluations are not part of the measured time.

AdamW and Muon are tuned alike before that: five learning rates, then three batch sizes, each in a run with
`--tuning_share` of the reference's cost. These runs see neither the held-out text nor the end of the training text,
which decides between them.

- nanogpt: train.py as it is, with the options that the README gives for a CPU. Only the seed is
  changed, and train.py's own evaluations are left out.
- run_clm: transformers' GPT-2 in Trainer with the defaults of examples/pytorch/language-modeling/run_clm.py.
- transformers: transformers' GPT-2 in Trainer with the settings that were chosen for adamw.
- adamw, muon: our model with `PretrainingTrainer`.

Each contender has a process of its own, and all keep the memory that they free (`keep_freed_memory`). On a busy
machine, compare the seconds of CPU.
"""

import argparse
import itertools
import json
import math
import os
import pickle
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# The README's options for a CPU, without its evaluations.
NANOGPT_OPTIONS = "--device=cpu --compile=False --eval_iters=1 --log_interval=1000 --block_size=64 --batch_size=12"
NANOGPT_OPTIONS += " --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0 --eval_interval=1000000"
NANOGPT_ROWS = 12

ADAMW = {"adam_beta2": 0.99, "weight_decay": 0.1, "warmup_steps": 0.05}
LEARNING_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
ROWS = (12, 24, 48)
CONTENDERS = {
    "nanogpt": {"rows": NANOGPT_ROWS},
    # TrainingArguments' defaults, which run_clm.py does not change; GPT2Config has a dropout of 0.1.
    "run_clm": {"rows": 8, "learning_rate": 5e-5, "dropout": 0.1, "epochs": 3},
    "transformers": ADAMW,
    "adamw": ADAMW,
    "muon": ADAMW | {"adam_beta2": 0.95, "muon_momentum": 0.9},
}
CALIBRATION_STEPS = 24
POINTS = 12


class Meter:
    """Counts steps, and evaluates after some of them, outside of the measured time."""

    def __init__(self, inputs, targets, steps: int, tokens_per_step: int, points: int):
        self.inputs, self.targets = inputs, targets  # both (windows, length)
        self.tokens_per_step = tokens_per_step
        self.due = {round(steps * (i + 1) / points) for i in range(points)} | {1}
        self.points = []
        self.steps = 0

    def start(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def step(self, model, logits_of) -> None:
        self.steps += 1
        if self.steps not in self.due:
            return
        times = {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}
        loss = held_out_loss(model, logits_of, self.inputs, self.targets)
        self.points.append({"step": self.steps, "tokens": self.steps * self.tokens_per_step, **times, "loss": loss})
        self.wall = time.perf_counter() - times["seconds"]
        self.cpu = time.process_time() - times["cpu_seconds"]


def held_out_loss(model, logits_of, inputs, targets) -> float:
    import torch
    import torch.nn.functional as F

    training = model.training
    model.eval()
    total = 0.0
    with torch.no_grad():
        for x, y in zip(inputs.split(64), targets.split(64), strict=True):
            total += F.cross_entropy(logits_of(x).flatten(0, 1).float(), y.flatten(), reduction="sum").item()
    model.train(training)
    return total / targets.numel()


def read_tokens(args, folder: Path) -> int:
    """Write train.bin and val.bin, both of uint16, for the comparison and for tuning; return the vocabulary's size.

    nanoGPT splits after 90% of its text. Several texts are split there each, so that both parts are of the same kind.
    """
    import numpy as np

    texts = [Path(file).read_text(encoding="utf-8") for file in args.text]

    def part(start: float, end: float) -> str:
        return "".join(text[int(start * len(text)) : int(end * len(text))] for text in texts)

    parts = {"train": part(0, 0.9), "val": part(0.9, 1), "tuning/train": part(0, 0.81), "tuning/val": part(0.81, 0.9)}
    if args.vocab_size:
        from scratch_gpt2.tokenization import train_tokenizer

        tokenizer = train_tokenizer([parts["train"]], args.vocab_size)
        ids = {name: tokenizer(text, verbose=False).input_ids for name, text in parts.items()}
        size = len(tokenizer)
    else:
        numbers = {character: i for i, character in enumerate(sorted(set("".join(texts))))}
        ids = {name: [numbers[character] for character in text] for name, text in parts.items()}
        size = len(numbers)
    (folder / "tuning").mkdir()
    for name, values in ids.items():
        np.array(values, dtype=np.uint16).tofile(folder / f"{name}.bin")
    return size


def held_out_windows(args):
    """Windows of `--length` tokens, spread evenly over the held-out text, and the token after each of theirs."""
    import numpy as np
    import torch

    ids = torch.from_numpy(np.fromfile(Path(args.data, "val.bin"), dtype=np.uint16).astype(np.int64))
    windows = (len(ids) - 1) // args.length
    used = min(windows, max(1, args.eval_tokens // args.length))
    starts = torch.arange(used) * windows // used * args.length
    places = starts[:, None] + torch.arange(args.length)
    return ids[places], ids[places + 1]


def training_blocks(args):
    """Blocks as `TokenShards` cuts them: they share one token, so that every token is predicted once."""
    import numpy as np
    import torch

    ids = torch.from_numpy(np.fromfile(Path(args.data, "train.bin"), dtype=np.uint16).astype(np.int64))
    blocks = ids.unfold(0, args.length, args.length - 1)
    return [{"input_ids": block, "labels": block} for block in blocks]


def run_nanogpt(args, seed: int, steps: int) -> list[dict]:
    """nanoGPT's train.py on our split, in a folder of links to the checkout: it reads files of the working folder."""
    import torch

    meter = Meter(*held_out_windows(args), steps, NANOGPT_ROWS * args.length, args.points)
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        for entry in Path(args.nanogpt).resolve().iterdir():
            if entry.name != "data":
                Path(folder, entry.name).symlink_to(entry)
        data = Path(folder, "data", "shakespeare_char")
        data.mkdir(parents=True)
        for name in ("train.bin", "val.bin"):
            (data / name).symlink_to(Path(args.data, name).resolve())
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": args.tokens_known}))
        os.chdir(folder)
        sys.path.insert(0, folder)
        sys.modules.pop("model", None)
        from model import GPT

        configure, seeded = GPT.configure_optimizers, torch.manual_seed

        def configure_and_measure(model, *settings):
            optimizer = configure(model, *settings)
            optimizer.register_step_post_hook(lambda *_: meter.step(model, lambda ids: model(ids, ids)[0]))
            meter.start()
            return optimizer

        GPT.configure_optimizers = configure_and_measure
        torch.manual_seed = lambda number: seeded(number + seed)
        steps_options = [f"--max_iters={steps}", f"--lr_decay_iters={steps}"]
        sys.argv = ["train.py", "config/train_shakespeare_char.py", *NANOGPT_OPTIONS.split(), *steps_options]
        try:
            runpy.run_path("train.py", run_name="__main__")
        finally:
            torch.manual_seed = seeded
            sys.path.remove(folder)
            os.chdir(before)
    return meter.points


def run_trainer(args, seed: int, steps: int) -> list[dict]:
    """One of the contenders that train with transformers' Trainer, or with ours, which is a subclass."""
    from transformers import Trainer, TrainerCallback, set_seed

    settings = CONTENDERS[args.only] | json.loads(args.tuned)
    rows, dropout = settings.pop("rows"), settings.pop("dropout", 0.0)
    settings.pop("epochs", None)
    meter = Meter(*held_out_windows(args), steps, rows * args.length, args.points)
    set_seed(seed)
    model = new_model(args, dropout)

    class Measure(TrainerCallback):
        def on_train_begin(self, *_, **__):
            meter.start()

        def on_step_end(self, *_, model, **__):
            meter.step(model, lambda ids: model(input_ids=ids, use_cache=False).logits)

    with tempfile.TemporaryDirectory() as folder:
        common = {"output_dir": folder, "max_steps": steps, "per_device_train_batch_size": rows, "seed": seed}
        common |= {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no", "report_to": "none"}
        common |= {"disable_tqdm": True, "use_cpu": True} | settings
        blocks = training_blocks(args)
        if args.only in ("run_clm", "transformers"):
            from transformers import TrainingArguments

            trainer = Trainer(model, TrainingArguments(**common), train_dataset=blocks)
        else:
            from scratch_gpt2.training.pretraining import PretrainingTrainer
            from scratch_gpt2.training.recipes import PretrainingArguments

            common = {"lr_scheduler_type": "linear"} | common
            sizes = {"tokens_per_step": rows * args.length, "block_length": args.length}
            optimizer = args.only
            arguments = PretrainingArguments(**common)
            trainer = PretrainingTrainer(model, arguments, optimizer, **sizes, train_dataset=blocks)
        trainer.add_callback(Measure())
        trainer.train()
    return meter.points


def new_model(args, dropout: float):
    from transformers import GPT2Config, GPT2LMHeadModel

    from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM

    sizes = {"n_layer": args.n_layer, "n_head": args.n_head, "n_embd": args.n_embd, "n_positions": args.length}
    sizes |= {"vocab_size": args.tokens_known, "bos_token_id": 0, "eos_token_id": 0}
    sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    if args.only in ("run_clm", "transformers"):
        return GPT2LMHeadModel(GPT2Config(**sizes))
    return ScratchGPT2ForCausalLM(ScratchGPT2Config(**sizes))


def child(args, name: str, steps: int, data: Path, seeds=(0,), tuned: dict | None = None, points=1) -> list[dict]:
    """One contender in a process of its own, once with each seed."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--data", str(data), "--steps", str(steps)]
    command += ["--tokens_known", str(args.tokens_known), "--tuned", json.dumps(tuned or {})]
    command += ["--points", str(points), "--seeds"]
    output = subprocess.run([*command, *map(str, seeds)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"seed"')]


def median_end(runs: list[dict], quantity: str) -> float:
    return statistics.median(run["points"][-1][quantity] for run in runs)


def steps_within(args, name: str, tuned: dict, budget: float, data: Path) -> int:
    """The steps that cost `budget`: tokens, or beside nanoGPT seconds of CPU, which a short run measures."""
    per_step = tuned["rows"] * args.length
    if args.reference == "nanogpt":
        points = child(args, name, CALIBRATION_STEPS, data, tuned=tuned)[0]["points"]
        first, last = points[0], points[-1]
        per_step = (last["cpu_seconds"] - first["cpu_seconds"]) / (last["step"] - first["step"])
    return max(1, int(budget / per_step))


def tune(args, name: str, budget: float, data: Path) -> dict:
    """The learning rate, then the batch size, with the smallest loss at the end of the training text."""
    best = {"rows": ROWS[1], "learning_rate": LEARNING_RATES[0]}
    losses = {}

    def loss_with(**changes) -> float:
        tuned = best | changes
        key = f"{tuned['learning_rate']:g}, {tuned['rows']} rows"
        if key not in losses:
            steps = steps_within(args, name, tuned, budget, data / "tuning")
            losses[key] = child(args, name, steps, data / "tuning", tuned=tuned)[0]["points"][-1]["loss"]
            print(f"tuning {name}: {key}: {losses[key]:.3f}", file=sys.stderr, flush=True)
        return losses[key]

    best["learning_rate"] = min(LEARNING_RATES, key=lambda rate: loss_with(learning_rate=rate))
    best["rows"] = min(ROWS, key=lambda rows: loss_with(rows=rows))
    return best | {"losses": losses}


def compare(args, data: Path) -> Iterator[dict]:
    """The reference, then the others, with shares of its CPU time or, beside run_clm, of its tokens."""
    tokens = (data / "train.bin").stat().st_size // 2
    steps = args.steps
    if args.reference == "run_clm" and steps is None:
        steps = math.ceil(CONTENDERS["run_clm"]["epochs"] * tokens / args.length / CONTENDERS["run_clm"]["rows"])
    runs = child(args, args.reference, steps or 2000, data, args.seeds, points=POINTS)
    yield {"contender": args.reference, "share": 1.0, "runs": runs}
    budget = median_end(runs, "cpu_seconds" if args.reference == "nanogpt" else "tokens")
    tuned = {}
    for name in args.contenders:
        recipe = "adamw" if name == "transformers" else name
        if recipe not in tuned:
            tuned[recipe] = tune(args, recipe, args.tuning_share * budget, data)
        settings = {key: tuned[recipe][key] for key in ("rows", "learning_rate")}
        for share in args.shares:
            steps = steps_within(args, name, settings, share * budget, data)
            runs = child(args, name, steps, data, args.seeds, settings, points=POINTS)
            yield {"contender": name, "share": share, "tuned": tuned[recipe], "runs": runs}


def crossing(points: list[dict], loss: float, quantity: str) -> float | None:
    """Where the curve first reaches `loss`, on a line between its two evaluations; `None` if it does not."""
    for before, after in itertools.pairwise(points):
        if after["loss"] <= loss:
            part = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before[quantity] + part * (after[quantity] - before[quantity])
    return None


def summarise(row: dict, reference: dict) -> dict:
    """Means over the seeds; `to_reference` is the part of the reference's cost until its mean final loss."""
    target = statistics.mean(run["points"][-1]["loss"] for run in reference["runs"])
    losses = [run["points"][-1]["loss"] for run in row["runs"]]
    result = {"contender": row["contender"], "share": row["share"], "loss": statistics.mean(losses)}
    result |= {"least": min(losses), "greatest": max(losses), "to_reference": {}}
    for quantity in ("tokens", "cpu_seconds", "seconds"):
        result[quantity] = median_end(row["runs"], quantity)
        reached = [crossing(run["points"], target, quantity) for run in row["runs"]]
        if None not in reached:
            result["to_reference"][quantity] = statistics.median(reached) / median_end(reference["runs"], quantity)
    return result


def report(row: dict, reference: dict) -> None:
    one = summarise(row, reference)
    cost = ", ".join(f"{value:.2f} of its {name}" for name, value in one["to_reference"].items())
    print(
        f"{one['contender']:<13}{one['share']:>6.2f}{one['tokens']:>12,.0f} tokens{one['cpu_seconds']:>8.1f} CPU s"
        f"{one['seconds']:>8.1f} s   loss {one['loss']:.3f} ({one['least']:.3f} to {one['greatest']:.3f})   "
        f"{reference['contender']}'s loss in {cost or 'more'}",
        file=sys.stderr,
        flush=True,
    )


def draw(rows: list[dict], path: str) -> None:
    from scratch_gpt2.files import figure_file

    units = {"cpu_seconds": "CPU seconds", "seconds": "seconds", "tokens": "tokens"}
    with figure_file(path, rows, figsize=(13, 4.5)) as figure:
        for place, (quantity, unit) in enumerate(units.items(), start=1):
            axes = figure.add_subplot(1, 3, place, xlabel=unit, ylabel="validation loss (nats per token)")
            for number, row in enumerate(rows):
                label = row["contender"] if row["share"] == 1 else f"{row['contender']}, {row['share']:.2f}"
                for run in row["runs"]:
                    curve = [(point[quantity], point["loss"]) for point in run["points"][1:]]
                    axes.plot(*zip(*curve, strict=True), color=f"C{number}", alpha=0.7, label=label)
                    label = None
            axes.grid()
            axes.legend()


def run_seeds(args) -> None:
    """What the process of one contender does."""
    import torch
    from transformers.utils import logging

    from scratch_gpt2.hardware import keep_freed_memory

    logging.set_verbosity_error()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    for seed in args.seeds:
        run = run_nanogpt if args.only == "nanogpt" else run_trainer
        print(json.dumps({"seed": seed, "points": run(args, seed, args.steps)}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="text files")
    parser.add_argument("--vocab_size", type=int, help="train a BPE with this many tokens; by default, characters")
    parser.add_argument("--reference", choices=("nanogpt", "run_clm"), default="nanogpt")
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=["transformers", "adamw", "muon"])
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.33], help="of the reference's cost")
    parser.add_argument(
        "--tuning_share", type=float, default=0.33, help="of the reference's cost, for each tuning run"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of the reference; 2,000 for nanogpt and 3 epochs for run_clm")
    parser.add_argument("--nanogpt", help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--length", type=int, default=64, help="tokens per row")
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_head", type=int, default=4)
    parser.add_argument("--n_embd", type=int, default=128)
    parser.add_argument("--eval_tokens", type=int, default=32_768)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", help="PNG file for the curves; their numbers are written next to it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for hidden in ("--only", "--data", "--tuned"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--tokens_known", "--points"):
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = {"length": 64, "n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": None}
    if args.reference == "nanogpt" and any(getattr(args, name) != value for name, value in sizes.items()):
        parser.error(
            "nanoGPT's README gives its sizes; leave out --length, --n_layer, --n_head, --n_embd, --vocab_size"
        )
    if args.reference == "nanogpt" and not args.nanogpt:
        parser.error("--nanogpt is missing: give a checkout of karpathy/nanoGPT, or --reference run_clm")
    if args.only:
        run_seeds(args)
        return
    with tempfile.TemporaryDirectory() as data:
        args.tokens_known = read_tokens(args, Path(data))
        rows = []
        for row in compare(args, Path(data)):
            rows.append(row)
            report(row, rows[0])
            if args.output:
                draw(rows, args.output)
    if args.json:
        print(json.dumps({"options": vars(args), "rows": [summarise(row, rows[0]) for row in rows]}))


if __name__ == "__main__":
    main()
