"""What a pretraining run will need: memory per device, time and cost of a restart, before a GPU is rented."""

import math
from dataclasses import asdict, dataclass
from fnmatch import fnmatch

import torch

from ..configuration_scratch_gpt2 import ScratchGPT2Config
from ..linear_cross_entropy import CHUNK_ELEMENTS
from ..modeling_scratch_gpt2 import ScratchGPT2ForCausalLM
from .callbacks import flops_per_token
from .optimizers import parameter_groups

STRATEGIES = ("ddp", "fsdp2", "tp")


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device.

    - parameters, gradients, optimizer: in float32, as the trainers keep them. These are exact, without the 4 bytes of
      a step counter per parameter.
    - buffers: the largest copies that a step makes of them: DDP's buckets of gradients; under FSDP2 the gathered
      embeddings and two blocks, and a block's gradients before they are scattered; otherwise the weights in bfloat16.
    - activations: what the blocks keep for the backward pass under bfloat16 autocast with fused attention.
    - loss: two chunks of logits and the gradient of the output layer (see `linear_cross_entropy.py`).
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def device_memory(
    config: ScratchGPT2Config,
    strategy: str,
    devices: int,
    rows: int,
    length: int,
    optimizer: str = "adamw",
    gradient_checkpointing: bool = False,
) -> DeviceMemory:
    """Memory of pretraining on the fullest of `devices`, without the GPU's own context and fragmentation.

    Args:
        strategy: `ddp` (a whole model on every device), `fsdp2` (parameters, gradients and optimizer state sharded)
            or `tp` (the matrices of the blocks split by heads and features, as in `base_model_tp_plan`).
        rows, length: sequences per device and pass (with `tp`: of all devices together), and their tokens.
        optimizer: `adamw`, with two numbers per parameter, or `muon`, with one per matrix in the blocks.

    Raises ValueError for an unknown strategy and for heads that cannot be divided among the devices.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"Unknown strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}.")
    if strategy == "tp" and config.n_head % devices:
        raise ValueError(
            f"Tensor parallelism divides the {config.n_head} heads, but {config.n_head} is not divisible by {devices}."
        )
    with torch.device("meta"):
        model = ScratchGPT2ForCausalLM(config)
    muon = (
        {id(weight) for weight in parameter_groups(model, 0.0)["hidden"]["params"]} if optimizer == "muon" else set()
    )
    local = {
        name: local_size(name, weight.shape, strategy, devices, config) for name, weight in model.named_parameters()
    }
    states = sum(local[name] * (1 if id(weight) in muon else 2) for name, weight in model.named_parameters())
    stored = 4 * sum(local.values())
    block = sum(weight.numel() for weight in model.model.layers[0].parameters())
    outside = sum(weight.numel() for weight in model.parameters()) - config.n_layer * block
    matrices = config.matrix_parameters // (devices if strategy == "tp" else 1)
    buffers = {
        "ddp": 4 * sum(local.values()) + 2 * matrices,
        "fsdp2": 2 * (outside + 2 * block) + 4 * block,
        "tp": 2 * matrices,
    }[strategy]
    return DeviceMemory(
        parameters=stored,
        gradients=stored,
        optimizer=4 * states,
        buffers=buffers,
        activations=activation_bytes(
            config, rows * length, devices if strategy == "tp" else 1, gradient_checkpointing
        ),
        loss=8 * CHUNK_ELEMENTS + 4 * config.vocab_size * config.n_embd,
    )


def local_size(name: str, shape: torch.Size, strategy: str, devices: int, config: ScratchGPT2Config) -> int:
    """Elements of a parameter on the first device, which has the largest part."""
    if strategy == "fsdp2":
        return math.ceil(shape[0] / devices) * shape[1:].numel()
    if strategy == "tp":
        styles = [style for part, style in config.base_model_tp_plan.items() if fnmatch(name, f"model.{part}.*")]
        whole = not styles or (styles[0] == "rowwise" and name.endswith(".bias"))
        return shape.numel() if whole else shape.numel() // devices
    return shape.numel()


def activation_bytes(
    config: ScratchGPT2Config, tokens: int, split: int = 1, gradient_checkpointing: bool = False
) -> int:
    """What the blocks keep under bfloat16 autocast for the backward pass, without dropout.

    Per token and block: the residual stream before both norms, in float32; their outputs, the queries, keys, values,
    the output of attention and both sides of the activation function in bfloat16. `split` devices share what lies
    between a column-wise and a row-wise matrix. With gradient checkpointing: the residual stream before each block,
    and all of one block.
    """
    width, inner = config.n_embd, config.inner_width
    whole = 2 * 4 * width + 2 * 2 * width
    shared = 2 * (4 * width + 2 * inner)
    block = whole + shared // split
    if gradient_checkpointing:
        return tokens * (config.n_layer * 4 * width + block)
    return tokens * config.n_layer * block


def tokens_per_second(config: ScratchGPT2Config, length: int, devices: int, peak_flops: float, mfu: float) -> float:
    """Of all devices together, at a model FLOPs utilization of `mfu`."""
    return devices * peak_flops * mfu / flops_per_token(config, length)


def checkpoint_bytes(config: ScratchGPT2Config, optimizer: str = "adamw") -> int:
    """Weights and optimizer state, in float32."""
    memory = device_memory(config, "ddp", devices=1, rows=1, length=1, optimizer=optimizer)
    return memory.parameters + memory.optimizer
