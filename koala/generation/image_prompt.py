"""Prompts that are images, by an IP-Adapter: its layers for a model, and what a request asks of it.

arXiv 2308.06721. Importing this loads no torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from koala.architectures.attention_map import attention_map, cross_attentions, roots
from koala.architectures.table import UNetArchitecture
from koala.checkpoints.ip_adapter import (
    BESIDE,
    ImageEncoder,
    IPAdapterFile,
    open_image_encoder,
    open_ip_adapter,
)
from koala.errors import UserError
from koala.generation.validation import MOST_IP_SCALE, added_scale

if TYPE_CHECKING:
    from koala.utils.arrays import Array

_FAMILIES = {768: "SD 1.5", 1024: "SD 2"}  # by width of the text embeddings
_ENCODERS = {1024: "OpenCLIP ViT-H", 1280: "OpenCLIP ViT-bigG"}  # by width of the image embedding


@dataclass(frozen=True)
class IPAdapter:
    """An IP-Adapter that fits a model, with its image encoder."""

    file: IPAdapterFile
    encoder: ImageEncoder
    every: tuple[str, ...]  # cross-attentions of the U-Net that it was made for
    takes: dict[str, int]  # cross-attention of the model -> place in `every`

    def same(self, other: IPAdapter) -> bool:
        """Whether both are of the same files."""
        return (self.file.place, self.encoder.place) == (other.file.place, other.encoder.place)

    def line(self) -> str:
        """How many of its layers are used, in one line."""
        lost = [path for i, path in enumerate(self.every) if i not in self.takes.values()]
        blocks = Counter(path.split(".attentions.")[0] for path in lost)
        used = len(self.every) - len(lost)
        text = f"IP-Adapter {self.file.name}: {used} of {len(self.every)} layers are used"
        left = ", ".join(f"{number} of {block}" for block, number in blocks.items())
        return text + (f"; left out: {left}" if lost else "")


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """What one image is drawn by, besides its prompt."""

    adapter: IPAdapter
    pixels: Array  # float32 [1, 3, s, s], as the image encoder reads them
    scale: float  # of what the adapter adds


def fitted_adapter(
    name: str | Path, encoder: str | Path | None, model: str, unet: UNetArchitecture
) -> IPAdapter:
    """An IP-Adapter for a model with that U-Net, or for the teacher that it is a cut of.

    encoder: the image encoder's folder; by default `image_encoder` beside the adapter's file.
    Raises `UserError` for a file that is no plain IP-Adapter of SDXL's, or is for another model,
    and for an encoder that is not the adapter's.
    """
    file = open_ip_adapter(name)
    if file.context != unet.context:
        family = _FAMILIES.get(file.context, "another model")
        raise UserError(
            f"{name} is an IP-Adapter for {family}: its tokens are {file.context} wide, {model} "
            f"needs {unet.context}"
        )
    own, widths = cross_attentions(unet), file.widths
    made_for = [unet] if [*own.values()] == widths else roots(unet, widths)
    if len(made_for) != 1:
        raise UserError(
            f"{name} is an IP-Adapter for another model: its {len(widths)} layers are not those of "
            f"{model}, which has {len(own)}, nor of a teacher of its kind"
        )
    if narrowed := [path for path, _ in unet.inner if path in own]:
        raise UserError(
            f"{model} is pruned inside {len(narrowed)} of its {len(own)} cross-attentions, and "
            f"the IP-Adapter {name} does not say which heads are left: leave it out"
        )
    (whole,) = made_for
    takes = dict(zip(own, attention_map(whole, unet), strict=True))
    return IPAdapter(file, _encoder(file, encoder), (*cross_attentions(whole),), takes)


def _encoder(file: IPAdapterFile, folder: str | Path | None) -> ImageEncoder:
    beside = file.place.parent / BESIDE
    if folder is None and not beside.is_dir():
        raise UserError(
            f"{file.place} needs the image encoder that it was trained with{_named(file.reads)}: "
            f"give its folder, or put it beside the file as {BESIDE}"
        )
    found = open_image_encoder(beside if folder is None else folder)
    if found.gives != file.reads:
        raise UserError(
            f"{found.place} gives image embeddings {found.gives} wide, {file.place} reads "
            f"{file.reads}: give the encoder that it was trained with{_named(file.reads)}"
        )
    return found


def _named(width: int) -> str:
    return f" ({_ENCODERS[width]})" if width in _ENCODERS else ""


def check_ip_scale(adapter: bool, image: bool, encoder: bool, scale: float | None) -> float:
    """How strong an IP-Adapter is: 1 unless told. UserError if it or its image is missing."""
    if not adapter:
        given = {"an image prompt": image, "an image encoder": encoder}
        given["an image prompt's scale"] = scale is not None
        for what, is_given in given.items():
            if is_given:
                raise UserError(f"{what} has no effect without an IP-Adapter: give one")
    elif not image:
        raise UserError("an IP-Adapter needs an image, which it takes for a prompt: give one")
    return added_scale("IP-Adapter", scale, MOST_IP_SCALE, "0.5 leaves the text room")
