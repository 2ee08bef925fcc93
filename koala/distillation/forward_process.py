"""The forward process: noise schedule, and the random draws of each sample.

Each sample has its own generator, seeded by (seed, sample number). So a sample gets the same noise,
timestep and caption dropout however its batch is divided over processes and parts, and each process
draws only what it needs.

Shapes: n samples, c latent channels, h x w latent pixels, L tokens, D text width, P pooled width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from koala.checkpoints.load import alphas_cumprod
from koala.checkpoints.prediction import EPSILON, of_config


class NoiseSchedule:
    """SDXL's discrete forward process: z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps.

    config: a diffusers scheduler config as a dict (`koala.checkpoints.load.load_scheduler_config`).
    UserError if it describes another process (`koala.checkpoints.prediction`).
    Source: Ho et al. 2020, eq. 4.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.prediction = of_config(config).type
        self.steps: int = config["num_train_timesteps"]
        self.alphas_cumprod = alphas_cumprod(config)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t for fp32 latents and noise [n,c,h,w] and timesteps int64 [n] in [0, steps)."""
        abar = self.alphas_cumprod.to(latents.device)[timesteps].view(-1, 1, 1, 1)
        return abar.sqrt() * latents + (1.0 - abar).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the U-Net is to predict, of `add_noise`'s arguments: eps, or v, fp32 [n,c,h,w].

        v = sqrt(abar_t) eps - sqrt(1 - abar_t) z_0 (arXiv 2202.00512, section 2.2).
        """
        if self.prediction == EPSILON:
            return noise
        abar = self.alphas_cumprod.to(latents.device)[timesteps].view(-1, 1, 1, 1)
        return abar.sqrt() * noise - (1.0 - abar).sqrt() * latents

    def epsilon(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The noise in z_t = `noisy` by a U-Net's output, eps or v: fp32 [n,c,h,w]."""
        if self.prediction == EPSILON:
            return output
        abar = self.alphas_cumprod.to(noisy.device)[timesteps].view(-1, 1, 1, 1)
        return abar.sqrt() * output + (1.0 - abar).sqrt() * noisy

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """sigma_t = sqrt((1 - abar_t) / abar_t), fp32 [n,1,1,1]; z_t sqrt(1 + sigma_t^2) is
        z_0 + sigma_t eps."""
        abar = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return ((1.0 - abar) / abar).sqrt()

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """w_t, fp32 [n], in 0..1: min(SNR_t, gamma) / SNR_t for eps, / (SNR_t + 1) for v.

        SNR_t = abar_t / (1 - abar_t): nearly clean samples, easy and numerous, count less.
        Source: Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy".
        """
        abar = self.alphas_cumprod.to(timesteps.device)[timesteps]
        if self.prediction == EPSILON:
            return (gamma * (1.0 - abar) / abar).clamp(max=1.0)
        return torch.minimum(abar, gamma * (1.0 - abar))


def generators_at(seed: int, first: int, count: int) -> list[torch.Generator]:
    """CPU generators of samples first..first+count-1, one each.

    torch's CPU generator reads only the lower 32 bits of its seed, so seed and number are hashed to
    32 bits.
    """
    return [
        torch.Generator().manual_seed(
            int.from_bytes(
                hashlib.blake2b(f"{seed} {number}".encode(), digest_size=4).digest(), "little"
            )
        )
        for number in range(first, first + count)
    ]


class Draws(NamedTuple):
    """The random draws of a batch's samples, on the CPU."""

    noise: Tensor  # eps, fp32 [n, c, h, w]
    timesteps: Tensor  # int64 [n] in [0, steps)
    share: Tensor  # fp32 [n] in [0, 1): captions with a share below the dropout are dropped


def draw_noise(shape: Sequence[int], steps: int, generators: Sequence[torch.Generator]) -> Draws:
    """Draws for latents of `shape` [n,c,h,w], sample i's from generators[i] alone."""
    assert shape[0] == len(generators), (shape, len(generators))
    each = [
        (
            torch.randn(tuple(shape[1:]), generator=generator),
            torch.randint(steps, (), generator=generator),
            torch.rand((), generator=generator),
        )
        for generator in generators
    ]
    return Draws(*(torch.stack(column) for column in zip(*each, strict=True)))


class Noised(NamedTuple):
    """A noised batch, ready for a U-Net."""

    noisy: Tensor  # z_t, fp32 [n, 4, h, w]
    timesteps: Tensor  # t, int64 [n]
    text: Tensor  # [n, L, D]
    pooled: Tensor  # [n, P]
    time_ids: Tensor  # fp32 [n, 6]

    def without_text(self) -> Noised:
        """The same with the zeros of an empty prompt, for classifier-free guidance."""
        return self._replace(text=torch.zeros_like(self.text), pooled=torch.zeros_like(self.pooled))


def predict(unet: nn.Module, batch: Noised, dtype: torch.dtype) -> Tensor:
    """The U-Net's prediction of eps or v, fp32 [n,4,h,w]; its inputs are cast to `dtype`.

    Not the sizes and timesteps: bf16 has 8 bits, which would turn 1274 pixels into 1272.
    """
    return unet(
        batch.noisy.to(dtype),
        batch.timesteps,
        encoder_hidden_states=batch.text.to(dtype),
        added_cond_kwargs={
            "text_embeds": batch.pooled.to(dtype),
            "time_ids": batch.time_ids,
        },
    ).sample.float()
