"""How the time and memory of GPT-2 124M grow with the length of the text, compared with transformers' GPT-2.

    python tests/benchmarks/growth.py --output growth.png
    python tests/benchmarks/growth.py --lengths 128 256 512 --new_tokens 1 64 256 --rounds 3 --json

Measures, in float32 and with the same random weights, a training step (forward, backward, AdamW) on one row of T
tokens, and the greedy generation of N tokens, also after `optimize_for_inference`. Each model and length has a process
of its own, in turns, and the benchmark fails if losses or tokens differ. Memory is the peak of the process during the
steps or the generation. All processes keep the memory that they free (`keep_freed_memory`). `--output` draws the
medians into a PNG file and writes them into a JSON file next to it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

from train_step import TOLERANCE, load, peak_mb, reset_peak, train

NAMES = {
    "train": ("transformers", "scratch_gpt2"),
    "decode": ("transformers", "scratch_gpt2", "scratch_gpt2 optimized"),
}


def measure(name: str, kind: str, size: int, weights: str) -> dict:
    """One point of one curve, in this process."""
    if kind == "decode":
        return decode(name, size, weights)
    result = train(name, SimpleNamespace(weights=weights, batch=1, length=size, dtype="float32", steps=2))
    return {"seconds": statistics.median(result["seconds"]), "peak_mb": result["peak_mb"], "work": result["losses"]}


def decode(name: str, new_tokens: int, weights: str) -> dict:
    import torch

    model = load(name, SimpleNamespace(weights=weights)).eval()
    if name == "scratch_gpt2 optimized":
        model.optimize_for_inference()
    ids = torch.arange(8)[None]
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    model.generate(ids, max_new_tokens=2, **options)  # warm-up
    reset_peak("cpu")
    start = time.perf_counter()
    tokens = model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **options)
    return {"seconds": time.perf_counter() - start, "peak_mb": peak_mb("cpu"), "work": tokens[0].tolist()}


def compare(args) -> list[dict]:
    """One row for each kind, size and model, with medians over the rounds; raises RuntimeError if the work differs."""
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    from scratch_gpt2.configuration_scratch_gpt2 import PRESETS

    sizes = [("train", length) for length in args.lengths] + [("decode", count) for count in args.new_tokens]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        set_seed(0)
        GPT2LMHeadModel(GPT2Config(**PRESETS[args.preset])).save_pretrained(folder)
        for kind, size in sizes:
            runs = {name: [] for name in NAMES[kind]}
            for _ in range(args.rounds):
                for name, results in runs.items():
                    command = [sys.executable, __file__, "--only", name, kind, str(size), folder]
                    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                    results.append(json.loads(output.splitlines()[-1]))
            check_same_work(kind, size, [run["work"] for results in runs.values() for run in results])
            for name, results in runs.items():
                medians = {key: statistics.median(run[key] for run in results) for key in ("seconds", "peak_mb")}
                rows.append({"kind": kind, "size": size, "model": name, **medians})
    return rows


def check_same_work(kind: str, size: int, works: list[list]) -> None:
    tolerance = TOLERANCE["float32"] if kind == "train" else 0
    for work in works:
        if any(abs(a - b) > tolerance * abs(b) for a, b in zip(work, works[0], strict=True)):
            raise RuntimeError(f"The work of {kind} {size} differs: {work}, {works[0]}")


def slopes(rows: list[dict], quantity: str = "seconds") -> dict[str, dict[str, float]]:
    """Seconds (or MB, for `peak_mb`) per additional token: the slope of the least-squares line through each curve."""
    curves = {kind: {} for kind in NAMES}
    for kind, names in NAMES.items():
        for name in names:
            points = curve_points(rows, kind, name, quantity)
            if len(points) > 1:
                curves[kind][name] = statistics.linear_regression(*zip(*points, strict=True)).slope
    return curves


def curve_points(rows: list[dict], kind: str, name: str, quantity: str) -> list[tuple[int, float]]:
    return [(row["size"], row[quantity]) for row in rows if (row["kind"], row["model"]) == (kind, name)]


def draw(rows: list[dict], path: str) -> None:
    from scratch_gpt2.files import figure_file

    titles = {"train": "a training step on T tokens", "decode": "generating T tokens"}
    units = {"seconds": "seconds", "peak_mb": "peak MB"}
    panels = [(kind, quantity) for kind in NAMES for quantity in units]
    with figure_file(path, rows, figsize=(9, 7)) as figure:
        for place, (kind, quantity) in enumerate(panels, start=1):
            axes = figure.add_subplot(2, 2, place, title=titles[kind], xlabel="tokens (T)", ylabel=units[quantity])
            for name in NAMES[kind]:
                points = curve_points(rows, kind, name, quantity)
                axes.plot(*zip(*points, strict=True), label=name, marker="o", markersize=3)
            axes.set_ylim(bottom=0)
            axes.grid()
            axes.legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024], help="tokens per step")
    parser.add_argument("--new_tokens", type=int, nargs="+", default=[1, 128, 512, 1000], help="tokens to generate")
    parser.add_argument("--preset", default="gpt2", help="size: tiny, gpt2, gpt2-medium, ...")
    parser.add_argument("--rounds", type=int, default=1, help="processes per model and length")
    parser.add_argument("--output", help="PNG file for the curves")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--only", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        from scratch_gpt2.hardware import keep_freed_memory

        keep_freed_memory()
        name, kind, size, weights = args.only
        print(json.dumps(measure(name, kind, int(size), weights)))
        return
    rows = compare(args)
    if args.output:
        draw(rows, args.output)
    if args.json:
        result = {"preset": args.preset, "rows": rows, "slopes": slopes(rows)}
        print(json.dumps(result | {"memory_slopes": slopes(rows, "peak_mb")}))
        return
    print(f"{'':<8}{'tokens':>7} {'model':<23}{'seconds':>9}{'peak MB':>9}")
    for row in rows:
        print(f"{row['kind']:<8}{row['size']:>7} {row['model']:<23}{row['seconds']:>9.3f}{row['peak_mb']:>9.0f}")
    for kind, curve in slopes(rows).items():
        print(f"{kind}: " + ", ".join(f"{name} {1000 * slope:.2f} ms per token" for name, slope in curve.items()))
    for kind, curve in slopes(rows, "peak_mb").items():
        print(f"{kind}: " + ", ".join(f"{name} {slope:.3f} MB per token" for name, slope in curve.items()))


if __name__ == "__main__":
    main()
