"""The mini family's tiny autoencoder: a cheap decoder, and its inverse.

diffusers' `AutoencoderTiny`, the class of TAESD, at half of its width. It works on normalised
latents and is distilled from the VAE alone: it decodes latents to the VAE's image, and encodes that
image to the latents. So it needs no images, only the latents made by `koala prepare --model`; half
of them get noise, since a U-Net's latents are not those of images.

Shapes: n samples, latents [n, 4, h, w], images [n, 3, 8h, 8w].
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from koala.checkpoints.latent_scale import LatentScale
from koala.mini.perceptual import MobileNetV2
from koala.mini.vae import opponent, to_images
from koala.utils.contact_sheet import contact_sheet

PERCEPTUAL = 0.5  # weight of the perceptual error
NOISE = 0.5  # standard deviations, at most, on half of the latents


def new_tiny() -> AutoencoderTiny:
    """The untrained autoencoder, fp32: about 430,000 parameters, most of them in the decoder.

    Blocks are many where they are cheap, at the latents' resolution: 6, 4, 2 and 1.
    """
    return AutoencoderTiny(
        encoder_block_out_channels=(16,) * 4,
        decoder_block_out_channels=(32,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(6, 4, 2, 1),
    )


class TinyDistillation(nn.Module):
    """Decoding like the VAE: L1 + L2 + perceptual error; encoding back: L2.

    tiny: the trainable autoencoder. vae: the frozen teacher. shown: the preview's latents
    [n, 4, h, w].
    """

    def __init__(self, tiny: AutoencoderTiny, vae: AutoencoderKL, shown: Tensor) -> None:
        super().__init__()
        self.trainable = tiny
        self.shown = shown
        # Not submodules, so neither trained nor saved.
        self._frozen = (vae.requires_grad_(False).eval(), MobileNetV2.pretrained())

    def losses(
        self, batch: dict[str, Any], generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """Named scalars for {"latents": [n, 4, h, w]}; deterministic."""
        z = batch["latents"].to(next(self.trainable.parameters()).device)
        z = z + self._noise(z.shape, generators[0]).to(z)
        target = self.drawn(z)
        y = self.trainable.decode(z).sample
        error = opponent(y - target)
        pixel = error.abs().mean() + error.square().mean()
        seen = self._frozen[1].to(z.device).distance(y, target)
        latent = F.mse_loss(self.trainable.encode(target).latents, z)
        loss = pixel + PERCEPTUAL * seen + latent
        return {"pixel": pixel, "perceptual": seen, "latent": latent, "loss": loss}

    @staticmethod
    def _noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Gaussian noise of a strength for each sample, uniform below `NOISE`, 0 for half."""
        strength = (2 * torch.rand(shape[0], 1, 1, 1, generator=generator) - 1).clamp(min=0)
        return NOISE * strength * torch.randn(shape, generator=generator)

    @torch.no_grad()
    def drawn(self, z: Tensor) -> Tensor:
        """The VAE's pictures of latents as the U-Net sees them, in [-1, 1]."""
        vae = self._frozen[0]
        return vae.decode(LatentScale(vae.config, z.device).denormalise(z)).sample.clamp(-1, 1)

    @torch.no_grad()
    def preview(self, trainable: nn.Module) -> Image.Image:
        """The VAE's images above the tiny autoencoder's."""
        assert isinstance(trainable, AutoencoderTiny)
        z = self.shown.to(next(trainable.parameters()).device)
        images = to_images(torch.cat([self.drawn(z), trainable.decode(z).sample]))
        names = ["VAE"] * len(z) + ["tiny"] * len(z)
        return contact_sheet(images, names, max(1, len(z) // 2), 2)

    def export(self, trainable: nn.Module, folder: Path) -> None:
        """Writes the folder of the autoencoder in fp32."""
        assert isinstance(trainable, AutoencoderTiny)
        trainable.save_pretrained(folder)
        file = folder / "config.json"
        config = json.loads(file.read_text("utf-8"))
        del config["block_out_channels"]  # diffusers writes it and then warns about it
        file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
