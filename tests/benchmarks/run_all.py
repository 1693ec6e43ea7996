"""The short set of the benchmarks as one table (make bench): training, writing, loading and growth of GPT-2 124M.

    python tests/benchmarks/run_all.py
    python tests/benchmarks/run_all.py --nanogpt ~/nanoGPT --output results    # keeps the JSON objects and growth.png

Every benchmark is a process of its own, one after the other, on all cores, which should otherwise be idle. The ratio
is how many times less ours takes, in time or in memory, than the peer; the goal is the least ratio that the project
aims at. `python tests/benchmarks/NAME.py --help` tells what each measures.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).parent


def short_set(args) -> dict[str, list[str]]:
    """Name of each run: script and options."""
    nanogpt = ["--nanogpt", args.nanogpt] if args.nanogpt else []
    growth = ["--lengths", "128", "512", "--new_tokens", "1", "128"]
    return {
        "training": ["train_step.py", "--dtype", "float32", "--length", "256", "--rounds", "1", *nanogpt],
        "writing": ["decode.py", "--rounds", "2"],
        "writing 8 texts": ["decode.py", "--rounds", "2", "--batch", "8", "--new_tokens", "16"],
        "reading a prompt": ["decode.py", "--rounds", "2", "--prompt", "512", "--new_tokens", "1"],
        "loading": ["load_memory.py"],
        "growth": ["growth.py", *growth, "--output", str(Path(args.output) / "growth.png")],
    }


def training_rows(result: dict) -> list[dict]:
    models = result["models"]
    ours = models.pop("scratch_gpt2")
    peer = min(models, key=lambda name: models[name]["seconds"])
    what = f"training step, {result['batch']} x {result['length']}, {result['dtype']}"
    return [
        row(f"{what}, beside {peer}", "s", ours["seconds"], models[peer]["seconds"], 1.3),
        row(f"{what}, memory", "MB", ours["peak_mb"], models["transformers"]["peak_mb"]),
    ]


def writing_rows(result: dict) -> list[dict]:
    contenders, rows = result["contenders"], []
    what = f"{result['batch']} x {result['new_tokens']} tokens after {result['prompt']}"
    goal = None if result["new_tokens"] == 1 else 1.5 if result["batch"] > 1 else 2.0
    goals = {"scratch_gpt2": None, "scratch_gpt2 optimized": goal, "scratch_gpt2 int8": None}
    for name, own_goal in goals.items():
        ours, theirs = contenders[name]["seconds"], contenders["transformers"]["seconds"]
        way = name.removeprefix("scratch_gpt2 ")
        rows.append(row(f"{what}, {way}, beside transformers", "s", ours, theirs, own_goal))
    for name, peer in (("scratch_gpt2 optimized", "ctranslate2"), ("scratch_gpt2 int8", "ctranslate2 int8")):
        if peer in contenders:
            ours, theirs = contenders[name]["seconds"], contenders[peer]["seconds"]
            rows.append(row(f"{what}, beside {peer}", "s", ours, theirs, 1.0))
    return rows


def loading_rows(result: dict) -> list[dict]:
    ours, theirs = result["scratch_gpt2"], result["transformers"]
    return [
        row(f"loading {result['size']}", "s", ours["seconds"], theirs["seconds"], 1.0),
        row(f"loading {result['size']}, memory", "GB", ours["peak_gb"], theirs["peak_gb"], 1.0),
    ]


def growth_rows(result: dict) -> list[dict]:
    kinds = {"train": "a training step on one more token", "decode": "writing one more token"}
    slopes = {kind: curve for kind, curve in result["slopes"].items() if curve}
    return [
        row(kinds[kind], "ms", 1000 * curve["scratch_gpt2"], 1000 * curve["transformers"], 1.0)
        for kind, curve in slopes.items()
    ]


ROWS = {"train_step.py": training_rows, "decode.py": writing_rows}
ROWS |= {"load_memory.py": loading_rows, "growth.py": growth_rows}


def row(what: str, unit: str, ours: float, peer: float, goal: float | None = None) -> dict:
    return {"what": what, "unit": unit, "ours": ours, "peer": peer, "ratio": peer / ours, "goal": goal}


def run(script: str, *options: str) -> dict:
    command = [sys.executable, str(HERE / script), *options, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def as_table(rows: list[dict]) -> str:
    lines = ["| what | ours | peer | ratio | goal |", "| --- | ---: | ---: | ---: | ---: |"]
    for r in rows:
        goal = f"{r['goal']:.1f}x" if r["goal"] else "-"
        ours, peer = (f"{r[key]:.4g} {r['unit']}" for key in ("ours", "peer"))
        lines.append(f"| {r['what']} | {ours} | {peer} | {r['ratio']:.2f}x | {goal} |")
    return "\n".join(lines)


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", help="folder with nanoGPT's model.py, a further peer in training")
    parser.add_argument("--output", help="existing folder for the JSON objects and growth.png")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        args.output = args.output or temporary
        rows = []
        for name, (script, *options) in short_set(args).items():
            print(f"{name}: {script} {' '.join(options)}", file=sys.stderr)
            result = run(script, *options)
            Path(args.output, f"{name.replace(' ', '_')}.json").write_text(json.dumps(result, indent=1) + "\n")
            rows += ROWS[script](result)
    print(f"{machine()}\n\n{as_table(rows)}")


if __name__ == "__main__":
    main()
