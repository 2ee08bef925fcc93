"""How a VAE's latents become a U-Net's: one definition for training, data and generation."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from koala.architectures.table import LATENT_CHANNELS

_SCALING_FACTOR = 0.18215  # diffusers' default, if a VAE's config states none


class LatentScale:
    """The normalisation in a VAE's config, as diffusers' SDXL pipelines apply it.

    U-Net latents = (VAE latents - mean) / std * factor, with the config's `latents_mean`,
    `latents_std` and `scaling_factor`. `mean` and `std` are float32 [1, c, 1, 1] on `device`;
    0 and 1 if the config lacks either.
    """

    def __init__(self, config: Mapping[str, Any], device: str | torch.device = "cpu") -> None:
        channels = config.get("latent_channels", LATENT_CHANNELS)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        both = mean is not None and std is not None
        self.mean, self.std = (
            torch.tensor(values if both else [other] * channels, device=device).view(1, -1, 1, 1)
            for values, other in ((mean, 0.0), (std, 1.0))
        )
        self.factor: float = config.get("scaling_factor", _SCALING_FACTOR)

    def normalise(self, latents: Tensor) -> Tensor:
        """U-Net latents of VAE latents, [n, c, h, w]."""
        return (latents - self.mean) / self.std * self.factor

    def denormalise(self, latents: Tensor) -> Tensor:
        """VAE latents of U-Net latents, [n, c, h, w]."""
        return latents / self.factor * self.std + self.mean
