"""Memory of a process, as Linux tells it in /proc."""

from pathlib import Path


def memory_mb(name: str, pid: int | str = "self") -> float:
    """`VmRSS`, what the process holds now, or `VmHWM`, the peak since its start or `reset_peak_memory`."""
    return int(Path(f"/proc/{pid}/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")
