"""Noise to latents, a batch of rows at a time.

`evaluate` runs the U-Net on a batch of rows, `BatchRow.advance` takes one row's next step. A row is
one image with its own timesteps, noise levels, guidance and number of steps, so all rows of one
size can share a forward pass.

Letters: n rows, t text tokens, d text width, p pooled width, c latent channels, h and w the
latent's height and width (pixels / 8). Arrays are NumPy's or PyTorch's: importing this loads
no torch.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image

from koala.generation.samplers import Sampler
from koala.utils.arrays import Array, deviation, joined, numbers

if TYPE_CHECKING:
    import torch


# What a ControlNet adds: (x, timesteps, condition) -> a residual [n, c', h', w'] for each of the
# U-Net's skip connections, and one for its mid block's output. The arguments are as the U-Net's.
Residuals: TypeAlias = Callable[[Array, Array, "Condition"], tuple[list[Array], Array]]


@dataclass(frozen=True)
class Hint:
    """What a ControlNet is shown of n rows."""

    net: Residuals
    image: Array  # float32 [n, 3, 8h, 8w] in 0..1
    scale: Array  # float32 [n], of the residuals

    @staticmethod
    def joined(parts: "Sequence[Hint]") -> "Hint":
        """All of them as one batch, in order. They are for one ControlNet."""
        (net,) = {part.net for part in parts}
        return Hint(net, joined([p.image for p in parts]), joined([p.scale for p in parts]))


# What an IP-Adapter does: (U-Net, tokens [n, i, d], scale [n]) -> a block inside which that U-Net's
# cross-attentions read the tokens too.
Attached: TypeAlias = Callable[[Any, Array, Array], AbstractContextManager[None]]


@dataclass(frozen=True)
class ImageTokens:
    """What an IP-Adapter shows a U-Net of n rows."""

    attached: Attached
    tokens: Array  # [n, i, d]
    scale: Array  # float32 [n]

    @staticmethod
    def joined(parts: "Sequence[ImageTokens]") -> "ImageTokens":
        """All of them as one batch, in order. They are for one IP-Adapter."""
        (attached,) = {part.attached for part in parts}
        tokens, scale = (joined([getattr(p, key) for p in parts]) for key in ("tokens", "scale"))
        return ImageTokens(attached, tokens, scale)


@dataclass(frozen=True)
class Condition:
    """The U-Net's conditioning of n rows."""

    text: Array  # [n, t, d]
    pooled: Array  # [n, p]
    time_ids: Array  # float32 [n, 6]
    # For PyTorch's predictor alone:
    hint: Hint | None = field(default=None, kw_only=True)
    image: ImageTokens | None = field(default=None, kw_only=True)

    def to(self, device: "torch.device", dtype: "torch.dtype") -> "Condition":
        """Tensors on another device, text in another dtype; bf16 would round the sizes.

        The hint and the image's tokens stay where they are.
        """
        text, pooled = (part.to(device, dtype) for part in (self.text, self.pooled))
        return replace(self, text=text, pooled=pooled, time_ids=self.time_ids.to(device))

    @staticmethod
    def joined(parts: "Sequence[Condition]") -> "Condition":
        """All of them as one batch, in order. All have a hint, or none; and an image's tokens."""
        return Condition(
            joined([part.text for part in parts]),
            joined([part.pooled for part in parts]),
            joined([part.time_ids for part in parts]),
            hint=Hint.joined([p.hint for p in parts if p.hint]) if parts[0].hint else None,
            image=ImageTokens.joined([p.image for p in parts if p.image])
            if parts[0].image
            else None,
        )


# One evaluation of a U-Net: (x, timesteps, condition) -> its output, epsilon or v. x is float32
# [n, c, h, w], scaled to the variance that the U-Net was trained with; timesteps float32 [n], one
# per row; the output float32 [n, c, h, w]. The arguments may be on any device.
Predict: TypeAlias = Callable[[Array, Array, Condition], Array]


@dataclass(frozen=True)
class Inpainting:
    """The part of an image that inpainting keeps: its latents outside the mask."""

    latents: Array  # [1, c, h, w]
    mask: Array  # [1, 1, h, w]: 1 is repainted, 0 is kept
    noise: Array  # [1, c, h, w], unit normal

    def put_back(self, x: Array, sigma: float) -> Array:
        """x with the kept part replaced by the image at that noise level."""
        kept = self.latents + sigma * self.noise
        return (1 - self.mask) * kept + self.mask * x


@dataclass
class BatchRow:
    """One image that is being denoised."""

    sampler: Sampler
    x: Array  # float32 [1, c, h, w], on the device
    condition: Condition  # n = 1
    unconditional: Condition | None  # of the same length; None: no guidance
    guidance: float
    guided_steps: int  # counted from the first
    guidance_rescale: float  # 0: none
    kept: Inpainting | None
    size: tuple[int, int]  # of the image; the last places beyond are padding
    paste: Callable[[Image.Image], Image.Image] | None  # puts kept pixels back
    later: Sequence[tuple[Condition, Condition | None]]  # of the steps after the first
    done: int = 0  # steps
    denoised: Array | None = None  # the last step's estimate of the image, latents like x

    @property
    def steps(self) -> int:
        return len(self.sampler.timesteps)

    @property
    def finished(self) -> bool:
        return self.done == self.steps

    @property
    def guided(self) -> bool:
        """Whether the next step needs the unconditional prediction too."""
        return self.unconditional is not None and self.done < self.guided_steps

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, h, w, t): rows of equal shape can share a batch."""
        return (*self.x.shape[1:], self.condition.text.shape[1])

    @property
    def controlled_by(self) -> tuple[Residuals | None, Attached | None]:
        """Its ControlNet and IP-Adapter: rows can share a batch if they are the same."""
        hint, image = self.condition.hint, self.condition.image
        return None if hint is None else hint.net, None if image is None else image.attached

    @property
    def scaled(self) -> Array:
        """x scaled to the variance that the U-Net was trained with."""
        return self.x / math.sqrt(self.sampler.sigmas[self.done] ** 2 + 1)

    def cut(self, drawn: Image.Image) -> Image.Image:
        """The finished image of what the latents decode to."""
        if drawn.size != self.size:
            drawn = drawn.crop((0, 0, *self.size))
        return drawn if self.paste is None else self.paste(drawn)

    def advance(self, output: Array) -> None:
        """Takes the next step with the U-Net's output [1, c, h, w]."""
        to = self.sampler.sigmas[self.done + 1]
        self.denoised = self.sampler.denoised(self.done, self.x, output)
        x = self.sampler.step(self.done, self.x, self.denoised)
        self.x = x if self.kept is None else self.kept.put_back(x, to)
        self.done += 1
        if self.done <= len(self.later):
            self.condition, self.unconditional = self.later[self.done - 1]


def evaluate(predict: Predict, rows: Sequence[BatchRow]) -> list[Array]:
    """The U-Net's output [1, c, h, w] for each row: one pass over rows of one shape.

    The unconditional rows of the guided ones come first. The two outputs are combined with
    weight `guidance` (arXiv 2207.12598, equation 6, w = guidance - 1).
    """
    guided = [row for row in rows if row.guided]
    batch = [*guided, *rows]
    conditions = [row.unconditional for row in guided if row.unconditional is not None]
    conditions += [row.condition for row in rows]
    x = joined([row.scaled for row in batch])
    timesteps = numbers(x, [row.sampler.timesteps[row.done] for row in batch])
    output = predict(x, timesteps, Condition.joined(conditions))
    outputs = [output[i : i + 1] for i in range(len(batch))]
    without, with_prompt = iter(outputs[: len(guided)]), outputs[len(guided) :]
    return [
        _guide(next(without), found, row) if row.guided else found
        for row, found in zip(rows, with_prompt, strict=True)
    ]


def _guide(without: Array, with_prompt: Array, row: BatchRow) -> Array:
    guided = without + row.guidance * (with_prompt - without)
    if not row.guidance_rescale:
        return guided
    # arXiv 2305.08891, section 3.4: guidance without the contrast that it adds.
    rescaled = guided * (deviation(with_prompt) / deviation(guided))
    return row.guidance_rescale * rescaled + (1 - row.guidance_rescale) * guided


def finish(predict: Predict, rows: Sequence[BatchRow]) -> None:
    """Takes all steps of rows of one shape and number of steps, together."""
    while not rows[0].finished:
        for row, output in zip(rows, evaluate(predict, rows), strict=True):
            row.advance(output)
