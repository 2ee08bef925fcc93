"""From prompts to images and a record of how each was made.

`koala.load("koala-mini")("a red fox, noto style", number=4, seed=7)` draws four.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from koala.checkpoints.tensors import load_tensor
from koala.checkpoints.textual_inversion import read_embedding
from koala.errors import UserError
from koala.generation import image_inputs, samplers, validation
from koala.generation.decode import Decode, full, to_images
from koala.generation.denoise import BatchRow, Condition, Inpainting, Predict, predictor
from koala.generation.engine import Engine, Progress
from koala.generation.memory.plan import MemoryPlan
from koala.generation.noise import Noise
from koala.generation.prompt_editing import by_step
from koala.generation.prompts import PromptEmbedding, encode, padded
from koala.generation.requests import Known, Loras, Paste, Request, Settings, checked
from koala.generation.schedule import SPACINGS, Schedule
from koala.lora.adapters import Attached, Merged, Modules, merge, modules_of
from koala.lora.names import BaseModel
from koala.lora.reading import Lora, LoraReport, read
from koala.lora.switching import LoraSwitcher
from koala.text_conditioning import Ids, TextConditioner, time_ids


@dataclass(frozen=True)
class Result:
    """Images and the settings of each."""

    images: list[Image.Image]
    settings: list[Settings]


@dataclass
class Pipeline:
    """A loaded model, made by `koala.load`.

    `predict`, `encode` and `decode` run U-Net and VAE; they can be replaced.
    `dataclasses.replace(pipeline, unet=...)` swaps the U-Net: the new pipeline runs on plain
    PyTorch, without LoRAs.
    """

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    conditioner: TextConditioner
    scheduler_config: dict[str, Any]
    zeros_for_empty: bool = True  # without a negative prompt, not the embedding of ""
    loras: dict[str, Attached | Merged] = field(default_factory=dict, init=False)  # by name
    predict: Predict = field(init=False)
    encode: Callable[[Tensor], Tensor] = field(init=False)  # images to latents
    decode: Decode = field(init=False)
    device: torch.device = field(init=False)  # of the latents between steps
    plan: MemoryPlan | None = field(default=None, init=False)  # that it was loaded by
    batch_sizes: tuple[int, ...] = field(default=(), init=False)  # compiled rows; (): any
    _previewer: image_inputs.Previewer | None = field(default=None, init=False)
    _lora_switcher: LoraSwitcher = field(init=False, repr=False)
    _embeddings: dict[Path, Ids] = field(default_factory=dict, init=False, repr=False)
    _plain: Predict = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._plain = self.predict = predictor(self.unet)
        self._lora_switcher = LoraSwitcher(self._modules, self._read_lora)
        self.encode = partial(image_inputs.encode_image, self.vae)
        self.decode = full(self.vae)
        self.device = self.unet.device

    @property
    def factor(self) -> int:
        """Pixels per latent position, along a side: 8 in SDXL."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

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
        UserError for a value that is not allowed.
        """
        return self.draw(self.requests(prompt, **asked), strict, on_step)

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
        """The number of steps of all requests together."""
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
        mask_blur: int | None = None,
        lora: Mapping[str | Path, float] | None = None,
        lora_dir: Path | None = None,
        embedding: Sequence[str | Path] = (),
        embedding_dir: Path | None = None,
    ) -> list[Request]:
        """One checked request per image: `number` of each prompt, in the order of the prompts.

        prompt: text of any length, with weights (`koala.generation.prompt_syntax`), changes
            (`koala.generation.prompt_editing`), and LoRAs of `lora_dir` as <lora:NAME:SCALE>.
        steps: 1 to 1000. guidance: 0 to 100; up to 1 there is no unconditional pass.
        guidance_until: the share of the steps, from the first, with guidance: above 0, up to 1.
        scheduler: a key of `samplers.SAMPLERS`.
        size: (width, height) in pixels or "WIDTHxHEIGHT", multiples of 8 from 16 to 4096; by
            default that of `image`, else the model's own. With an image it may be any size: what
            is no multiple of 8 is padded, and cut back at the end.
        seed: image i has seed + i; by default a random seed, which the settings record.
        image: a file or an image to start from. strength: the share of the steps that is done on
            it, above 0, up to 1; by default 0.6. mask: an image of the same size, light or
            transparent where it is to be repainted (`image_files.read_mask`); what is not comes
            back pixel for pixel. mask_blur: pixels, 0 to 64, inwards from the mask's edge, over
            which the two blend; by default 4.
        lora: files and scales, -100 to 100, for these images alone, besides the model's own.

        embedding: files of textual inversions, each named in a prompt by the file's name;
            those of the folder `embedding_dir` may be.

        UserError for a value that is not allowed.
        """
        asked = checked(
            self.known, prompt, negative_prompt=negative_prompt, steps=steps, guidance=guidance,
            guidance_until=guidance_until, scheduler=scheduler, size=size, number=number,
            seed=seed, image=image, strength=strength, mask=mask, mask_blur=mask_blur, lora=lora,
            lora_dir=lora_dir, embedding=embedding, embedding_dir=embedding_dir,
        )  # fmt: skip
        if any(asked.loras) and self.predict is not self._plain:
            raise UserError(
                "a LoRA for single requests needs a model that plain PyTorch runs: leave it out, "
                "or load the model without compile, graphs, a memory plan or another backend"
            )
        first = asked.settings[0]
        pixels = places = paste = None
        if asked.image is not None:
            image = image_inputs.on_white(asked.image, (first.width, first.height))
            pixels = image_inputs.to_pixels(image, self.factor)
            if asked.mask is not None:
                places = torch.from_numpy(asked.mask.places).float()[None, None]
                paste = Paste(image, asked.mask.blend)
        return [
            Request(settings, pixels, places, paste, loras, asked.embeddings)
            for settings, loras in zip(asked.settings, asked.loras, strict=True)
        ]

    @property
    def known(self) -> Known:
        """The facts that decide which images it can draw."""
        return Known(
            name=self.name,
            native=self.unet.config.sample_size * self.factor,
            scheduler_config=self.scheduler_config,
            base=self._base,
            loras=tuple((name, lora.scale) for name, lora in self.loras.items()),
        )

    # --- what the engine calls -----------------------------------------------------------

    def use_loras(self, lora: Loras) -> None:
        """Applies the LoRAs of one request, in place of those applied before."""
        if self._lora_switcher.switch(lora):
            self.conditioner.clear_cache()

    @torch.inference_mode()
    def begin(self, request: Request) -> BatchRow:
        """A request's row before its first step."""
        asked = request.settings
        schedule = self._schedule(asked)
        h, w = -(-asked.height // self.factor), -(-asked.width // self.factor)  # rounded up
        noise = Noise(asked.seed, (1, self.unet.config.in_channels, h, w), self.device)
        sampler = samplers.BY_NAME[asked.sampler](schedule, noise)
        first = noise.draw()
        x, kept = sampler.start(first), None
        if request.image is not None:
            latents = self.encode(request.image).to(self.device)
            # As in diffusers: with a mask and full strength, it starts from pure noise.
            if request.mask is None or asked.strength < 1:
                x = latents + sampler.sigmas[0] * first
            if request.mask is not None:
                kept = Inpainting(latents, request.mask.to(self.device), first)
        embeddings = {path.stem.lower(): self._embedding(path) for path in request.embeddings}
        (condition, unconditional), *later = self._conditions(asked, len(schedule), embeddings)
        guided = math.ceil(asked.guidance_until * len(schedule))
        return BatchRow(
            sampler, x, condition, unconditional, asked.guidance, guided, kept,
            size=(asked.width, asked.height), paste=request.paste, later=later,
        )  # fmt: skip

    @torch.inference_mode()
    def finish(self, rows: Sequence[BatchRow]) -> list[Image.Image]:
        """The images of rows of one shape that have taken their last step."""
        drawn = to_images(self.decode(torch.cat([row.x for row in rows])))
        return [row.cut(image) for row, image in zip(rows, drawn, strict=True)]

    @torch.inference_mode()
    def preview(self, row: BatchRow) -> Image.Image:
        """A rough image of a row's last step: RGB, one pixel per latent position."""
        if self._previewer is None:
            self._previewer = image_inputs.Previewer(self.decode, self.unet.config.in_channels)
        return self._previewer(row.x if row.denoised is None else row.denoised)

    def _schedule(self, asked: Settings) -> Schedule:
        return SPACINGS[asked.schedule](self.scheduler_config, asked.steps).last(asked.strength)

    def _conditions(
        self, asked: Settings, steps: int, embeddings: Mapping[str, Ids]
    ) -> list[tuple[Condition, Condition | None]]:
        """For each step: the conditions with the prompt and, if there is guidance, without it."""
        prompts = by_step(asked.prompt, steps)
        zeros = not asked.negative_prompt and self.zeros_for_empty
        negatives = by_step(asked.negative_prompt, steps) if asked.guidance > 1 else []
        texts = {*prompts} if zeros else {*prompts, *negatives}
        found = {text: encode(self.conditioner, text, embeddings) for text in texts}
        longest = max(one.text.shape[1] for one in found.values())
        conditions = {
            text: self._condition(padded(self.conditioner, one, longest), asked)
            for text, one in found.items()
        }
        if not negatives:
            return [(conditions[prompt], None) for prompt in prompts]
        if zeros:
            empty = conditions[prompts[0]]
            empty = replace(
                empty, text=torch.zeros_like(empty.text), pooled=torch.zeros_like(empty.pooled)
            )
            return [(conditions[prompt], empty) for prompt in prompts]
        return [(conditions[p], conditions[n]) for p, n in zip(prompts, negatives, strict=True)]

    def _embedding(self, file: Path) -> Ids:
        """The ids of a textual inversion's vectors, which are read once."""
        if file not in self._embeddings:
            first, second = self.conditioner.encoders
            widths = (first.config.hidden_size, second.config.hidden_size)
            vectors = [
                load_tensor(stored, "F32").reshape(-1, width)
                for stored, width in zip(read_embedding(file, widths).vectors, widths, strict=True)
            ]
            if not all(one.isfinite().all() for one in vectors):
                raise UserError(f"{file} has NaN or infinite values; download it again")
            self._embeddings[file] = self.conditioner.add_vectors(*vectors)
        return self._embeddings[file]

    def _condition(self, encoded: PromptEmbedding, asked: Settings) -> Condition:
        pair = (asked.height, asked.width)
        parts = (encoded.text, encoded.pooled, time_ids([pair], [(0, 0)], [pair]))
        return Condition(*(part.to(self.device) for part in parts))

    # --- LoRAs ------------------------------------------------------------------------------

    def add_lora(self, file: str | Path, scale: float = 1.0, merged: bool = False) -> LoraReport:
        """Adds a LoRA to the U-Net and the text encoders, named after its file.

        A LoRA for the model's teacher is carried over; the report lists what could not be. It lies
        beside the weights, or with `merged` is added to them for good, which costs no time per
        step. scale: -100 to 100. UserError for a file that is no LoRA for this model.
        """
        path = Path(file).expanduser()
        if path.stem in self.loras:
            raise UserError(f"a LoRA called {path.stem!r} is on the model already; rename one")
        scale = validation.lora_scale(scale)
        lora = self._read_lora(path)
        apply = merge if merged else Attached
        self.loras[path.stem] = apply(self._modules(), lora, scale)
        self.conditioner.clear_cache()
        return lora.report

    def scale_lora(self, name: str, scale: float) -> None:
        """Sets the scale of a LoRA that is not merged."""
        self._attached(name).scale = validation.lora_scale(scale)
        self.conditioner.clear_cache()

    def remove_lora(self, name: str) -> None:
        """Removes a LoRA that is not merged; the weights are as before."""
        self._attached(name).remove()
        del self.loras[name]
        self.conditioner.clear_cache()

    def _read_lora(self, path: Path) -> Lora:
        return read(path, self._base)

    @cached_property
    def _base(self) -> BaseModel:
        configs = (model.config.to_dict() for model in self.conditioner.encoders)
        return BaseModel.from_configs(self.unet.config, *configs)

    def _modules(self) -> Modules:
        return modules_of(self.unet, *self.conditioner.encoders)

    def _attached(self, name: str) -> Attached:
        found = self.loras.get(name)
        if not isinstance(found, Attached):
            state = "merged into the weights for good" if found else "not on the model"
            raise UserError(
                f"LoRA {name!r} is {state}; its LoRAs: {', '.join(self.loras) or 'none'}"
            )
        return found
