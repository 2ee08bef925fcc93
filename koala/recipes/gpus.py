"""Graphics cards by name: what a dry run reckons with where the card itself is not at hand.

Memory in GiB as the driver shows it; peak in TFLOP/s of dense bf16 products summed in fp32, from
the makers' data sheets (of GeForce cards twice their fp32 rate, as the white papers have it).
"""

from typing import NamedTuple

from koala.errors import unknown

SHARE = 0.35  # of the peak that a training is assumed to reach; nothing of ours was measured yet


class Gpu(NamedTuple):
    """A kind of GPU."""

    gib: float
    tflops: float


GPUS = {
    "b200": Gpu(178.0, 2250.0),
    "h200": Gpu(139.8, 989.0),
    "h100": Gpu(79.2, 989.0),
    "a100": Gpu(79.2, 312.0),
    "a100-40gb": Gpu(39.4, 312.0),
    "l40s": Gpu(44.5, 362.0),
    "5090": Gpu(31.4, 209.5),
    "4090": Gpu(23.5, 165.2),
    "3090": Gpu(23.6, 71.2),
    "4070": Gpu(11.6, 58.3),
    "3060": Gpu(11.6, 25.5),
}


def get(name: str) -> Gpu:
    """The card of that name; `UserError` lists the names."""
    if name not in GPUS:
        raise unknown("card", name, GPUS)
    return GPUS[name]
