"""SDXL's size and crop micro-conditioning (arXiv 2307.01952, section 2.2)."""

from collections.abc import Sequence

import numpy as np

Pair = tuple[int, int]


def time_ids(original: Sequence[Pair], crop: Sequence[Pair], target: Sequence[Pair]) -> np.ndarray:
    """Float32 [n, 6]: row i is original (height, width), crop (top, left), target (height, width).

    In pixels. Training, generation and evaluation tell the U-Net the same.
    """
    rows = [(*a, *b, *c) for a, b, c in zip(original, crop, target, strict=True)]
    return np.array(rows, np.float32).reshape(-1, 6)
