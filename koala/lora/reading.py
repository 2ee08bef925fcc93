"""Reads a LoRA file: the modules it changes, and their counterparts in the model at hand.

A LoRA adds `alpha / rank * up @ down` to a weight (arXiv 2106.09685); LoCon does the same for
convolutions. A LoRA of a student's teacher is mapped by weight inheritance: each student block
takes the adapter of the teacher block that it inherits from. Adapters without a counterpart are
dropped, counted and reported. Only the file's header is read here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from koala.architectures.block_map import block_map, tensor_map
from koala.architectures.table import (
    ARCHITECTURES,
    CUTS,
    UNetArchitecture,
    student_of,
    teacher_faults,
)
from koala.checkpoints.tensors import FLOATS, Stored, load_tensor, read_header
from koala.checkpoints.validate import some
from koala.errors import UserError
from koala.lora import peft
from koala.lora.names import PARTS, ROLES, BaseModel, Target, shapes, split, targets

_OTHER_ADAPTERS = {  # substrings of tensor names in other kinds of adapter
    ".hada_": "LoHa", ".lokr_": "LoKr", ".dora_scale": "DoRA", ".lora_magnitude_vector": "DoRA",
    ".on_input": "IA3", ".ia3_l": "IA3", ".oft_": "OFT", ".diff": "full difference",
}  # fmt: skip
_OTHER_MODELS = {  # prefixes of tensor names in LoRAs of other models
    "lora_te_": "SD 1.5 or SD 2",
    "lora_unet_double_blocks": "Flux",
    "lora_unet_single_blocks": "Flux",
    "transformer.": "a diffusion transformer such as Flux or SD 3",
}
_CONTEXTS = {768: "SD 1.5", 1024: "SD 2", 2048: "SDXL"}  # widths of the text embeddings


@dataclass(frozen=True)
class Adapter:
    """The adapter of one weight: factor * up(mid(down(x))), without the scale."""

    down: Stored  # [rank, in, *kernel]; with mid [rank, in, 1, 1]
    up: Stored  # [out, rank], or [out, rank, 1, 1]
    mid: Stored | None  # [rank, rank, *kernel]
    factor: float  # alpha / rank

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Entry:
    """The tensors of one module in the file."""

    stem: str  # their common name
    tensors: dict[str, Stored]  # by suffix, a key of ROLES

    def role(self, role: str) -> Stored | None:
        return next((s for ending, s in self.tensors.items() if ROLES[ending] == role), None)


@dataclass(frozen=True)
class LoraReport:
    """Which of a LoRA's modules were applied."""

    name: str  # of the file, without its suffix
    made_for: str  # architecture
    applied_to: str  # architecture
    spellings: list[str]
    modules: int  # in the file
    applied: int
    parts: dict[str, int]  # modules applied, by part of the pipeline
    ranks: list[int]
    dropped: dict[str, dict[str, int]]  # reason -> the teacher's block -> modules

    def line(self) -> str:
        """The report in one line."""
        text = f"LoRA {self.name}, made for {self.made_for}: {self.applied} of {self.modules}"
        reasons = (f"{sum(blocks.values())} {why}" for why, blocks in self.dropped.items())
        lost = f"; dropped: {', '.join(reasons)}" if self.dropped else ""
        return f"{text} modules fit {self.applied_to}{lost}"


@dataclass(frozen=True)
class Lora:
    """A LoRA file mapped to `base`."""

    file: Path
    base: BaseModel
    made_for: BaseModel
    entries: dict[Target, Entry]  # by module of `made_for`; the whole file
    moves: dict[Target, Target]  # module of `made_for` -> module of `base`, if there is one
    adapters: dict[Target, Adapter]  # by module of `base`
    report: LoraReport


def teacher_of(student: UNetArchitecture) -> UNetArchitecture | None:
    """The known architecture that `student` is a cut of, or None.

    For a custom student, the first architecture whose blocks it can inherit.
    """
    rows = [row for row in ARCHITECTURES.values() if not teacher_faults(row) and row != student]
    if student.name in ARCHITECTURES:
        return next((r for r in rows if any(student_of(r, cut) == student for cut in CUTS)), None)
    return next((row for row in rows if _inherits(student, row)), None)


def _inherits(student: UNetArchitecture, teacher: UNetArchitecture) -> bool:
    try:
        block_map(teacher, student)
    except UserError:
        return False
    return True


def read(file: Path, base: BaseModel, teacher: UNetArchitecture | None = None) -> Lora:
    """Reads a LoRA `file` for the model `base`.

    `teacher`: the U-Net that the base's was cut from, by default `teacher_of(base.unet)`. A LoRA is
    taken as made for `base` if all its tensors fit, else as made for the teacher. Raises
    `UserError` if the file is not a LoRA or LoCon, or is for another kind of model.
    """
    entries, settings = _entries(file), peft.read_settings(file)
    _check_kind(file, entries, base)
    made_for, faults = base, _faults(entries, base)
    teacher = teacher or teacher_of(base.unet)
    if faults and teacher:
        made_for = replace(base, unet=teacher)
        faults = _faults(entries, made_for)
    if faults:
        raise UserError(f"{file} does not fit {made_for.unet.name}: {faults[0]}")
    of_file = {targets(made_for)[entry.stem][1]: entry for entry in entries}
    if len(of_file) < len(entries):
        raise UserError(f"{file} names a module twice, in two spellings")
    settings.check(file, of_file)
    moves = {t: m for t, m in _moves(made_for, base).items() if t in of_file}
    adapters = {moves[t]: _adapter(of_file[t], t, settings) for t in moves}
    report = LoraReport(
        name=file.stem,
        made_for=made_for.unet.name,
        applied_to=base.unet.name,
        spellings=sorted({targets(made_for)[entry.stem][0] for entry in entries}),
        modules=len(of_file),
        applied=len(adapters),
        parts={part: sum(t.part == part for t in adapters) for part in PARTS},
        ranks=sorted({adapter.rank for adapter in adapters.values()}),
        dropped=_dropped([t for t in of_file if t not in moves], made_for, base),
    )
    if not adapters:
        raise UserError(f"{file}: none of its modules fits; {report.line()}")
    return Lora(file, base, made_for, of_file, moves, adapters, report)


# --- the file -------------------------------------------------------------------------------


def _entries(file: Path) -> list[Entry]:
    """The file's tensors by module. Raises `UserError` if it is not a complete LoRA."""
    tensors: dict[str, dict[str, Stored]] = {}
    unexpected = []
    for key, stored in read_header(file).items():
        for mark, kind in _OTHER_ADAPTERS.items():
            if mark in key:
                raise UserError(f"{file} is a {kind} ({key}); only LoRA and LoCon are supported")
        if parts := split(key):
            tensors.setdefault(parts[0], {})[parts[1]] = stored
        else:
            unexpected.append(key)
    if not any(ROLES[ending] != "alpha" for endings in tensors.values() for ending in endings):
        raise UserError(
            f"{file} is not a LoRA: none of its {len(unexpected)} tensors is named like one"
        )
    if unexpected:
        raise UserError(f"{file} has tensors that are not part of a LoRA: {some(unexpected)}")
    entries = [Entry(stem, endings) for stem, endings in tensors.items()]
    if half := [e.stem for e in entries if not (e.role("down") and e.role("up"))]:
        raise UserError(f"{file} lacks the up or down matrix of {some(half)}")
    kinds = {s.dtype for e in entries for s in e.tensors.values()}
    if strange := kinds - {*FLOATS}:
        raise UserError(f"{file} holds {some(sorted(strange))} tensors; they must be floats")
    return entries


def _check_kind(file: Path, entries: list[Entry], base: BaseModel) -> None:
    """Raises `UserError` if the LoRA is recognisably for another model."""
    own = base.unet.context
    for entry in entries:
        for beginning, model in _OTHER_MODELS.items():
            if entry.stem.startswith(beginning):
                raise UserError(f"{file} is a LoRA for {model} ({entry.stem}), not for SDXL")
        down = entry.role("down")
        if "attn2" in entry.stem and entry.stem.endswith(("to_k", "to_v")) and down:
            context = down.shape[1] if len(down.shape) > 1 else 0
            if context != own:
                model = _CONTEXTS.get(context, "another model")
                raise UserError(
                    f"{file} is a LoRA for {model}, whose text embeddings are {context} wide; "
                    f"those of {base.unet.name} are {own} wide"
                )


def _faults(entries: Iterable[Entry], base: BaseModel) -> list[str]:
    """Why the entries are not a LoRA for `base`, worst first; empty if they are one."""
    known, sizes = targets(base), shapes(base)
    unknown = [e.stem for e in entries if e.stem not in known]
    misshapen = [
        f"{e.stem}, expected {list(sizes[known[e.stem][1]])}"
        for e in entries
        if e.stem in known and not _fits(e, sizes[known[e.stem][1]])
    ]
    named = {"unknown modules": unknown, "wrong shape": misshapen}
    return [f"{what}: {some(stems)}" for what, stems in named.items() if stems]


def _fits(entry: Entry, weight: tuple[int, ...]) -> bool:
    """Whether up @ down has the weight's shape, and alpha is a single number."""
    down, up, mid, alpha = (entry.role(role) for role in ("down", "up", "mid", "alpha"))
    assert down and up
    rank = down.shape[0] if down.shape else 0
    inner = (rank, weight[1])
    if mid:
        whole = _flat(down.shape) == inner and mid.shape == (rank, rank, *weight[2:])
    else:
        whole = _flat(down.shape) == _flat((*inner, *weight[2:]))
    single = alpha is None or math.prod(alpha.shape) == 1
    return rank > 0 and whole and _flat(up.shape) == (weight[0], rank) and single


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 kernel as a matrix."""
    return shape[:2] if all(side == 1 for side in shape[2:]) else shape


def _adapter(entry: Entry, target: Target, settings: peft.PeftSettings) -> Adapter:
    down, up, mid, alpha = (entry.role(role) for role in ("down", "up", "mid", "alpha"))
    assert down and up
    rank = down.shape[0]
    factor = settings.factor(target, rank)
    if alpha:
        factor = load_tensor(alpha, "F32").item() / rank
    if not math.isfinite(factor):
        raise UserError(f"{down.file}: alpha of {entry.stem} is {factor * rank}")
    return Adapter(down, up, mid, factor)


# --- the map --------------------------------------------------------------------------------


def _moves(made_for: BaseModel, base: BaseModel) -> dict[Target, Target]:
    """Module of `made_for` -> module of `base` that inherits it."""
    moves = {target: target for target in shapes(base) if target.part != "unet"}
    if made_for == base:
        return moves | {target: target for target in shapes(base)}
    inherited = tensor_map(made_for.unet, base.unet)
    for target in shapes(base):
        if target.part == "unet":
            source = inherited[f"{target.path}.weight"].removesuffix(".weight")
            moves[Target("unet", source)] = target
    return moves


def _dropped(
    lost: Iterable[Target], made_for: BaseModel, base: BaseModel
) -> dict[str, dict[str, int]]:
    """Why modules were dropped: reason -> teacher block -> number of modules."""
    kept = set(block_map(made_for.unet, base.unet).values()) if made_for != base else set()
    counts: dict[str, Counter[str]] = {}
    for target in lost:
        block, reason = _gone(target.path, kept)
        counts.setdefault(reason, Counter())[block] += 1
    return {reason: dict(blocks) for reason, blocks in counts.items()}


def _gone(path: str, kept: set[str]) -> tuple[str, str]:
    """(teacher block of a module, why the student lacks it)."""
    found = re.match(r"(.+?\.(?:attentions|resnets)\.\d+)(\.transformer_blocks\.\d+)?", path)
    assert found, path
    layer, block = found[1], found[2] or ""
    if layer in kept:
        return layer + block, "of depth cut"
    return layer, "of the mid block" if layer.startswith("mid_block") else "of layers cut"
