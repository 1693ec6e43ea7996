"""Speed of writing text with GPT-2 124M on a CPU, beside transformers' GPT-2 and CTranslate2.

    python tests/benchmarks/decode.py
    python tests/benchmarks/decode.py --batch 8 --rounds 5 --json
    python tests/benchmarks/decode.py --prompt 512 --new_tokens 1      # prefill

All write the same number of tokens, greedily, with the same random weights, in turns in one process:

transformers       transformers' GPT2LMHeadModel, float32
scratch_gpt2       our model as it is loaded
... optimized      after optimize_for_inference()
... int8           after optimize_for_inference(weights="int8")
ctranslate2        its float32 and int8, where it is installed (pip install ctranslate2)

The tokens of the float32 contenders must be equal; for int8 the share of equal ones is shown. Times are medians.
Bandwidth is the bytes of weights that a step reads, times steps, over the time, as a part of what a plain sum over
400 MB reads per second in the same turns; with a long prompt it means nothing. Memory is what a contender's process
holds after its first text, all contenders' libraries included, each in a process of its own (Linux).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed
from transformers.utils import logging

from scratch_gpt2 import ScratchGPT2ForCausalLM

EXACT = ("transformers", "scratch_gpt2", "scratch_gpt2 optimized", "ctranslate2")
OURS_AND_THEIRS = ("transformers", "scratch_gpt2", "scratch_gpt2 optimized", "scratch_gpt2 int8")
NAMES = (*OURS_AND_THEIRS, "ctranslate2", "ctranslate2 int8")


def make_writer(name: str, folder: Path):
    """A function from (B, T) ids and a number of tokens to the (B, n) new ids."""
    if name.startswith("ctranslate2"):
        return make_ctranslate2_writer(folder, "int8" if name.endswith("int8") else "float32")
    model_class = GPT2LMHeadModel if name == "transformers" else ScratchGPT2ForCausalLM
    model = model_class.from_pretrained(folder, dtype=torch.float32)
    if name != "transformers" and name != "scratch_gpt2":
        model.optimize_for_inference("int8" if name.endswith("int8") else None)

    def write(ids, new_tokens):
        mask = torch.ones_like(ids)
        tokens = model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, eos_token_id=None, do_sample=False
        )
        return tokens[:, ids.shape[1] :]

    return write


def make_ctranslate2_writer(folder: Path, compute_type: str):
    import ctranslate2

    generator = ctranslate2.Generator(
        str(folder / "ctranslate2"), compute_type=compute_type, intra_threads=torch.get_num_threads()
    )

    def write(ids, new_tokens):
        results = generator.generate_batch(
            [[str(number) for number in row] for row in ids.tolist()],
            max_length=new_tokens,
            min_length=new_tokens,
            include_prompt_in_result=False,
            sampling_topk=1,
        )
        return torch.tensor([result.sequences_ids[0] for result in results])

    return write


def convert_to_ctranslate2(model: GPT2LMHeadModel, folder: Path) -> None:
    """What ctranslate2's own converter does, with numbers for tokens: random weights have no vocabulary."""
    from ctranslate2.converters.transformers import GPT2Loader

    spec = GPT2Loader().get_model_spec(model)
    spec.register_vocabulary([str(number) for number in range(model.config.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = str(model.config.eos_token_id)
    spec.validate()
    spec.optimize(quantization=None)
    (folder / "ctranslate2").mkdir()
    spec.save(str(folder / "ctranslate2"))


def write_weights(folder: Path, n_layer: int) -> bool:
    """Random weights, and the same for CTranslate2 where that is installed. A wide distribution makes the text varied,
    and keeps the best two tokens further apart than rounding."""
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=n_layer, initializer_range=0.1)).eval()
    model.save_pretrained(folder)
    try:
        convert_to_ctranslate2(model, folder)
    except ImportError:
        return False
    return True


def compare(args) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = NAMES if write_weights(folder, args.n_layer) else OURS_AND_THEIRS
        memory = {name: run_alone(name, folder, args) for name in names} if args.memory else {}
        writers = {name: make_writer(name, folder) for name in names}
        ids = random_prompt(args)
        tokens = {name: write(ids, args.new_tokens) for name, write in writers.items()}  # warms up
        check_equal(tokens)
        buffer = torch.ones(100_000_000)
        seconds, cpu_seconds, read_seconds = {name: [] for name in names}, {name: [] for name in names}, []
        for _ in range(args.rounds):
            for name, write in writers.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                write(ids, args.new_tokens)
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(time.process_time() - cpu_start)
            start = time.perf_counter()
            buffer.sum()
            read_seconds.append(time.perf_counter() - start)
    bandwidth = buffer.nbytes / statistics.median(read_seconds)
    linear_weights = GPT2Config().vocab_size * 768 + args.n_layer * 12 * 768**2
    summary = {}
    for name in names:
        time_taken = statistics.median(seconds[name])
        bytes_read = linear_weights * (1 if name.endswith("int8") else 4) * args.new_tokens
        summary[name] = {
            "tokens_per_second": args.batch * args.new_tokens / time_taken,
            "seconds": time_taken,
            "cpu_seconds": statistics.median(cpu_seconds[name]),
            "speed": statistics.median(seconds["transformers"]) / time_taken,
            "fastest_speed": min(seconds["transformers"]) / min(seconds[name]),
            "bandwidth": bytes_read / time_taken / bandwidth,
            "equal_tokens": (tokens[name] == tokens["transformers"]).float().mean().item(),
            "memory_mb": memory.get(name),
        }
    return {"read_gb_per_second": bandwidth / 1e9, "contenders": summary}


def random_prompt(args) -> torch.Tensor:
    return torch.randint(0, 50257, (args.batch, args.prompt), generator=torch.Generator().manual_seed(0))


def check_equal(tokens: dict[str, torch.Tensor]) -> None:
    for name in EXACT:
        if name in tokens and not torch.equal(tokens[name], tokens["transformers"]):
            raise RuntimeError(f"{name} writes other tokens: {tokens[name].tolist()}")


def run_alone(name: str, folder: Path, args) -> float:
    options = ["--batch", str(args.batch), "--prompt", str(args.prompt), "--new_tokens", str(args.new_tokens)]
    command = [sys.executable, __file__, "--only", name, "--weights", str(folder), *options]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def held_mb(name: str, args) -> float:
    make_writer(name, Path(args.weights))(random_prompt(args), args.new_tokens)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="texts at once")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--memory", action="store_true", help="measure the memory too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable_progress_bar()
    if args.only:
        print(held_mb(args.only, args))
        return
    result = compare(args)
    if args.json:
        print(json.dumps(vars(args) | result))
        return
    print(f"batch {args.batch}, prompt {args.prompt}, {args.new_tokens} new tokens, {args.rounds} rounds, ", end="")
    print(f"{torch.get_num_threads()} threads, a plain read {result['read_gb_per_second']:.1f} GB/s")
    print(f"{'':<24}{'tokens/s':>9}{'CPU s':>8}{'speed':>8}{'bandwidth':>11}{'equal':>7}{'memory':>10}")
    for name, row in result["contenders"].items():
        memory = f"{row['memory_mb']:.0f} MB" if row["memory_mb"] else "-"
        print(
            f"{name:<24}{row['tokens_per_second']:>9.1f}{row['cpu_seconds']:>8.2f}{row['speed']:>7.2f}x"
            f"{row['bandwidth']:>11.0%}{row['equal_tokens']:>7.0%}{memory:>10}"
        )


if __name__ == "__main__":
    main()
