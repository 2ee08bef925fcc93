"""Sizes that a model was not made for: drawn at its native area, and resized to what was asked."""

import math

from PIL import Image

from koala.generation import Settings
from koala.generation.image_files import as_grey
from koala.generation.requests import Known
from koala.generation.validation import SMALLEST, is_far

SAME_SHAPE = 0.01  # by which the proportions of a mask and its image may differ, by rounding


def native_size(size: tuple[int, int], native: int, grid: int) -> tuple[int, int]:
    """The native area in the shape of `size`, in multiples of `grid`."""
    scale = native / math.sqrt(size[0] * size[1])
    width, height = (max(2 * grid, round(side * scale / grid) * grid) for side in size)
    return width, height


def whole_size(size: tuple[int, int], grid: int) -> tuple[int, int]:
    """`size` in multiples of `grid`."""
    width, height = (max(SMALLEST, round(side / grid) * grid) for side in size)
    return width, height


def matched(mask: Image.Image, image: Image.Image) -> Image.Image:
    """The mask at its image's size, if it has the same shape; else as it is."""
    ratio = mask.width * image.height / (mask.height * image.width)
    if mask.size == image.size or abs(ratio - 1) > SAME_SHAPE:
        return mask
    return as_grey(mask).resize(image.size)


def shown_size(settings: Settings) -> tuple[int, int]:
    """The size that the client gets."""
    if not settings.enlarged:
        return settings.width, settings.height
    width, height = map(int, settings.enlarged.split("x"))
    return width, height


def shown(image: Image.Image, settings: Settings) -> Image.Image:
    """The image at the size that the client gets."""
    if not settings.enlarged:
        return image
    return image.resize(shown_size(settings), Image.Resampling.LANCZOS)


def note(settings: Settings, known: Known) -> str | None:
    """What a client should know of the settings, in a line; None if there is nothing."""
    lines = known.notes(settings)
    drawn = f"{settings.width}x{settings.height}"
    if settings.pasted:
        lines.insert(0, f"the part at {settings.pasted} was drawn at {drawn} and put back")
    elif settings.enlarged:
        far = is_far(shown_size(settings), known.native)
        why = "which the model was made for" if far else "in multiples of 8"
        lines.insert(0, f"drawn at {drawn}, {why}, and resized to {settings.enlarged}")
    return "; ".join(lines) or None
