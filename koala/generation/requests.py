"""What is asked for: the record of one picture, and the request that carries what it is made from.

Settings are what a PNG keeps; they are complete, so that the same model makes the same picture
from them again. `checked` says what may be asked, and loads no torch for it: a mistake shows before
a model is read.
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
from koala.generation.image_files import fingerprint, mask_places, open_picture
from koala.generation.prompt_syntax import parse
from koala.lora.names import Base, base_of
from koala.lora.reading import read

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Loras: TypeAlias = tuple[tuple[Path, float], ...]  # files and scales, in the order they are put on


@dataclass(frozen=True)
class Settings:
    """How one picture was made: enough to make it again."""

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
    loras: tuple[tuple[str, float], ...] = ()  # name and scale, in the order they were put on
    guidance_until: float = 1.0  # the share of the steps that is guided, from the first on
    strength: float = 1.0  # the share of the steps that is done, where a picture is given
    image: str = ""  # the given picture's fingerprint; empty where none is given
    mask: str = ""  # the mask's


@dataclass(frozen=True)
class Request:
    """One picture to draw, checked and complete; `Pipeline.requests` makes them."""

    settings: Settings
    image: Tensor | None = None  # float32 [1, 3, height, width] in -1..1
    mask: Tensor | None = None  # float32 [1, 1, h, w]: 1 is painted anew, 0 is kept
    lora: Loras = ()  # of its own, besides those that are on the model for all

    @property
    def pixels(self) -> int:
        return self.settings.width * self.settings.height


@dataclass(frozen=True)
class Known:
    """What of a model decides which pictures it can draw."""

    name: str
    native: int  # pixels of a side
    scheduler_config: Mapping[str, Any]
    base: Base  # what a LoRA has to fit
    loras: tuple[tuple[str, float], ...] = ()  # names and scales of those on it

    @classmethod
    def of(cls, model: str | Path) -> Known:
        """Of a bundled name, a folder, a Hub id or a single file. UserError if it is none."""
        folder = resolve_model(model)
        native = unet_architecture(folder).sample * FACTOR
        return cls(str(model), native, load_scheduler_config(folder), base_of(folder))


@dataclass(frozen=True)
class Asked:
    """Pictures that a model can draw, checked."""

    settings: list[Settings]  # of each
    image: Image.Image | None  # that they start from, upright
    mask: np.ndarray | None  # bool [h, w] of a latent: painted anew
    loras: Loras  # of their own


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
) -> Asked:
    """What `Pipeline.requests` makes requests of; UserError for a value that is not allowed.

    model: what is known of it, or its name, which is looked for when all else has been checked.
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
    given, masked = (None if it is None else open_picture(it) for it in (image, mask))
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
    return Asked(every, given, places, own)
