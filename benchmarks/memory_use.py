"""What this process holds in memory, as the system counts it."""

import ctypes
import gc
import os


def resident() -> float:
    """MiB of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def release() -> None:
    """Gives back what is free, so that what stays is what is held."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
