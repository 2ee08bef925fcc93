"""Latents to pictures."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from koala.errors import UserError

# A decoder, whatever runs it: latents [n, c, h, w] as the U-Net sees them -> pixels float32
# [n, 3, 8h, 8w] in 0..1.
Decode: TypeAlias = Callable[[Tensor], Tensor]


def decoder(vae: AutoencoderKL) -> Decode:
    """The VAE's own decoder, all of a picture at once."""
    return partial(decode, vae)


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures float32 [n, 3, 8h, 8w] in 0..1, from latents [n, c, h, w] as the U-Net sees them.

    The latents are unscaled with the VAE config's `latents_mean`, `latents_std` and
    `scaling_factor`, in the order of diffusers' SDXL pipeline.
    """
    x = latents.float() / vae.config.scaling_factor
    if vae.config.latents_mean is not None and vae.config.latents_std is not None:
        mean, std = (
            torch.tensor(values, device=x.device).view(1, -1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        x = x * std + mean
    pixels = vae.decode(x.to(vae.device, vae.dtype)).sample.float()
    if not pixels.isfinite().all():
        raise UserError(
            f"the picture came out as not-a-number in {str(vae.dtype).removeprefix('torch.')}; "
            "load the model in float32, or use one with a VAE made for float16"
        )
    return (pixels / 2 + 0.5).clamp(0, 1)


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """8-bit RGB pictures from float [n, 3, h, w] in 0..1."""
    rounded = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in rounded]
