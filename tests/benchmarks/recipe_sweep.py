"""What each ingredient of the pretraining recipe gains, at two sizes and over seeds, and whether learning rates carry
over to other widths.

    python tests/benchmarks/recipe_sweep.py --data shards --output sweep                # ingredients
    python tests/benchmarks/recipe_sweep.py --data shards --output widths --widths      # learning rate against width
    python tests/benchmarks/recipe_sweep.py --data shards --output sweep --only muon adamw_1e-3 --seeds 0 --jobs 1

`--data` is a folder of token shards from examples/prepare_text.py. Each run is examples/pretrain.py with one change to
the reference, `--recipe muon`, on the same tokens in the same number of steps. AdamW is tried with as many learning
rates as Muon. The table shows the loss on the same validation text, in nats per token, and its difference from the
reference with the same size and seed. `--jobs` runs share the machine, so no time is measured. Finished runs are kept:
started again, the script makes the missing ones.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scratch_gpt2.files import figure_file, read_json, write_json

PRETRAIN = Path(__file__).resolve().parents[2] / "examples" / "pretrain.py"
COMMON = (
    "--n_positions 512 --eval_tokens 131072 --eval_steps 0.5 --save_strategy no --sample_steps 0 --warmup_steps 20"
)
SIZES = {"2M": "--n_layer 4 --n_embd 160 --n_head 4", "10M": "--n_layer 5 --n_embd 384 --n_head 6"}
LEARNING_RATES = ("1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2")
REFERENCE = "muon"
CHANGES = {
    REFERENCE: "",
    "cosine_to_zero": "--lr_scheduler_type cosine",
    "linear_to_zero": "--lr_scheduler_type linear",
    "warmup_stable_decay": "--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {decay}",
    "weight_decay_0": "--weight_decay 0",
    "weight_decay_0.3": "--weight_decay 0.3",
    **{f"muon_{rate}": f"--learning_rate {rate}" for rate in LEARNING_RATES if rate != "4e-3"},
    **{f"adamw_{rate}": f"--optimizer adamw --learning_rate {rate}" for rate in LEARNING_RATES},
}
WIDTHS = (128, 256, 512)


def train(args, name: str, options: str, seed: int) -> float:
    """The final validation loss, of a run that is made unless it is there."""
    folder = args.output / f"{name}-seed{seed}"
    if not (folder / "run.json").is_file():
        decay = shlex.quote(f'{{"num_decay_steps": {int(0.4 * args.steps)}}}')
        command = [sys.executable, str(PRETRAIN), "--recipe", "muon", *shlex.split(COMMON)]
        command += shlex.split(options.replace("{decay}", decay))
        command += ["--data", args.data, "--output_dir", str(folder), "--seed", str(seed), "--overwrite_output_dir"]
        command += ["--max_steps", str(args.steps), "--tokens_per_step", str(args.tokens_per_step)]
        command += ["--per_device_train_batch_size", str(args.batch), *shlex.split(args.options)]
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise ChildProcessError(f"{name}, seed {seed} failed: {done.stderr[-2000:]}")
    loss = read_json(folder / "run.json")["metrics"]["loss"]
    print(f"{name}, seed {seed}: {loss:.4f}", file=sys.stderr, flush=True)
    return loss


def train_all(args, runs: dict[str, str]) -> dict[str, list[float]]:
    """The losses by name, in the order of the seeds."""
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {
            name: [pool.submit(train, args, name, options, seed) for seed in args.seeds]
            for name, options in runs.items()
        }
        return {name: [future.result() for future in some] for name, some in futures.items()}


def ingredients(args) -> dict[str, list[float]]:
    changes = {name: CHANGES[name] for name in dict.fromkeys((REFERENCE, *(args.only or CHANGES)))}
    losses = train_all(
        args, {f"{size}-{name}": f"{SIZES[size]} {change}" for size in SIZES for name, change in changes.items()}
    )
    print("\n| change | " + " | ".join(f"{size}: loss | difference" for size in SIZES) + " |")
    print("| --- |" + " ---: | ---: |" * len(SIZES))
    for name in changes:
        cells = []
        for size in SIZES:
            own, reference = losses[f"{size}-{name}"], losses[f"{size}-{REFERENCE}"]
            differences = [loss - other for loss, other in zip(own, reference, strict=True)]
            low, high = min(differences), max(differences)
            cells += [
                f"{statistics.mean(own):.4f}",
                f"{statistics.mean(differences):+.4f} ({low:+.4f} to {high:+.4f})",
            ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    return losses


def widths(args) -> dict[str, list[float]]:
    runs = {
        f"width{width}-{rate}": f"--n_layer 4 --n_embd {width} --n_head {width // 64} --learning_rate {rate}"
        for width in WIDTHS
        for rate in LEARNING_RATES
    }
    losses = train_all(args, runs)
    with figure_file(args.output / "widths.png", figsize=(6, 4)) as figure:
        axes = figure.subplots()
        for width in WIDTHS:
            means = [statistics.mean(losses[f"width{width}-{rate}"]) for rate in LEARNING_RATES]
            axes.plot([float(rate) for rate in LEARNING_RATES], means, marker="o", label=f"width {width}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats per token)")
        axes.legend()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of token shards")
    parser.add_argument("--output", type=Path, required=True, help="folder for runs, results.json and widths.png")
    parser.add_argument("--widths", action="store_true", help="learning rate against width instead of ingredients")
    parser.add_argument("--only", nargs="+", choices=list(CHANGES), help="these ingredients, beside the reference")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--tokens_per_step", type=int, default=16384, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=32, help="rows per device and pass (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: %(default)s)")
    parser.add_argument("--options", default="", help="more options for all runs, such as --bf16")
    args = parser.parse_args()
    losses = (widths if args.widths else ingredients)(args)
    settings = {"steps": args.steps, "tokens_per_step": args.tokens_per_step, "seeds": args.seeds}
    write_json(args.output / "results.json", {**settings, "validation_loss": losses})


if __name__ == "__main__":
    main()
