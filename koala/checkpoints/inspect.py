"""Describes a weights file or a model without loading it.

Only headers and small files are read, without torch, so any size is inspected at once. Files that
koala cannot use are described as well; only damaged ones are refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from koala.architectures.layout import parameters
from koala.architectures.table import UNetArchitecture
from koala.checkpoints import card_facts, model_card
from koala.checkpoints.foreign import foreign
from koala.checkpoints.load import load_scheduler_config
from koala.checkpoints.prediction import Prediction, of_config
from koala.checkpoints.resolve import resolve_model, single_file_path
from koala.checkpoints.shards import shard_of
from koala.checkpoints.single_file import FILES, open_file
from koala.checkpoints.spellings import average, canonical
from koala.checkpoints.tensors import Stored, read_header, read_metadata
from koala.checkpoints.unet_folder import open_unet, unet_folder
from koala.checkpoints.validate import WEIGHTS, read_tensors, unet_architecture

_UNSTATED = f"{Prediction()} (not stated: as SDXL)"
_AVERAGES = {
    "read": "the U-Net is the EMA average: the file has no other",
    "left out": "an EMA average of the U-Net lies beside it (other), and is not read",
}
_SHOWN = 300  # characters of one metadata value


@dataclass(frozen=True)
class PartSummary:
    """One network of a model, or a whole file whose networks are unknown."""

    tensors: int
    parameters: int
    dtypes: tuple[str, ...]  # as safetensors names them
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`."""

    model: str
    kind: str  # the U-Net's architecture, or another kind of file
    parts: dict[str, PartSummary]
    licence: str | None
    metadata: dict[str, str]  # of a single file
    # Of a U-Net; None where there is none:
    layout: str | None = None  # "diffusers" or "ldm"
    depths: tuple[int, ...] | None = None  # see `UNetArchitecture`
    up: tuple[tuple[int, ...], ...] | None = None
    mid: int | None = None
    unet_parameters: int | None = None
    prediction: str | None = None  # "epsilon" or "v", with ", zero terminal SNR" if so
    average: str | None = None  # EMA: "read", the file has no other, or "left out"

    def text(self) -> str:
        """For a terminal."""
        lines = [f"{self.model}: {self.kind}"]
        if self.unet_parameters is not None:
            mid = {None: "no mid block", 0: "mid block of one resnet"}.get(
                self.mid, f"mid depth {self.mid}"
            )
            lines.append(f"  U-Net     {self.unet_parameters:,} parameters, depths "
                         f"{list(self.depths or ())}, {mid}")  # fmt: skip
            lines.append(f"  layout    {self.layout}")
            lines.append(f"  predicts  {self.prediction}")
        if self.average is not None:
            lines.append(f"  average   {_AVERAGES[self.average]}")
        for name, part in self.parts.items():
            lines.append(
                f"  {name:<14} {part.tensors:>5,} tensors {part.parameters:>14,} parameters "
                f"{part.bytes / 1e6:>10,.1f} MB  {' '.join(part.dtypes)}"
            )
        lines.append(f"  licence   {self.licence or 'not stated'}")
        for key, value in self.metadata.items():
            cut = (
                value
                if len(value) <= _SHOWN
                else f"{value[:_SHOWN]}... ({len(value):,} characters)"
            )
            lines.append(f"  {key if key.isprintable() else ascii(key)}: {cut!r}")
        return "\n".join(lines)


def inspect(model: str | Path) -> Inspection:
    """Describes a single file or a model.

    model: a .safetensors file of any kind, a bundled name, folder or Hub id. Raises `UserError` if
    a file is damaged or not a safetensors file, a folder is not a complete model, or a U-Net has
    missing or unexpected tensors.
    """
    if file := single_file_path(model):
        return _of_file(file)
    if alone := unet_folder(model):
        arch, stored = open_unet(alone)
        licence = model_card.read(alone).licence
        part = {"unet": _part(stored.values())}
        return _described(str(model), arch, "diffusers", part, _UNSTATED, _named(licence), {})
    folder = resolve_model(model)
    parts = {c: _part(read_tensors(folder, c).values()) for c in WEIGHTS}
    licence, arch = model_card.read(folder).licence, unet_architecture(folder)
    predicts = of_config(load_scheduler_config(folder))
    return _described(str(model), arch, "diffusers", parts, str(predicts), _named(licence), {})


def _of_file(file: Path) -> Inspection:
    header, metadata = read_header(file), read_metadata(file)
    licence = model_card.read_metadata(file, metadata).licence
    stated = {key: value for key, value in metadata.items() if key != FILES}
    shapes = {name: stored.shape for name, stored in canonical(header).items()}
    if kind := shard_of(file) or foreign(shapes):
        whole = {"all": _part(header.values())}
        return Inspection(str(file), kind, whole, _named(licence), stated)
    opened = open_file(file)
    parts = {component: _part(of.values()) for component, of in opened.parts.items()}
    if opened.rest:
        parts["other"] = _part(opened.rest.values())
    arch, layout = opened.found.architecture, opened.found.layout
    predicts = str(opened.prediction or _UNSTATED)
    ema = average(header)
    return _described(str(file), arch, layout, parts, predicts, _named(licence), stated, ema)


def _described(
    model: str,
    arch: UNetArchitecture,
    layout: str,
    parts: dict[str, PartSummary],
    prediction: str,
    licence: str | None,
    metadata: dict[str, str],
    ema: str | None = None,
) -> Inspection:
    return Inspection(
        model, arch.name, parts, licence, metadata, layout, arch.depths, arch.up, arch.mid,
        parameters(arch), prediction, ema,
    )  # fmt: skip


def _part(tensors: Collection[Stored]) -> PartSummary:
    return PartSummary(
        tensors=len(tensors),
        parameters=sum(math.prod(stored.shape) for stored in tensors),
        dtypes=tuple(sorted({stored.dtype for stored in tensors})),
        bytes=sum(stored.size for stored in tensors),
    )


def _named(licence: card_facts.Licence) -> str | None:
    return None if licence.identifier == "unknown" else licence.name or licence.identifier
