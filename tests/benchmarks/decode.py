"""Speed of writing text with GPT-2 124M on a CPU, beside transformers' GPT-2 and CTranslate2.

    python tests/benchmarks/decode.py
    python tests/benchmarks/decode.py --batch 8 --rounds 5 --json
    python tests/benchmarks/decode.py --prompt 512 --new_tokens 1      # prefill

All write the same number of tokens, greedily, with the same random weights, in turns, each in its own process:

transformers       transformers' GPT2LMHeadModel, float32
scratch_gpt2       our model as it is loaded
... optimized      after optimize_for_inference()
... int8           after optimize_for_inference(weights="int8")
ctranslate2        its float32 and int8, where it is installed (pip install ctranslate2)

The tokens of the float32 contenders must be equal; for int8 the share of equal ones is shown. Times are medians.
Bandwidth is the bytes of weights that a step reads, times steps, over the time, as a part of what a plain sum over
400 MB reads per second in the same turns; with a long prompt it means nothing. Memory is what a contender's process
holds after its first text (Linux).
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


class Contender:
    """A writer in a process of its own, which waits while another one is measured: the threads of one library cost
    another one's time where they share a process."""

    def __init__(self, name: str, folder: Path, args):
        options = ["--batch", str(args.batch), "--prompt", str(args.prompt), "--new_tokens", str(args.new_tokens)]
        command = [sys.executable, __file__, "--only", name, "--weights", str(folder), *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        first = self.write()
        self.tokens, self.memory_mb = first["tokens"], first["memory_mb"]
        self.runs = []

    def write(self) -> dict:
        self.process.stdin.write("write\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def median(self, key: str) -> float:
        return statistics.median(run[key] for run in self.runs)


def answer_requests(name: str, args) -> None:
    """The process of a contender: for each line it reads, it writes the text again and says what that took."""
    write, ids = make_writer(name, Path(args.weights)), random_prompt(args)
    for _ in sys.stdin:
        start, cpu_start = time.perf_counter(), time.process_time()
        tokens = write(ids, args.new_tokens)
        run = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
        print(json.dumps(run | {"tokens": tokens.tolist(), "memory_mb": held_mb()}), flush=True)


def compare(args) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = NAMES if write_weights(folder, args.n_layer) else OURS_AND_THEIRS
        contenders = {name: Contender(name, folder, args) for name in names}  # each has written once: warm
        check_equal({name: contender.tokens for name, contender in contenders.items()})
        buffer, read_seconds = torch.ones(100_000_000), []
        for _ in range(args.rounds):
            for contender in contenders.values():
                contender.runs.append(contender.write())
            start = time.perf_counter()
            buffer.sum()
            read_seconds.append(time.perf_counter() - start)
        for contender in contenders.values():
            contender.process.communicate()
    return summarise(contenders, buffer.nbytes / statistics.median(read_seconds), args)


def summarise(contenders: dict[str, Contender], bandwidth: float, args) -> dict:
    linear_weights = GPT2Config().vocab_size * 768 + args.n_layer * 12 * 768**2
    base, summary = contenders["transformers"], {}
    for name, contender in contenders.items():
        seconds = contender.median("seconds")
        bytes_read = linear_weights * (1 if name.endswith("int8") else 4) * args.new_tokens
        equal = torch.tensor(contender.tokens) == torch.tensor(base.tokens)
        summary[name] = {
            "tokens_per_second": args.batch * args.new_tokens / seconds,
            "seconds": seconds,
            "cpu_seconds": contender.median("cpu_seconds"),
            "speed": base.median("seconds") / seconds,
            "bandwidth": bytes_read / seconds / bandwidth,
            "equal_tokens": equal.float().mean().item(),
            "memory_mb": contender.memory_mb,
        }
    return {"read_gb_per_second": bandwidth / 1e9, "contenders": summary}


def random_prompt(args) -> torch.Tensor:
    return torch.randint(0, 50257, (args.batch, args.prompt), generator=torch.Generator().manual_seed(0))


def check_equal(tokens: dict[str, list]) -> None:
    for name in EXACT:
        if name in tokens and tokens[name] != tokens["transformers"]:
            raise RuntimeError(f"{name} writes other tokens: {tokens[name]}")


def held_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="texts at once")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable_progress_bar()
    if args.only:
        answer_requests(args.only, args)
        return
    result = compare(args)
    if args.json:
        print(json.dumps(vars(args) | result))
        return
    print(f"batch {args.batch}, prompt {args.prompt}, {args.new_tokens} new tokens, {args.rounds} rounds, ", end="")
    print(f"{torch.get_num_threads()} threads, a plain read {result['read_gb_per_second']:.1f} GB/s")
    print(f"{'':<24}{'tokens/s':>9}{'CPU s':>8}{'speed':>8}{'bandwidth':>11}{'equal':>7}{'memory':>10}")
    for name, row in result["contenders"].items():
        print(
            f"{name:<24}{row['tokens_per_second']:>9.1f}{row['cpu_seconds']:>8.2f}{row['speed']:>7.2f}x"
            f"{row['bandwidth']:>11.0%}{row['equal_tokens']:>7.0%}{row['memory_mb']:>7.0f} MB"
        )


if __name__ == "__main__":
    main()
