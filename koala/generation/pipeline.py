"""From a model's name and a prompt to pictures and a record of how each was made.

`load("koala-mini")("a red fox, noto style", number=4, seed=7)` draws four.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

import koala
from koala.conditioning import TextConditioner, time_ids
from koala.device import pick_device
from koala.errors import UserError
from koala.formats import (
    load_scheduler_config,
    load_unet,
    load_vae,
    read_json,
    resolve_model,
)
from koala.generation import checks
from koala.generation.decode import decode, to_pictures
from koala.generation.denoise import Condition, denoise, initial_noise
from koala.generation.schedule import Schedule, trailing
from koala.lora.adapters import Attached, Merged, merge, modules_of
from koala.lora.names import Base
from koala.lora.reading import Report, read

PIXELS_AT_ONCE = 512 * 512  # bounds memory: more pictures than this holds are drawn in turns


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


@dataclass(frozen=True)
class Result:
    """Pictures, the settings of each, and a warning for each prompt that was read in part."""

    images: list[Image.Image]
    settings: list[Settings]
    dropped: list[str] = field(default_factory=list)


@dataclass
class Pipeline:
    """A loaded model, made by `load`; `dataclasses.replace(pipeline, unet=...)` swaps its U-Net."""

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    conditioner: TextConditioner
    scheduler_config: dict[str, Any]
    zeros_for_empty: bool = True  # no negative prompt means zeros, not the embedding of ""
    loras: dict[str, Attached | Merged] = field(default_factory=dict, init=False)  # by name

    @property
    def factor(self) -> int:
        """Pixels a latent's side stands for: 8 in SDXL."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        negative_prompt: str = "",
        steps: int = 10,
        guidance: float = 3.5,
        size: tuple[int, int] | str | None = None,
        number: int = 1,
        seed: int | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Draws `number` pictures of each prompt, in the order of the prompts.

        Picture i of the result has seed `seed` + i; without a seed a random one is taken and
        recorded. `size` is (width, height) in pixels, "WIDTHxHEIGHT", or the model's native
        size. `guidance` of at most 1 leaves the unconditional pass out. `on_step(done, total)`
        is called after each step, for progress. UserError for a value that is not allowed.
        """
        prompts = checks.prompts(prompt)
        checks.numbers(steps=steps, guidance=guidance, number=number)
        checks.negative_prompt(negative_prompt, guidance)
        width, height = checks.size(size, self.unet.config.sample_size * self.factor, self.factor)
        first_seed = checks.seed(seed, len(prompts) * number)
        schedule = trailing(self.scheduler_config, steps)
        scales = tuple((name, lora.scale) for name, lora in self.loras.items())
        settings = [
            Settings(
                prompt=prompts[i // number],
                negative_prompt=negative_prompt,
                steps=steps,
                guidance=float(guidance),
                seed=first_seed + i,
                width=width,
                height=height,
                model=self.name,
                version=koala.__version__,
                loras=scales,
            )
            for i in range(len(prompts) * number)
        ]
        at_once = max(1, PIXELS_AT_ONCE // (width * height))
        chunks = [settings[i : i + at_once] for i in range(0, len(settings), at_once)]
        report = _Progress(on_step, steps * len(chunks))
        images = [image for chunk in chunks for image in self._draw(chunk, schedule, report.step)]
        return Result(images, settings, self._dropped([*prompts, negative_prompt]))

    def add_lora(self, file: str | Path, scale: float = 1.0, merged: bool = False) -> Report:
        """Puts a LoRA on the U-Net and the text encoders, called by its file's name.

        One made for the model's teacher is carried over; the report says what had no place. It
        stays beside the weights, or with `merged` is added to them once and for all, which costs
        nothing a step. UserError for a file that is no LoRA for this model.
        """
        path = Path(file).expanduser()
        if path.stem in self.loras:
            raise UserError(f"a LoRA called {path.stem!r} is on the model already; rename one")
        scale = checks.lora_scale(scale)
        encoders = self.conditioner.encoders
        configs = (model.config.to_dict() for model in encoders)
        lora = read(path, Base.from_configs(self.unet.config, *configs))
        modules = modules_of(self.unet, *encoders)
        put_on = merge if merged else Attached
        self.loras[path.stem] = put_on(modules, lora, scale)
        self.conditioner.forget()
        return lora.report

    def scale_lora(self, name: str, scale: float) -> None:
        """Sets the scale of a LoRA that is not merged."""
        self._attached(name).scale = checks.lora_scale(scale)
        self.conditioner.forget()

    def remove_lora(self, name: str) -> None:
        """Takes off a LoRA that is not merged; the weights are as they were."""
        self._attached(name).remove()
        del self.loras[name]
        self.conditioner.forget()

    def _attached(self, name: str) -> Attached:
        found = self.loras.get(name)
        if not isinstance(found, Attached):
            state = "merged into the weights for good" if found else "not on the model"
            raise UserError(
                f"LoRA {name!r} is {state}; on it are: {', '.join(self.loras) or 'none'}"
            )
        return found

    def _draw(
        self, chunk: list[Settings], schedule: Schedule, on_step: Callable[[], None]
    ) -> list[Image.Image]:
        """Pictures of one chunk: their size, steps and guidance are the same."""
        one = chunk[0]
        noise = initial_noise(
            [settings.seed for settings in chunk],
            self.unet.config.in_channels,
            one.height // self.factor,
            one.width // self.factor,
        )
        condition = self._condition([settings.prompt for settings in chunk], one)
        unconditional = None
        if one.guidance > 1:
            unconditional = self._condition([one.negative_prompt] * len(chunk), one)
        latents = denoise(
            self.unet, noise, condition, unconditional, schedule, one.guidance, on_step
        )
        return to_pictures(decode(self.vae, latents))

    def _condition(self, prompts: list[str], one: Settings) -> Condition:
        """The prompts (all empty, or none) and the size, as the U-Net takes them."""
        n = len(prompts)
        empty = not prompts[0]
        text, pooled = (
            self.conditioner.zeros(n)
            if empty and self.zeros_for_empty
            else self.conditioner(prompts)
        )
        pair = (one.height, one.width)
        return Condition(text, pooled, time_ids([pair] * n, [(0, 0)] * n, [pair] * n))

    def _dropped(self, prompts: list[str]) -> list[str]:
        """A line for each prompt, once, whose end the text encoders do not read."""
        found = {prompt: self.conditioner.dropped_words(prompt) for prompt in prompts}
        return [
            f"the text encoders read {self.conditioner.tokens} tokens; not read: {words!r}"
            for words in found.values()
            if words is not None
        ]


def load(
    model: str | Path = "koala-mini",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    lora: Mapping[str | Path, float] | None = None,
) -> Pipeline:
    """Loads a model: a bundled name, a pipeline folder, or a Hub id.

    By default on the GPU in float16 where there is one, otherwise on the CPU in float32.
    The VAE is float32 on the CPU and wherever its config asks for it (`force_upcast`).
    `lora`: files of LoRAs and their scales; `Pipeline.add_lora` says what each becomes.
    UserError for a model that cannot be had or read, or a device that is not there.
    """
    folder = resolve_model(model)
    place = pick_device(device)
    if dtype is None:
        dtype = torch.float32 if place.type == "cpu" else torch.float16
    vae = load_vae(folder, torch.float32)
    if place.type != "cpu" and not vae.config.force_upcast:
        vae = vae.to(dtype)
    unet = load_unet(folder, dtype).to(place, memory_format=torch.channels_last)
    index = read_json(folder / "model_index.json")
    pipeline = Pipeline(
        name=Path(model).resolve().name if Path(model).exists() else str(model),
        unet=unet.eval(),
        vae=vae.to(place).eval(),
        conditioner=TextConditioner.from_folder(folder, dtype, place),
        scheduler_config=load_scheduler_config(folder),
        zeros_for_empty=index.get("force_zeros_for_empty_prompt", True),
    )
    for file, scale in (lora or {}).items():
        pipeline.add_lora(file, scale)
    return pipeline


class _Progress:
    """Counts steps over all chunks."""

    def __init__(self, on_step: Callable[[int, int], None] | None, total: int) -> None:
        self.on_step, self.done, self.total = on_step, 0, total

    def step(self) -> None:
        self.done += 1
        if self.on_step is not None:
            self.on_step(self.done, self.total)
