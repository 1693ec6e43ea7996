"""Speed of generation with GPT-2 124M, compared with transformers, CTranslate2, onnxruntime, OpenVINO and llama.cpp.

    python tests/benchmarks/decode.py
    python tests/benchmarks/decode.py --batch 8 --rounds 5 --json
    python tests/benchmarks/decode.py --prompt 900     # a long context
    python tests/benchmarks/decode.py --prompt 512 --new_tokens 1      # prefill
    python tests/benchmarks/decode.py --contenders "scratch_gpt2 int8" "llama.cpp Q8_0"     # and transformers
    python tests/benchmarks/decode.py --static --batch 8 --new_tokens 256      # for a GPU
    python tests/benchmarks/decode.py --preset tiny --new_tokens 4     # to see whether it works

All generate the same number of tokens, greedily, with the same random weights, in turns, each in its own process, with
the same number of threads; all processes keep the memory that they free (`keep_freed_memory`):

transformers       transformers' GPT2LMHeadModel, float32
scratch_gpt2       our model as loaded
... optimized      after optimize_for_inference()
... int8, int4     after optimize_for_inference(weights="int8") and "int4"
... bf16 weights   after optimize_for_inference(weights="bf16"), where the CPU computes bfloat16
... static         transformers' and ours with a static cache (--static), with which generate compiles them on a GPU
... bf16           transformers' and ours after optimize_for_inference(), where the CPU computes bfloat16
ctranslate2        its float32 and int8, if it is installed (pip install ctranslate2)
onnxruntime        transformers' model exported with its key-value cache, float32 (pip install onnxruntime onnxscript)
openvino           the same file with a state, float32 and, with nncf, int8 (pip install openvino nncf)
llama.cpp          F32, Q8_0 and Q4_0 files of our own export, by its server (pip install xllamacpp gguf)

The float32 contenders must generate equal tokens; for the others, the share of equal tokens is shown. llama.cpp
computes GELU from a table in float16, so its F32 may choose another token. Times are medians. Bandwidth is the bytes
of weights that the steps read, divided by the time, as a share of the fastest sum over 400 MB in the same turns; it is
meaningless with a long prompt. Memory is the resident memory of a contender's process after its first text (Linux). On
a GPU, only transformers' model and ours take part, and the last two numbers are meaningless.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from importlib.util import find_spec
from pathlib import Path

import decode_peers
import torch
from process_memory import memory_mb
from transformers import GPT2Config, GPT2LMHeadModel, set_seed
from transformers.utils import logging

from scratch_gpt2 import ScratchGPT2ForCausalLM
from scratch_gpt2.configuration_scratch_gpt2 import PRESETS
from scratch_gpt2.hardware import cpu_computes_bfloat16, keep_freed_memory

STATIC = ("transformers static", "scratch_gpt2 static")
EXACT = ("transformers", "scratch_gpt2", "scratch_gpt2 optimized", "ctranslate2", "onnxruntime", "openvino", *STATIC)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = {"int8": "int8", "int4": "int4", "weights": "bf16"}  # last word of a contender: weights=
# Bytes of a weight, with its share of a scale, in the blocks and in the output layer. float32: 4
WEIGHT_BYTES = {"int8": (1, 1), "int4": (0.625, 1), "bf16": (2, 2), "weights": (2, 2)}
WEIGHT_BYTES |= {"Q8_0": (1.0625, 1.0625), "Q4_0": (0.5625, 1.0625)}


def contender_names(static: bool) -> list[str]:
    """The contenders that this machine can run."""
    names = ["transformers", "scratch_gpt2", *(STATIC if static else ())]
    if DEVICE == "cuda":
        return names
    names += ["scratch_gpt2 optimized", "scratch_gpt2 int8", "scratch_gpt2 int4"]
    if cpu_computes_bfloat16():
        names += ["transformers bf16", "scratch_gpt2 bf16", "scratch_gpt2 bf16 weights"]
    if find_spec("ctranslate2"):
        names += ["ctranslate2", "ctranslate2 int8"]
    if find_spec("onnxruntime") and find_spec("onnxscript"):
        names += ["onnxruntime"]
    if find_spec("openvino") and find_spec("onnxscript"):
        names += ["openvino", *(["openvino int8"] if find_spec("nncf") else [])]
    if find_spec("xllamacpp") and find_spec("gguf"):
        names += [f"llama.cpp {kind}" for kind in decode_peers.LLAMA_TYPES]
    return names


def make_writer(name: str, folder: Path, batch: int, positions: int):
    """A function of (B, T) ids and the number n of new tokens that returns the (B, n) new ids.

    llama.cpp and OpenVINO are told `batch`, B, and llama.cpp that there are at most `positions` positions.
    """
    kind = name.split()[-1]
    if name == "onnxruntime":
        return decode_peers.make_onnx_writer(folder)
    if name.startswith("openvino"):
        return decode_peers.make_openvino_writer(folder, batch, in_int8=kind == "int8")
    if name.startswith("llama.cpp"):
        return decode_peers.make_llama_writer(folder / f"{kind}.gguf", batch, positions)
    if name.startswith("ctranslate2"):
        return decode_peers.make_ctranslate2_writer(folder, "int8" if kind == "int8" else "float32")
    model_class = GPT2LMHeadModel if name.startswith("transformers") else ScratchGPT2ForCausalLM
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    model = model_class.from_pretrained(folder, dtype=dtype).eval().to(DEVICE)
    if name.startswith("scratch_gpt2 ") and name not in STATIC:
        model.optimize_for_inference(OURS.get(kind))
    options = {"eos_token_id": None, "do_sample": False}
    options |= {"cache_implementation": "static"} if name in STATIC else {}

    def write(ids, new_tokens):
        ids = ids.to(DEVICE)
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options)
        return tokens[:, ids.shape[1] :].cpu()

    return write


def write_weights(folder: Path, preset: str, names: list[str]) -> None:
    """Random weights, also converted for the peers with a format of their own. Their wide distribution makes the text
    varied, and keeps the best two tokens further apart than rounding errors."""
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**PRESETS[preset], initializer_range=0.1)).eval()
    model.save_pretrained(folder)
    peers = {name.split()[0] for name in names}
    if "ctranslate2" in peers:
        decode_peers.convert_to_ctranslate2(model, folder)
    if peers & {"onnxruntime", "openvino"}:
        decode_peers.export_to_onnx(model, folder)
    if "llama.cpp" in peers:
        decode_peers.convert_to_gguf(folder)


class Contender:
    """A writer in a process of its own, which waits while another one is measured: libraries in one process would slow
    each other down by their threads."""

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
    """The process of a contender: generate the text once per input line, and print the measurements."""
    keep_freed_memory()
    ids = random_prompt(args)
    with contextlib.redirect_stdout(sys.stderr):  # nncf prints a table
        write = make_writer(name, Path(args.weights), args.batch, args.prompt + args.new_tokens)
    for _ in sys.stdin:
        start, cpu_start = time.perf_counter(), time.process_time()
        tokens = write(ids, args.new_tokens)
        run = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
        print(json.dumps(run | {"tokens": tokens.tolist(), "memory_mb": memory_mb("VmRSS")}), flush=True)


def compare(args) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        folder, names = Path(args.folder or temporary), contender_names(args.static)
        if not (folder / "config.json").exists():
            write_weights(folder, args.preset, names)
        if args.contenders:
            names = ["transformers", *(name for name in names if name in args.contenders)]
        contenders = {name: Contender(name, folder, args) for name in names}  # each has generated once, as a warm-up
        check_equal({name: contender.tokens for name, contender in contenders.items()})
        buffer, read_seconds = torch.ones(100_000_000), []
        for _ in range(args.rounds):
            for contender in contenders.values():
                contender.runs.append(contender.write())
            read_seconds += timeit.repeat(buffer.sum, number=1, repeat=5)
        for contender in contenders.values():
            contender.process.communicate()
    return summarise(contenders, buffer.nbytes / min(read_seconds), args)


def summarise(contenders: dict[str, Contender], bandwidth: float, args) -> dict:
    config = GPT2Config(**PRESETS[args.preset])
    in_blocks, in_output = config.n_layer * 12 * config.n_embd**2, config.vocab_size * config.n_embd
    base, summary = contenders["transformers"], {}
    for name, contender in contenders.items():
        seconds = contender.median("seconds")
        block_bytes, output_bytes = WEIGHT_BYTES.get(name.split()[-1], (4, 4))
        bytes_read = (in_blocks * block_bytes + in_output * output_bytes) * args.new_tokens
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
            raise RuntimeError(f"{name} generates other tokens than transformers: {tokens[name]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="texts per batch")
    parser.add_argument("--prompt", type=int, default=16, help="tokens per prompt")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="gpt2", help="size: tiny, gpt2, gpt2-medium, ...")
    parser.add_argument("--folder", help="existing folder to keep the weights and their conversions in")
    parser.add_argument("--contenders", nargs="+", help="only these and transformers; by default all that can run")
    parser.add_argument("--static", action="store_true", help="also measure a static cache, compiled on a GPU")
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
    print(f"{torch.get_num_threads()} threads, freed memory kept, plain read {result['read_gb_per_second']:.1f} GB/s")
    print(f"{'':<24}{'tokens/s':>9}{'CPU s':>8}{'speed':>8}{'bandwidth':>11}{'equal':>7}{'memory':>10}")
    for name, row in result["contenders"].items():
        print(
            f"{name:<24}{row['tokens_per_second']:>9.1f}{row['cpu_seconds']:>8.2f}{row['speed']:>7.2f}x"
            f"{row['bandwidth']:>11.0%}{row['equal_tokens']:>7.0%}{row['memory_mb']:>7.0f} MB"
        )


if __name__ == "__main__":
    main()
