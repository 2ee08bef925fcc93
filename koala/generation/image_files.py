"""Image files to start from: opened, checked, fingerprinted. Importing this loads no torch.

A file may be anything: its size is checked before its pixels are read. Its EXIF orientation is
applied.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from koala.errors import UserError

if TYPE_CHECKING:
    import numpy as np

MOST_PIXELS = 64_000_000
_RGB_LIKE = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
# Other formats hold no pixels (EPS runs a program), or nobody uses them.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "TGA")
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def open_image(file: str | Path | Image.Image) -> Image.Image:
    """An image, upright and loaded, in a mode of 8 bits per channel.

    UserError for a file that is no image, is truncated, or holds more than 64 million pixels.
    """
    if isinstance(file, Image.Image):
        return _upright(file, "the image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            with Image.open(file, formats=_FORMATS) as image:
                return _upright(image, str(file))
    except UserError:
        raise
    except _UNREADABLE as error:
        raise UserError(f"{file} cannot be read as an image: {error}") from None


def _upright(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise UserError(
            f"{name} is {width}x{height}: allowed are {MOST_PIXELS:,} pixels; make it smaller"
        )
    if image.mode not in _RGB_LIKE:
        raise UserError(f"{name} has the mode {image.mode}: allowed are images of 8 bits")
    turned = ImageOps.exif_transpose(image)
    turned.load()
    return turned


def fingerprint(image: Image.Image) -> str:
    """16 hexadecimal digits of the SHA-256 of the image's mode, size and pixels."""
    header = f"{image.mode} {image.width}x{image.height} ".encode()
    return hashlib.sha256(header + image.tobytes()).hexdigest()[:16]


def mask_places(
    mask: Image.Image, image_size: tuple[int, int], size: tuple[int, int], factor: int
) -> np.ndarray:
    """bool [h, w] of a latent: where the mask is light, to be repainted.

    image_size: of the image that the mask is for. size: of the image to be drawn. Both are
    (width, height) in pixels. A latent position takes the mask's pixel in its upper left corner,
    as in diffusers' pipeline. UserError for a mask of another size, or dark everywhere.
    """
    import numpy as np

    if mask.size != image_size:
        raise UserError(
            f"the mask is {mask.width}x{mask.height}, its image {image_size[0]}x{image_size[1]}: "
            "make them the same size"
        )
    grey = mask.convert("L")
    if grey.size != size:
        grey = grey.resize(size, Image.Resampling.LANCZOS)
    light = np.array(grey)[::factor, ::factor] >= 128
    if not light.any():
        raise UserError("the mask is dark everywhere: make the part to repaint light")
    return light
