"""Requests: the settings of one image, and what else it is made from.

A PNG keeps the settings. They are complete: the same model makes the same image from them again.
`koala.generation.request_checks` makes them of what a person asks for. This loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image

import koala
from koala.architectures.table import FACTOR, UNetArchitecture
from koala.checkpoints.load import load_scheduler_config
from koala.checkpoints.resolve import resolve_model
from koala.checkpoints.sampling import USUAL, Sampling, of_model, of_named
from koala.checkpoints.validate import unet_architecture
from koala.checkpoints.words import Words, words_in
from koala.generation import prompt_dialects, samplers, validation
from koala.generation.control import Control
from koala.generation.form import Form, is_form
from koala.generation.image_prompt import ImagePrompt
from koala.lora.names import BaseModel, base_of

if TYPE_CHECKING:
    from koala.utils.arrays import Array

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
    guidance_rescale: float = 0.0  # arXiv 2305.08891, section 3.4; 0: none
    strength: float = 1.0  # share of the steps that is done, from an image
    image: str = ""  # fingerprint of the image that it starts from, if any
    mask: str = ""  # fingerprint of the mask, if any
    mask_blur: int = 0  # pixels over which the repainted part blends into the image
    mask_fill: str = "original"  # what the repainted part starts from
    embeddings: tuple[str, ...] = ()  # textual inversions that the prompts name
    enlarged: str = ""  # WIDTHxHEIGHT that the image was resized to once drawn, if it was
    pasted: str = ""  # WIDTHxHEIGHT+LEFT+TOP of the part of `enlarged` that was drawn, if not all
    control: str = ""  # name of a ControlNet, if any
    control_image: str = ""  # fingerprint of what it is shown
    control_scale: float = 1.0  # of what it adds
    ip_adapter: str = ""  # name of an IP-Adapter, if any
    ip_image: str = ""  # fingerprint of the image that is its prompt
    ip_scale: float = 1.0  # of what it adds


@dataclass(frozen=True)
class Paste:
    """The image that a mask keeps a part of, and how much of each pixel is repainted."""

    image: Image.Image  # RGB
    blend: Image.Image  # "L" of the same size: 0 keeps the pixel, 255 repaints it

    def __call__(self, drawn: Image.Image) -> Image.Image:
        """The drawn image with the kept pixels put back."""
        return Image.composite(drawn, self.image, self.blend)


@dataclass(frozen=True)
class Request:
    """One image to draw, checked and complete; `Pipeline.requests` makes them."""

    settings: Settings
    image: Array | None = None  # float32 [1, 3, 8h, 8w] in -1..1, padded
    mask: Array | None = None  # float32 [1, 1, h, w]: 1 is repainted, 0 is kept
    paste: Paste | None = None  # with a mask
    lora: Loras = ()  # for this image alone, besides the model's
    embeddings: tuple[Path, ...] = ()  # textual inversions, by the names of the files
    control: Control | None = None
    image_prompt: ImagePrompt | None = None

    @property
    def pixels(self) -> int:
        return self.settings.width * self.settings.height


@dataclass(frozen=True)
class Known:
    """The facts of a model that decide which images it can draw."""

    name: str
    native: int  # pixels of a side
    scheduler_config: Mapping[str, Any]
    base: BaseModel | None  # what a LoRA must fit; None: it takes none
    loras: tuple[tuple[str, float], ...] = ()  # names and scales of the model's own
    sampling: Sampling = USUAL  # that it is made for
    words: Words | None = None  # that it was taught, if they are few

    @classmethod
    def of(cls, model: str | Path) -> Known:
        """Of a bundled name, a folder, a Hub id or a single file. UserError if it is not found."""
        if is_form(model):
            form = Form.read(Path(model).expanduser())
            return cls.of_form(form, form.name, words_in(Path(model).expanduser()))
        folder = resolve_model(model)
        return cls(
            str(model), unet_architecture(folder).sample * FACTOR, load_scheduler_config(folder),
            base_of(folder), sampling=of_model(model, folder), words=words_in(folder),
        )  # fmt: skip

    @classmethod
    def of_form(cls, form: Form, name: str, words: Words | None) -> Known:
        """Of an OpenVINO form, under a name."""
        meant = of_named(name, form.scheduler)
        return cls(name, form.native, form.scheduler, base=None, sampling=meant, words=words)

    def notes(self, settings: Settings) -> list[str]:
        """A line for each of an image's settings that may not be what is meant.

        That is what the model was not made for, and what other programs do not read as words.
        """
        size = validation.size_note((settings.width, settings.height), self.native)
        texts = (settings.prompt, settings.negative_prompt)
        taught = settings.loras or settings.embeddings or settings.ip_adapter  # more than words
        found = (
            size,
            self.sampling.note(settings.steps, settings.guidance),
            None if taught or not self.words else self.words.note(settings.prompt, self.name),
            *(note for text in texts for note in prompt_dialects.notes(text)),
        )
        return [line for line in found if line]


def example(model: str, architecture: UNetArchitecture, meant: Sampling) -> Settings:
    """The settings of one image, drawn as a model is meant to be."""
    side = architecture.sample * FACTOR
    sampler, spacing = samplers.get(meant.scheduler)
    return Settings(
        "a red fox", "", meant.steps, meant.guidance, 0, side, side, model, koala.__version__,
        sampler=sampler.name, schedule=spacing,
    )  # fmt: skip
