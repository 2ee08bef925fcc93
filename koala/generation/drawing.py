"""Drawing with whatever runs the networks: from prompts to images, and a record of each.

Everything here takes NumPy's arrays or PyTorch's. Importing it loads no torch.
"""

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from koala.architectures.time_ids import time_ids
from koala.errors import UserError
from koala.generation import image_inputs, samplers, validation
from koala.generation.control import Control
from koala.generation.denoise import (
    BatchRow,
    Condition,
    Hint,
    ImageTokens,
    Inpainting,
    Predict,
)
from koala.generation.engine import Engine, Progress
from koala.generation.image_prompt import ImagePrompt
from koala.generation.noise import Noise
from koala.generation.pixels import Decode, to_images
from koala.generation.prompt_editing import by_step
from koala.generation.prompts import Encoder, Ids, PromptEmbedding, encode, padded
from koala.generation.request_checks import checked
from koala.generation.requests import Known, Loras, Paste, Request, Settings
from koala.generation.schedule import SPACINGS, Schedule
from koala.utils.arrays import Array, joined, no_gradients, zeros_like


@dataclass(frozen=True)
class Result:
    """Images and the settings of each."""

    images: list[Image.Image]
    settings: list[Settings]


class Drawing(ABC):
    """What every pipeline can do: subclasses have the networks.

    `predict` runs the U-Net, `encode` and `decode` the VAE, `conditioner` the text encoders.
    """

    name: str
    conditioner: Encoder
    scheduler_config: dict[str, Any]
    zeros_for_empty: bool  # without a negative prompt, not the embedding of ""
    predict: Predict
    encode: Callable[[Array], Array]  # images to latents
    decode: Decode
    batch_sizes: tuple[int, ...]  # compiled rows; (): any
    takes_loras: bool  # for single requests
    takes_embeddings: bool = False  # textual inversions
    takes_images: bool = True  # to start from
    takes_control: bool = False  # ControlNets and IP-Adapters
    # Keeps in the cache what lets the next start be fast. It takes seconds, once for a model, so
    # it is for after the images are there.
    keep_form: Callable[[], None] = staticmethod(lambda: None)
    _previewer: image_inputs.Previewer | None = None

    @property
    @abstractmethod
    def factor(self) -> int:
        """Pixels per latent position, along a side: 8 in SDXL."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of a latent."""

    @property
    @abstractmethod
    def known(self) -> Known:
        """The facts that decide which images it can draw."""

    @abstractmethod
    def own(self, array: Array) -> Array:
        """An array as the networks take it: of their kind, on their device."""

    @abstractmethod
    def noise(self, seed: int, shape: tuple[int, ...]) -> Noise:
        """An image's noise."""

    def embedding(self, file: Path) -> Ids:
        """The ids of a textual inversion's vectors, if it `takes_embeddings`."""
        raise NotImplementedError

    def hint(self, control: Control) -> Hint:
        """What a request's ControlNet is shown, if it `takes_control`."""
        raise NotImplementedError

    def image_tokens(self, prompt: ImagePrompt) -> tuple[ImageTokens, ImageTokens]:
        """What a request's IP-Adapter shows, and what stands for none, if it `takes_control`."""
        raise NotImplementedError

    @abstractmethod
    def use_loras(self, lora: Loras) -> None:
        """Applies the LoRAs of one request, in place of those applied before."""

    def __call__(
        self,
        prompt: str | list[str],
        *,
        strict: bool = False,
        on_step: Callable[[int, int], None] | None = None,
        **asked: Any,
    ) -> Result:
        """Draws `number` images of each prompt, in the order of the prompts.

        asked: keyword arguments of `requests`. strict: every image is bit for bit what it is when
        drawn alone. on_step: called as on_step(done, total) after each step of each image.
        UserError for a value that is not allowed; a warning for a size, steps or guidance that the
        model was not made for.
        """
        requests = self.requests(prompt, **asked)
        for line in self.known.notes(requests[0].settings):
            warnings.warn(line, stacklevel=2)
        return self.draw(requests, strict, on_step)

    def draw(
        self,
        requests: Sequence[Request],
        strict: bool = False,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Result:
        """The images of requests, in their order, batched as far as possible."""
        done, total = itertools.count(1), self.steps(requests)

        def count(_: Progress) -> None:
            if on_step is not None:
                on_step(next(done), total)

        engine = Engine(self, strict=strict)
        tickets = [engine.submit(request, count) for request in requests]
        while engine.turn():
            pass
        settings = [request.settings for request in requests]
        return Result([ticket.result() for ticket in tickets], settings)

    def steps(self, requests: Sequence[Request]) -> int:
        """The number of steps of all requests together, each evaluation of the U-Net one."""
        return sum(len(self._schedule(request.settings)) for request in requests)

    def requests(
        self,
        prompt: str | list[str],
        *,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance: float | None = None,
        guidance_until: float = 1.0,
        guidance_rescale: float = 0.0,
        scheduler: str | None = None,
        size: tuple[int, int] | str | None = None,
        number: int = 1,
        seed: int | None = None,
        image: str | Path | Image.Image | None = None,
        strength: float | None = None,
        mask: str | Path | Image.Image | None = None,
        mask_blur: int | None = None,
        mask_fill: str | None = None,
        lora: Mapping[str | Path, float] | None = None,
        lora_dir: Path | None = None,
        embedding: Sequence[str | Path] = (),
        embedding_dir: Path | None = None,
        control: str | Path | None = None,
        control_image: str | Path | Image.Image | None = None,
        control_scale: float | None = None,
        ip_adapter: str | Path | None = None,
        ip_image: str | Path | Image.Image | None = None,
        ip_scale: float | None = None,
        image_encoder: str | Path | None = None,
    ) -> list[Request]:
        """One checked request per image: `number` of each prompt, in the order of the prompts.

        prompt: text of any length, with weights (`koala.generation.prompt_syntax`), changes
            (`koala.generation.prompt_editing`), and LoRAs of `lora_dir` as <lora:NAME:SCALE>.
        steps: 1 to 1000. guidance: 0 to 100; up to 1 there is no unconditional pass. Both and the
            scheduler are by default those that the model is made for
            (`koala.checkpoints.sampling`).
        guidance_until: the share of the steps, from the first, with guidance: above 0, up to 1.
        guidance_rescale: 0 to 1, how far the contrast that guidance adds is taken back.
        scheduler: a name that `samplers.get` knows, such as "euler" or "dpm++2m-karras".
        size: (width, height) in pixels or "WIDTHxHEIGHT", multiples of 8 from 16 to 4096; by
            default that of `image`, else the model's own. With an image it may be any size: what
            is no multiple of 8 is padded, and cut back at the end.
        seed: image i has seed + i; by default a random seed, which the settings record.
        image: a file or an image to start from. strength: the share of the steps that is done on
            it, above 0, up to 1; by default 0.6. mask: an image of the same size, light or
            transparent where it is to be repainted (`image_files.read_mask`); what is not comes
            back pixel for pixel. mask_blur: pixels, 0 to 64, inwards from the mask's edge, over
            which the two blend; by default 4. mask_fill: what the repainted part starts from, if
            strength is below 1: the "original", its "surroundings" drawn into it, "noise" or
            "nothing" (latents of 0); by default the original.
        lora: files and scales, -100 to 100, for these images alone, besides the model's own.
        embedding: files of textual inversions, each named in a prompt by the file's name; those of
            the folder `embedding_dir` may be.
        control: a ControlNet for the model, or for the teacher that it is a cut of: a folder, a Hub
            id or a single file. control_image: what it is shown, of the image's shape, on black
            where it is transparent. control_scale: how strong it is, 0 to 2; by default 1.
        ip_adapter: the file of a plain IP-Adapter for the model, or for its teacher.
            ip_image: the image that it takes for a prompt, of any size, on white where it is
            transparent; its middle square is read. ip_scale: how strong it is, 0 to 2; by default
            1. image_encoder: the folder of the image encoder that it was trained with; by default
            `image_encoder` beside the file.

        UserError for a value that is not allowed.
        """
        asked = checked(
            self.known, prompt, negative_prompt=negative_prompt, steps=steps, guidance=guidance,
            guidance_until=guidance_until, guidance_rescale=guidance_rescale, scheduler=scheduler,
            size=size, number=number, seed=seed, image=image, strength=strength, mask=mask,
            mask_blur=mask_blur, mask_fill=mask_fill, lora=lora, lora_dir=lora_dir,
            embedding=embedding, embedding_dir=embedding_dir, control=control,
            control_image=control_image, control_scale=control_scale, ip_adapter=ip_adapter,
            ip_image=ip_image, ip_scale=ip_scale, image_encoder=image_encoder,
        )  # fmt: skip
        if any(asked.loras) and not self.takes_loras:
            raise UserError(
                "a LoRA for single requests needs a model that plain PyTorch runs: leave it out, "
                "or load the model without compile, graphs, a memory plan or another backend"
            )
        if asked.embeddings and not self.takes_embeddings:
            raise UserError(
                f"the textual inversion {asked.embeddings[0].stem} needs text encoders that "
                "PyTorch runs: leave its name out, or load the model with the backend torch"
            )
        if asked.image is not None and not self.takes_images:
            raise UserError(
                f"{self.name} runs without PyTorch, which starting from an image needs: load the "
                "model itself with backend 'torch'"
            )
        beside = {"a ControlNet": asked.control, "an IP-Adapter": asked.image_prompt}
        for what, given in beside.items():
            if given is not None and not self.takes_control:
                raise UserError(
                    f"{what} needs a model that plain PyTorch runs: leave it out, or load the "
                    "model without compile, graphs or a memory plan"
                )
        first = asked.settings[0]
        pixels = places = paste = None
        if asked.image is not None:
            image = image_inputs.on_white(asked.image, (first.width, first.height))
            start = image
            if asked.mask is not None and first.mask_fill == "surroundings":
                start = image_inputs.filled(image, asked.mask.places, self.factor)
            pixels = self.own(image_inputs.to_pixels(start, self.factor))
            if asked.mask is not None:
                places = self.own(asked.mask.places.astype(np.float32)[None, None])
                paste = Paste(image, asked.mask.blend)
        shown = None
        if asked.control is not None:
            image = image_inputs.on_ground(
                asked.control.image, (first.width, first.height), "black"
            )
            seen = image_inputs.to_pixels(image, self.factor) / 2 + 0.5
            shown = Control(asked.control.net, self.own(seen), first.control_scale)
        image_prompt = None
        if asked.image_prompt is not None:
            adapter = asked.image_prompt.adapter
            read = image_inputs.for_clip(asked.image_prompt.image, adapter.encoder.side)
            image_prompt = ImagePrompt(adapter, self.own(read), first.ip_scale)
        return [
            Request(settings, pixels, places, paste, loras, asked.embeddings, shown, image_prompt)
            for settings, loras in zip(asked.settings, asked.loras, strict=True)
        ]

    # --- what the engine calls -----------------------------------------------------------

    def begin(self, request: Request) -> BatchRow:
        """A request's row before its first step."""
        with no_gradients():
            asked = request.settings
            schedule = self._schedule(asked)
            h, w = -(-asked.height // self.factor), -(-asked.width // self.factor)  # rounded up
            noise = self.noise(asked.seed, (1, self.channels, h, w))
            sampler = samplers.BY_NAME[asked.sampler](schedule, noise)
            first = noise.draw()
            x, kept = sampler.start(first), None
            if request.image is not None:
                latents = self.own(self.encode(request.image))
                # As in diffusers: with a mask and full strength, it starts from pure noise.
                if request.mask is None or asked.strength < 1:
                    x = latents + sampler.sigmas[0] * first
                if request.mask is not None:
                    kept = Inpainting(latents, self.own(request.mask), first)
                    x = x + _refilled(kept, asked.mask_fill, noise)
            embeddings = {path.stem.lower(): self.embedding(path) for path in request.embeddings}
            steps = validation.steps_done(asked.steps, asked.strength)
            hint = None if request.control is None else self.hint(request.control)
            of_steps = self._conditions(asked, steps, embeddings, hint)
            if request.image_prompt is not None:
                image, none = self.image_tokens(request.image_prompt)
                of_steps = [
                    (replace(one, image=image), other and replace(other, image=none))
                    for one, other in of_steps
                ]
            each = [pair for pair in of_steps for _ in range(sampler.evaluations)]
            (condition, unconditional), *later = each[: len(schedule)]
            guided = sampler.evaluations * math.ceil(asked.guidance_until * steps)
            return BatchRow(
                sampler, x, condition, unconditional, asked.guidance, guided,
                asked.guidance_rescale, kept, size=(asked.width, asked.height),
                paste=request.paste, later=later,
            )  # fmt: skip

    def finish(self, rows: Sequence[BatchRow]) -> list[Image.Image]:
        """The images of rows of one shape that have taken their last step."""
        with no_gradients():
            drawn = to_images(self.decode(joined([row.x for row in rows])))
            return [row.cut(image) for row, image in zip(rows, drawn, strict=True)]

    def preview(self, row: BatchRow) -> Image.Image:
        """A rough image of a row's last step: RGB, one pixel per latent position."""
        with no_gradients():
            if self._previewer is None:
                self._previewer = image_inputs.Previewer(self.decode, self.channels, row.x)
            return self._previewer(row.x if row.denoised is None else row.denoised)

    def _schedule(self, asked: Settings) -> Schedule:
        """A step for each evaluation of the U-Net."""
        schedule = SPACINGS[asked.schedule](self.scheduler_config, asked.steps)
        sampler = samplers.BY_NAME[asked.sampler]
        return sampler.adapted(schedule.last(asked.strength), asked.schedule)

    def _conditions(
        self, asked: Settings, steps: int, embeddings: Mapping[str, Ids], hint: Hint | None
    ) -> list[tuple[Condition, Condition | None]]:
        """For each step: the conditions with the prompt and, if there is guidance, without it."""
        prompts = by_step(asked.prompt, steps)
        zeros = not asked.negative_prompt and self.zeros_for_empty
        negatives = by_step(asked.negative_prompt, steps) if asked.guidance > 1 else []
        texts = {*prompts} if zeros else {*prompts, *negatives}
        found = {text: encode(self.conditioner, text, embeddings) for text in texts}
        longest = max(one.text.shape[1] for one in found.values())
        conditions = {
            text: self._condition(padded(self.conditioner, one, longest), asked, hint)
            for text, one in found.items()
        }
        if not negatives:
            return [(conditions[prompt], None) for prompt in prompts]
        if zeros:
            empty = conditions[prompts[0]]
            empty = replace(empty, text=zeros_like(empty.text), pooled=zeros_like(empty.pooled))
            return [(conditions[prompt], empty) for prompt in prompts]
        return [(conditions[p], conditions[n]) for p, n in zip(prompts, negatives, strict=True)]

    def _condition(self, encoded: PromptEmbedding, asked: Settings, hint: Hint | None) -> Condition:
        pair = (asked.height, asked.width)
        parts = (encoded.text, encoded.pooled, time_ids([pair], [(0, 0)], [pair]))
        return Condition(*(self.own(part) for part in parts), hint=hint)


def _refilled(kept: Inpainting, fill: str, noise: Noise) -> Array:
    """What to add to x, so that the repainted part starts from something else than the image."""
    if fill not in ("noise", "nothing"):
        return 0
    return kept.mask * ((noise.draw() if fill == "noise" else 0) - kept.latents)
