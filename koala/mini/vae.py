"""The mini family's VAE: SDXL's f8, four-channel autoencoder at a tenth of the width.

It is trained on the illustration set with an absolute error, a perceptual error and a small KL
term. The latents' mean and standard deviation per channel are stored in the VAE's config, where
diffusers' SDXL pipeline reads them, so the U-Net sees latents with mean 0 and standard deviation 1.

Shapes: n images, h x w pixels; latents [n, 4, h/8, w/8].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from koala.data.illustrations.images import ImageSet
from koala.data.sampler import shuffled
from koala.mini.perceptual import MobileNetV2
from koala.utils.contact_sheet import contact_sheet

SHOWN = 16  # images of a preview
HUE = 3.0  # weight of hue relative to lightness, in which illustrations vary more
CROPPED = 0.9  # share of `vae`'s steps on crops of half the side, at a quarter of the cost


def new_vae(side: int) -> AutoencoderKL:
    """The untrained VAE for images of side x side pixels, fp32."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 96, 192),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=side,
        scaling_factor=1.0,
    )


def to_images(pixels: Tensor) -> list[Image.Image]:
    """fp32 [n, 3, h, w] in [-1, 1] to RGB pictures."""
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(a) for a in array.cpu().numpy()]


class ImageData:
    """Training pictures in an order that (seed, epoch) gives, mirrored at random."""

    def __init__(self, images: ImageSet, indices: list[int], seed: int):
        self.pixels = torch.from_numpy(
            np.stack([np.asarray(images.image(i)) for i in indices])
        ).permute(0, 3, 1, 2)  # uint8 [N, 3, h, w]
        self.seed = seed

    def batch(self, first: int, count: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
        """{"pixels": fp32 [count, 3, h, w] in [-1, 1]}; one process learns from them."""
        assert world == 1
        return {"pixels": self._some(shuffled(len(self.pixels), first, count, self.seed))}

    def every(self, step: int) -> Tensor:
        """Every step-th picture, fp32 in [-1, 1]."""
        return self._some(range(0, len(self.pixels), step))

    def _some(self, picked: Sequence[int]) -> Tensor:
        return self.pixels[list(picked)].float() / 127.5 - 1


def opponent(rgb: Tensor) -> Tensor:
    """[n, 3, h, w] as lightness, red-green and yellow-blue, of about equal variance here."""
    r, g, b = rgb.unbind(1)
    red_green, yellow_blue = (r - g) / 2**0.5, (r + g - 2 * b) / 6**0.5
    return torch.stack([(r + g + b) / 3**0.5, HUE * red_green, HUE * yellow_blue], 1)


class Autoencoding(nn.Module):
    """L1 + L2 + perceptual error + KL, which weighs little (Rombach et al. 2022, app. G).

    Errors are measured in opponent colours with hue weighted up, and a small term pulls the first
    three latent channels towards the mean colour of their 8 x 8 pixels. Without both, encoder and
    decoder take thousands of steps to agree on any code for hue (`docs/log.md`); and latents that
    look like a small image are easy to denoise.

    Most steps use crops: the number of steps matters, and small ones are cheap.

    `sharpening` is the second half of the training: the encoder is frozen, so that latents keep
    their meaning, the perceptual error weighs more, and images are not cropped.

    With `drift`, each image's latents get noise of up to that many of their standard deviations:
    the latents that a U-Net generates are never exactly an image's. The encoder learns to store
    important details, such as eyes, robustly, and the decoder to read them under noise.
    Source: Yang et al. 2025, "Latent Denoising Makes Good Visual Tokenizers", with noise added
    where they interpolate.
    """

    def __init__(
        self, vae: AutoencoderKL, shown: Tensor, perceptual: float = 0.25, kl: float = 1e-3,
        colour: float = 0.1, cropped: float = CROPPED, drift: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.trainable = vae
        self.perceptual, self.kl, self.colour = perceptual, kl, colour
        self.cropped = cropped  # share of steps on crops
        self.drift = drift
        self._frozen = {"net": MobileNetV2.pretrained()}
        self.shown = shown  # fp32 [SHOWN, 3, h, w]

    def losses(
        self, batch: dict[str, Any], generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """Named scalars; all randomness comes from the first sample's generator."""
        generator = generators[0]
        device = next(self.trainable.parameters()).device
        x = batch["pixels"].to(device)
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(mirrored.to(device)[:, None, None, None], x.flip(-1), x)
        x = self._cropped(x, generator).contiguous(memory_format=torch.channels_last)
        posterior = self.trainable.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        z = posterior.mean + posterior.std * noise
        y = self.trainable.decode(z + self._drifts(z, generator)).sample
        error = opponent(y - x)
        pixel = error.abs().mean() + error.square().mean()
        seen = self._frozen["net"].to(device).distance(y, x)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        colour = F.mse_loss(posterior.mean[:, :3], F.avg_pool2d(opponent(x), 8))
        loss = pixel + self.perceptual * seen + self.kl * kl + self.colour * colour
        return {"pixel": pixel, "perceptual": seen, "kl": kl, "colour": colour, "loss": loss}

    def sharpening(self) -> "Autoencoding":
        """The same task for the decoder alone."""
        for part in (self.trainable.encoder, self.trainable.quant_conv):
            assert part is not None
            part.requires_grad_(False)
        return Autoencoding(
            self.trainable, self.shown, perceptual=0.5, kl=self.kl, colour=self.colour, cropped=0.0
        )

    def _drifts(self, z: Tensor, generator: torch.Generator) -> Tensor | float:
        """Noise of 0 to `drift` standard deviations of the batch for each of z [n, 4, h/8, w/8]."""
        if not self.drift:
            return 0.0
        share = torch.rand(len(z), 1, 1, 1, generator=generator)
        noise = torch.randn(z.shape, generator=generator)
        return self.drift * z.std((0, 2, 3), keepdim=True) * (share * noise).to(z.device)

    def _cropped(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """All images, or the same half-sided window of all."""
        half = x.shape[-1] // 2
        draws = torch.rand(3, generator=generator)
        if draws[0] >= self.cropped:
            return x
        top, left = (int(d * (half + 1)) for d in draws[1:])
        return x[..., top : top + half, left : left + half]

    @torch.no_grad()
    def preview(self, trainable: nn.Module) -> Image.Image:
        """Images above their reconstructions."""
        assert isinstance(trainable, AutoencoderKL)
        x = self.shown.to(next(trainable.parameters()).device)
        y = trainable.decode(trainable.encode(x).latent_dist.mode()).sample
        images = to_images(torch.cat([x, y]))
        return contact_sheet(images, ["real"] * len(x) + ["rebuilt"] * len(y), len(x) // 2, 2)

    def export(self, trainable: nn.Module, folder: Path) -> None:
        """Writes the VAE folder in fp32."""
        assert isinstance(trainable, AutoencoderKL)
        trainable.save_pretrained(folder)


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Stores mean and std of the latents of fp32 [n, 3, h, w] in the VAE's config."""
    latents = torch.cat([vae.encode(x).latent_dist.mode() for x in pixels.split(64)])
    vae.register_to_config(
        latents_mean=[round(v, 5) for v in latents.mean((0, 2, 3)).tolist()],
        latents_std=[round(v, 5) for v in latents.std((0, 2, 3)).tolist()],
    )
