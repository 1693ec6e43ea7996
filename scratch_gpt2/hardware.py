"""Capabilities of this machine, and the memory allocator."""

import ctypes
import os
import sys
from typing import Any

import torch


def cpu_computes_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions; without them, bfloat16 is emulated and about 100 times slower."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13 has it
    return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)


def keep_freed_memory() -> None:
    """Make the C library keep the memory that this process frees, for training on a CPU.

    glibc returns large buffers to Linux, which clears them page by page when the next step asks again: 12% of the CPU
    time of a training step of six of GPT-2 124M's blocks, against 7% more memory. Without glibc, do nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # /usr/include/malloc.h
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_max, 0)


# Dense bfloat16 peaks in FLOP/s from NVIDIA's data sheets (float16 for T4 and V100, which have no bfloat16). The
# first name that occurs in torch's name of the device counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def known_peak_flops() -> float | None:
    """Peak FLOP/s of the GPU in bfloat16; `None` without a GPU or for one that is not in the table."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def usable_cores() -> int:
    """A cluster often gives a process some of the machine's cores only; not every system can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
