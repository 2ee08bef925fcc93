"""How many threads compute, and how they wait: told to OpenMP before torch is loaded.

Importing this loads no torch. What the user has set in the environment stays.
"""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def available_cores(cgroups: Path = CGROUPS) -> int:
    """The cores that this process may use: at most the container's quota, rounded up."""
    affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(cgroups))))


def _quota(cgroups: Path) -> float:
    """The container's quota in cores; infinity without one. cgroup v2, else v1."""
    try:
        if (cgroups / "cpu.max").exists():
            quota, period = (cgroups / "cpu.max").read_text("utf-8").split()
        else:
            quota, period = (
                (cgroups / "cpu" / f"cpu.cfs_{name}_us").read_text("utf-8")
                for name in ("quota", "period")
            )
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return math.inf


def limit_threads() -> None:
    """One thread for each core that is there, not for each of the host's."""
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))


def sleep_while_waiting() -> None:
    """Threads without work sleep. By default they spin, and take the cores from other work."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
