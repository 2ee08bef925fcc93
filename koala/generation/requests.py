"""Requests: the settings of one image, and what else it is made from.

A PNG keeps the settings. They are complete: the same model makes the same image from them again.
`checked` validates a request without loading torch, so a mistake shows before a model is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image

import koala
from koala.architectures.table import FACTOR, UNetArchitecture
from koala.checkpoints.load import load_scheduler_config
from koala.checkpoints.resolve import resolve_model
from koala.checkpoints.sampling import Sampling
from koala.checkpoints.tensors import read_header
from koala.checkpoints.textual_inversion import read_embedding
from koala.checkpoints.validate import unet_architecture
from koala.errors import UserError
from koala.generation import samplers, validation
from koala.generation.form import Form, is_form
from koala.generation.image_files import Mask, fingerprint, open_image, read_mask
from koala.generation.prompt_editing import by_step
from koala.generation.prompt_embeddings import named_embeddings
from koala.generation.prompt_loras import refuse_loras, split_loras
from koala.generation.prompt_syntax import parse
from koala.lora.names import BaseModel, base_of
from koala.lora.reading import read

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

    @classmethod
    def of(cls, model: str | Path) -> Known:
        """Of a bundled name, a folder, a Hub id or a single file. UserError if it is not found."""
        if is_form(model):
            form = Form.read(Path(model).expanduser())
            return cls(form.name, form.native, form.scheduler, None)
        folder = resolve_model(model)
        native = unet_architecture(folder).sample * FACTOR
        return cls(str(model), native, load_scheduler_config(folder), base_of(folder))


@dataclass(frozen=True)
class Checked:
    """A request of one or more images that a model can draw."""

    settings: list[Settings]  # of each image
    image: Image.Image | None  # that they start from, upright
    mask: Mask | None
    loras: list[Loras]  # for each image alone
    embeddings: tuple[Path, ...]  # textual inversions that the prompts name


def example(model: str, architecture: UNetArchitecture, meant: Sampling) -> Settings:
    """The settings of one image, drawn as a model is meant to be."""
    side = architecture.sample * FACTOR
    sampler, spacing = samplers.get(meant.scheduler)
    return Settings(
        "a red fox", "", meant.steps, meant.guidance, 0, side, side, model, koala.__version__,
        sampler=sampler.name, schedule=spacing,
    )  # fmt: skip


def checked(
    model: str | Path | Known,
    prompt: str | list[str],
    *,
    negative_prompt: str = "",
    steps: int = 10,
    guidance: float = 3.5,
    guidance_until: float = 1.0,
    guidance_rescale: float = 0.0,
    scheduler: str = "euler",
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
) -> Checked:
    """Validates the arguments of `Pipeline.requests`. UserError for a value that is not allowed.

    model: its facts, or its name, which is resolved after everything else was checked.
    """
    prompts = validation.prompts(prompt)
    validation.numbers(steps=steps, guidance=guidance, number=number)
    validation.negative_prompt(negative_prompt, guidance)
    refuse_loras(negative_prompt)
    split = [split_loras(text, lora_dir) for text in prompts]
    prompts = validation.prompts([text for text, _ in split])
    sampler, spacing = samplers.get(scheduler)
    until = validation.guidance_until(guidance_until, guidance)
    rescale = validation.guidance_rescale(guidance_rescale, guidance)
    share = validation.strength(strength, image is not None, mask is not None)
    done = validation.steps_done(steps, share)
    for text in (*prompts, negative_prompt):
        for variant in set(by_step(text, done)):
            parse(variant)  # refuses weights out of their range
    first_seed = validation.seed(seed, len(prompts) * number)
    given, masked = (None if it is None else open_image(it) for it in (image, mask))
    asked_size = given.size if given is not None and size is None else size
    drawn_size = None
    if asked_size is not None:  # what starts from an image is padded, and cut back
        drawn_size = validation.size(asked_size, FACTOR if given is None else 1)
    blur = validation.mask_blur(mask_blur, masked is not None)
    fill = validation.mask_fill(mask_fill, masked is not None, share)
    own = tuple((Path(f).expanduser(), validation.lora_scale(s)) for f, s in (lora or {}).items())
    embeddings = named_embeddings([*prompts, negative_prompt], embedding, embedding_dir)
    loras = [(*own, *files.items()) for _, files in split]  # of each prompt
    named = {path for files in loras for path, _ in files}
    for path in (*named, *embeddings):
        read_header(path)  # refuses a file that is missing or damaged before a model is fetched

    known = model if isinstance(model, Known) else Known.of(model)
    validation.schedule(known.scheduler_config, spacing, steps)
    names = [(*known.loras, *((path.stem, scale) for path, scale in files)) for files in loras]
    for of_prompt in names:
        for name, count in Counter(name for name, _ in of_prompt).items():
            if count > 1:
                raise UserError(f"two LoRAs are called {name!r}: name each once")
    for path in named:
        if known.base is None:
            raise UserError(
                f"{known.name} runs without PyTorch, which the LoRA {path} needs: leave it out, or "
                "name the model that this was made of"
            )
        read(path, known.base)
    if known.base is not None:  # a form takes none, which `Drawing.requests` says
        first_text, second_text = known.base.text_encoders
        for path in embeddings:
            read_embedding(path, (first_text.width, second_text.width))
    width, height = drawn_size or (known.native, known.native)
    area = None
    if given is not None and masked is not None:
        area = read_mask(masked, given.size, (width, height), FACTOR, blur)
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
        schedule=spacing,
        loras=names[0],
        guidance_until=until,
        guidance_rescale=rescale,
        strength=share,
        image="" if given is None else fingerprint(given),
        mask="" if masked is None else fingerprint(masked),
        mask_blur=blur,
        mask_fill=fill,
        embeddings=tuple(path.stem for path in embeddings),
    )
    of = [i // number for i in range(len(prompts) * number)]  # the prompt of each image
    every = [
        replace(first, prompt=prompts[n], loras=names[n], seed=first.seed + i)
        for i, n in enumerate(of)
    ]
    return Checked(every, given, area, [loras[n] for n in of], embeddings)
