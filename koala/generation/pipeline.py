"""A model that PyTorch holds, with its LoRAs.

`koala.load("koala-mini")("a fox, noto style", number=4, seed=7)` draws four.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from koala.checkpoints.sampling import of_named
from koala.checkpoints.tensors import load_tensor
from koala.checkpoints.textual_inversion import read_embedding
from koala.checkpoints.words import Words
from koala.errors import UserError
from koala.generation import validation
from koala.generation.control import Control
from koala.generation.decode import full
from koala.generation.denoise import Hint, ImageTokens, Predict, Residuals
from koala.generation.drawing import Drawing
from koala.generation.image_prompt import ImagePrompt, IPAdapter
from koala.generation.memory.plan import MemoryPlan
from koala.generation.noise import TorchNoise
from koala.generation.pixels import Decode
from koala.generation.requests import Known, Loras
from koala.generation.runtime.image_prompt import ImageReader
from koala.generation.runtime.pytorch import encode_image, predictor, residuals_of
from koala.lora.adapters import Attached, Merged, Modules, merge, modules_of
from koala.lora.names import BaseModel
from koala.lora.reading import Lora, LoraReport, read
from koala.lora.switching import LoraSwitcher
from koala.text_conditioning import Ids, TextConditioner
from koala.utils.arrays import Array
from koala.utils.device import device_and_dtype
from koala.utils.networks import AutoencoderKL, UNet2DConditionModel


@dataclass
class Pipeline(Drawing):
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
    words: Words | None = None  # that it was taught, if they are few
    loras: dict[str, Attached | Merged] = field(default_factory=dict, init=False)  # by name
    predict: Predict = field(init=False)
    encode: Callable[[Array], Array] = field(init=False)
    decode: Decode = field(init=False)
    device: torch.device = field(init=False)  # of the latents between steps
    plan: MemoryPlan | None = field(default=None, init=False)  # that it was loaded by
    batch_sizes: tuple[int, ...] = field(default=(), init=False)  # compiled rows; (): any
    _lora_switcher: LoraSwitcher = field(init=False, repr=False)
    _embeddings: dict[Path, Ids] = field(default_factory=dict, init=False, repr=False)
    _controlnet: tuple[Path, Residuals] | None = field(default=None, init=False, repr=False)
    _reader: tuple[IPAdapter, ImageReader] | None = field(default=None, init=False, repr=False)
    _shown: tuple[ImagePrompt, tuple[Tensor, Tensor]] | None = field(
        default=None, init=False, repr=False
    )
    _plain: Predict = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._plain = self.predict = predictor(self.unet)
        self._lora_switcher = LoraSwitcher(self._modules, self._read_lora)
        self.encode = partial(encode_image, self.vae)
        self.decode = full(self.vae)
        self.device, _ = device_and_dtype(self.unet)

    @property
    def factor(self) -> int:
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def channels(self) -> int:
        return int(self.unet.config.in_channels)

    @property
    def takes_loras(self) -> bool:  # type: ignore[override]  # found out, not set
        return self.predict is self._plain

    @property
    def takes_control(self) -> bool:  # type: ignore[override]  # found out, not set
        return self.takes_loras

    def own(self, array: Array) -> Tensor:
        return torch.as_tensor(array).to(self.device)

    def noise(self, seed: int, shape: tuple[int, ...]) -> TorchNoise:
        return TorchNoise(seed, shape, self.device)

    @property
    def known(self) -> Known:
        return Known(
            name=self.name,
            native=self.unet.config.sample_size * self.factor,
            scheduler_config=self.scheduler_config,
            base=self._base,
            loras=tuple((name, lora.scale) for name, lora in self.loras.items()),
            sampling=of_named(self.name, self.scheduler_config),
            words=self.words,
        )

    def use_loras(self, lora: Loras) -> None:
        if self._lora_switcher.switch(lora):
            self.conditioner.clear_cache()

    takes_embeddings = True

    def embedding(self, file: Path) -> Ids:
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

    def hint(self, control: Control) -> Hint:
        """What a ControlNet is shown. It is read once, and kept until a request has another."""
        net = control.net
        if self._controlnet is None or self._controlnet[0] != net.files.place:
            device, dtype = device_and_dtype(self.unet)
            module = net.files.load(net.unet, dtype)
            nn.Module.to(module, device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # it does take it
            self._controlnet = net.files.place, residuals_of(module, net.takes)
        return Hint(self._controlnet[1], control.image, torch.tensor([control.scale]))

    def image_tokens(self, prompt: ImagePrompt) -> tuple[ImageTokens, ImageTokens]:
        """What a request's IP-Adapter shows, and what stands for no image.

        It is read once, with its image encoder, and kept until a request has another.
        """
        if self._reader is None or not self._reader[0].same(prompt.adapter):
            self._reader = self._shown = None  # room for the next
            self._reader = prompt.adapter, ImageReader(prompt.adapter, *device_and_dtype(self.unet))
        reader = self._reader[1]
        if self._shown is None or self._shown[0] is not prompt:
            self._shown = prompt, reader.tokens(torch.as_tensor(prompt.pixels))
        scale = torch.tensor([prompt.scale])
        image, none = (ImageTokens(reader.attached, one, scale) for one in self._shown[1])
        return image, none

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
