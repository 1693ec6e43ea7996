"""Time and memory of a training step of GPT-2 124M, compared with transformers' GPT-2 (and nanoGPT's).

    python tests/benchmarks/train_step.py
    python tests/benchmarks/train_step.py --batch 1 --length 256 --dtype float32 --json
    python tests/benchmarks/train_step.py --nanogpt ~/nanoGPT     # a checkout of karpathy/nanoGPT
    python tests/benchmarks/train_step.py --length 256 --dtype float32 --masked 0.7     # fine-tuning on answers
    python tests/benchmarks/train_step.py --dtype float32 --compile     # torch.compile for all; needs a C++ compiler
    python tests/benchmarks/train_step.py --preset tiny --length 64 --dtype float32     # to see whether it works

The models train in turns, each in its own process, from the same weights on the same tokens: forward, backward,
clipping, AdamW, in float32 or under bfloat16 autocast. The benchmark fails if their losses differ. The first step is a
warm-up and is not measured. Memory is the peak of the process (on a GPU: of torch) during the steps. FLOPs are those
that the model needs, whatever a library computes; MFU is their share of the GPU's peak in bfloat16 (PaLM, appendix B).
On a busy machine, compare the seconds of CPU.

All processes keep the memory that they free, as the training scripts in examples/ do (`keep_freed_memory`).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

from process_memory import memory_mb, reset_peak_memory

# Largest relative difference between the losses of the same work.
TOLERANCE = {"float32": 1e-5, "bf16": 2e-3}


def train(name: str, args, masked: float = 0.0, compiled: bool = False) -> dict:
    """Train one model for a few steps, in this process."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(name, args).to(device).train()
    config = model.config
    vocab_size = config.vocab_size
    ids = torch.randint(0, vocab_size, (args.batch, args.length), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    labels = ids.clone()
    labels[:, : round(masked * args.length)] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if compiled:
        model.compile()
    reset_peak(device)
    losses, seconds, cpu_seconds = [], [], []
    for _ in range(args.steps + 1):  # the first one is a warm-up
        start, cpu_start = time.perf_counter(), time.process_time()
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bf16"):
            if name == "nanogpt":
                targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-1)
                loss = model(ids, targets.clamp(min=-1))[1]  # it ignores label -1
            else:
                only_loss = {"skip_logits": True} if name.startswith("scratch_gpt2") else {}  # as under Trainer
                loss = model(input_ids=ids, labels=labels, use_cache=False, **only_loss).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    times = {"seconds": seconds[1:], "cpu_seconds": cpu_seconds[1:]}
    return {"model": name, "losses": losses, **times, "peak_mb": peak_mb(device)}


def load(name: str, args):
    import torch

    options = {"dtype": torch.float32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    if name.startswith("scratch_gpt2"):  # or, from growth.py, "scratch_gpt2 optimized"
        from scratch_gpt2 import ScratchGPT2ForCausalLM

        return ScratchGPT2ForCausalLM.from_pretrained(args.weights, **options)
    from transformers import GPT2LMHeadModel

    reference = GPT2LMHeadModel.from_pretrained(args.weights, **options)
    return reference if name == "transformers" else as_nanogpt(reference, args.nanogpt)


def as_nanogpt(reference, folder: str):
    sys.path.insert(0, folder)
    from model import GPT, GPTConfig

    names = ("n_layer", "n_head", "n_embd", "vocab_size")
    sizes = {name: getattr(reference.config, name) for name in names}
    model = GPT(GPTConfig(dropout=0.0, block_size=reference.config.n_positions, **sizes))
    transposed = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    weights = reference.state_dict()
    model.load_state_dict({name: x.T if name.endswith(transposed) else x for name, x in weights.items()}, strict=False)
    for block in model.transformer.h:
        block.mlp.gelu.approximate = "tanh"  # OpenAI's; nanoGPT's exact GELU has other losses
    return model


def reset_peak(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak_memory()


def peak_mb(device: str) -> float:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return memory_mb("VmHWM")


def compare(args) -> list[dict]:
    """All rounds of all models, each in its own process. Raises RuntimeError if the losses differ."""
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    from scratch_gpt2.configuration_scratch_gpt2 import PRESETS

    names = ["transformers", "scratch_gpt2"] + ["nanogpt"] * (args.nanogpt is not None)
    with tempfile.TemporaryDirectory() as folder:
        set_seed(0)
        GPT2LMHeadModel(GPT2Config(**PRESETS[args.preset])).save_pretrained(folder)
        runs = []
        for _ in range(args.rounds):
            for name in names:
                command = [sys.executable, __file__, "--only", name, "--weights", folder, *sys.argv[1:]]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                runs.append(json.loads(output.splitlines()[-1]))
                print(output.splitlines()[-1], file=sys.stderr)
    for run in runs:
        for loss, expected in zip(run["losses"], runs[0]["losses"], strict=True):
            if abs(loss - expected) > TOLERANCE[args.dtype] * expected:
                raise RuntimeError(f"The losses differ: {run['model']} {run['losses']}, {runs[0]['losses']}")
    return runs


def summarise(runs: list[dict], args) -> dict[str, dict]:
    from scratch_gpt2 import ScratchGPT2Config
    from scratch_gpt2.configuration_scratch_gpt2 import PRESETS
    from scratch_gpt2.hardware import known_peak_flops
    from scratch_gpt2.training.callbacks import flops_per_token

    tokens = args.batch * args.length
    flops = tokens * flops_per_token(ScratchGPT2Config(**PRESETS[args.preset]), args.length)
    peak_flops = known_peak_flops()
    summary = {}
    for name in dict.fromkeys(run["model"] for run in runs):
        mine = [run for run in runs if run["model"] == name]
        summary[name] = {
            "seconds": statistics.median(second for run in mine for second in run["seconds"]),
            "cpu_seconds": statistics.median(second for run in mine for second in run["cpu_seconds"]),
            "peak_mb": statistics.median(run["peak_mb"] for run in mine),
            "losses": mine[0]["losses"],
        }
    base = summary["transformers"]
    for result in summary.values():
        result["speed"] = base["seconds"] / result["seconds"]
        result["memory"] = result["peak_mb"] / base["peak_mb"]
        result["tokens_per_second"] = tokens / result["seconds"]
        result["tflops_per_second"] = flops / result["seconds"] / 1e12
        result["mfu"] = flops / result["seconds"] / peak_flops if peak_flops else None
    return summary


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtype", choices=TOLERANCE, default="bf16")
    parser.add_argument("--masked", type=float, default=0.0, help="share of each row, from its start, without labels")
    parser.add_argument("--compile", action="store_true", help="compile every model with torch.compile")
    parser.add_argument("--preset", default="gpt2", help="size: tiny, gpt2, gpt2-medium, ...")
    parser.add_argument("--steps", type=int, default=2, help="measured steps per process")
    parser.add_argument("--rounds", type=int, default=2, help="processes per model")
    parser.add_argument("--nanogpt", help="folder with nanoGPT's model.py")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        from scratch_gpt2.hardware import keep_freed_memory

        keep_freed_memory()
        print(json.dumps(train(args.only, args, args.masked, args.compile)))
        return
    summary = summarise(compare(args), args)
    if args.json:
        print(json.dumps({"options": vars(args), "models": summary}))
        return
    print(f"{args.batch} x {args.length} tokens, {args.dtype}; every process keeps the memory that it frees")
    print(
        f"{'model':<20}{'s/step':>8}{'CPU s':>8}{'speed':>8}{'tokens/s':>10}{'TFLOP/s':>9}{'MFU':>6}{'peak MB':>10}"
        f"{'memory':>8}   first loss"
    )
    for name, result in summary.items():
        print(
            f"{name:<20}{result['seconds']:>8.2f}{result['cpu_seconds']:>8.2f}{result['speed']:>7.2f}x"
            f"{result['tokens_per_second']:>10.0f}{result['tflops_per_second']:>9.3f}"
            f"{'-' if result['mfu'] is None else format(result['mfu'], '.0%'):>6}"
            f"{result['peak_mb']:>10.0f}{result['memory']:>8.0%}   {result['losses'][0]:.5f}"
        )


if __name__ == "__main__":
    main()
