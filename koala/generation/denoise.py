"""Noise to latents: the sampler, one function that reads like its formula.

Letters: n pictures, t text tokens, d text width, p pooled width, c latent channels, h and w the
latent's height and width (pixels / 8).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from koala.generation.schedule import Schedule


@dataclass(frozen=True)
class Condition:
    """What the U-Net is told about n pictures."""

    text: Tensor  # [n, t, d]
    pooled: Tensor  # [n, p]
    time_ids: Tensor  # [n, 6]

    def to(self, device: torch.device, dtype: torch.dtype) -> "Condition":
        """The same on another device and in another precision; itself where that is so already."""
        parts = (self.text, self.pooled, self.time_ids)
        return Condition(*(part.to(device, dtype) for part in parts))


# One evaluation of a U-Net, whatever runs it: (x, timesteps, condition) -> epsilon. x is float32
# [n, c, h, w], scaled to the variance that the U-Net knows; timesteps float32 [n], each row its
# own; epsilon float32 [n, c, h, w]. What it is given may lie on any device.
Predict: TypeAlias = Callable[[Tensor, Tensor, Condition], Tensor]


def predictor(unet: UNet2DConditionModel) -> Predict:
    """The predictions of a U-Net as PyTorch runs it, on its device and in its precision."""

    def predict(x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        own = condition.to(unet.device, unet.dtype)
        (epsilon,) = unet(
            x.to(unet.device, unet.dtype),
            timesteps.to(unet.device),
            encoder_hidden_states=own.text,
            added_cond_kwargs={"text_embeds": own.pooled, "time_ids": own.time_ids},
            return_dict=False,
        )
        return epsilon.float()

    return predict


def initial_noise(seeds: list[int], channels: int, height: int, width: int) -> Tensor:
    """Unit normal noise, float32 [n, c, h, w] on the CPU.

    Each picture's comes from its own generator, so that it depends on its seed and nothing
    else: not on its place in a batch, nor on the device that draws it.
    """
    shape = (channels, height, width)
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def denoise(
    unet: UNet2DConditionModel,
    noise: Tensor,
    condition: Condition,
    unconditional: Condition | None,
    schedule: Schedule,
    guidance: float,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Euler's method (arXiv 2206.00364, algorithm 1 without its correction) down the schedule.

    `noise` is unit normal, float32 [n, c, h, w]; the result is latents of the same kind, on the
    U-Net's device. With `unconditional`, both predictions come from one pass of 2n rows and are
    combined with weight `guidance` (arXiv 2207.12598, equation 6, w = guidance - 1).
    `on_step` is called after each step.
    """
    predict, condition = predictor(unet), _batch(condition, unconditional, unet)
    x = noise.to(unet.device) * schedule.sigmas[0]  # kept in float32 from step to step
    for timestep, sigma, sigma_next in zip(
        schedule.timesteps, schedule.sigmas[:-1], schedule.sigmas[1:], strict=True
    ):
        scaled = x / (sigma**2 + 1) ** 0.5  # the variance that the U-Net knows
        if unconditional is not None:
            scaled = torch.cat([scaled, scaled])
        epsilon = predict(scaled, timestep.expand(len(scaled)), condition)
        if unconditional is not None:
            without, with_prompt = epsilon.chunk(2)
            epsilon = without + guidance * (with_prompt - without)
        x = x + (sigma_next - sigma) * epsilon
        if on_step is not None:
            on_step()
    return x


def _batch(
    condition: Condition, unconditional: Condition | None, unet: UNet2DConditionModel
) -> Condition:
    """Both conditions in one batch, the unconditional rows first, as the U-Net takes them."""
    parts = [condition] if unconditional is None else [unconditional, condition]
    return Condition(
        *(
            torch.cat([getattr(part, name) for part in parts]).to(unet.device, unet.dtype)
            for name in ("text", "pooled", "time_ids")
        )
    )
