"""What a person asks for, checked without loading torch: a mistake shows before a model is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

import koala
from koala.architectures.table import FACTOR
from koala.checkpoints.controlnet import open_controlnet
from koala.checkpoints.ip_adapter import open_image_encoder, open_ip_adapter
from koala.checkpoints.sampling import USUAL, Sampling
from koala.checkpoints.tensors import read_header
from koala.checkpoints.textual_inversion import embedding_header, read_embedding
from koala.errors import UserError
from koala.generation import samplers, validation
from koala.generation.control import ControlNet, check_scale, check_shape, fitted
from koala.generation.image_files import Mask, fingerprint, open_image, read_mask
from koala.generation.image_prompt import IPAdapter, check_ip_scale, fitted_adapter
from koala.generation.prompt_editing import by_step
from koala.generation.prompt_embeddings import named_embeddings
from koala.generation.prompt_loras import refuse_loras, split_loras
from koala.generation.prompt_syntax import parse
from koala.generation.requests import Known, Loras, Settings
from koala.lora.folder import check_file
from koala.lora.names import BaseModel
from koala.lora.reading import LoraReport, read


@dataclass(frozen=True)
class CheckedControl:
    """A ControlNet that the model can draw with."""

    net: ControlNet
    image: Image.Image  # upright, of any size


@dataclass(frozen=True)
class CheckedImagePrompt:
    """An image for a prompt, and an IP-Adapter that the model can draw with."""

    adapter: IPAdapter
    image: Image.Image  # upright, of any size


@dataclass(frozen=True)
class Checked:
    """A request of one or more images that a model can draw."""

    settings: list[Settings]  # of each image
    image: Image.Image | None  # that they start from, upright
    mask: Mask | None
    loras: list[Loras]  # for each image alone
    fits: dict[Path, LoraReport]  # how much of each of these LoRAs the model takes
    embeddings: tuple[Path, ...]  # textual inversions that the prompts name
    control: CheckedControl | None
    image_prompt: CheckedImagePrompt | None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked for besides the prompts, as in `Drawing.requests`; None: the model's own."""

    negative_prompt: str = ""
    steps: int | None = None
    guidance: float | None = None
    guidance_until: float = 1.0
    guidance_rescale: float = 0.0
    scheduler: str | None = None
    size: tuple[int, int] | str | None = None
    number: int = 1
    seed: int | None = None
    image: str | Path | Image.Image | None = None
    strength: float | None = None
    mask: str | Path | Image.Image | None = None
    mask_blur: int | None = None
    mask_fill: str | None = None
    lora: Mapping[str | Path, float] | None = None
    lora_dir: Path | None = None
    embedding: Sequence[str | Path] = ()
    embedding_dir: Path | None = None
    control: str | Path | None = None
    control_image: str | Path | Image.Image | None = None
    control_scale: float | None = None
    ip_adapter: str | Path | None = None
    ip_image: str | Path | Image.Image | None = None
    ip_scale: float | None = None
    image_encoder: str | Path | None = None


@dataclass(frozen=True)
class _Inputs:
    """What is asked for, as far as it needs no model: checked, and read from its files."""

    prompts: list[str]
    seed: int  # of the first image
    image: Image.Image | None
    mask: Image.Image | None
    size: tuple[int, int] | None  # pixels
    mask_blur: int
    loras: list[Loras]  # of each prompt
    embeddings: tuple[Path, ...]
    control_image: Image.Image | None
    control_scale: float
    ip_image: Image.Image | None
    ip_scale: float

    @classmethod
    def of(cls, prompt: str | list[str], asked: Asked) -> _Inputs:
        prompts = validation.prompts(prompt)
        validation.number(asked.number)
        refuse_loras(asked.negative_prompt)
        split = [split_loras(text, asked.lora_dir) for text in prompts]
        prompts = validation.prompts([text for text, _ in split])
        seed = validation.seed(asked.seed, len(prompts) * asked.number)
        given, masked = (None if it is None else open_image(it) for it in (asked.image, asked.mask))
        size = given.size if given is not None and asked.size is None else asked.size
        if size is not None:  # what starts from an image is padded, and cut back
            size = validation.size(size, FACTOR if given is None else 1)
        blur = validation.mask_blur(asked.mask_blur, masked is not None)
        own = (asked.lora or {}).items()
        shared = tuple((Path(f).expanduser(), validation.lora_scale(s)) for f, s in own)
        texts = [*prompts, asked.negative_prompt]
        embeddings = named_embeddings(texts, asked.embedding, asked.embedding_dir)
        loras: list[Loras] = [(*shared, *files.items()) for _, files in split]
        for path in _files(loras):  # refuses a file that is missing or damaged
            check_file(path)
            read_header(path)
        for path in embeddings:
            embedding_header(path)
        strong = check_scale(
            asked.control is not None, asked.control_image is not None, asked.control_scale
        )
        shown = None
        if asked.control is not None and asked.control_image is not None:
            shown = open_image(asked.control_image)
            open_controlnet(asked.control)
        ip_scale = check_ip_scale(
            asked.ip_adapter is not None, asked.ip_image is not None,
            asked.image_encoder is not None, asked.ip_scale,
        )  # fmt: skip
        ip_image = None
        if asked.ip_adapter is not None and asked.ip_image is not None:
            ip_image = open_image(asked.ip_image)
            open_ip_adapter(asked.ip_adapter)
            if asked.image_encoder is not None:
                open_image_encoder(asked.image_encoder)
        return cls(
            prompts, seed, given, masked, size, blur, loras, embeddings, shown, strong,
            ip_image, ip_scale,
        )  # fmt: skip


@dataclass(frozen=True)
class _Sampled:
    """How the images are sampled."""

    steps: int
    guidance: float
    until: float
    rescale: float
    strength: float
    sampler: type[samplers.Sampler]
    spacing: str  # of the noise levels
    mask_fill: str

    @classmethod
    def of(cls, texts: Sequence[str], asked: Asked, meant: Sampling | None) -> _Sampled:
        """meant: the model's own; None where it is not known yet."""
        own = meant or USUAL
        steps = own.steps if asked.steps is None else asked.steps
        guidance = own.guidance if asked.guidance is None else asked.guidance
        validation.numbers(steps, guidance)
        validation.negative_prompt(asked.negative_prompt, guidance, own.guided)
        until = validation.guidance_until(asked.guidance_until, guidance)
        rescale = validation.guidance_rescale(asked.guidance_rescale, guidance)
        named = own.scheduler if asked.scheduler is None else asked.scheduler
        sampler, spacing = samplers.get(named)
        masked = asked.mask is not None
        share = validation.strength(asked.strength, asked.image is not None, masked)
        fill = validation.mask_fill(asked.mask_fill, masked, share)
        known = meant is not None or asked.steps is not None
        done = validation.steps_done(steps, share) if known else steps
        for text in (*texts, asked.negative_prompt):
            for variant in set(by_step(text, done)):
                parse(variant)  # refuses weights out of their range
        return cls(steps, float(guidance), until, rescale, share, sampler, spacing, fill)


def check_values(prompt: str | list[str], **asked: Any) -> None:
    """Checks all of a request that needs no model. Arguments and errors as of `checked`."""
    _without_model(prompt, Asked(**asked))


def checked(model: str | Path | Known, prompt: str | list[str], **asked: Any) -> Checked:
    """Validates the arguments of `Pipeline.requests`. UserError for a value that is not allowed.

    model: its facts, or its name, which is resolved after everything else was checked. asked: the
    fields of `Asked`.
    """
    values = Asked(**asked)
    if isinstance(model, Known):
        known, inputs = model, _Inputs.of(prompt, values)
    else:
        inputs = _without_model(prompt, values)
        known = Known.of(model)
    sampled = _Sampled.of(inputs.prompts, values, known.sampling)
    validation.schedule(known.scheduler_config, sampled.spacing, sampled.steps)
    names, fits = _check_loras(known, inputs)
    width, height = inputs.size or (known.native, known.native)
    control = _check_control(known, values.control, inputs.control_image, (width, height))
    image_prompt = _check_image_prompt(known, values, inputs.ip_image)
    area = None
    if inputs.image is not None and inputs.mask is not None:
        size = inputs.image.size
        area = read_mask(inputs.mask, size, (width, height), FACTOR, inputs.mask_blur)
    first = Settings(
        prompt=inputs.prompts[0],
        negative_prompt=values.negative_prompt,
        steps=sampled.steps,
        guidance=sampled.guidance,
        seed=inputs.seed,
        width=width,
        height=height,
        model=known.name,
        version=koala.__version__,
        sampler=sampled.sampler.name,
        schedule=sampled.spacing,
        guidance_until=sampled.until,
        guidance_rescale=sampled.rescale,
        strength=sampled.strength,
        image="" if inputs.image is None else fingerprint(inputs.image),
        mask="" if inputs.mask is None else fingerprint(inputs.mask),
        mask_blur=inputs.mask_blur,
        mask_fill=sampled.mask_fill,
        embeddings=tuple(path.stem for path in inputs.embeddings),
        control="" if control is None else control.net.files.name,
        control_image="" if control is None else fingerprint(control.image),
        control_scale=inputs.control_scale,
        ip_adapter="" if image_prompt is None else image_prompt.adapter.file.name,
        ip_image="" if image_prompt is None else fingerprint(image_prompt.image),
        ip_scale=inputs.ip_scale,
    )
    # The prompt of each image.
    of = [i // values.number for i in range(len(inputs.prompts) * values.number)]
    every = [
        replace(first, prompt=inputs.prompts[n], loras=names[n], seed=first.seed + i)
        for i, n in enumerate(of)
    ]
    loras = [inputs.loras[n] for n in of]
    return Checked(every, inputs.image, area, loras, fits, inputs.embeddings, control, image_prompt)


def _without_model(prompt: str | list[str], asked: Asked) -> _Inputs:
    inputs = _Inputs.of(prompt, asked)
    _Sampled.of(inputs.prompts, asked, None)
    return inputs


def _base(known: Known, what: str) -> BaseModel:
    """The model as `what` must fit it. UserError where it runs without PyTorch."""
    if known.base is None:
        raise UserError(
            f"{known.name} runs without PyTorch, which {what} needs: leave it out, or name the "
            "model that this was made of"
        )
    return known.base


def _check_control(
    known: Known, name: str | Path | None, image: Image.Image | None, size: tuple[int, int]
) -> CheckedControl | None:
    """UserError for a ControlNet that the model cannot take, or an image of another shape."""
    if name is None or image is None:
        return None
    base = _base(known, f"the ControlNet {name}")
    check_shape(image.size, size)
    return CheckedControl(fitted(name, known.name, base.unet), image)


def _check_image_prompt(
    known: Known, asked: Asked, image: Image.Image | None
) -> CheckedImagePrompt | None:
    """UserError for an IP-Adapter that the model cannot take."""
    if asked.ip_adapter is None or image is None:
        return None
    base = _base(known, f"the IP-Adapter {asked.ip_adapter}")
    adapter = fitted_adapter(asked.ip_adapter, asked.image_encoder, known.name, base.unet)
    return CheckedImagePrompt(adapter, image)


def _files(loras: Sequence[Loras]) -> dict[Path, None]:
    """Each file once, as they come."""
    return {path: None for files in loras for path, _ in files}


def _check_loras(
    known: Known, inputs: _Inputs
) -> tuple[list[tuple[tuple[str, float], ...]], dict[Path, LoraReport]]:
    """Names and scales of each prompt's LoRAs, and how each file fits.

    UserError for those that the model cannot take.
    """
    names = [
        (*known.loras, *((path.stem, scale) for path, scale in files)) for files in inputs.loras
    ]
    for of_prompt in names:
        for name, count in Counter(name for name, _ in of_prompt).items():
            if count > 1:
                raise UserError(f"two LoRAs are called {name!r}: name each once")
    fits = {
        path: read(path, _base(known, f"the LoRA {path}")).report for path in _files(inputs.loras)
    }
    if known.base is not None:  # a form takes none, which `Drawing.requests` says
        first_text, second_text = known.base.text_encoders
        for path in inputs.embeddings:
            read_embedding(path, (first_text.width, second_text.width))
    return names, fits
