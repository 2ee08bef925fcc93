"""Graphics cards by name: what a dry run reckons with where the card itself is not at hand.

Memory in GiB as the driver shows it; peak in TFLOP/s of dense bf16 products summed in fp32, from
the makers' data sheets (of GeForce cards twice their fp32 rate, as the white papers have it).
"""

from typing import NamedTuple

from koala.errors import unknown

SHARE = 0.35  # of the peak that a training is assumed to reach; nothing of ours was measured yet


class Card(NamedTuple):
    """A kind of GPU."""

    gib: float
    tflops: float


CARDS = {
    "b200": Card(178.0, 2250.0),
    "h200": Card(139.8, 989.0),
    "h100": Card(79.2, 989.0),
    "a100": Card(79.2, 312.0),
    "a100-40gb": Card(39.4, 312.0),
    "l40s": Card(44.5, 362.0),
    "5090": Card(31.4, 209.5),
    "4090": Card(23.5, 165.2),
    "3090": Card(23.6, 71.2),
    "4070": Card(11.6, 58.3),
    "3060": Card(11.6, 25.5),
}


def get(name: str) -> Card:
    """The card of that name; `UserError` lists the names."""
    if name not in CARDS:
        raise unknown("card", name, CARDS)
    return CARDS[name]
