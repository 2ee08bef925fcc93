"""Noise to latents: rows, each at its own place on its own way, taken a step further together.

`evaluate` asks the U-Net about a batch of rows, `Row.advance` moves one on. A row is one picture:
it has its own timesteps, noise levels, guidance and number of steps, so that whatever is of the
same size can share a forward pass.

Letters: n rows, t text tokens, d text width, p pooled width, c latent channels, h and w the
latent's height and width (pixels / 8).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from koala.generation.samplers import Sampler
from koala.utils.device import sent, whereabouts


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

    @staticmethod
    def joined(parts: "Sequence[Condition]") -> "Condition":
        """One batch of all of them, in their order."""
        return Condition(
            torch.cat([part.text for part in parts]),
            torch.cat([part.pooled for part in parts]),
            torch.cat([part.time_ids for part in parts]),
        )


# One evaluation of a U-Net, whatever runs it: (x, timesteps, condition) -> epsilon. x is float32
# [n, c, h, w], scaled to the variance that the U-Net knows; timesteps float32 [n], each row its
# own; epsilon float32 [n, c, h, w]. What it is given may lie on any device.
Predict: TypeAlias = Callable[[Tensor, Tensor, Condition], Tensor]


def predictor(unet: UNet2DConditionModel) -> Predict:
    """The predictions of a U-Net as PyTorch runs it, on its device and in its precision."""

    def predict(x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        device, dtype = whereabouts(unet)
        own = condition.to(device, dtype)
        (epsilon,) = unet(
            x.to(device, dtype),
            sent(timesteps, device),
            encoder_hidden_states=own.text,
            added_cond_kwargs={"text_embeds": own.pooled, "time_ids": own.time_ids},
            return_dict=False,
        )
        return epsilon.float()

    return predict


@dataclass(frozen=True)
class Kept:
    """What inpainting leaves as it was: a picture's latents outside the mask."""

    latents: Tensor  # [1, c, h, w]
    mask: Tensor  # [1, 1, h, w]: 1 where the picture is painted anew, 0 where it is kept
    noise: Tensor  # [1, c, h, w], unit normal

    def put_back(self, x: Tensor, sigma: float) -> Tensor:
        """x with the kept part as it is at that noise level."""
        kept = self.latents + sigma * self.noise
        return (1 - self.mask) * kept + self.mask * x


@dataclass
class Row:
    """One picture on its way from noise."""

    sampler: Sampler
    x: Tensor  # float32 [1, c, h, w], on the device
    condition: Condition  # n = 1
    unconditional: Condition | None = None  # of the same length; None: never guided
    guidance: float = 1.0
    guided_steps: int = 0  # so many, from the first on
    kept: Kept | None = None
    done: int = 0  # steps
    denoised: Tensor | None = None  # the picture as the last step saw it, latents like x

    @property
    def steps(self) -> int:
        return len(self.sampler.timesteps)

    @property
    def finished(self) -> bool:
        return self.done == self.steps

    @property
    def guided(self) -> bool:
        """Whether the next step needs the unconditional prediction as well."""
        return self.unconditional is not None and self.done < self.guided_steps

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, h, w, t): rows that agree in it can share a batch."""
        return (*self.x.shape[1:], self.condition.text.shape[1])

    @property
    def scaled(self) -> Tensor:
        """x with the variance that the U-Net knows."""
        return self.x / math.sqrt(self.sampler.sigmas[self.done] ** 2 + 1)

    def advance(self, epsilon: Tensor) -> None:
        """Takes the next step with the predicted noise [1, c, h, w]."""
        sigma, to = self.sampler.sigmas[self.done : self.done + 2]
        self.denoised = self.x - sigma * epsilon
        x = self.sampler.step(self.done, self.x, self.denoised)
        self.x = x if self.kept is None else self.kept.put_back(x, to)
        self.done += 1


def evaluate(predict: Predict, rows: Sequence[Row]) -> list[Tensor]:
    """The noise [1, c, h, w] that the U-Net sees in each row: one pass over rows of one shape.

    The unconditional rows of those that are guided come first. The two predictions are combined
    with weight `guidance` (arXiv 2207.12598, equation 6, w = guidance - 1).
    """
    guided = [row for row in rows if row.guided]
    batch = [*guided, *rows]
    told = [row.unconditional for row in guided if row.unconditional is not None]
    told += [row.condition for row in rows]
    epsilon = predict(
        torch.cat([row.scaled for row in batch]),
        torch.tensor([row.sampler.timesteps[row.done] for row in batch]),
        Condition.joined(told),
    ).split(1)
    without, with_prompt = iter(epsilon[: len(guided)]), epsilon[len(guided) :]
    return [
        _guide(next(without), found, row.guidance) if row.guided else found
        for row, found in zip(rows, with_prompt, strict=True)
    ]


def _guide(without: Tensor, with_prompt: Tensor, guidance: float) -> Tensor:
    return without + guidance * (with_prompt - without)
