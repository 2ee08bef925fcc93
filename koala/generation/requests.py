"""Requests: the settings of one image, and what else it is made from.

A PNG keeps the settings. They are complete: the same model makes the same image from them again.
`checked` validates a request without loading torch, so a mistake shows before a model is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image

import koala
from koala.architectures.table import FACTOR
from koala.checkpoints.load import load_scheduler_config
from koala.checkpoints.resolve import resolve_model
from koala.checkpoints.tensors import read_header
from koala.checkpoints.validate import unet_architecture
from koala.errors import UserError
from koala.generation import samplers, validation
from koala.generation.image_files import fingerprint, mask_places, open_image
from koala.generation.prompt_syntax import parse
from koala.lora.names import BaseModel, base_of
from koala.lora.reading import read

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Loras: TypeAlias = tuple[tuple[Path, float], ...]  # files and scales, in the order of application


@dataclass(frozen=True)
class Settings:
    """How one image was made: enough to make it again."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    seed: int
    width: int  # pixels
    height: int  # pixels
    model: str
    version: str  # of koala
    sampler: str = "Euler"
    schedule: str = "trailing"
    loras: tuple[tuple[str, float], ...] = ()  # name and scale, in order
    guidance_until: float = 1.0  # share of the steps with guidance, from the first
    strength: float = 1.0  # share of the steps that is done, from an image
    image: str = ""  # fingerprint of the image that it starts from, if any
    mask: str = ""  # fingerprint of the mask, if any
    enlarged: str = ""  # WIDTHxHEIGHT that the image was resized to once drawn, if it was


@dataclass(frozen=True)
class Request:
    """One image to draw, checked and complete; `Pipeline.requests` makes them."""

    settings: Settings
    image: Tensor | None = None  # float32 [1, 3, height, width] in -1..1
    mask: Tensor | None = None  # float32 [1, 1, h, w]: 1 is repainted, 0 is kept
    lora: Loras = ()  # for this image alone, besides the model's

    @property
    def pixels(self) -> int:
        return self.settings.width * self.settings.height


@dataclass(frozen=True)
class Known:
    """The facts of a model that decide which images it can draw."""

    name: str
    native: int  # pixels of a side
    scheduler_config: Mapping[str, Any]
    base: BaseModel  # what a LoRA must fit
    loras: tuple[tuple[str, float], ...] = ()  # names and scales of the model's own

    @classmethod
    def of(cls, model: str | Path) -> Known:
        """Of a bundled name, a folder, a Hub id or a single file. UserError if it is not found."""
        folder = resolve_model(model)
        native = unet_architecture(folder).sample * FACTOR
        return cls(str(model), native, load_scheduler_config(folder), base_of(folder))


@dataclass(frozen=True)
class Checked:
    """A request of one or more images that a model can draw."""

    settings: list[Settings]  # of each image
    image: Image.Image | None  # that they start from, upright
    mask: np.ndarray | None  # bool [h, w] of a latent: repainted
    loras: Loras  # for these images alone


def checked(
    model: str | Path | Known,
    prompt: str | list[str],
    *,
    negative_prompt: str = "",
    steps: int = 10,
    guidance: float = 3.5,
    guidance_until: float = 1.0,
    scheduler: str = "euler",
    size: tuple[int, int] | str | None = None,
    number: int = 1,
    seed: int | None = None,
    image: str | Path | Image.Image | None = None,
    strength: float | None = None,
    mask: str | Path | Image.Image | None = None,
    lora: Mapping[str | Path, float] | None = None,
) -> Checked:
    """Validates the arguments of `Pipeline.requests`. UserError for a value that is not allowed.

    model: its facts, or its name, which is resolved after everything else was checked.
    """
    prompts = validation.prompts(prompt)
    validation.numbers(steps=steps, guidance=guidance, number=number)
    validation.negative_prompt(negative_prompt, guidance)
    for text in (*prompts, negative_prompt):
        parse(text)  # refuses weights out of their range
    sampler = samplers.get(scheduler)
    until = validation.guidance_until(guidance_until, guidance)
    share = validation.strength(strength, image is not None, mask is not None)
    validation.steps_done(steps, share)
    first_seed = validation.seed(seed, len(prompts) * number)
    given, masked = (None if it is None else open_image(it) for it in (image, mask))
    asked_size = given.size if given is not None and size is None else size
    drawn_size = None if asked_size is None else validation.size(asked_size)
    own = tuple((Path(f).expanduser(), validation.lora_scale(s)) for f, s in (lora or {}).items())
    for path, _ in own:
        read_header(path)  # refuses a file that is missing or damaged before a model is fetched

    known = model if isinstance(model, Known) else Known.of(model)
    validation.schedule(known.scheduler_config, sampler.spacing, steps)
    loras = (*known.loras, *((path.stem, scale) for path, scale in own))
    for name, count in Counter(name for name, _ in loras).items():
        if count > 1:
            raise UserError(f"two LoRAs are called {name!r}: name each once")
    for path, _ in own:
        read(path, known.base)
    width, height = drawn_size or (known.native, known.native)
    places = None
    if given is not None and masked is not None:
        places = mask_places(masked, given.size, (width, height), FACTOR)
    first = Settings(
        prompt=prompts[0],
        negative_prompt=negative_prompt,
        steps=steps,
        guidance=float(guidance),
        seed=first_seed,
        width=width,
        height=height,
        model=known.name,
        version=koala.__version__,
        sampler=sampler.name,
        schedule=sampler.spacing,
        loras=loras,
        guidance_until=until,
        strength=share,
        image="" if given is None else fingerprint(given),
        mask="" if masked is None else fingerprint(masked),
    )
    every = [
        replace(first, prompt=prompts[i // number], seed=first.seed + i)
        for i in range(len(prompts) * number)
    ]
    return Checked(every, given, places, own)
