"""What a process holds in memory, as the system counts it."""

import ctypes
import gc
import os
import subprocess
import sys


def resident() -> float:
    """MiB of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def release() -> None:
    """Gives back what is free, so that what stays is what is held."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def idle_with_torch() -> float:
    """MiB at the peak of an interpreter that imports torch and ends."""
    code = (
        "import torch; print([l.split()[1] for l in open('/proc/self/status') if 'VmHWM' in l][0])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return round(int(ended.stdout) / 1024, 1)
