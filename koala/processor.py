"""What processor this is, and what it can do."""

import os
import platform
from functools import lru_cache
from pathlib import Path

_INFO = Path("/proc/cpuinfo")


@lru_cache(maxsize=1)
def _facts() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; nothing where there is no such file."""
    if not _INFO.is_file():
        return {}
    first = _INFO.read_text().split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in first)
    return {key.strip(): value.strip() for key, _, value in pairs}


def name() -> str:
    """As the operating system calls it, such as "AMD EPYC"."""
    return _facts().get("model name") or platform.processor() or platform.machine()


def has_bf16() -> bool:
    """Whether it multiplies bfloat16 itself; others emulate it, slower than float32."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & {*_facts().get("flags", "").split()})


def hardware() -> str:
    """Processor, cores, accelerator and versions, in one line."""
    import diffusers
    import torch

    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{name()}, {os.cpu_count()} cores{device}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    )
