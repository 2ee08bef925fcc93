"""From a model's name and a prompt to pictures and a record of how each was made.

`load("koala-mini")("a red fox, noto style", number=4, seed=7)` draws four.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

import koala
from koala.checkpoints.load import load_scheduler_config, load_unet, load_vae
from koala.checkpoints.resolve import resolve_model
from koala.checkpoints.validate import read_json
from koala.errors import UserError
from koala.generation import image_inputs, samplers, validation
from koala.generation.decode import Decode, full, to_pictures
from koala.generation.denoise import Condition, Kept, Predict, Row, predictor
from koala.generation.engine import Engine, Progress
from koala.generation.prompts import Encoded, encode, padded, parse
from koala.generation.requests import Loras, Request, Settings
from koala.generation.schedule import SPACINGS, Schedule
from koala.lora.adapters import Attached, Merged, Modules, merge, modules_of
from koala.lora.names import BaseModel
from koala.lora.reading import Lora, LoraReport, read
from koala.lora.switching import LoraSwitcher
from koala.text_conditioning import TextConditioner, time_ids
from koala.utils.device import pick_device

MEMO = 64  # chunks of prompts whose embeddings are remembered


@dataclass(frozen=True)
class Result:
    """Pictures and the settings of each."""

    images: list[Image.Image]
    settings: list[Settings]


@dataclass
class Pipeline:
    """A loaded model, made by `load`; `dataclasses.replace(pipeline, unet=...)` swaps its U-Net.

    What runs the U-Net and the VAE, and where, can be set: `predict`, `encode`, `decode` and
    `device`.
    A pipeline that `replace` makes has plain ones again, and no record of LoRAs.
    """

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    conditioner: TextConditioner
    scheduler_config: dict[str, Any]
    zeros_for_empty: bool = True  # no negative prompt means zeros, not the embedding of ""
    loras: dict[str, Attached | Merged] = field(default_factory=dict, init=False)  # by name
    predict: Predict = field(init=False)
    encode: Callable[[Tensor], Tensor] = field(init=False)  # pictures to latents
    decode: Decode = field(init=False)
    device: torch.device = field(init=False)  # where latents are between steps
    _previewer: image_inputs.Previewer | None = field(default=None, init=False)
    _lora_switcher: LoraSwitcher = field(init=False, repr=False)
    _plain: Predict = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._plain = self.predict = predictor(self.unet)
        self._lora_switcher = LoraSwitcher(self._modules, self._read_lora)
        self.encode = partial(image_inputs.encode_picture, self.vae)
        self.decode = full(self.vae)
        self.device = self.unet.device

    @property
    def factor(self) -> int:
        """Pixels a latent's side stands for: 8 in SDXL."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def __call__(
        self,
        prompt: str | list[str],
        *,
        strict: bool = False,
        on_step: Callable[[int, int], None] | None = None,
        **asked: Any,
    ) -> Result:
        """Draws `number` pictures of each prompt, in the order of the prompts.

        All that `requests` takes can be said. `strict` makes every picture bit for bit what it
        is when it is drawn alone. `on_step(done, total)` is called after each step of each
        picture. UserError for a value that is not allowed.
        """
        return self.draw(self.requests(prompt, **asked), strict, on_step)

    def draw(
        self,
        requests: Sequence[Request],
        strict: bool = False,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Result:
        """The pictures of requests, in their order, drawn together as far as they can be."""
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
        """How many steps the requests take, each picture's counted."""
        return sum(len(self._schedule(request.settings)) for request in requests)

    def requests(
        self,
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
    ) -> list[Request]:
        """One request a picture, checked: `number` of each prompt, in the order of the prompts.

        Picture i has seed `seed` + i; without a seed a random one is taken and recorded. `size`
        is (width, height) in pixels, "WIDTHxHEIGHT", or by default that of `image`, or the
        model's native one. Prompts may be of any length, with weights (`koala.generation.prompts`).
        `guidance` of at most 1 leaves the unconditional pass out, and `guidance_until` leaves it
        out after that share of the steps. `scheduler` is one of `samplers.SAMPLERS`.

        From an `image` (a file or a picture) only the last `strength` of the steps is done, by
        default 0.6; with a `mask` of its size only what is light in it is painted anew.
        `lora` names files and scales for these pictures alone, besides those on the model.
        UserError for a value that is not allowed.
        """
        prompts = validation.prompts(prompt)
        validation.numbers(steps=steps, guidance=guidance, number=number)
        validation.negative_prompt(negative_prompt, guidance)
        for text in (*prompts, negative_prompt):
            parse(text)  # refuses weights out of their range
        sampler = samplers.get(scheduler)
        given, masked = (
            None if it is None else image_inputs.open_picture(it) for it in (image, mask)
        )
        native = self.unet.config.sample_size * self.factor
        asked_size = given.size if given is not None and size is None else size
        width, height = validation.size(asked_size, native, self.factor)
        own = self._own_loras(lora or {})
        first = Settings(
            prompt=prompts[0],
            negative_prompt=negative_prompt,
            steps=steps,
            guidance=float(guidance),
            seed=validation.seed(seed, len(prompts) * number),
            width=width,
            height=height,
            model=self.name,
            version=koala.__version__,
            sampler=sampler.name,
            schedule=sampler.spacing,
            loras=(
                *((name, standing.scale) for name, standing in self.loras.items()),
                *((path.stem, scale) for path, scale in own),
            ),
            guidance_until=validation.guidance_until(guidance_until, guidance),
            strength=validation.strength(strength, given is not None, masked is not None),
            image="" if given is None else image_inputs.fingerprint(given),
            mask="" if masked is None else image_inputs.fingerprint(masked),
        )
        self._schedule(first)  # refuses a number of steps that the model or the strength rules out
        pixels = places = None
        if given is not None:
            pixels = image_inputs.to_pixels(given, (width, height))
            if masked is not None:
                places = image_inputs.to_mask(masked, given.size, (width, height), self.factor)
        every = (
            replace(first, prompt=prompts[i // number], seed=first.seed + i)
            for i in range(len(prompts) * number)
        )
        return [Request(settings, pixels, places, own) for settings in every]

    # --- what the engine asks for -----------------------------------------------------------

    def wear(self, lora: Loras) -> None:
        """Puts on the LoRAs of one request's own, in the place of those worn until now."""
        if self._lora_switcher.switch(lora):
            self.conditioner.clear_cache()

    @torch.inference_mode()
    def begin(self, request: Request) -> Row:
        """The row of a request before its first step."""
        asked = request.settings
        schedule = self._schedule(asked)
        h, w = asked.height // self.factor, asked.width // self.factor
        noise = samplers.Noise(asked.seed, (1, self.unet.config.in_channels, h, w), self.device)
        sampler = samplers.BY_NAME[asked.sampler](schedule, noise)
        first = noise.draw()
        x, kept = sampler.start(first), None
        if request.image is not None:
            latents = self.encode(request.image).to(self.device)
            # As in diffusers: with a mask and full strength, nothing but noise is painted over.
            if request.mask is None or asked.strength < 1:
                x = latents + sampler.sigmas[0] * first
            if request.mask is not None:
                kept = Kept(latents, request.mask.to(self.device), first)
        condition, unconditional = self._conditions(asked)
        guided = math.ceil(asked.guidance_until * len(schedule))
        return Row(sampler, x, condition, unconditional, asked.guidance, guided, kept)

    @torch.inference_mode()
    def finish(self, rows: Sequence[Row]) -> list[Image.Image]:
        """The pictures of rows of one shape that have taken their last step."""
        return to_pictures(self.decode(torch.cat([row.x for row in rows])))

    @torch.inference_mode()
    def preview(self, row: Row) -> Image.Image:
        """What a row's last step saw, roughly: RGB, a pixel for each place of its latent."""
        if self._previewer is None:
            self._previewer = image_inputs.Previewer(self.decode, self.unet.config.in_channels)
        return self._previewer(row.x if row.denoised is None else row.denoised)

    def _schedule(self, asked: Settings) -> Schedule:
        return SPACINGS[asked.schedule](self.scheduler_config, asked.steps).last(asked.strength)

    def _conditions(self, asked: Settings) -> tuple[Condition, Condition | None]:
        """What the U-Net is told with and, where there is guidance, without the prompt."""
        prompt = encode(self.conditioner, asked.prompt)
        if asked.guidance <= 1:
            return self._condition(prompt, asked), None
        if not asked.negative_prompt and self.zeros_for_empty:
            negative = Encoded(torch.zeros_like(prompt.text), torch.zeros_like(prompt.pooled))
        else:
            negative = encode(self.conditioner, asked.negative_prompt)
            longest = max(one.text.shape[1] for one in (prompt, negative))
            prompt = padded(self.conditioner, prompt, longest)
            negative = padded(self.conditioner, negative, longest)
        return self._condition(prompt, asked), self._condition(negative, asked)

    def _condition(self, encoded: Encoded, asked: Settings) -> Condition:
        pair = (asked.height, asked.width)
        parts = (encoded.text, encoded.pooled, time_ids([pair], [(0, 0)], [pair]))
        return Condition(*(part.to(self.device) for part in parts))

    # --- LoRAs ------------------------------------------------------------------------------

    def add_lora(self, file: str | Path, scale: float = 1.0, merged: bool = False) -> LoraReport:
        """Puts a LoRA on the U-Net and the text encoders, called by its file's name.

        One made for the model's teacher is carried over; the report says what had no place. It
        stays beside the weights, or with `merged` is added to them once and for all, which costs
        nothing a step. UserError for a file that is no LoRA for this model.
        """
        path = Path(file).expanduser()
        if path.stem in self.loras:
            raise UserError(f"a LoRA called {path.stem!r} is on the model already; rename one")
        scale = validation.lora_scale(scale)
        lora = self._read_lora(path)
        put_on = merge if merged else Attached
        self.loras[path.stem] = put_on(self._modules(), lora, scale)
        self.conditioner.clear_cache()
        return lora.report

    def scale_lora(self, name: str, scale: float) -> None:
        """Sets the scale of a LoRA that is not merged."""
        self._attached(name).scale = validation.lora_scale(scale)
        self.conditioner.clear_cache()

    def remove_lora(self, name: str) -> None:
        """Takes off a LoRA that is not merged; the weights are as they were."""
        self._attached(name).remove()
        del self.loras[name]
        self.conditioner.clear_cache()

    def _own_loras(self, asked: Mapping[str | Path, float]) -> Loras:
        """The LoRAs of one request, checked as far as their files' headers go."""
        if asked and self.predict is not self._plain:
            raise UserError(
                "a LoRA for single requests needs PyTorch's plain way of running the model: leave "
                "it out, or load the model without compiling, graphs, a plan or another back end"
            )
        found = tuple((Path(file), validation.lora_scale(scale)) for file, scale in asked.items())
        stems = [*self.loras, *(path.stem for path, _ in found)]
        for path, _ in found:
            if stems.count(path.stem) > 1:
                raise UserError(f"two LoRAs are called {path.stem!r}: name each once")
            self._read_lora(path)
        return found

    def _read_lora(self, path: Path) -> Lora:
        configs = (model.config.to_dict() for model in self.conditioner.encoders)
        return read(path, BaseModel.from_configs(self.unet.config, *configs))

    def _modules(self) -> Modules:
        return modules_of(self.unet, *self.conditioner.encoders)

    def _attached(self, name: str) -> Attached:
        found = self.loras.get(name)
        if not isinstance(found, Attached):
            state = "merged into the weights for good" if found else "not on the model"
            raise UserError(
                f"LoRA {name!r} is {state}; on it are: {', '.join(self.loras) or 'none'}"
            )
        return found


def load(
    model: str | Path = "koala-mini",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    lora: Mapping[str | Path, float] | None = None,
    settle: Callable[[str, Sequence[nn.Module]], None] | None = None,
) -> Pipeline:
    """Loads a model: a bundled name, a pipeline folder, or a Hub id.

    By default on the GPU in float16 where there is one, otherwise on the CPU in float32.
    The VAE is float32 on the CPU and wherever its config asks for it (`force_upcast`).
    `lora`: files of LoRAs and their scales; `Pipeline.add_lora` says what each becomes.
    `settle`: given each part's models as soon as they are read, onto the CPU, to put them where
    they belong (`koala.generation.memory.placement`); by default all go to the device.
    UserError for a model that cannot be had or read, or a device that is not there.
    """
    folder = resolve_model(model)
    place = pick_device(device)
    if dtype is None:
        dtype = torch.float32 if place.type == "cpu" else torch.float16

    def onto_device(_: str, models: Sequence[nn.Module]) -> None:
        for each in models:
            each.to(place)

    settle = settle or onto_device
    conditioner = TextConditioner.from_folder(folder, dtype, cache_size=MEMO)
    settle("text encoders", conditioner.encoders)
    unet = load_unet(folder, dtype).to(memory_format=torch.channels_last)
    settle("U-Net", [unet])
    vae = load_vae(folder, torch.float32)
    if place.type != "cpu" and not vae.config.force_upcast:
        vae = vae.to(dtype)
    settle("VAE", [vae])
    index = read_json(folder / "model_index.json")
    pipeline = Pipeline(
        name=Path(model).resolve().name if Path(model).exists() else str(model),
        unet=unet.eval(),
        vae=vae.eval(),
        conditioner=conditioner,
        scheduler_config=load_scheduler_config(folder),
        zeros_for_empty=index.get("force_zeros_for_empty_prompt", True),
    )
    for file, scale in (lora or {}).items():
        pipeline.add_lora(file, scale)
    return pipeline
