"""Reads a LoRA file: the modules it changes, and their counterparts in the model at hand.

A LoRA adds `alpha / rank * up @ down` to a weight (arXiv 2106.09685); `koala.lora.kinds` has the
other kinds. A LoRA of a student's teacher is mapped by weight inheritance: each student block
takes the adapter of the teacher block that it inherits from. Adapters without a counterpart are
dropped, counted and reported. Only the file's header is read here.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from koala.architectures.block_map import block_map, tensor_map
from koala.architectures.table import (
    ARCHITECTURES,
    CUTS,
    UNetArchitecture,
    root_faults,
    student_of,
)
from koala.checkpoints import lora_families
from koala.checkpoints.foreign import foreign
from koala.checkpoints.tensors import (
    FLOATS,
    FP8,
    Stored,
    load_tensor,
    read_header,
    read_metadata,
)
from koala.checkpoints.validate import some
from koala.errors import UserError
from koala.lora import kinds, peft
from koala.lora.folder import check_file
from koala.lora.names import PARTS, ROLES, BaseModel, Target, shapes, split, targets

_OTHER_ADAPTERS = {  # substrings of tensor names in other kinds of adapter
    ".on_input": "IA3", ".ia3_l": "IA3", ".oft_": "OFT", ".boft_": "BOFT", ".a1.weight": "GLoRA",
    ".lora_E": "AdaLoRA", ".vera_lambda": "VeRA", ".fourierft_": "FourierFT", ".hra_u": "HRA",
    ".vblora_": "VB-LoRA", ".randlora_": "RandLora",
}  # fmt: skip
# What programs put beside a LoRA and no adapter of a weight needs: patterns of tensor names.
_BESIDE = {
    "embeddings": r"bundle_emb\..*",
    "biases": r".*(\.diff_b|\.lora_B(\.[^.]+)?\.bias|\.bias|\.bias_(indices|values|size))",
    "norms": r".*\.[wb]_norm",
    "whole weights": r".*(\.modules_to_save\..*|\.set_weight)",
    "training states": r"global_step|epoch|step",
}
STRAY = 0.1  # of a file's modules may be unknown; with more it is for another model
MADE_FOR = "koala.unet"  # metadata: the U-Net that a file of ours is for


@dataclass(frozen=True)
class Adapter:
    """The adapter of one weight: factor * `kinds.change`, without the scale."""

    kind: str  # one of `kinds.KINDS`
    factors: Mapping[str, Stored]  # by role, without `kinds.NUMBERS`
    rank: int | None
    factor: float  # alpha / rank, times the scalar if there is one

    @property
    def decomposed(self) -> bool:
        """Whether it is a DoRA: the sum with the weight is scaled to stored norms."""
        return any(role in self.factors for role in kinds.NORMS)


@dataclass(frozen=True)
class Entry:
    """The tensors of one module in the file."""

    stem: str  # their common name
    tensors: dict[str, Stored]  # by suffix, a key of ROLES

    @property
    def file(self) -> Path:
        return next(iter(self.tensors.values())).file

    @property
    def roles(self) -> dict[str, Stored]:
        return {ROLES[ending]: stored for ending, stored in self.tensors.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {role: stored.shape for role, stored in self.roles.items()}


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
    kinds: list[str]  # of adapters, such as "LoRA" and "LoHa with DoRA"
    left_out: dict[str, list[str]]  # what is no adapter of a weight: kind -> tensors or modules
    doubt: str  # why it may be made for another model; "" if it is clear

    def line(self) -> str:
        """The report in one line."""
        kind = self.kinds[0] if len(self.kinds) == 1 else "LoRA"
        text = f"{kind} {self.name}, made for {self.made_for}: {self.applied} of {self.modules}"
        reasons = (f"{sum(blocks.values())} {why}" for why, blocks in self.dropped.items())
        lost = f"; dropped: {', '.join(reasons)}" if self.dropped else ""
        beside = [f"{what} ({len(names)}: {some(names)})" for what, names in self.left_out.items()]
        left = f"; left out: {', '.join(beside)}" if beside else ""
        return f"{text} modules fit {self.applied_to}{lost}{left}{self.doubt and '; '}{self.doubt}"


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
    rows = [row for row in ARCHITECTURES.values() if not root_faults(row) and row != student]
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

    `teacher`: the U-Net that the base's was cut from, by default `teacher_of(base.unet)`. Whether
    it is made for `base` or for the teacher follows from its names and shapes; where both fit,
    from its metadata, else it is taken as the teacher's, and the report says the doubt. Raises
    `UserError` if the file is not a LoRA of a known kind, or is for another kind of model.
    """
    check_file(file)
    teacher = teacher or teacher_of(base.unet)
    _check_family(file, base, teacher)
    entries, left_out = _entries(file)
    settings = peft.read_settings(file)
    _check_context(file, entries, base)
    made_for, entries, doubt = _made_for(file, entries, base, teacher)
    known = targets(made_for)
    if strange := [entry.stem for entry in entries if entry.stem not in known]:
        left_out = {**left_out, "unknown modules": strange}
        entries = [entry for entry in entries if entry.stem in known]
    of_file = {known[entry.stem][1]: entry for entry in entries}
    if len(of_file) < len(entries):
        raise UserError(f"{file} names a module twice, in two spellings")
    settings.check(file, of_file)
    moves = {t: m for t, m in _moves(made_for, base).items() if t in of_file}
    adapters = {moves[t]: _adapter(of_file[t], t, settings) for t in moves}
    report = LoraReport(
        name=file.stem,
        made_for=made_for.unet.name,
        applied_to=base.unet.name,
        spellings=sorted({known[entry.stem][0] for entry in entries}),
        modules=len(of_file),
        applied=len(adapters),
        parts={part: sum(t.part == part for t in adapters) for part in PARTS},
        ranks=sorted({adapter.rank for adapter in adapters.values() if adapter.rank}),
        dropped=_dropped([t for t in of_file if t not in moves], made_for, base),
        kinds=sorted({_kind(adapter) for adapter in adapters.values()}),
        left_out=left_out,
        doubt=doubt,
    )
    if not adapters:
        raise UserError(f"{file}: none of its modules fits; {report.line()}")
    return Lora(file, base, made_for, of_file, moves, adapters, report)


def _kind(adapter: Adapter) -> str:
    if not adapter.decomposed:
        return adapter.kind
    return "DoRA" if adapter.kind == "LoRA" else f"{adapter.kind} with DoRA"


# --- the file -------------------------------------------------------------------------------


def _entries(file: Path) -> tuple[list[Entry], dict[str, list[str]]]:
    """The file's tensors by module, and those left out: kind -> names.

    Raises `UserError` if it is not a complete LoRA.
    """
    header = read_header(file)
    tensors, left_out = _by_module(file, header)
    for stem in [s for s, of in tensors.items() if {ROLES[e] for e in of} <= {*kinds.NUMBERS}]:
        left_out.setdefault("alphas without matrices", []).append(stem)
        del tensors[stem]
    if not tensors:
        raise _no_lora(file, header, left_out)
    others = left_out.get("other tensors", [])
    if len(others) > STRAY * len(header):
        raise UserError(f"{file} has tensors that are not part of a LoRA: {some(others)}")
    entries = [Entry(stem, endings) for stem, endings in tensors.items()]
    if half := [e.stem for e in entries if not kinds.kind_of(e.roles)]:
        raise UserError(f"{file}: the matrices of {some(half)} are not all there, or of two kinds")
    factors = {s.dtype for e in entries for r, s in e.roles.items() if r not in kinds.NUMBERS}
    if strange := factors - {*FLOATS, *FP8}:
        raise UserError(f"{file} holds {some(sorted(strange))} tensors; they must be floats")
    return entries, left_out


def _by_module(
    file: Path, header: Mapping[str, Stored]
) -> tuple[dict[str, dict[str, Stored]], dict[str, list[str]]]:
    """Tensors by module and ending, and those left out: kind -> names.

    Raises `UserError` for an adapter of another kind, and for several adapters.
    """
    tensors: dict[str, dict[str, Stored]] = {}
    left_out: dict[str, list[str]] = {}
    adapter = ""
    for key, stored in header.items():
        for mark, kind in _OTHER_ADAPTERS.items():
            if mark in key:
                kind = "BOFT" if kind == "OFT" and len(stored.shape) == 4 else kind
                raise UserError(f"{file} is {kind} ({key}); supported are LoRA, DoRA, LoHa, LoKr")
        if what := _beside(key, stored):
            left_out.setdefault(what, []).append(key)
        elif parts := split(key):
            stem, ending, named = parts
            if (named and adapter not in ("", named)) or ending in tensors.get(stem, {}):
                raise UserError(f"{file} holds several adapters ({adapter}, {named}): split it")
            adapter = named or adapter
            tensors.setdefault(stem, {})[ending] = stored
        else:
            left_out.setdefault("other tensors", []).append(key)
    return tensors, left_out


def _no_lora(
    file: Path, header: Mapping[str, Stored], left_out: Mapping[str, list[str]]
) -> UserError:
    """What a file without a weight's adapter is."""
    beside = {what: names for what, names in left_out.items() if what in _BESIDE}
    if beside and "other tensors" not in left_out:
        named = ", ".join(f"{what} ({some(names)})" for what, names in beside.items())
        return UserError(f"{file} changes no weight: it holds {named}, which are not applied here")
    kind = foreign({key: stored.shape for key, stored in header.items()}) or "an SDXL model"
    return UserError(
        f"{file} is not a LoRA: none of its {len(header)} tensors is named like one; it is {kind}"
    )


def _beside(key: str, stored: Stored) -> str:
    """What a tensor is that no adapter of a weight needs; "" if it may be part of one."""
    if key.endswith(".diff") and len(stored.shape) == 1:
        return "norms"
    return next((what for what, mark in _BESIDE.items() if re.fullmatch(mark, key)), "")


def _check_family(file: Path, base: BaseModel, teacher: UNetArchitecture | None) -> None:
    """Raises `UserError` if names that neither model has are another family's, or it says so."""
    known = {*targets(base), *(targets(replace(base, unet=teacher)) if teacher else ())}
    strange: dict[str, int | None] = {}  # module -> width of its input
    adapter = False
    for key, stored in read_header(file).items():
        stem, ending, _ = split(key) or (key, "", "")
        adapter = adapter or bool(ending) or "lora" in key
        if stem not in known:
            wide = ROLES.get(ending) == "down" and len(stored.shape) > 1
            strange[stem] = stored.shape[1] if wide else strange.get(stem)
    if not adapter:
        return
    stated = lora_families.of_metadata(read_metadata(file))
    found = lora_families.of_modules(strange)
    if stated and stated[0] != "SDXL" and (found or stated[0] == lora_families.KOLORS):
        found = stated
    if found:
        raise UserError(f"{file} is a LoRA for {found[0]} ({found[1]}), not for SDXL")


def _check_context(file: Path, entries: list[Entry], base: BaseModel) -> None:
    """Raises `UserError` if the LoRA's text embeddings are another model's."""
    own = base.unet.context
    for entry in entries:
        down = entry.shapes.get("down")
        if "attn2" in entry.stem and entry.stem.endswith(("to_k", "to_v")) and down:
            context = down[1] if len(down) > 1 else 0
            if context != own:
                model = lora_families.CONTEXTS.get(context, "another model")
                raise UserError(
                    f"{file} is a LoRA for {model}, whose text embeddings are {context} wide; "
                    f"those of {base.unet.name} are {own} wide"
                )


def _made_for(
    file: Path, entries: list[Entry], base: BaseModel, teacher: UNetArchitecture | None
) -> tuple[BaseModel, list[Entry], str]:
    """What the entries are a LoRA for, the entries, and why that may be wrong.

    Entries of a few unknown modules are among them; UserError for many, or a wrong shape.
    """
    readings = [base, *([replace(base, unet=teacher)] if teacher else [])]
    unknown = [[e.stem for e in entries if e.stem not in targets(each)] for each in readings]
    misshapen = [
        [
            f"{e.stem}, expected {list(shapes(each)[found[1]])}"
            for e in entries
            if (found := targets(each).get(e.stem))
            and not kinds.fits(e.shapes, shapes(each)[found[1]])
        ]
        for each in readings
    ]
    faults = [len(one) + len(other) for one, other in zip(unknown, misshapen, strict=True)]
    if len(readings) == 2 and faults == [0, 0]:
        made_for, doubt = _either(file, entries, *readings)
        return made_for, entries, doubt
    best = min(range(len(readings)), key=lambda n: (faults[n], -n))
    name = readings[best].unet.name
    many = len(unknown[best]) > STRAY * len(entries)
    stated = lora_families.of_metadata(read_metadata(file))
    if stated and stated[0] != "SDXL":
        family, said = stated
        if many or misshapen[best]:
            raise UserError(f"{file} is a LoRA for {family} ({said}), not for SDXL")
        return readings[best], entries, f"but its {said}, which is {family}'s"
    if many:
        raise UserError(f"{file} does not fit {name}: unknown modules: {some(unknown[best])}")
    if misshapen[best]:
        if family := lora_families.of_widths(_other_widths(entries, readings[best])):
            raise UserError(f"{file} is a LoRA for {family}: {misshapen[best][0]} for {name}")
        raise UserError(f"{file} does not fit {name}: wrong shape: {some(misshapen[best])}")
    return readings[best], entries, ""


def _other_widths(entries: list[Entry], base: BaseModel) -> list[int]:
    """Widths of the inputs of modules whose inputs in the base are of another width."""
    found = []
    for entry in entries:
        down, named = entry.shapes.get("down", ()), targets(base).get(entry.stem)
        if named and len(down) > 1 and down[1] != shapes(base)[named[1]][1]:
            found.append(down[1])
    return found


def _either(
    file: Path, entries: list[Entry], base: BaseModel, teacher: BaseModel
) -> tuple[BaseModel, str]:
    """Which of two readings, that both fit, is meant, and why that may be wrong."""
    moves, own = _moves(teacher, base), targets(base)
    read_as = [(targets(teacher)[e.stem][1], own[e.stem][1]) for e in entries]
    if all(moves.get(source) == target for source, target in read_as):
        return base, ""  # they change the same weights either way
    metadata = read_metadata(file)
    for each in (base, teacher):
        if metadata.get(MADE_FOR) == signature(each.unet):
            return each, ""
    found = {target for _, target in read_as if target.part == "unet"}
    ends = {_end(target.path) for target in found}
    if all(t in found for t in shapes(base) if t.part == "unet" and _end(t.path) in ends):
        return base, ""  # every such module of the student, and none that only the teacher has
    stated = lora_families.of_metadata(metadata)
    if stated and stated[0] == "SDXL":
        return teacher, ""
    names = base.unet.name, teacher.unet.name
    return teacher, (
        f"its names fit {names[0]} as well, and nothing in it says which is meant: "
        f"taken as made for {names[1]}"
    )


def _end(path: str) -> str:
    """A module's path within its block."""
    return re.split(r"(?:transformer_blocks|attentions|resnets)\.\d+\.", path)[-1]


def signature(unet: UNetArchitecture) -> str:
    """A U-Net's architecture as text, for the metadata."""
    return json.dumps({**asdict(unet), "name": ""}, sort_keys=True)


def _adapter(entry: Entry, target: Target, settings: peft.PeftSettings) -> Adapter:
    factors = entry.roles
    alpha, scalar = (factors.pop(role, None) for role in kinds.NUMBERS)
    kind, rank = kinds.kind_of(factors), kinds.rank_of(entry.shapes)
    if settings.decomposed(target) and not any(role in factors for role in kinds.NORMS):
        raise UserError(f"{entry.file} is a DoRA (use_dora) without the magnitude of {entry.stem}")
    factor = settings.factor(target, rank)
    if alpha and rank:  # without a rank, LyCORIS stores an alpha of no meaning
        factor = _number(alpha) / rank
    if scalar:
        factor *= _number(scalar)
    if not math.isfinite(factor):
        raise UserError(f"{entry.file}: alpha of {entry.stem} is {factor}")
    return Adapter(kind, factors, rank, factor)


def _number(stored: Stored) -> float:
    """Of a tensor of one number, which some programs write as a whole one."""
    return float(load_tensor(stored, "F32" if stored.dtype in {*FLOATS, *FP8} else None).item())


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
