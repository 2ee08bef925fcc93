"""A training's throughput: samples per second, memory, and share of the matmul peak.

The peak is measured on the same device, in the same run, by one large 16-bit matrix product.
"""

import time

import torch

from koala.distillation.parallel import World
from koala.utils.device import compute_dtype, most_resident_bytes

PEAK_SIDE = 8192  # of the matrices; random, because zeros would be faster
PEAK_TIMES = 20


def matmul_peak(device: torch.device) -> float | None:
    """FLOP/s of a GPU on a large matrix product in `compute_dtype`; None on the CPU."""
    if device.type != "cuda":
        return None
    a, b = (
        torch.randn(PEAK_SIDE, PEAK_SIDE, device=device, dtype=compute_dtype(device))
        for _ in range(2)
    )
    times = []
    for _ in range(2):  # the first round warms up
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(PEAK_TIMES):
            a @ b
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return PEAK_TIMES * 2 * PEAK_SIDE**3 / times[-1]


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: of GPU memory, or of main memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return most_resident_bytes()


class Meter:
    """Throughput and memory of a run, and its share of the peak if a sample's FLOPs are known."""

    def __init__(self, world: World, seen: int, flops: float | None) -> None:
        """flops: of one sample's step, forward and backward, teacher included."""
        self._world, self._seen, self._at, self._flops = world, seen, time.monotonic(), flops
        self._peak = matmul_peak(world.device) if flops is not None else None
        self.note = ""

    def read(self, seen: int) -> dict[str, float]:
        """Since the last reading: samples per second of all processes, GiB, share of the peak."""
        now = time.monotonic()
        rate = (seen - self._seen) / max(now - self._at, 1e-9)
        self._seen, self._at = seen, now
        memory = peak_memory(self._world.device) / 2**30
        values = {"samples_per_second": rate, "memory_gib": memory}
        self.note = f"{memory:.1f} GiB"
        if self._flops is not None and self._peak is not None:
            values["share_of_peak"] = rate * self._flops / (self._peak * self._world.size)
            self.note += f" {values['share_of_peak']:.0%} of peak"
        return values
