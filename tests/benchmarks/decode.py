"""Speed of generation with GPT-2 124M, beside transformers' GPT-2, CTranslate2 and onnxruntime.

    python tests/benchmarks/decode.py
    python tests/benchmarks/decode.py --batch 8 --rounds 5 --json
    python tests/benchmarks/decode.py --prompt 512 --new_tokens 1      # prefill
    python tests/benchmarks/decode.py --static --batch 8 --new_tokens 256      # for a GPU
    python tests/benchmarks/decode.py --preset tiny --new_tokens 4     # to see whether it works

All generate the same number of tokens, greedily, with the same random weights, in turns, each in its own process:

transformers       transformers' GPT2LMHeadModel, float32
scratch_gpt2       our model as loaded
... optimized      after optimize_for_inference()
... int8           after optimize_for_inference(weights="int8")
... static         transformers' and ours with a static cache (--static), with which generate compiles them on a GPU
... bf16           transformers' and ours after optimize_for_inference(), where the CPU computes bfloat16
ctranslate2        its float32 and int8, if it is installed (pip install ctranslate2)
onnxruntime        transformers' model exported with its key-value cache, float32 (pip install onnxruntime onnxscript)

The float32 contenders must generate equal tokens; for the others, the share of equal tokens is shown. Times are
medians. Bandwidth is the bytes of weights that the steps read, divided by the time, as a share of the fastest sum over
400 MB in the same turns; it is meaningless with a long prompt. Memory is the resident memory of a contender's process
after its first text (Linux). On a GPU, only transformers' model and ours take part, and the last two numbers are
meaningless.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from importlib.util import find_spec
from pathlib import Path

import torch
from process_memory import memory_mb
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, set_seed
from transformers.utils import logging

from scratch_gpt2 import ScratchGPT2ForCausalLM
from scratch_gpt2.configuration_scratch_gpt2 import PRESETS
from scratch_gpt2.hardware import cpu_computes_bfloat16

STATIC = ("transformers static", "scratch_gpt2 static")
EXACT = ("transformers", "scratch_gpt2", "scratch_gpt2 optimized", "ctranslate2", "onnxruntime", *STATIC)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHT_BYTES = {"int8": 1, "bf16": 2}  # float32: 4


def contender_names(static: bool) -> list[str]:
    """The contenders that this machine can run."""
    names = ["transformers", "scratch_gpt2", *(STATIC if static else ())]
    if DEVICE == "cuda":
        return names
    names += ["scratch_gpt2 optimized", "scratch_gpt2 int8"]
    if cpu_computes_bfloat16():
        names += ["transformers bf16", "scratch_gpt2 bf16"]
    if find_spec("ctranslate2"):
        names += ["ctranslate2", "ctranslate2 int8"]
    if find_spec("onnxruntime") and find_spec("onnxscript"):
        names += ["onnxruntime"]
    return names


def make_writer(name: str, folder: Path):
    """A function of (B, T) ids and the number n of new tokens that returns the (B, n) new ids."""
    if name == "onnxruntime":
        return make_onnx_writer(folder)
    if name.startswith("ctranslate2"):
        return make_ctranslate2_writer(folder, "int8" if name.endswith("int8") else "float32")
    model_class = GPT2LMHeadModel if name.startswith("transformers") else ScratchGPT2ForCausalLM
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    model = model_class.from_pretrained(folder, dtype=dtype).eval().to(DEVICE)
    if name.startswith("scratch_gpt2 ") and name not in STATIC:
        model.optimize_for_inference("int8" if name.endswith("int8") else None)
    options = {"eos_token_id": None, "do_sample": False}
    options |= {"cache_implementation": "static"} if name in STATIC else {}

    def write(ids, new_tokens):
        ids = ids.to(DEVICE)
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options)
        return tokens[:, ids.shape[1] :].cpu()

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


def make_onnx_writer(folder: Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", options)
    names = [argument.name for argument in session.get_inputs()]  # the ids, then keys and values of every block
    n_heads, head_size = (session.get_inputs()[1].shape[i] for i in (1, 3))
    to_value = onnxruntime.OrtValue.ortvalue_from_numpy

    def write(ids, new_tokens):
        empty = torch.zeros(len(ids), n_heads, 0, head_size).numpy()
        past, step_ids, written = [to_value(empty) for _ in names[1:]], ids, []
        for _ in range(new_tokens):
            inputs = dict(zip(names, [to_value(step_ids.numpy()), *past], strict=True))
            logits, *past = session.run_with_ort_values(None, inputs)
            step_ids = torch.from_numpy(logits.numpy().argmax(-1, keepdims=True))
            written.append(step_ids)
        return torch.cat(written, 1)

    return write


class StepWithCache(torch.nn.Module):
    """transformers' GPT-2 for ONNX, with tensors only: from (B, T) ids and the alternating keys and values of all
    blocks to the logits of the last position and the longer keys and values."""

    def __init__(self, model: GPT2LMHeadModel):
        super().__init__()
        self.model = model

    def forward(self, ids, past):
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        output = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1], [x for layer in output.past_key_values.layers for x in (layer.keys, layer.values)]


def export_to_onnx(model: GPT2LMHeadModel, folder: Path) -> None:
    config, free = model.config, torch.export.Dim.DYNAMIC
    past = [torch.zeros(2, config.n_head, 3, config.n_embd // config.n_head) for _ in range(2 * config.n_layer)]
    shapes = ({0: free, 1: free}, [{0: free, 2: free}] * len(past))
    inputs = (torch.zeros(2, 5, dtype=torch.long), past)
    (folder / "onnx").mkdir()
    file = folder / "onnx" / "model.onnx"
    torch.onnx.export(StepWithCache(model).eval(), inputs, file, dynamic_shapes=shapes, dynamo=True, verbose=False)


def convert_to_ctranslate2(model: GPT2LMHeadModel, folder: Path) -> None:
    """As ctranslate2's own converter does, but with numbers as tokens: random weights have no vocabulary."""
    from ctranslate2.converters.transformers import GPT2Loader

    spec = GPT2Loader().get_model_spec(model)
    spec.register_vocabulary([str(number) for number in range(model.config.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = str(model.config.eos_token_id)
    spec.validate()
    spec.optimize(quantization=None)
    (folder / "ctranslate2").mkdir()
    spec.save(str(folder / "ctranslate2"))


def write_weights(folder: Path, preset: str, names: list[str]) -> None:
    """Random weights, also converted for the peers with a format of their own. Their wide distribution makes the text
    varied, and keeps the best two tokens further apart than rounding errors."""
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**PRESETS[preset], initializer_range=0.1)).eval()
    model.save_pretrained(folder)
    if "ctranslate2" in names:
        convert_to_ctranslate2(model, folder)
    if "onnxruntime" in names:
        export_to_onnx(model, folder)


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
    write, ids = make_writer(name, Path(args.weights)), random_prompt(args)
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
    linear_weights = config.vocab_size * config.n_embd + config.n_layer * 12 * config.n_embd**2
    base, summary = contenders["transformers"], {}
    for name, contender in contenders.items():
        seconds = contender.median("seconds")
        bytes_read = linear_weights * WEIGHT_BYTES.get(name.split()[-1], 4) * args.new_tokens
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
    print(f"{torch.get_num_threads()} threads, plain read {result['read_gb_per_second']:.1f} GB/s")
    print(f"{'':<24}{'tokens/s':>9}{'CPU s':>8}{'speed':>8}{'bandwidth':>11}{'equal':>7}{'memory':>10}")
    for name, row in result["contenders"].items():
        print(
            f"{name:<24}{row['tokens_per_second']:>9.1f}{row['cpu_seconds']:>8.2f}{row['speed']:>7.2f}x"
            f"{row['bandwidth']:>11.0%}{row['equal_tokens']:>7.0%}{row['memory_mb']:>7.0f} MB"
        )


if __name__ == "__main__":
    main()
