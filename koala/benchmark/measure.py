"""Seconds and bytes: how long something takes, what it holds at its peak, what the chip can do.

The ceilings are measured in the same run as what is held against them: a datasheet's figures are
not what a product of random numbers reaches, and machines differ from day to day.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

GB = 1e9
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timing:
    """Seconds over several runs, the first (warm) one not among them."""

    median: float
    least: float
    greatest: float
    runs: int

    @property
    def spread(self) -> float:
        """From least to greatest, as a share of the median."""
        return (self.greatest - self.least) / self.median


def timing(work: Callable[[], object], runs: int, device: torch.device) -> Timing:
    """Calls `work` once to warm up and then `runs` times, waiting for the device each time."""
    assert runs >= 1
    work()
    seconds = []
    for _ in range(runs):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return Timing(statistics.median(seconds), min(seconds), max(seconds), runs)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# --- memory ---------------------------------------------------------------------------------


def release(device: torch.device) -> None:
    """Gives back what nobody holds any more, so that the next model starts on an empty device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Begins a new peak. On Linux without a GPU: of the whole process' resident memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # man 5 proc: resets the high water mark


def peak_bytes(device: torch.device) -> int | None:
    """The most since `reset_peak`: allocated by tensors on CUDA, resident on Linux, else None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if device.type == "cpu" else None


def resident_bytes(device: torch.device) -> int | None:
    """What is held now, counted as `peak_bytes` counts."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") if device.type == "cpu" else None


def _status(key: str) -> int | None:
    if not _STATUS.exists():
        return None
    found = [line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:")]
    return 1024 * int(found[0].split()[1]) if found else None


# --- ceilings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at what it is best at."""

    flops: float  # operations a second of a large product of random numbers, in `dtype`
    bytes: float  # a second, read plus written, of a large copy
    dtype: str


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Both ceilings; about a second on a GPU."""
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
