"""Images to start from, as pixels and as latents; and previews of unfinished ones.

`koala.generation.image_files` opens the files.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from koala.architectures.table import FACTOR
from koala.checkpoints.latent_scale import LatentScale
from koala.generation.decode import Decode, computed
from koala.generation.row_tiling import encode_tiled
from koala.utils.networks import AutoencoderKL


def on_white(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image as RGB of `size` (width, height), on white where it is transparent."""
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    rgb = image.convert("RGB")
    if rgb.size != size:
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    return rgb


def to_pixels(image: Image.Image, factor: int = FACTOR) -> Tensor:
    """Float32 [1, 3, h, w] in -1..1 of an RGB image.

    Sides that are no multiple of `factor` are padded to one: with the last row and column.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    padding = (0, -image.width % factor, 0, -image.height % factor)
    return functional.pad(pixels, padding, mode="replicate")


def encode_image(vae: AutoencoderKL, pixels: Tensor, tiled: bool = False) -> Tensor:
    """Latents float32 [n, c, h, w] as the U-Net sees them, of pixels [n, 3, 8h, 8w] in -1..1.

    They are the posterior's mode, not a sample, as in diffusers' image-to-image pipeline. tiled:
    with row tiling, which takes less memory (`koala.generation.row_tiling`).
    """

    def mode(x: Tensor) -> Tensor:
        return encode_tiled(vae, x) if tiled else vae.encode(x).latent_dist.mode()

    z = computed(vae, mode, pixels)
    return LatentScale(vae.config, z.device).normalise(z)


class Previewer:
    """Latents to colours by a linear map, one pixel per latent position: rough and very cheap.

    The map is fitted to the decoder: to the mean colours of 64 small constant latents, drawn with
    standard deviation one as the U-Net's are.
    """

    def __init__(self, decode: Decode, channels: int) -> None:
        generator = torch.Generator().manual_seed(0)
        samples = torch.randn(64, channels, generator=generator)
        colours = decode(samples[:, :, None, None].expand(-1, -1, 4, 4).contiguous())
        means = colours.mean((2, 3)).double().cpu()
        known = torch.cat([samples, torch.ones(len(samples), 1)], dim=1).double()
        self.map = torch.linalg.lstsq(known, means).solution.float()  # [c + 1, 3]

    def __call__(self, latents: Tensor) -> Image.Image:
        """An RGB image of w x h pixels of latents [1, c, h, w] as the U-Net sees them."""
        places = latents[0].float().cpu().permute(1, 2, 0)
        colours = (places @ self.map[:-1] + self.map[-1]).clamp(0, 1)
        return Image.fromarray((colours * 255).round().to(torch.uint8).numpy())
