"""From what a decoder gives to images. Importing this loads no torch."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from PIL import Image

from koala.errors import Failure
from koala.utils.arrays import Array, all_finite, to_numpy

# Latents [n, 4, h, w] as the U-Net sees them -> images float32 [n, 3, 8h, 8w] in 0..1.
Decode: TypeAlias = Callable[[Array], Array]


def finished(pixels: Array, latents: Array) -> Array:
    """A decoder's -1..1 as 0..1. Failure if a value is not finite, saying what made it so."""
    if all_finite(pixels):
        return (pixels / 2 + 0.5).clip(0, 1)
    if all_finite(latents):
        raise Failure("the decoder gave NaN in float32: its weights are damaged")
    raise Failure(
        "the U-Net gave NaN: if it runs in float16, load the model in float32, or in bfloat16 if "
        "the device has it; else a LoRA's scale, or a value in a LoRA, is too large"
    )


def to_images(pixels: Array) -> list[Image.Image]:
    """8-bit RGB images of float [n, 3, h, w] in 0..1."""
    rounded = (pixels * 255).round()
    bytes_ = to_numpy(rounded).astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(np.ascontiguousarray(image)) for image in bytes_]
