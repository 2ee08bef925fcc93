"""Pictures that are given: from a file, as pixels, as latents, as a mask; and previews.

A file may be anything. Its size is looked at before its pixels are, and it is turned as its camera
says.
"""

import hashlib
import warnings
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from torch import Tensor

from koala.errors import UserError
from koala.generation.decode import Decode, computed
from koala.generation.row_tiling import encode_in_strips

MOST_PIXELS = 64_000_000
_RGB_LIKE = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
# Others are no pictures of pixels (EPS runs a program), or nobody's.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "TGA")
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def open_picture(file: str | Path | Image.Image) -> Image.Image:
    """A picture, upright and loaded, in a mode that has 8 bits a channel.

    UserError for a file that is none, is cut short, or holds more than 64 million pixels.
    """
    if isinstance(file, Image.Image):
        return _upright(file, "the picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            with Image.open(file, formats=_FORMATS) as image:
                return _upright(image, str(file))
    except UserError:
        raise
    except _UNREADABLE as error:
        raise UserError(f"{file} cannot be read as a picture: {error}") from None


def _upright(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise UserError(
            f"{name} is {width}x{height}: allowed are {MOST_PIXELS:,} pixels; make it smaller"
        )
    if image.mode not in _RGB_LIKE:
        raise UserError(f"{name} has the mode {image.mode}: allowed are pictures of 8 bits")
    turned = ImageOps.exif_transpose(image)
    turned.load()
    return turned


def to_pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Float32 [1, 3, height, width] in -1..1, of `size` (width, height), on white."""
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    rgb = image.convert("RGB")
    if rgb.size != size:
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)[None]
    return pixels.float() / 127.5 - 1


def to_mask(
    image: Image.Image, picture: tuple[int, int], size: tuple[int, int], factor: int
) -> Tensor:
    """Float32 [1, 1, h, w] of a latent: 1 where the mask is light, to be painted anew; else 0.

    `picture` is the size of the picture it is for, `size` that of the picture to be drawn, both
    (width, height). A latent place takes the mask's pixel in its upper left corner, as in
    diffusers' pipeline. UserError for a mask of another size, or one that is dark everywhere.
    """
    if image.size != picture:
        raise UserError(
            f"the mask is {image.width}x{image.height}, its picture {picture[0]}x{picture[1]}: "
            "make them the same size"
        )
    grey = image.convert("L")
    if grey.size != size:
        grey = grey.resize(size, Image.Resampling.LANCZOS)
    light = torch.from_numpy(np.array(grey))[::factor, ::factor] >= 128
    if not light.any():
        raise UserError("the mask is dark everywhere: make light what is to be painted anew")
    return light.float()[None, None]


def fingerprint(image: Image.Image) -> str:
    """16 hexadecimal digits of the SHA-256 of the picture's mode, size and pixels."""
    header = f"{image.mode} {image.width}x{image.height} ".encode()
    return hashlib.sha256(header + image.tobytes()).hexdigest()[:16]


def encode_picture(vae: AutoencoderKL, pixels: Tensor, strips: bool = False) -> Tensor:
    """Latents float32 [n, c, h, w] as the U-Net sees them, of pixels [n, 3, 8h, 8w] in -1..1.

    The most likely ones, not a draw; scaled with the VAE config's statistics, as diffusers'
    picture-to-picture pipeline does. `strips` takes less memory (`koala.generation.row_tiling`).
    """

    def mode(x: Tensor) -> Tensor:
        return encode_in_strips(vae, x) if strips else vae.encode(x).latent_dist.mode()

    z = computed(vae, mode, pixels)
    if vae.config.latents_mean is not None and vae.config.latents_std is not None:
        mean, std = (
            torch.tensor(values, device=z.device).view(1, -1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        z = (z - mean) / std
    return z * vae.config.scaling_factor


class Previewer:
    """Latents to colours by a linear map, a pixel for each place: rough, and almost for nothing.

    The map is fitted to the decoder itself: to the mean colours of 64 small latents, each the
    same everywhere, that are drawn as the U-Net's are, of deviation one.
    """

    def __init__(self, decode: Decode, channels: int) -> None:
        generator = torch.Generator().manual_seed(0)
        samples = torch.randn(64, channels, generator=generator)
        colours = decode(samples[:, :, None, None].expand(-1, -1, 4, 4).contiguous())
        means = colours.mean((2, 3)).double().cpu()
        known = torch.cat([samples, torch.ones(len(samples), 1)], dim=1).double()
        self.map = torch.linalg.lstsq(known, means).solution.float()  # [c + 1, 3]

    def __call__(self, latents: Tensor) -> Image.Image:
        """An RGB picture of w x h pixels from latents [1, c, h, w] as the U-Net sees them."""
        places = latents[0].float().cpu().permute(1, 2, 0)
        colours = (places @ self.map[:-1] + self.map[-1]).clamp(0, 1)
        return Image.fromarray((colours * 255).round().to(torch.uint8).numpy())
