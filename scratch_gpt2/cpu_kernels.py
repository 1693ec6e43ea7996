"""Products with packed weights on a CPU, and the choice among them by measuring.

How fast a processor multiplies one row by a weight depends on its make, on the shape and on how the weight is stored.
One AMD EPYC core with AVX-512 reads (50257, 768) at 13 GB/s stored by rows, at 16 packed by oneDNN and at 24 stored by
columns, and (768, 3072) at 17, 19 and 14. PyTorch's inductor packs frozen weights with the same oneDNN operators, its
dynamic quantization uses the same int8 operators, and torchao the same int4 operators.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F

MEASURED_BYTES = 48 * 2**20  # of weights, more than most processors keep in their caches
MAX_WEIGHTS = 32
PASSES = 3
SEVERAL_ROWS = 8
GROUP = 32  # weights of 4 bits that share a scale
INT4_ROWS = 16  # outputs that the int4 operator packs together


class Stored:
    """One row times a weight as it is stored: by rows, or (the transposed of a contiguous tensor) by columns.

    MKL computes a product of one row on a single thread, so that each thread gets a part: of the sum where the weight
    is stored by columns, of the output where it is stored by rows.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.bias = weight, bias
        out_features, in_features = weight.shape
        self.splits_sum = weight.t().is_contiguous()
        self.n_parts = math.gcd(torch.get_num_threads(), in_features if self.splits_sum else out_features)
        bias = torch.zeros(out_features, dtype=weight.dtype) if bias is None else bias
        if self.splits_sum:
            self.parts = weight.t().unflatten(0, (self.n_parts, -1))  # (P, in / P, out)
            self.part_biases = torch.zeros(self.n_parts, 1, out_features, dtype=weight.dtype)
            self.part_biases[0] = bias
        else:
            self.parts = weight.unflatten(0, (self.n_parts, -1)).mT  # (P, in, out / P)
            self.part_biases = bias.view(self.n_parts, 1, -1)

    def __call__(self, hidden_states):
        if self.n_parts == 1:
            return F.linear(hidden_states, self.weight, self.bias)
        if self.splits_sum:
            output = torch.baddbmm(self.part_biases, hidden_states.view(self.n_parts, 1, -1), self.parts).sum(0)
        else:
            rows = hidden_states.view(1, 1, -1).expand(self.n_parts, -1, -1)
            output = torch.baddbmm(self.part_biases, rows, self.parts)
        return output.view(*hidden_states.shape[:-1], -1)


class Plain:
    """`F.linear`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.bias = weight, bias

    def __call__(self, hidden_states):
        return F.linear(hidden_states, self.weight, self.bias)


class OneDNN:
    """A copy of the weight, packed by oneDNN."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.packed, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()), bias

    def __call__(self, hidden_states):
        return torch.ops.mkldnn._linear_pointwise(hidden_states, self.packed, self.bias, "none", [], "")


KERNELS = {"by rows": Stored, "by columns": Stored, "plain": Plain, "oneDNN": OneDNN}
Choice = tuple[str, float]  # the name of a kernel, and the GB/s at which it reads the weight


@cache
def choose(shape: tuple[int, int], dtype: torch.dtype, threads: int) -> tuple[Choice, Choice]:
    """The fastest kernels for an (out, in) weight: for one row, and for a few rows. Measured once in a process."""
    shape = min(shape[0], MEASURED_BYTES // (shape[1] * dtype.itemsize)), shape[1]  # of an output layer, a part
    n_weights = min(MAX_WEIGHTS, MEASURED_BYTES // (shape[0] * shape[1] * dtype.itemsize))
    by_rows = [torch.ones(shape, dtype=dtype) for _ in range(n_weights)]
    by_columns = [torch.ones(shape[::-1], dtype=dtype).t() for _ in range(n_weights)]
    row, rows = torch.ones(1, shape[1], dtype=dtype), torch.ones(SEVERAL_ROWS, shape[1], dtype=dtype)
    packed = [OneDNN(weight, None) for weight in by_rows]
    one = {
        "by rows": gb_per_second([Stored(weight, None) for weight in by_rows], row, by_rows),
        "by columns": gb_per_second([Stored(weight, None) for weight in by_columns], row, by_rows),
        "oneDNN": gb_per_second(packed, row, by_rows),
    }
    first = fastest(one)
    stored = by_columns if first == "by columns" else by_rows
    few = {
        "plain": gb_per_second([Plain(weight, None) for weight in stored], rows, by_rows),
        "oneDNN": gb_per_second(packed, rows, by_rows),
    }
    second = fastest(few)
    return (first, one[first]), (second, few[second])


def fastest(speeds: dict[str, float]) -> str:
    """The name of the fastest kernel. A copy of the weight has to be worth its memory: 10% faster than none."""
    return max(speeds, key=lambda name: speeds[name] / (1.1 if name == "oneDNN" else 1))


def gb_per_second(kernels: Sequence[Callable], inputs: torch.Tensor, weights: list[torch.Tensor]) -> float:
    """The fastest of a few passes over all `weights`."""
    best = math.inf
    with torch.no_grad():
        for _ in range(PASSES):
            start = time.perf_counter()
            for kernel in kernels:
                kernel(inputs)
            best = min(best, time.perf_counter() - start)
    return sum(weight.nbytes for weight in weights) / best / 1e9


class Product:
    """`F.linear` with the fastest kernel for one row, and the fastest for several rows. A copy that only several rows
    need is packed when they first come: in generation, the output layer sees one row of each text."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.bias, self.in_features = weight, bias, weight.shape[1]
        self.choices = choose(tuple(weight.shape), weight.dtype, torch.get_num_threads())
        one, few = (KERNELS[name] for name, _ in self.choices)
        self.one_row = one(weight, bias)
        self.rows = self.one_row if one is few else few(weight, bias) if few is Plain else None

    @staticmethod
    def stores_by_columns(shape: tuple[int, int], dtype: torch.dtype) -> bool:
        return choose(shape, dtype, torch.get_num_threads())[0][0] == "by columns"

    def __call__(self, hidden_states):
        if hidden_states.numel() == self.in_features:
            return self.one_row(hidden_states)
        if self.rows is None:
            self.rows = KERNELS[self.choices[1][0]](self.weight, self.bias)
        return self.rows(hidden_states)

    def report(self) -> list[str]:
        return [f"{name} at {speed:.1f} GB/s" for name, speed in self.choices]


class BFloat16Product:
    """`F.linear` in bfloat16 for a model in float32: the weight takes half the memory to read, and the input is
    rounded to 8 bits of precision."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.product = OneDNN(weight.bfloat16(), None if bias is None else bias.bfloat16())

    @staticmethod
    def stores_by_columns(shape: tuple[int, int], dtype: torch.dtype) -> bool:
        return False

    def __call__(self, hidden_states):
        return self.product(hidden_states.bfloat16()).to(hidden_states.dtype)

    def report(self) -> list[str]:
        return ["oneDNN in bfloat16"] * 2


class Int8Product:
    """`F.linear` in int8, with one scale for each row of the weight and one for each row of the input."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.packed, self.bias, self.in_features = pack_int8(weight), bias, weight.shape[1]
        # Without VNNI, AVX2 adds two products in 16 bits, which 8 bits would overflow: 7 bits, as in torch.ao.
        self.in_7_bits = not cpu_adds_int8_exactly()

    @staticmethod
    def stores_by_columns(shape: tuple[int, int], dtype: torch.dtype) -> bool:
        return False

    def __call__(self, hidden_states):
        if hidden_states.numel() == self.in_features:
            return self.multiply(hidden_states) if self.bias is None else self.multiply(hidden_states).add_(self.bias)
        # The operator has one scale for all rows: scaled to equal size first, no row loses precision to another.
        size = hidden_states.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(hidden_states.dtype).tiny)
        output = self.multiply(hidden_states / size).mul_(size)
        return output if self.bias is None else output.add_(self.bias)

    def multiply(self, hidden_states):
        return torch.ops.quantized.linear_dynamic(hidden_states, self.packed, self.in_7_bits)

    def report(self) -> list[str]:
        return [f"FBGEMM int8, inputs in {7 if self.in_7_bits else 8} bits"] * 2


class Int4Product:
    """`F.linear` with weights of 4 bits, and a scale and an offset for each `GROUP` neighbors in a row of the weight.
    Inputs and outputs are rounded to bfloat16, which every processor converts."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.packed, self.scales = pack_int4(weight)
        self.bias, (self.out_features, self.in_features) = bias, weight.shape

    @staticmethod
    def stores_by_columns(shape: tuple[int, int], dtype: torch.dtype) -> bool:
        return False

    def __call__(self, hidden_states):
        rows = hidden_states.reshape(-1, self.in_features).bfloat16()
        if self.in_features % GROUP:
            rows = F.pad(rows, (0, -self.in_features % GROUP))
        output = torch._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales)[:, : self.out_features]
        output = output.to(hidden_states.dtype).view(*hidden_states.shape[:-1], -1)
        return output if self.bias is None else output.add_(self.bias)

    def report(self) -> list[str]:
        return ["int4, inputs in bfloat16"] * 2


def cpu_adds_int8_exactly() -> bool:
    """Whether FBGEMM multiplies int8 with VNNI, which adds in 32 bits."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13 has it
    return capabilities.get("avx512_vnni", False)


def pack_int8(weight: torch.Tensor):
    """FBGEMM's packed form of an (out, in) weight: int8 from -127 to 127 times a scale for each output."""
    scales = weight.abs().amax(1).clamp(min=torch.finfo(weight.dtype).tiny) / 127  # (out,)
    numbers = torch.round(weight / scales[:, None]).to(torch.int8)
    no_shift = torch.zeros(len(scales), dtype=torch.long)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # "deprecated", but FBGEMM takes nothing else
        quantized = torch._make_per_channel_quantized_tensor(numbers, scales.double(), no_shift, 0)
    return torch.ops.quantized.linear_prepack(quantized, None)


def pack_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed form of an (out, in) weight: numbers from 0 to 15, and (in / GROUP, out, 2) scales and offsets in
    bfloat16. A weight is (number - 8) * scale + offset. Rows and columns of zeros complete the operator's blocks."""
    out_features, in_features = weight.shape
    weight = F.pad(weight.float(), (0, -in_features % GROUP, 0, -out_features % INT4_ROWS))
    groups = weight.unflatten(1, (-1, GROUP))  # (out, in / GROUP, GROUP)
    least, greatest = groups.aminmax(dim=-1, keepdim=True)
    scales = ((greatest - least) / 15).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    offsets = (least + 8 * scales).bfloat16()
    numbers = torch.round((groups - offsets.float()) / scales.float() + 8).clamp(0, 15).int().flatten(1)
    packed = torch._convert_weight_to_int4pack_for_cpu(numbers, 2)  # 2 is not used on CPUs
    return packed, torch.cat([scales, offsets], -1).transpose(0, 1).contiguous()


Packed = Product | BFloat16Product | Int8Product | Int4Product
# For the blocks, and for the output layer. Beside int4, that one has int8, whose logits are not rounded to bfloat16.
PRODUCTS: dict[str | None, tuple[type[Packed], type[Packed]]] = {
    None: (Product, Product),
    "bf16": (BFloat16Product, BFloat16Product),
    "int8": (Int8Product, Int8Product),
    "int4": (Int4Product, Int8Product),
}
ONEDNN_OPERATORS = ["mkldnn._reorder_linear_weight", "mkldnn._linear_pointwise"]
INT8_OPERATORS = ["quantized.linear_prepack", "quantized.linear_dynamic"]
INT4_OPERATORS = ["aten._convert_weight_to_int4pack_for_cpu", "aten._weight_int4pack_mm_for_cpu"]
OPERATORS = {
    None: ONEDNN_OPERATORS,
    "bf16": ONEDNN_OPERATORS,
    "int8": INT8_OPERATORS,
    "int4": INT4_OPERATORS + INT8_OPERATORS,
}


def missing_operator(weights: str | None) -> str | None:
    """The first private operator of torch that products with `weights` call and this version of torch lacks."""
    for operator in OPERATORS[weights]:
        library, name = operator.split(".")
        if not hasattr(getattr(torch.ops, library), name):
            return operator
    return None
