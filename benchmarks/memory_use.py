"""What a process holds in memory, in MiB, as the system counts it."""

import ctypes
import gc
import os
import subprocess
import sys


def resident(process: int | str = "self") -> float:
    """What is in memory now."""
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak(process: int | str = "self") -> float:
    """The most that ever was."""
    with open(f"/proc/{process}/status") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    return round(kib / 1024, 1)


def idle_with_torch() -> float:
    """The peak of an interpreter that imports torch and ends."""
    code = "import torch; from benchmarks.memory_use import peak; print(peak())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(ended.stdout)


def release() -> None:
    """Gives back what is free, so that what stays is what is held."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
