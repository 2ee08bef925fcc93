"""Textual inversions of SDXL: a file of token embeddings for each of the two text encoders.

arXiv 2208.01618. Only the header is read here, without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from koala.checkpoints.tensors import FLOATS, Stored, read_header
from koala.checkpoints.validate import some
from koala.errors import UserError

# Names of the two tensors: of A1111, kohya and diffusers, and of pivotal tuning.
_NAMES = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
_IMAGES = (".png", ".webp", ".jpg", ".jpeg", ".jxl", ".avif")
_MOST = 4  # tensors of a textual inversion for one text encoder
_SECOND = 1280  # width of SDXL's second text encoder, the refiner's only one
_OTHERS = {768: "SD 1.5", 1024: "SD 2"}  # embeddings for one text encoder, by width


@dataclass(frozen=True)
class TextualInversion:
    """The vectors that stand for a name in a prompt."""

    name: str  # of the file, without its suffix
    vectors: tuple[Stored, Stored]  # [v, d1] and [v, d2], or [d] for a single one

    @property
    def widths(self) -> tuple[int, int]:
        """(d1, d2)"""
        return self.vectors[0].shape[-1], self.vectors[1].shape[-1]

    @property
    def number(self) -> int:
        """Of vectors, the tokens that it takes."""
        shape = self.vectors[0].shape
        return shape[0] if len(shape) == 2 else 1


def read_embedding(file: Path, widths: tuple[int, int]) -> TextualInversion:
    """A textual inversion for text encoders of these widths.

    Raises UserError for another kind of file, and for an embedding of another model, by name.
    """
    found = _read(file)
    if (own := found.widths) != widths:
        raise UserError(
            f"{file} is for text encoders {own[0]} and {own[1]} wide; this model's are {widths[0]} "
            f"and {widths[1]} wide"
        )
    if strange := {stored.dtype for stored in found.vectors} - {*FLOATS}:
        raise UserError(f"{file} holds {some(sorted(strange))} tensors; they must be floats")
    return found


def embeddings_in(folder: Path | None) -> tuple[list[TextualInversion], list[str]]:
    """The textual inversions of a folder, and the names of its files that are none of SDXL's."""
    found, others = [], []
    for file in sorted(folder.glob("*.safetensors")) if folder else ():
        try:
            found.append(_read(file))
        except UserError:
            others.append(file.stem)
    return found, others


def _read(file: Path) -> TextualInversion:
    header = embedding_header(file)
    names = next((pair for pair in _NAMES if {*pair} <= {*header}), None)
    if names is None or _of_t5(header):
        raise UserError(f"{file} {_what(header)}; SDXL's has two tensors, clip_l and clip_g")
    first, second = (header[name] for name in names)
    if any(len(stored.shape) not in (1, 2) or not stored.shape[0] for stored in (first, second)):
        raise UserError(f"{file} is damaged: its tensors are no vectors; download it again")
    return TextualInversion(file.stem, (first, second))


def embedding_header(file: Path) -> dict[str, Stored]:
    """A file's tensors. UserError if it is no safetensors file; images are named."""
    if file.suffix.lower() in _IMAGES and file.is_file():
        raise UserError(
            f"{file} is an image; embeddings inside images, as AUTOMATIC1111's web UI saves them, "
            "are not read: give a .safetensors file"
        )
    return read_header(file)


def _of_t5(header: Mapping[str, Stored]) -> bool:
    return any("t5" in name.lower() for name in header)


def _what(header: Mapping[str, Stored]) -> str:
    """What a file is that has not both tensors, as far as its names and shapes tell."""
    if _of_t5(header):
        return "is a textual inversion of Flux or SD 3, which have a T5 text encoder"
    if half := {*header} & {name for pair in _NAMES for name in pair}:
        return f"is no textual inversion of SDXL: it holds {some(sorted(half))} alone"
    if any(".hada_" in name or "lora" in name or ".lokr_" in name for name in header):
        beside = [name for name in header if name.startswith("bundle_emb.")]
        return f"is a LoRA, which --lora reads{' (its embeddings are left out)' if beside else ''}"
    widths = {stored.shape[-1] for stored in header.values() if 1 <= len(stored.shape) <= 2}
    if len(header) <= _MOST and len(widths) == 1:
        (width,) = widths
        if width in _OTHERS:
            return f"is a textual inversion of {_OTHERS[width]}, which has one text encoder"
        if width == _SECOND:
            return "is a textual inversion of SDXL's second text encoder alone, or of the refiner"
        return f"is a textual inversion for a text encoder {width} wide, which no SDXL has"
    return f"is no textual inversion of SDXL: it holds {some(header) or 'nothing'}"
