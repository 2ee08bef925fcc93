"""ControlNets: which of one's residuals a model takes, and what a request asks of it.

Importing this loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from koala.architectures.skip_map import skip_connections, skip_map, with_layers
from koala.architectures.table import TIME_IDS, UNetArchitecture
from koala.checkpoints.controlnet import ControlNetFiles, open_controlnet
from koala.errors import UserError
from koala.generation.validation import MOST_CONTROL, added_scale

if TYPE_CHECKING:
    from koala.utils.arrays import Array

SHAPE = 1.05  # factor by which a control image's proportions may differ from the image's


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet that fits a model."""

    files: ControlNetFiles
    unet: UNetArchitecture  # that it was made for, as far as its own tensors depend on it
    takes: tuple[int, ...]  # residual of each skip connection and the mid block (`skip_map`)

    def line(self) -> str:
        """How many of its residuals are used, in one line."""
        every = [*(path for path, _ in skip_connections(self.unet)), "mid_block"]
        lost = [path for i, path in enumerate(every) if i not in self.takes]
        used = f"ControlNet {self.files.name}: {len(every) - len(lost)} of {len(every)} residuals"
        return f"{used} are used" + (f"; left out: {', '.join(lost)}" if lost else "")


@dataclass(frozen=True)
class Control:
    """What one image is drawn by, besides its prompt."""

    net: ControlNet
    image: Array  # float32 [1, 3, 8h, 8w] in 0..1, padded
    scale: float  # of the residuals


def fitted(name: str | Path, model: str, unet: UNetArchitecture) -> ControlNet:
    """A ControlNet for a model with that U-Net, or for the teacher that it is a cut of.

    Raises `UserError` for a file that is no ControlNet of SDXL's, or is for another model.
    """
    files = open_controlnet(name)
    stages = len(unet.widths)
    layers = (len(files.residuals) - stages) // stages
    made_for = with_layers(unet, layers)
    widths = [width for _, width in skip_connections(made_for)]
    added = unet.pooled + TIME_IDS * unet.time_ids
    own: dict[str, tuple[int | list[int], int | list[int]]] = {
        "residuals": (files.residuals, widths),
        "text embeddings": (files.context or unet.context, unet.context),
        "pooled text and sizes": (files.added, added),
    }
    for what, (theirs, ours) in own.items():
        if theirs != ours:
            raise UserError(
                f"{name} is a ControlNet for another model: its {what} are {_wide(theirs)} wide, "
                f"{model} needs {_wide(ours)}"
            )
    if layers < unet.layers:
        raise UserError(
            f"{name} is a ControlNet for a U-Net of {layers} layers a stage; {model} has "
            f"{unet.layers}: give one that was trained for it, or for its teacher"
        )
    return ControlNet(files, made_for, tuple(skip_map(made_for, unet)))


def check_scale(net: bool, image: bool, scale: float | None) -> float:
    """How strong a ControlNet is: 1 unless told. UserError if it or its image is missing."""
    if not net:
        for name, given in (("image", image), ("scale", scale is not None)):
            if given:
                raise UserError(f"a control {name} has no effect without a ControlNet: give one")
    elif not image:
        raise UserError("a ControlNet needs a control image, which it draws by: give one")
    return added_scale("control", scale, MOST_CONTROL, "1 is usual")


def check_shape(image: tuple[int, int], size: tuple[int, int]) -> None:
    """UserError unless a control image has the proportions of the image. Both (width, height)."""
    if not 1 / SHAPE <= image[0] * size[1] / (image[1] * size[0]) <= SHAPE:
        raise UserError(
            f"the control image is {image[0]}x{image[1]}, the image {size[0]}x{size[1]}: make them "
            "the same shape, or set the size"
        )


def check_runtime(
    option: str, backend: str | None, compile: bool, graphs: bool, planned: bool
) -> None:
    """UserError for what does not go with an option that plain PyTorch runs, as --control."""
    given = {
        f"--backend {backend}": backend not in (None, "torch"),
        "--compile": compile,
        "--graphs": graphs,
        "a memory plan (--vram, --weights, --decode, --tiny-vae, a model in int4)": planned,
    }
    for name, is_given in given.items():
        if is_given:
            raise UserError(f"{option} needs plain PyTorch: it does not go with {name}")


def _wide(widths: int | list[int]) -> str:
    return ", ".join(map(str, widths)) if isinstance(widths, list) else str(widths)
