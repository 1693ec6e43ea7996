"""Peak memory and time of loading a GPT-2 checkpoint, with scratch_gpt2 and with transformers' own GPT-2.

    python tests/benchmarks/load_memory.py --size gpt2
    python tests/benchmarks/load_memory.py --size gpt2-xl --dtype bfloat16 --shards 2 --json

Writes random float32 weights of the chosen size to a temporary folder (gpt2-xl: 6.2 GB, and as much again as a
checkpoint of this package) and loads them in fresh processes, in turns. Seconds include reading every weight once,
because weights may stay in a memory-mapped file until then; CPU seconds are those of the process. Peak memory is VmHWM
of /proc/self/status (Linux). It includes the pages of memory-mapped files and the libraries themselves, which the row
"imports only" shows.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from scratch_gpt2 import ScratchGPT2ForCausalLM
from scratch_gpt2.configuration_scratch_gpt2 import PRESETS

OWN = "scratch_gpt2, own checkpoint"
LOAD = """
import sys, time
import torch
import transformers, scratch_gpt2
from transformers import GPT2LMHeadModel
from scratch_gpt2 import ScratchGPT2ForCausalLM, openai_weights
name, folder, dtype = sys.argv[1:]
start, cpu_start = time.perf_counter(), time.process_time()
if name != "imports only":
    model_class = GPT2LMHeadModel if name == "transformers" else ScratchGPT2ForCausalLM
    model = model_class.from_pretrained(folder, dtype=dtype)
    checksum = sum(p.sum().item() for p in model.parameters())  # reads memory-mapped weights
seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024 / 1e9, seconds, cpu_seconds)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="gpt2", choices=PRESETS, help="size of the GPT-2")
    parser.add_argument("--dtype", default="auto", help="dtype of the loaded model: auto, float32, bfloat16, float16")
    parser.add_argument("--shards", type=int, default=1, help="number of safetensors files")
    parser.add_argument("--repeats", type=int, default=3, help="loads per library; medians are shown")
    parser.add_argument("--folder", help="parent of the temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_checkpoint(Path(folder), GPT2Config(**PRESETS[args.size]), args.shards)
        own_folder = Path(folder) / "own"
        ScratchGPT2ForCausalLM.from_pretrained(folder).save_pretrained(own_folder)
        runs = {"imports only": [], "scratch_gpt2": [], OWN: [], "transformers": []}
        for _ in range(args.repeats):
            for name, results in runs.items():
                command = [sys.executable, "-c", LOAD, name, own_folder if name == OWN else folder, args.dtype]
                results.append([float(value) for value in subprocess.check_output(command, text=True).split()])
    medians = {
        name: [statistics.median(column) for column in zip(*results, strict=True)] for name, results in runs.items()
    }
    if args.json:
        columns = ("peak_gb", "seconds", "cpu_seconds")
        rows = {name: dict(zip(columns, values, strict=True)) for name, values in medians.items()}
        print(json.dumps({"size": args.size, "dtype": args.dtype, "shards": args.shards, **rows}))
        return
    print(f"{args.size}, float32 in {args.shards} file(s), loaded as {args.dtype}, medians of {args.repeats}")
    for name, (peak, seconds, cpu_seconds) in medians.items():
        print(f"{name:28} {peak:6.2f} GB {seconds:6.2f} s {cpu_seconds:6.2f} CPU s")


def write_checkpoint(folder: Path, config: GPT2Config, n_shards: int) -> None:
    """Write random weights with one shard in memory at a time."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT2LMHeadModel(config).named_parameters()}
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(folder)
    names, weight_map = list(shapes), {}
    for shard in range(n_shards):
        file = f"model-{shard + 1:05}-of-{n_shards:05}.safetensors"
        part = names[shard * len(names) // n_shards : (shard + 1) * len(names) // n_shards]
        save_file({name: torch.randn(shapes[name]) * 0.02 for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


if __name__ == "__main__":
    main()
