"""Textual inversions of SDXL: a file of token embeddings for each of the two text encoders.

arXiv 2208.01618. Only the header is read here, without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from koala.checkpoints.tensors import FLOATS, Stored, read_header
from koala.checkpoints.validate import some
from koala.errors import UserError

# Names of the two tensors: of A1111, kohya and diffusers, and of pivotal tuning.
_NAMES = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
_OTHERS = {768: "SD 1.5", 1024: "SD 2"}  # embeddings for one text encoder, by width


@dataclass(frozen=True)
class TextualInversion:
    """The vectors that stand for a name in a prompt."""

    name: str  # of the file, without its suffix
    vectors: tuple[Stored, Stored]  # [v, d1] and [v, d2], or [d] for a single one


def read_embedding(file: Path, widths: tuple[int, int]) -> TextualInversion:
    """A textual inversion for text encoders of these widths.

    Raises UserError for another kind of file, and for an embedding of another model, by name.
    """
    header = read_header(file)
    names = next((pair for pair in _NAMES if {*pair} <= {*header}), None)
    if names is None:
        found = {stored.shape[-1] for stored in header.values() if 1 <= len(stored.shape) <= 2}
        if len(header) <= 3 and len(found) == 1 and (kind := _OTHERS.get(*found)):
            raise UserError(
                f"{file} is a textual inversion of {kind}, which has one text encoder; SDXL's has "
                "two tensors, clip_l and clip_g"
            )
        raise UserError(
            f"{file} is no textual inversion of SDXL: it holds {some(header) or 'nothing'}, and "
            "not clip_l and clip_g"
        )
    first, second = (header[name] for name in names)
    if any(len(stored.shape) not in (1, 2) or not stored.shape[0] for stored in (first, second)):
        raise UserError(f"{file} is damaged: its tensors are no vectors; download it again")
    if (own := (first.shape[-1], second.shape[-1])) != widths:
        raise UserError(
            f"{file} is for text encoders {own[0]} and {own[1]} wide; this model's are {widths[0]} "
            f"and {widths[1]} wide"
        )
    if strange := {first.dtype, second.dtype} - {*FLOATS}:
        raise UserError(f"{file} holds {some(sorted(strange))} tensors; they must be floats")
    return TextualInversion(file.stem, (first, second))
