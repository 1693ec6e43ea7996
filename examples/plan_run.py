"""Plan a pretraining run: memory per GPU, days, and the cost of a restart. Nothing is trained or downloaded.

    python examples/plan_run.py --preset gpt2 --gpus 8 --tokens 10e9
    python examples/plan_run.py --preset gpt2-xl --gpus 64 --gpu A100 --tokens 10e9 100e9 --gradient_checkpointing

Memory is that of float32 weights with bfloat16 autocast, as the training scripts use it. The context of CUDA and
fragmentation add about 2 GB. The speed is calculated as `--mfu` times the GPU's peak, not measured.
"""

if __name__ == "__main__":  # --help and mistyped options are answered before the imports below, which take seconds
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "_quick.py"))

from dataclasses import asdict, dataclass, field
from typing import Literal

from scratch_gpt2 import ScratchGPT2Config
from scratch_gpt2.cli import parse_arguments, run_main
from scratch_gpt2.hardware import PEAK_FLOPS
from scratch_gpt2.training.plan import STRATEGIES, checkpoint_bytes, device_memory, tokens_per_second
from scratch_gpt2.training.recipes import TOKENS_PER_STEP

GB = 1e9


@dataclass
class Arguments:
    preset: Literal["tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = field(
        default="gpt2", metadata={"help": "Size of the model."}
    )
    gpus: int = field(default=8, metadata={"help": "Number of GPUs."})
    gpu: str = field(default="H100", metadata={"help": f"One of {', '.join(PEAK_FLOPS)}."})
    tokens: list[float] = field(default_factory=lambda: [10e9, 100e9], metadata={"help": "Tokens to train on."})
    mfu: list[float] = field(
        default_factory=lambda: [0.4, 0.5], metadata={"help": "Model FLOPs utilization, between 0 and 1."}
    )
    rows: int = field(default=16, metadata={"help": "Sequences per GPU and pass."})
    block_length: int = field(default=1024, metadata={"help": "Tokens per sequence."})
    tokens_per_step: int = field(default=TOKENS_PER_STEP, metadata={"help": "Tokens per optimizer step."})
    save_steps: int = field(default=1000, metadata={"help": "Steps between checkpoints."})
    optimizer: Literal["adamw", "muon"] = field(default="adamw", metadata={"help": "As in pretrain.py."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute the blocks' activations."})


def check(arguments: Arguments) -> None:
    if arguments.gpu not in PEAK_FLOPS:
        raise ValueError(f"The peak of {arguments.gpu!r} is not known; choose one of {', '.join(PEAK_FLOPS)}.")
    for name in ("gpus", "rows", "block_length", "tokens_per_step", "save_steps"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} is {getattr(arguments, name)} but must be at least 1.")
    for name, most in (("tokens", 1e15), ("mfu", 1)):
        for value in getattr(arguments, name):
            if not 0 < value <= most:
                raise ValueError(f"{name} is {value:g} but must be above 0 and at most {most:g}.")


def memory_table(arguments: Arguments, config: ScratchGPT2Config) -> list[str]:
    columns = ("parameters", "gradients", "optimizer", "buffers", "activations", "loss", "total")
    lines = ["memory per GPU, GB" + "".join(f"{name:>13}" for name in columns)]
    for strategy in STRATEGIES:
        try:
            memory = device_memory(
                config,
                strategy,
                devices=arguments.gpus,
                rows=arguments.rows,
                length=arguments.block_length,
                optimizer=arguments.optimizer,
                gradient_checkpointing=arguments.gradient_checkpointing,
            )
        except ValueError as error:
            lines.append(f"{strategy:<18} {error}")
            continue
        values = [*asdict(memory).values(), memory.total]
        lines.append(f"{strategy:<18}" + "".join(f"{value / GB:>13.2f}" for value in values))
    return lines


def time_table(arguments: Arguments, config: ScratchGPT2Config) -> list[str]:
    lines = [f"{'MFU':<6}{'tokens/s':>12}{'s/step':>9}" + "".join(f"{f'days, {n:.0e}':>14}" for n in arguments.tokens)]
    peak = PEAK_FLOPS[arguments.gpu]
    for mfu in arguments.mfu:
        speed = tokens_per_second(config, arguments.block_length, devices=arguments.gpus, peak_flops=peak, mfu=mfu)
        days = "".join(f"{tokens / speed / 86_400:>14.2f}" for tokens in arguments.tokens)
        lines.append(f"{mfu:<6.0%}{speed:>12,.0f}{arguments.tokens_per_step / speed:>9.2f}{days}")
    return lines


def restart_cost(arguments: Arguments, config: ScratchGPT2Config) -> str:
    """A failure comes on average in the middle between two checkpoints."""
    peak, mfu = PEAK_FLOPS[arguments.gpu], min(arguments.mfu)
    speed = tokens_per_second(config, arguments.block_length, devices=arguments.gpus, peak_flops=peak, mfu=mfu)
    lost = arguments.save_steps / 2 * arguments.tokens_per_step / speed
    size = checkpoint_bytes(config, optimizer=arguments.optimizer) / GB
    return (
        f"restart: a checkpoint of {size:.2f} GB every {arguments.save_steps:,} steps; a failure loses "
        f"{lost / 60:.1f} minutes on average at {mfu:.0%} MFU, and the time to start again"
    )


def main() -> None:
    (arguments,) = parse_arguments(Arguments, description=__doc__)
    check(arguments)
    config = ScratchGPT2Config.from_preset(arguments.preset)
    if arguments.block_length > config.n_positions:
        raise ValueError(
            f"block_length is {arguments.block_length}, but {arguments.preset} has {config.n_positions} positions."
        )
    print(
        f"{arguments.preset}: {config.n_parameters / 1e6:.1f}M parameters; {arguments.gpus} x {arguments.gpu}, "
        f"{arguments.rows} rows of {arguments.block_length} tokens per GPU, {arguments.optimizer}"
    )
    print("", *memory_table(arguments, config), "", *time_table(arguments, config), "", sep="\n")
    print(restart_cost(arguments, config))


if __name__ == "__main__":
    run_main(main)
