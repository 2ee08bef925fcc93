"""Aspect-ratio buckets: sizes of about equal area, so that cropping any image loses little.

SDXL's list (arXiv 2307.01952, appendix I) follows from a rule: sides are multiples of 64 pixels,
the area is 90 % to 100 % of the square's, the longer side at most four times the shorter. (The rule
also gives 1344 x 704, which the list omits although it has 704 x 1344.)

Sizes are (height, width) in pixels.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from koala.architectures.table import FACTOR
from koala.errors import UserError

STEP = 64  # pixels
LEAST_AREA = 0.9  # of the square's
MOST_ASPECT = 4  # longer side over shorter
FEWEST_STEPS = 8  # a smaller square is the only bucket

Size = tuple[int, int]


@lru_cache
def buckets(side: int, step: int = STEP) -> tuple[Size, ...]:
    """The buckets around a square of `side` pixels: 41 at 1024, 11 at 512.

    Below 512 the square is the only bucket. UserError unless the side is a multiple of 64, or of 8
    below 512.
    """
    unit = step if side >= FEWEST_STEPS * step else FACTOR
    if side < FACTOR or side % unit:
        raise UserError(f"size {side}: it must be a multiple of {unit} pixels")
    if side < FEWEST_STEPS * step:
        return ((side, side),)
    area = side * side
    shorts = range(step, side + 1, step)
    pairs = [
        (short, long)
        for short in shorts
        for long in range(short, MOST_ASPECT * short + 1, step)
        if LEAST_AREA * area <= short * long <= area
    ]
    return tuple(sorted({*pairs, *((long, short) for short, long in pairs)}))


@dataclass(frozen=True)
class Fit:
    """How an image fits its bucket: resized to cover it, then centre-cropped."""

    resized: Size
    top: int  # of the crop, in the resized image: SDXL's crop conditioning
    left: int
    target: Size  # the bucket


def fit(size: Size, side: int, step: int = STEP, upscale: bool = False) -> Fit | None:
    """The bucket with the nearest aspect ratio; None if the image would need enlarging."""
    height, width = size
    target = min(
        buckets(side, step), key=lambda b: (abs(math.log(b[0] * width / (b[1] * height))), b)
    )
    scale = max(target[0] / height, target[1] / width)
    if scale > 1 and not upscale:
        return None
    resized = (max(target[0], round(height * scale)), max(target[1], round(width * scale)))
    top, left = (resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2
    return Fit(resized, top, left, target)
