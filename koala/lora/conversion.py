"""Converts a teacher's LoRA file to one for its student, for use in other programs."""

from __future__ import annotations

import contextlib
from pathlib import Path

from koala.checkpoints.tensors import Stored, read_metadata, write
from koala.errors import UserError
from koala.lora import peft
from koala.lora.names import base_named, spellings, targets
from koala.lora.reading import Lora, LoraReport, read
from koala.utils.atomic import check_new, new_file


def convert_lora(file: str | Path, model: str, out: str | Path) -> LoraReport:
    """Writes the part of the LoRA `file` that fits `model` to the new file `out`.

    `model`: an architecture ("koala-700m"), a bundled name, a folder or a Hub id. Raises
    `UserError` as `read` and `write_converted` do.
    """
    lora = read(Path(file).expanduser(), base_named(model))
    write_converted(lora, Path(out).expanduser())
    return lora.report


def write_converted(lora: Lora, out: Path) -> None:
    """Writes a LoRA file for the model that the LoRA was read for.

    Modules get their names in that model, in the file's own spelling; dtypes and metadata are
    unchanged. PEFT's settings are adapted, in a separate file if they were in one.
    Raises `UserError` if `out` exists or cannot be written.
    """
    settings = peft.read_settings(lora.file).moved(_unet_adapters(lora))
    metadata, beside = read_metadata(lora.file), out.with_name(peft.CONFIG)
    check_new(out)
    if settings.beside:
        if out.name != peft.WEIGHTS:
            raise UserError(
                f"{out}: PEFT finds an adapter's settings by its file name; "
                f"name the output {peft.WEIGHTS}, in its own folder"
            )
        check_new(beside)
    elif settings.parts:
        metadata[peft.METADATA_KEY] = settings.text()
    tensors = _tensors(lora)
    kinds = {name: (stored.dtype, stored.shape) for name, stored in tensors.items()}
    with contextlib.ExitStack() as both:
        if settings.beside:
            part = both.enter_context(new_file(beside))
            part.write_text(settings.text() + "\n", encoding="utf-8")
        write(out, kinds, tensors.__getitem__, metadata)


def _tensors(lora: Lora) -> dict[str, Stored]:
    """The tensors that fit, by their names in the model."""
    names, tensors = spellings(lora.base), {}
    for source, target in lora.moves.items():
        entry = lora.entries[source]
        spelling, _ = targets(lora.made_for)[entry.stem]
        for ending, stored in entry.tensors.items():
            tensors[names[spelling][target] + ending] = stored
    return tensors


def _unet_adapters(lora: Lora) -> dict[str, tuple[int, float]]:
    """Path in the U-Net -> (rank, factor)."""
    return {t.path: (a.rank, a.factor) for t, a in lora.adapters.items() if t.part == "unet"}
