"""Time, peak memory, and the device's measured ceilings of compute and bandwidth.

The ceilings are measured in the same run as the results: real matrix products do not reach the
datasheet, and machines differ from day to day.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

GB = 1e9
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timing:
    """Seconds over several runs, without the warm-up."""

    median: float
    least: float
    greatest: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    @property
    def spread(self) -> float:
        """The range as a share of the median."""
        return (self.greatest - self.least) / self.median


def timing(work: Callable[[], object], runs: int, device: torch.device) -> Timing:
    """Calls `work` once to warm up, then times `runs` calls, synchronizing the device."""
    assert runs >= 1
    work()
    seconds = []
    for _ in range(runs):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return Timing.of(seconds)


def synchronize(device: torch.device) -> None:
    """Waits for all queued work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# --- memory ---------------------------------------------------------------------------------


def release(device: torch.device) -> None:
    """Frees unreferenced memory, so that the next model starts on an empty device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Resets the peak. On the CPU under Linux it is that of the process's resident memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5", encoding="utf-8")  # man 5 proc: resets the high water mark


def peak_bytes(device: torch.device) -> int | None:
    """The peak since `reset_peak`: allocated on CUDA, resident on Linux CPUs, else None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not _STATUS.exists():
        return None
    lines = _STATUS.read_text("utf-8").splitlines()
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith("VmHWM:")), None)


def held_bytes(device: torch.device) -> int:
    """What a peak holds already: on CUDA all that is allocated; a CPU's counts as a whole."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


# --- ceilings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """The measured limits of the device."""

    flops: float  # operations per second of a large matrix product in `dtype`
    bytes: float  # per second, read plus written, of a large copy
    dtype: str


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measures both ceilings; takes about a second on a GPU."""
    side, copied = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 26)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = timing(lambda: a @ b, 10, device)
    source = torch.randint(256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = timing(lambda: target.copy_(source), 10, device)
    return Ceilings(
        2 * side**3 / product.median,
        2 * copied / copy.median,
        str(dtype).removeprefix("torch."),
    )
