"""Converts a teacher's LoRA file to one for its student, for use in other programs."""

from __future__ import annotations

import contextlib
import math
import struct
from pathlib import Path

from koala.checkpoints.tensors import Stored, View, load_tensor, read_metadata, write
from koala.errors import UserError, unknown
from koala.lora import kinds, peft
from koala.lora.names import base_named, shapes, spellings, targets
from koala.lora.reading import MADE_FOR, Lora, LoraReport, read, signature
from koala.utils.atomic import check_new, new_file

SPELLINGS = ("kohya", "same")
_KOHYA = ("kohya, original names", "kohya, text")
_ENDINGS = {"down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight"}


def convert_lora(
    file: str | Path, model: str, out: str | Path, spelling: str = "kohya"
) -> LoraReport:
    """Writes the part of the LoRA `file` that fits `model` to the new file `out`.

    `model`: an architecture ("koala-700m"), a bundled name, a folder, a single file or a Hub id.
    `spelling`: "kohya", which other programs read in full, or "same" as in the file. Raises
    `UserError` as `read` and `write_converted` do.
    """
    if spelling not in SPELLINGS:
        raise unknown("spelling", spelling, SPELLINGS)
    lora = read(Path(file).expanduser(), base_named(model))
    write_converted(lora, Path(out).expanduser(), spelling)
    return lora.report


def write_converted(lora: Lora, out: Path, spelling: str = "kohya") -> None:
    """Writes a LoRA file for the model that the LoRA was read for.

    Modules get their names in that model. Dtypes and metadata are unchanged, with the model added;
    fp8 becomes fp16. In kohya's spelling each module has its alpha. In the file's own, PEFT's
    settings are adapted, in a separate file if they were in one. Raises `UserError` if `out` exists
    or cannot be written.
    """
    metadata = {**read_metadata(lora.file), MADE_FOR: signature(lora.base.unet)}
    check_new(out)
    if spelling == "kohya":
        metadata.pop(peft.METADATA_KEY, None)
        tensors = _kohya(lora)
        described = {name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()}
        write(out, described, lambda name: tensors[name][2], metadata)
        return
    settings = peft.read_settings(lora.file).moved(_unet_adapters(lora))
    beside = out.with_name(peft.CONFIG)
    if settings.beside:
        if out.name != peft.WEIGHTS:
            raise UserError(
                f"{out}: PEFT finds an adapter's settings by its file name; "
                f"name the output {peft.WEIGHTS}, in its own folder"
            )
        check_new(beside)
    elif settings.parts:
        metadata[peft.METADATA_KEY] = settings.text()
    own = _own(lora)
    with contextlib.ExitStack() as both:
        if settings.beside:
            part = both.enter_context(new_file(beside))
            part.write_text(settings.text() + "\n", encoding="utf-8")
        described = {name: (View((stored,)).dtype, stored.shape) for name, stored in own.items()}
        write(out, described, own.__getitem__, metadata)


def _kohya(lora: Lora) -> dict[str, tuple[str, tuple[int, ...], Stored | bytes]]:
    """Dtype, shape and source of each tensor, by kohya's and LyCORIS' names."""
    tensors: dict[str, tuple[str, tuple[int, ...], Stored | bytes]] = {}
    for source, target in lora.moves.items():
        adapter = lora.adapters[target]
        stem = spellings(lora.base)[_KOHYA[target.part != "unet"]][target]
        roles = lora.entries[source].roles
        for role, stored in roles.items():
            if "scalar" in roles and role in kinds.NUMBERS:
                continue  # the adapter's factor has both
            shape = stored.shape
            if role == "magnitude":  # PEFT's axes differ
                ones = (1,) * (len(shapes(lora.base)[target]) - 1)
                shape, role = (math.prod(shape), *ones), "dora_scale"
            tensors[stem + _ENDINGS.get(role, f".{role}")] = (View((stored,)).dtype, shape, stored)
        if f"{stem}.alpha" in tensors:
            continue
        if adapter.rank is not None:
            alpha = struct.pack("<f", adapter.factor * adapter.rank)
            tensors[f"{stem}.alpha"] = ("F32", (), alpha)
        elif adapter.factor != 1:  # whole matrices, which LyCORIS has no alpha for
            name = stem + (".lokr_w1" if adapter.kind == "LoKr" else ".diff")
            scaled = (
                load_tensor(adapter.factors[name.removeprefix(f"{stem}.")], "F32") * adapter.factor
            )
            tensors[name] = ("F32", tensors[name][1], scaled.numpy().tobytes())
    return tensors


def _own(lora: Lora) -> dict[str, Stored]:
    """The tensors that fit, by their names in the model, in the file's own spelling."""
    names, tensors = spellings(lora.base), {}
    for source, target in lora.moves.items():
        entry = lora.entries[source]
        spelling, _ = targets(lora.made_for)[entry.stem]
        for ending, stored in entry.tensors.items():
            tensors[names[spelling][target] + ending] = stored
    return tensors


def _unet_adapters(lora: Lora) -> dict[str, tuple[int | None, float]]:
    """Path in the U-Net -> (rank, factor)."""
    return {t.path: (a.rank, a.factor) for t, a in lora.adapters.items() if t.part == "unet"}
