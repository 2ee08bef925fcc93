"""GPUs by name or by numbers, for dry runs without the GPU itself.

Memory in GiB as reported by the driver; peak in TFLOP/s of dense bf16 products accumulated in fp32,
fp16 where there is no bf16, from data sheets (for GeForce cards twice the fp32 rate, of the 2080s
four times, as in the white papers).
"""

import re
from typing import NamedTuple

from koala.errors import UserError, unknown

SHARE = 0.35  # of the peak that a training is assumed to reach; not yet measured


_MAKERS = re.compile(r"^(?:(?:nvidia|geforce|rtx|tesla)[ _-]*)+")
_NUMBERS = re.compile(r"([\d.]+)TFLOPS?,([\d.]+)Gi?B", re.IGNORECASE)


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
    "a6000": Gpu(47.4, 154.8),
    "5090": Gpu(31.4, 209.5),
    "4090": Gpu(23.5, 165.2),
    "3090": Gpu(23.6, 71.2),
    "4070": Gpu(11.6, 58.3),
    "3060": Gpu(11.6, 25.5),
    "3070": Gpu(7.6, 40.6),
    "4060": Gpu(7.6, 30.2),
    "v100": Gpu(31.7, 125.0),
    "v100-16gb": Gpu(15.8, 125.0),
    "t4": Gpu(14.6, 65.0),
    "2080ti": Gpu(10.6, 53.8),
    "2080": Gpu(7.6, 40.3),
}


def get(name: str) -> Gpu:
    """The GPU of that name, or of numbers such as "35TFLOP,16GB"; `UserError` lists the names.

    A GB counts as a GiB, as on the cards' labels.
    """
    if found := _NUMBERS.fullmatch(name):
        try:
            tflops, gib = float(found[1]), float(found[2])
        except ValueError:
            tflops = gib = 0.0
        if not (tflops > 0 and gib > 0):
            raise UserError(f"card {name}: both numbers must be above 0, as in 35TFLOP,16GB")
        return Gpu(gib, tflops)
    bare = _MAKERS.sub("", name.lower()).replace(" ", "-")  # "RTX 4090", "NVIDIA A100 40GB"
    if bare not in GPUS:
        raise unknown("card", name, GPUS, ", or its numbers, as in 35TFLOP,16GB")
    return GPUS[bare]
