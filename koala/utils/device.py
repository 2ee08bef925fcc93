"""Which device does the work: the best there is, unless another is asked for; what a CPU can do.

Importing this loads no torch.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from koala.errors import UserError, unknown
from koala.utils.windows import memory_status, process_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DEVICES = ("cpu", "cuda", "mps")
_INFO = Path("/proc/cpuinfo")
FREE_SHARE = 0.9  # of the free memory, for a model
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # in <malloc.h>


def check_device(asked: str | None) -> None:
    """UserError unless it is the name of a device, there or not: "cpu", "cuda", "cuda:1", "mps"."""
    if asked is not None and not re.fullmatch(rf"({'|'.join(DEVICES)})(:\d{{1,3}})?", asked):
        raise unknown("device", asked, DEVICES, " or one of several, such as cuda:1")


def pick_device(asked: torch.device | str | None) -> torch.device:
    """The requested device, UserError if it is not available; None chooses the best one."""
    import torch

    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    if asked is None:
        return torch.device(there[0])
    try:
        found = torch.device(asked)
    except RuntimeError:
        found = None
    if found is None or found.type not in there:
        raise UserError(
            f"device {str(asked)!r} is not available: this machine has {', '.join(there)}"
        )
    return found


def free_bytes(device: torch.device) -> int:
    """Memory on the device that a model may use: nine tenths of what is free now."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    elif (meminfo := Path("/proc/meminfo")).exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text("utf-8").splitlines())
        free = min(int(lines["MemAvailable"].split()[0]) * 1024, _left_to_group())
    elif sys.platform == "win32":
        free = memory_status().available
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(FREE_SHARE * free)


def ran_out(error: BaseException) -> bool:
    """Whether an error means that a device or the machine has no more memory."""
    torch = sys.modules.get("torch")
    return (
        isinstance(error, MemoryError)
        or (torch is not None and isinstance(error, torch.OutOfMemoryError))
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))  # on the CPU
    )


def free_unused() -> None:
    """Returns the memory that torch holds and nobody uses."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch is not None and torch.backends.mps.is_available():
        torch.mps.empty_cache()


def keep_no_freed_memory() -> None:
    """Makes freed tensors of a MiB and more leave this process at once, which takes some time.

    Otherwise the C library keeps what lies between tensors in use: a model of 2.4 GiB that was
    quantised layer by layer held 8.6. Does nothing without glibc.
    """
    _mallopt(_M_MMAP_THRESHOLD, 2**20)


def keep_some_freed_memory() -> None:
    """Ends `keep_no_freed_memory`, but for tensors over 32 MiB: glibc itself goes as far.

    Networks that stay in memory draw a tenth faster so: their activations need no new pages.
    """
    _mallopt(_M_MMAP_THRESHOLD, 2**25)


def share_one_heap() -> None:
    """Makes all threads use one heap, so that what one frees is there for the others (glibc)."""
    _mallopt(_M_ARENA_MAX, 1)


def _mallopt(parameter: int, value: int) -> None:
    if sys.platform == "win32":  # which cannot open the C library so
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(parameter, value)


def allocated_bytes() -> int:
    """GPU memory that torch has allocated; 0 without a GPU, or without torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0
    allocated: int = torch.cuda.memory_allocated()
    return allocated


def free_and_total_bytes() -> tuple[int, int] | None:
    """Memory of the current GPU; None without one, or without torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return free, total


def resident_bytes() -> int:
    """Memory that this process holds now; where the system does not tell, the most it ever held."""
    if (statm := Path("/proc/self/statm")).exists():
        return int(statm.read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        return process_memory().resident
    return most_resident_bytes()


def most_resident_bytes() -> int:
    """The most memory that this process ever held."""
    if sys.platform == "win32":
        return process_memory().most_resident
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _left_to_group() -> int:
    """Memory left to this container (Linux, cgroups v2)."""
    group = Path("/sys/fs/cgroup")
    try:
        most, now = ((group / f"memory.{name}").read_text("utf-8") for name in ("max", "current"))
        return max(0, int(most) - int(now))
    except (OSError, ValueError):  # none, or "max": no limit
        return 2**63


def device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a model, by its first parameter.

    diffusers' own properties visit every module on each access, which costs more per step than
    launching some layers.
    """
    first = next(model.parameters())
    return first.device, first.dtype


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. Copies to CUDA are asynchronous, through pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@lru_cache(maxsize=1)
def _facts() -> dict[str, str]:
    """The first CPU's entries in /proc/cpuinfo; empty if there is no such file."""
    if not _INFO.is_file():
        return {}
    first = _INFO.read_text("utf-8").split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in first)
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    """The CPU's name according to the operating system, such as "AMD EPYC"."""
    return _facts().get("model name") or platform.processor() or platform.machine()


def has_bf16() -> bool:
    """Whether the CPU has bfloat16 instructions; emulation is slower than float32."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & {*_facts().get("flags", "").split()})


def compute_dtype(device: torch.device) -> torch.dtype:
    """What a training multiplies in: bf16 on a GPU that has it, fp16 on an older one (Volta,
    Turing), else fp32."""
    import torch

    if device.type != "cuda":
        return torch.float32
    has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_it else torch.float16


def hardware() -> str:
    """CPU, cores, accelerator and versions, in one line."""
    import diffusers
    import torch

    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{cpu_name()}, {os.cpu_count()} cores{device}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    )
