"""How much memory a model takes in each mode of running it, and the first mode that fits.

A `MemoryPlan` is a mode with its cost: for each phase of an image (encoding the prompt, and an
image if one is given, denoising, decoding) the weights on the device and the work. A `Planner`
goes down `LADDER` until the largest phase fits; `koala.generation.memory.placement` does the rest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

from koala.errors import UserError
from koala.generation import decode as decoding
from koala.generation import validation
from koala.generation.memory.estimate import CARRIED, GIB, LADDER, MARGIN
from koala.generation.memory.meta_models import TEXT, TINY, UNET, VAE, MetaModels
from koala.generation.memory.offload import aligned_size, tensors_of, units_of
from koala.generation.quantise import LARGEST
from koala.generation.runtime.dtypes import DTYPES, check_dtype
from koala.utils.counted import counted
from koala.utils.device import free_bytes, resident_bytes

# Bytes that a process on a CPU grows by while it works, besides its tensors: code that is paged in,
# and gaps in the allocator; up to 0.21 GiB were seen.
GROWTH = 2**28


@dataclass(frozen=True)
class Mode:
    """A way to run a model, as far as its memory goes."""

    dtype: str  # that U-Net and text encoders compute in: a key of DTYPES
    vae_dtype: str
    quantised: str | None  # to int8, fp8 or int4: how their weights are stored
    place: str = "resident"  # of LADDER
    decode: str = "full"  # or "tiled" or "tiny"

    @property
    def is_whole(self) -> bool:
        """Whether all networks lie on the device as they are, and decode an image at once."""
        return self.quantised is None and self.place == "resident" and self.decode != "tiled"

    @property
    def weights(self) -> str:
        return self.quantised or self.dtype

    @property
    def text_weights(self) -> str:
        """Of the text encoders, which stay in 8 bits beside a U-Net in 4."""
        return "int8" if self.weights == "int4" else self.weights

    @property
    def decoder(self) -> str:
        """The part that decodes."""
        return TINY if self.decode == "tiny" else VAE

    @property
    def encoder(self) -> str:
        """How the VAE encodes an image: "full" or "tiled"."""
        return "full" if self.decode == "full" else "tiled"

    @property
    def decoder_dtype(self) -> str:
        return self.dtype if self.decode == "tiny" else self.vae_dtype

    def place_of(self, part: str) -> str:
        """Where a part's weights are: "resident", "model offload" or "group offload"."""
        if part == TINY or (self.place == "text group offload" and part != TEXT):
            return "resident"
        if self.place == "group offload" and part == VAE:
            return "model offload"
        return self.place.removeprefix("text ")

    def summary(self) -> str:
        return f"weights {self.weights}, {self.place}, {self.decode} decode"


@dataclass(frozen=True)
class Phase:
    """One phase of drawing, in bytes on the device."""

    name: str
    weights: int
    activations: int

    @property
    def work(self) -> int:
        """All but the weights: activations with their margin, and what a request carries."""
        return int(MARGIN * self.activations) + CARRIED

    @property
    def total(self) -> int:
        return self.weights + self.work


@dataclass(frozen=True)
class MemoryPlan:
    """A mode and what it takes, for pictures of one size."""

    mode: Mode
    device: torch.device
    size: tuple[int, int]  # width, height in pixels
    images: int  # at a time
    parts: dict[str, int]  # weights of each part, bytes
    phases: tuple[Phase, ...]
    process: int  # bytes beside the model: on a CPU the interpreter and its libraries
    budget: int | None = None  # bytes

    @property
    def peak(self) -> int:
        """The most bytes of the model on the device at once."""
        return max(phase.total for phase in self.phases)

    @property
    def total(self) -> int:
        """What the budget must hold, in bytes."""
        return self.peak + self.process

    def table(self) -> str:
        """A table for a terminal: where each part is, and what each phase takes."""
        mode, largest = self.mode, max(self.phases, key=lambda phase: phase.total)
        unit, named = (GIB, "GiB") if self.total >= GIB else (2**20, "MiB")
        within = "" if self.budget is None else f" of {self.budget / unit:,.2f}"
        many = counted(self.images, "picture")
        decodes = {"full": ", decodes whole", "tiled": ", decodes in tiles", "tiny": ", idle"}
        rows = {
            TEXT: (mode.text_weights, ""),
            UNET: (mode.weights, ""),
            VAE: (mode.vae_dtype, decodes[mode.decode]),
            TINY: (mode.dtype, ", decodes"),
        }
        lines = [
            f"memory plan for {self.size[0]}x{self.size[1]}, {many} at a time, on {self.device}: "
            f"{self.total / unit:.2f}{within} {named}",
            f"{'part':<14}{'weights':>8}{named:>8}  where",
        ]
        for part, size in self.parts.items():
            stored, does = rows[part]
            lines.append(f"{part:<14}{stored:>8}{size / unit:8.2f}  {mode.place_of(part)}{does}")
        if self.process:
            beside = f"{'process':<22}{self.process / unit:8.2f}"
            lines.append(f"{beside}  interpreter and libraries, beside each phase")
        lines.append(f"{'phase':<14}{'weights':>8}{'work':>8}{'sum':>8}")
        for phase in self.phases:
            figures = (phase.weights, phase.work, phase.total)
            numbers = "".join(f"{figure / unit:8.2f}" for figure in figures)
            lines.append(f"{phase.name:<14}{numbers}{'  <- largest' * (phase is largest)}")
        return "\n".join(lines)


class Planner:
    """Plans for one model folder, device, size and number of pictures at a time.

    size: (width, height) in pixels. weights: "int8", "fp8" or "int4" stores U-Net and text encoders
    in it, the text encoders in int8 where the U-Net is in int4; a dtype keeps them in it; None:
    either. decode: "full", "tiled" or "tiny"; None: any. tiny: folder or Hub id of the tiny
    autoencoder, by default the model's own, if any. from_image: whether images start from others,
    which the VAE encodes. process: bytes that the budget holds beside the model. UserError for a
    value that is not allowed, a tiny autoencoder that is not found, or a dtype that the device
    lacks.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        size: tuple[int, int],
        images: int = 1,
        weights: str | None = None,
        decode: str | None = None,
        tiny: str | Path | None = None,
        from_image: bool = False,
        process: int = 0,
    ) -> None:
        self.device, self.size, self.images = device, size, images
        self.from_image, self.process = from_image, process
        has_own = (folder / decoding.TINY / "config.json").is_file()
        self.tiny = tiny or (folder if has_own or decode == "tiny" else None)
        if self.tiny is not None:
            decoding.tiny_folder(self.tiny)  # refuses a wrong one before anything is planned
        self._models = MetaModels(folder, self.tiny, size, images)
        self.modes = list(dict.fromkeys(self._ladder(weights, decode)))
        self.plan = cache(self._plan)

    def choose(self, budget: int | None = None) -> MemoryPlan:
        """The first plan that fits into `budget` bytes, by default what is free and taken already.

        If none fits, a UserError names the smallest budget that works.
        """
        allowed = free_bytes(self.device) + self.process if budget is None else budget
        for plan in map(self.plan, self.modes):
            if plan.total <= allowed:
                return replace(plan, budget=allowed)
        least = min(map(self.plan, self.modes), key=lambda plan: plan.peak)
        raise UserError(
            f"{allowed / GIB:.2f} GiB is too little for {self.size[0]}x{self.size[1]} pixels, "
            f"{self.images} at a time: the smallest that works is "
            f"{-(-least.total * 100 // GIB) / 100:.2f} GiB ({least.mode.summary()})"
        )

    def check_merging(self, plan: MemoryPlan) -> None:
        """UserError if the budget does not hold the model before its weights are rounded.

        LoRAs are merged into it then, in this process' memory.
        """
        dtypes = {TEXT: plan.mode.dtype, UNET: plan.mode.dtype, VAE: plan.mode.vae_dtype}
        made = [
            model for part, dtype in dtypes.items() for model in self._models.models(part, dtype)
        ]
        needed = aligned_size(tensors_of(made)) + self.process
        if plan.budget is not None and needed > plan.budget:
            raise UserError(
                f"--lora is merged before the weights are rounded or offloaded, which takes "
                f"{needed / GIB:.2f} GiB of {plan.budget / GIB:.2f}: give it as --teacher-lora "
                "FILE:SCALE, which merges it on the disk"
            )

    def smaller(self, plan: MemoryPlan) -> MemoryPlan | None:
        """The next plan that takes less, or None."""
        after = self.modes[self.modes.index(plan.mode) + 1 :]
        below = (replace(self.plan(mode), budget=plan.budget) for mode in after)
        return next((other for other in below if other.peak < plan.peak), None)

    def _ladder(self, weights: str | None, decode: str | None) -> Iterator[Mode]:
        validation.runtime(None, False, False, weights=weights, decode=decode)
        if weights == "fp8" and self.device.type == "mps":
            raise UserError("weights 'fp8': MPS has no such type; choose int8")
        if weights in DTYPES:
            check_dtype(DTYPES[weights], self.device)
        own = "fp32" if self.device.type == "cpu" else "fp16"
        dtype = weights if weights in DTYPES else own
        vae_dtype = self._vae_dtype(dtype)
        for quantised, place, decoder in LADDER:
            if weights is not None:
                quantised = weights if weights in LARGEST else None
            if decode or decoder != "tiny" or self.tiny is not None:
                yield Mode(dtype, vae_dtype, quantised, place, decode or decoder)

    def _vae_dtype(self, dtype: str) -> str:
        """float32 on the CPU; elsewhere the model's, or bfloat16 if the VAE overflows in fp16."""
        if self.device.type == "cpu":
            return "fp32"
        if dtype != "fp16" or not self._models.config("vae").get("force_upcast", True):
            return dtype
        if self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "fp32"

    def _plan(self, mode: Mode) -> MemoryPlan:
        """The plan of a mode."""
        models, work = self._models.models, self._models.work
        parts = {
            TEXT: models(TEXT, mode.dtype, mode.quantised),
            UNET: models(UNET, mode.dtype, mode.quantised),
            VAE: models(VAE, mode.vae_dtype),
        }
        if mode.decode == "tiny":
            parts[TINY] = models(TINY, mode.dtype)
        resident = {part: _on_device(made, mode.place_of(part)) for part, made in parts.items()}
        every = [  # name, the part that works, bytes of activations
            ("encode", TEXT, work(TEXT, mode.dtype, mode.quantised)),
            ("denoise", UNET, work(UNET, mode.dtype, mode.quantised)),
            ("decode", mode.decoder, work(mode.decoder, mode.decoder_dtype, None, mode.decode)),
        ]
        if self.from_image:
            every.insert(1, ("picture", VAE, self._models.encoding(mode.vae_dtype, mode.encoder)))
        phases = tuple(
            Phase(name, sum(one[part != busy] for part, one in resident.items()), activations)
            for name, busy, activations in every
        )
        sizes = {part: aligned_size(tensors_of(made)) for part, made in parts.items()}
        return MemoryPlan(mode, self.device, self.size, self.images, sizes, phases, self.process)


def beside_model(device: torch.device) -> int:
    """Bytes that a budget holds beside a model's tensors: on a CPU those of the whole process."""
    return resident_bytes() + GROWTH if device.type == "cpu" else 0


def _on_device(models: Sequence[nn.Module], place: str) -> tuple[int, int]:
    """Bytes of a part's weights on the device while it works, and while other parts do."""
    whole = aligned_size(tensors_of(models))
    if place == "resident":
        return whole, whole
    sizes = [aligned_size(tensors_of([unit])) for model in models for unit in units_of(model)]
    rest = whole - sum(sizes)
    return (whole if place == "model offload" else rest + 2 * max(sizes)), rest
