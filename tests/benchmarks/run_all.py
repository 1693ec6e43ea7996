"""The short set of benchmarks as one table (make bench): training, generation, loading and growth of GPT-2 124M.

    python tests/benchmarks/run_all.py
    python tests/benchmarks/run_all.py --repeat 3 --output results     # keep the JSON objects and the curves
    python tests/benchmarks/run_all.py --nanogpt ~/nanoGPT --sms data/sms --text books/emma.txt \\
        --hellaswag hellaswag_val.jsonl --instructions alpaca_data.json
    python tests/benchmarks/run_all.py --preset tiny       # to see whether all of it works, in a few minutes

The benchmarks run in sequence, each in its own process, on all cores, which should otherwise be idle. One repetition
takes about a quarter of an hour. The ratio is the peer's time or memory divided by ours; the goal is the project's
minimum. With --repeat, all numbers are medians, with the smallest and largest ratio in brackets.
`python tests/benchmarks/NAME.py --help` explains each measurement.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

from scratch_gpt2.configuration_scratch_gpt2 import PRESETS
from scratch_gpt2.hardware import cpu_computes_bfloat16

HERE = Path(__file__).parent


def short_set(args, folder: Path) -> dict[str, list[str]]:
    """The script and options of each run by its name. The runs share files in `folder`."""
    preset = ["--preset", args.preset]
    training = ["train_step.py", *preset, "--steps", "1", "--rounds", "2"]
    training += ["--nanogpt", args.nanogpt] if args.nanogpt else []
    decode = ["decode.py", *preset, "--folder", str(folder)]
    length = "256" if args.preset == "gpt2" else "64"
    fp32 = ["--dtype", "float32", "--length", length]
    runs = {"training": [*training, *fp32], "sft": [*training, *fp32, "--masked", "0.7"]}
    if cpu_computes_bfloat16():
        runs["training_bf16"] = [*training, "--dtype", "bf16", "--length", length]
        runs["memory_bf16"] = [*training, "--dtype", "bf16", "--length", "1024" if args.preset == "gpt2" else "256"]
    runs["decode"] = [*decode, "--rounds", "5"]
    runs["decode_batch_8"] = [*decode, "--batch", "8", "--new_tokens", "16"]
    runs["prefill"] = [*decode, "--prompt", "512" if args.preset == "gpt2" else "128", "--new_tokens", "1"]
    runs["loading"] = ["load_memory.py", "--size", args.preset]
    sizes = {"gpt2": ["--lengths", "128", "512", "--new_tokens", "1", "256"]}
    growth = sizes.get(args.preset, ["--lengths", "32", "64", "--new_tokens", "1", "32"])
    runs["growth"] = ["growth.py", *preset, *growth, "--output", str(Path(args.output or folder) / "growth.png")]
    return runs | runs_with_data(args)


def runs_with_data(args) -> dict[str, list[str]]:
    sizes = {name: str(PRESETS[args.preset][name]) for name in ("n_layer", "n_embd", "n_head")}
    layers = ["--n_layer", sizes["n_layer"]]
    runs = {}
    if args.sms:
        few = ["--rows", "64", "--epochs", "1", *layers, "--n_embd", sizes["n_embd"]]
        threads = ["--threads", str(torch.get_num_threads())]
        runs["classification"] = ["classification_epoch.py", "--data", args.sms, *few, *threads]
    if args.text:
        runs["tokenization"] = ["tokenize_text.py", "--text", *args.text, "--rounds", "2"]
    if args.hellaswag:
        runs["hellaswag"] = ["hellaswag.py", "--data", args.hellaswag, "--examples", "16", "--rounds", "1", *layers]
    if args.instructions:
        width = ["--n_embd", sizes["n_embd"], "--n_head", sizes["n_head"]]
        few = ["--tokenizer", "tiktoken:gpt2", "--conversations", "16", "--steps", "1", "--rounds", "1"]
        options = ["--data", args.instructions, "--dtype", "float32", "--length", "256", *few, *layers, *width]
        runs["instructions"] = ["sft_packing.py", *options]
    return runs


def left_out(args) -> list[str]:
    """One sentence for each part of the set that is not in the table."""
    reasons = []
    if not cpu_computes_bfloat16():
        reasons.append("bfloat16 (training, its memory, generation): this CPU does not compute it.")
    if not args.nanogpt:
        reasons.append("nanoGPT in training: no --nanogpt FOLDER was given.")
    data = {"sms": "a classification epoch", "text": "tokenization", "hellaswag": "HellaSwag"}
    data["instructions"] = "instruction tuning beside TRL"
    reasons += [f"{what}: no --{name} was given." for name, what in data.items() if not getattr(args, name)]
    packages = {"ctranslate2": "ctranslate2", "onnxruntime": "onnxruntime onnx onnxscript"}
    for name, install in packages.items():
        if not all(map(find_spec, install.split())):
            reasons.append(f"{name} in generation: it is not installed (pip install {install}).")
    return reasons


def training_rows(result: dict) -> list[dict]:
    models, options = result["models"], result["options"]
    ours, theirs = models["scratch_gpt2"], models["transformers"]
    size = f"{options['batch']} x {options['length']} tokens, {options['dtype']}"
    masked = f", {options['masked']:.0%} of a row masked" if options["masked"] else ""
    goal = 1.5 if masked else 1.3 if options["length"] < 1024 else None
    memory_goal = 1 / 0.55 if (options["dtype"], options["length"]) == ("bf16", 1024) else None
    rows = [
        row(f"training step, {size}{masked}", "s", name, ours["seconds"], peer["seconds"], goal)
        for name, peer in models.items()
        if peer is not ours
    ]
    what = f"peak memory of a training step, {size}{masked}"
    return [*rows, row(what, "MB", "transformers", ours["peak_mb"], theirs["peak_mb"], memory_goal)]


def decode_rows(result: dict) -> list[dict]:
    contenders, rows = result["contenders"], []
    prompt, new_tokens, batch = result["prompt"], result["new_tokens"], result["batch"]
    work = f"generating {new_tokens} tokens"
    work += f" for each of {batch} prompts" if batch > 1 else ""
    work = f"reading a prompt of {prompt} tokens" if new_tokens == 1 else work
    goal = None if new_tokens == 1 else 1.5 if batch > 1 else 2.0
    level = 1.0 if goal == 2.0 else None
    ours = {"as loaded": "scratch_gpt2", "optimized": "scratch_gpt2 optimized"}
    ours |= {"int8": "scratch_gpt2 int8", "bf16": "scratch_gpt2 bf16"}
    for way, peer, least in (
        ("as loaded", "transformers", None),
        ("optimized", "transformers", goal),
        ("optimized", "ctranslate2", level),
        ("optimized", "onnxruntime", None),
        ("int8", "transformers", None),
        ("int8", "ctranslate2 int8", level),
        ("bf16", "transformers bf16", goal),
    ):
        if peer in contenders:
            seconds = (contenders[name]["seconds"] for name in (ours[way], peer))
            rows.append(row(f"{work}, {way}", "s", peer, *seconds, least))
    return rows


def loading_rows(result: dict) -> list[dict]:
    theirs, rows = result["transformers"], []
    for what, name in (("its own", "scratch_gpt2, own checkpoint"), ("transformers'", "scratch_gpt2")):
        ours = result[name]
        work = f"loading {what} checkpoint of {result['size']}"
        rows.append(row(work, "s", "transformers", ours["seconds"], theirs["seconds"], 1.0))
        rows.append(row(f"peak memory of {work}", "GB", "transformers", ours["peak_gb"], theirs["peak_gb"], 1.0))
    return rows


def growth_rows(result: dict) -> list[dict]:
    work = {"train": "each additional token of a training step", "decode": "each additional token to generate"}
    rows = []
    for key, unit, what in (("slopes", "ms", "time"), ("memory_slopes", "MB", "peak memory")):
        for kind, curve in result[key].items():
            scale = 1000 if unit == "ms" else 1
            for name in (name for name in curve if name != "transformers"):
                way = ", optimized" if name.endswith(" optimized") else ""
                ours, theirs = scale * curve[name], scale * curve["transformers"]
                rows.append(row(f"{what} of {work[kind]}{way}", unit, "transformers", ours, theirs, 1.0))
    return rows


def classification_rows(result: dict) -> list[dict]:
    seconds = {training["model"]: training["seconds"] for training in result["results"]}
    what = "classification epoch, last block, states"
    return [
        row(f"{what} {ours}", "s", "transformers", seconds[ours], seconds["transformers"])
        for ours in ("cached", "uncached")
    ]


def tokenization_rows(result: dict) -> list[dict]:
    rows = []
    for ours in (r for r in result["contenders"] if r["name"] == "scratch_gpt2"):
        what = f"tokenizing {ours['megabytes']:.0f} MB of text"
        for peer in result["contenders"]:
            if peer["megabytes"] == ours["megabytes"] and peer is not ours:
                rows.append(row(what, "s", f"tiktoken, {peer['name']}", ours["seconds"], peer["seconds"]))
    return rows


def hellaswag_rows(result: dict) -> list[dict]:
    seconds = {name: way["seconds_per_example"] for name, way in result["ways"].items()}
    peers = {"loop": "transformers, a plain loop", "four rows": "transformers, build-nanogpt's four rows"}
    return [row("HellaSwag, an example", "s", peer, seconds["ours"], seconds[name]) for name, peer in peers.items()]


def instruction_rows(result: dict) -> list[dict]:
    packed, trl = result["trainers"]["packed"], result["trainers"]["trl"]
    what = f"instruction tuning, {result['options']['conversations']} conversations, packed"
    return [
        row(what, "s", "trl", packed["seconds_per_epoch"], trl["seconds_per_epoch"]),
        row(f"peak memory of {what}", "MB", "trl", packed["peak_mb"], trl["peak_mb"]),
    ]


ROWS = {
    "train_step.py": training_rows,
    "decode.py": decode_rows,
    "load_memory.py": loading_rows,
    "growth.py": growth_rows,
    "classification_epoch.py": classification_rows,
    "tokenize_text.py": tokenization_rows,
    "hellaswag.py": hellaswag_rows,
    "sft_packing.py": instruction_rows,
}


def row(what: str, unit: str, peer: str, ours: float, theirs: float, goal: float | None = None) -> dict:
    """One line of the table. The ratio to a slope of ours that is not positive is infinite."""
    ratio = theirs / ours if ours > 0 else math.inf
    return {"what": what, "unit": unit, "peer": peer, "ours": ours, "theirs": theirs, "ratio": ratio, "goal": goal}


def run(script: str, *options: str) -> dict:
    command = [sys.executable, str(HERE / script), *options, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def merge(repetitions: list[list[dict]]) -> list[dict]:
    """One row for the same row of all repetitions, with medians and the smallest and largest ratio."""
    merged = []
    for same in zip(*repetitions, strict=True):
        medians = {key: statistics.median(r[key] for r in same) for key in ("ours", "theirs", "ratio")}
        ratios = [r["ratio"] for r in same]
        merged.append(same[0] | medians | {"spread": (min(ratios), max(ratios))})
    return merged


def as_table(rows: list[dict], nanogpt: str | None = None) -> str:
    lines = ["| what | ours | peer | which peer | ratio | goal |", "| --- | ---: | ---: | --- | ---: | ---: |"]
    for r in rows:
        goal = f"{r['goal']:.3g}x" if r["goal"] else "-"
        ours, theirs = (f"{r[key]:.4g} {r['unit']}" for key in ("ours", "theirs"))
        low, high = r["spread"]
        spread = f" ({low:.2f} to {high:.2f})" if low != high else ""
        peer = with_version(r["peer"], nanogpt)
        lines.append(f"| {r['what']} | {ours} | {theirs} | {peer} | {r['ratio']:.2f}x{spread} | {goal} |")
    return "\n".join(lines)


def with_version(peer: str, nanogpt: str | None) -> str:
    """The first word of a peer is its package. nanoGPT has a commit instead of a version."""
    name, *rest = peer.replace(",", " ,").split(" ", 1)
    if name != "nanogpt":
        return " ".join([name, version(name), *rest]).replace(" ,", ",")
    command = ["git", "-C", nanogpt, "rev-parse", "--short", "HEAD"]
    try:
        return f"nanoGPT {subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()}"
    except (OSError, subprocess.CalledProcessError):
        return "nanoGPT"  # not a git checkout


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def run_set(runs: dict[str, list[str]], prefix: str, output: str | None) -> list[dict]:
    rows = []
    for name, (script, *options) in runs.items():
        print(f"{time.strftime('%H:%M:%S')} {prefix}{name}: {script} {' '.join(options)}", file=sys.stderr)
        result = run(script, *options)
        if output:
            Path(output, f"{prefix}{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        rows += ROWS[script](result)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1, help="number of repetitions of the whole set")
    parser.add_argument("--preset", choices=("tiny", "gpt2"), default="gpt2", help="size of the GPT-2")
    parser.add_argument("--nanogpt", help="folder with nanoGPT's model.py, as another peer in training")
    parser.add_argument("--sms", help="folder from examples/prepare_classification.py, for a classification epoch")
    parser.add_argument("--text", nargs="+", help="text files for tokenization; 1 MB is enough")
    parser.add_argument("--hellaswag", help="HellaSwag's validation data, original jsonl")
    parser.add_argument("--instructions", help="instructions in .json or .jsonl, for instruction tuning beside TRL")
    parser.add_argument("--output", help="existing folder for the JSON objects and growth.png")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = short_set(args, Path(folder))
        repetitions = [run_set(runs, f"{number}_", args.output) for number in range(1, args.repeat + 1)]
    print(f"{machine()}\n\n{as_table(merge(repetitions), args.nanogpt)}\n")
    print("\n".join(f"Left out: {reason}" for reason in left_out(args)))


if __name__ == "__main__":
    main()
