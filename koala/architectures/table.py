"""The table of U-Net architectures, one row each.

Everything else about a U-Net is computed from its row in plain Python: the diffusers config
(`config`), the name and shape of every tensor and the parameter count (`layout`), the cost of a
forward pass (`flops`). A student is defined as its teacher's row and a `Cut`.

Depths are transformer blocks per resnet of a stage; 0: the stage has no attention.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from koala.errors import UserError, unknown

LATENT_CHANNELS = 4
TIME_IDS = 6  # SDXL's size and crop conditioning: original, crop and target, two numbers each
FACTOR = 8  # pixels along one side of a latent position: every VAE of the family is f8


@dataclass(frozen=True)
class UNetArchitecture:
    """One U-Net, in diffusers' `UNet2DConditionModel` terms.

    Two rows are equal if all their tensors have the same name, shape and use. `name`, `sample` and
    `tokens` are labels: SDXL-Turbo (64) is the same U-Net as SDXL (128).
    """

    name: str = field(compare=False)
    sample: int = field(compare=False)  # native side of the latents
    tokens: int = field(compare=False)  # text tokens at the native prompt length
    widths: tuple[int, ...]  # channels of each stage
    heads: tuple[int, ...]  # attention heads of each stage
    layers: int  # resnets of a down block; an up block has one more
    depths: tuple[int, ...]  # transformer blocks per resnet, DW-1 first
    up: tuple[tuple[int, ...], ...]  # the same for every resnet of every up block, UP-1 first
    mid: int | None  # transformer blocks of the mid block; 0: one resnet; None: no mid block
    context: int  # width of the text embeddings
    pooled: int  # width of the pooled text embedding; 0: no added conditioning (before SDXL)
    time_ids: int  # width of the embedding of one of the six size and crop numbers
    groups: int  # of every group norm
    linear: bool  # transformer projections are linear (else 1x1 convolutions)
    # Of modules that are narrower inside than the rule has them (`layout.inner_widths`):
    # path and width. Only pruned U-Nets have any.
    inner: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Cut:
    """What a student keeps of its teacher, with one layer a block (KOALA, section 3.1)."""

    depth: tuple[Fraction, ...]  # share of the teacher's depth that stays, per stage, rounded up
    mid: bool


HALF, THREE_FIFTHS, ALL = Fraction(1, 2), Fraction(3, 5), Fraction(1)
CUTS = {
    "bk-sdxl": Cut((ALL, ALL, ALL), mid=True),
    "koala-1b": Cut((ALL, ALL, THREE_FIFTHS), mid=True),
    "koala-700m": Cut((ALL, ALL, HALF), mid=False),
}


def mirrored(depths: tuple[int, ...], layers: int) -> tuple[tuple[int, ...], ...]:
    """The up stages' depths for those of the down stages: one ResNet more, deepest first."""
    return tuple((depth,) * (layers + 1) for depth in reversed(depths))


_SSD_UP = ((4, 4, 10), (2, 1, 1), (0, 0, 0))

# `sdxl-mini-deep` is for the depth rules, which differ only where a stage is cut by several blocks.
# One head's width gives the heads of every stage; up None mirrors the down depths.
# fmt: off
_ROWS: tuple[tuple[Any, ...], ...] = (
    # name       sample text widths  head layers depths   up   mid context pooled time_ids groups
    ("sdm-v2.0",     96, 77, (320, 640, 1280, 1280), 64, 2, (1, 1, 1, 0), None, 1, 1024, 0, 0, 32),
    ("sdxl",        128, 77, (320, 640, 1280), 64, 2, (0, 2, 10), None,    10, 2048, 1280, 256, 32),
    ("ssd-1b",      128, 77, (320, 640, 1280), 64, 2, (0, 2, 4),  _SSD_UP,  0, 2048, 1280, 256, 32),
    ("segmind-vega", 128, 77, (320, 640, 1280), 64, 2, (0, 1, 2), None,     0, 2048, 1280, 256, 32),
    ("sdxl-mini",    16, 32, (64, 96, 128),    32, 2, (0, 1, 2),  None,     2,  160,   96,  32, 16),
    ("sdxl-mini-deep", 16, 32, (64, 96, 128),  32, 2, (0, 2, 4),  None,     4,  160,   96,  32, 16),
)
# fmt: on
_STUDENTS = (  # name, teacher, cut
    ("bk-sdxl", "sdxl", "bk-sdxl"),
    ("koala-1b", "sdxl", "koala-1b"),
    ("koala-700m", "sdxl", "koala-700m"),
    ("koala-mini-1b", "sdxl-mini", "koala-1b"),
    ("koala-mini", "sdxl-mini", "koala-700m"),
)
_ORDER = (
    "sdm-v2.0", "sdxl", "bk-sdxl", "koala-1b", "koala-700m", "ssd-1b", "segmind-vega",
    "sdxl-mini", "koala-mini-1b", "koala-mini", "sdxl-mini-deep",
)  # fmt: skip


def root_faults(unet: UNetArchitecture) -> list[str]:
    """Why a U-Net is not SDXL's or one like it, of which `CUTS` are shares; empty if it is.

    One phrase per fault.
    """
    faults = _teacher_faults(unet)
    if unet.layers != 2:
        faults.append(f"has layers_per_block {unet.layers}, an SDXL U-Net has 2")
    if not unet.mid:
        mid = "no mid block" if unet.mid is None else "a mid block without attention"
        faults.append(f"has {mid}, an SDXL U-Net has one with attention")
    if unet.up != mirrored(unet.depths, unet.layers):
        faults.append("has up blocks whose depths do not mirror the down blocks'")
    if not faults and unet.mid != unet.depths[-1]:
        faults.append(f"has mid depth {unet.mid}, not that of its last stage")
    return faults


def _teacher_faults(teacher: UNetArchitecture) -> list[str]:
    """Why a U-Net can have no student, one phrase per fault."""
    faults = []
    if teacher.inner:
        faults.append("is pruned, and a cut is made of whole blocks")
    if not teacher.pooled:
        faults.append("has no addition embedding (pooled text and size), an SDXL U-Net has one")
    if len(teacher.depths) != 3:
        faults.append(f"has {len(teacher.depths)} stages, an SDXL U-Net has 3")
    return faults


def _root(teacher: UNetArchitecture, cut: str) -> UNetArchitecture:
    """The U-Net that the named cut of `teacher` is a share of: itself, or what it was cut from.

    UserError if that is not known.
    """
    if not (faults := root_faults(teacher)):
        return teacher
    for name, of, _ in _STUDENTS:
        if teacher == ARCHITECTURES.get(name):
            return ARCHITECTURES[of]
    most = ",".join(map(str, teacher.depths))
    raise UserError(
        f"{teacher.name} cannot be cut to {cut}, which is a share of an SDXL U-Net: it "
        f"{'; '.join(faults)}; give depths, at most {most}, with {_NO_MID} for no mid block"
    )


def student_of(teacher: UNetArchitecture, to: str) -> UNetArchitecture:
    """The student that the cut `to` makes of `teacher`; the same rule at every size.

    A teacher may itself be a student: a named cut is then the same share of what that was cut from,
    so KOALA-700M of KOALA-1B is KOALA-700M. Whether the teacher has all its blocks is not checked
    here (`koala.architectures.block_map`).

    to: a name in `CUTS`, or custom depths such as "0,2,4": transformer blocks per resnet of each
    stage, with one layer per block. The suffix ",no-mid" removes the mid block, which otherwise is
    as deep as the last stage. Raises `UserError` if `to` is neither, the teacher is of no SDXL
    kind, or has fewer blocks.
    """
    if faults := _teacher_faults(teacher):
        raise UserError(f"{teacher.name} cannot be the teacher: {'; '.join(faults)}")
    root = teacher
    if cut := CUTS.get(to):
        root, mid = _root(teacher, to), cut.mid
        depths = tuple(math.ceil(d * s) for d, s in zip(root.depths, cut.depth, strict=True))
    else:
        mid = not to.endswith(_NO_MID)
        depths = _own_depths(to, teacher)
    student = replace(
        teacher,
        name=f"{to} of {root.name}" if cut else "custom",
        layers=1,
        depths=depths,
        up=mirrored(depths, 1),
        mid=depths[-1] if mid else None,
    )
    for name, of, by in _STUDENTS:
        if to == by and root == ARCHITECTURES.get(of):
            return replace(student, name=name)
    return next((row for row in ARCHITECTURES.values() if row == student), student)


_NO_MID = ",no-mid"


def check_student(to: str) -> None:
    """UserError unless `to` is a name in `CUTS`, or spelt as depths, for whatever teacher."""
    if to not in CUTS and not re.fullmatch(rf"\d{{1,3}}(,\d{{1,3}})*({_NO_MID})?", to, re.ASCII):
        raise unknown("student", to, CUTS, f", or depths such as 0,2,4 or 0,2,4{_NO_MID}")


def _own_depths(to: str, teacher: UNetArchitecture) -> tuple[int, ...]:
    """The depths in "0,2,4" or "0,2,4,no-mid"; `UserError` if `teacher` has fewer."""
    check_student(to)
    depths = tuple(map(int, to.removesuffix(_NO_MID).split(",")))
    pairs = zip(depths, teacher.depths, strict=False)
    if len(depths) != len(teacher.depths) or not any(depths) or any(s > t for s, t in pairs):
        most = ",".join(map(str, teacher.depths))
        raise UserError(
            f"depths {','.join(map(str, depths))} cannot be cut from {most}: give "
            f"{len(teacher.depths)} numbers, none above the teacher's, not all 0"
        )
    return depths


def _row(
    name: str, sample: int, tokens: int, widths: tuple[int, ...], head: int, layers: int,
    depths: tuple[int, ...], up: tuple[tuple[int, ...], ...] | None, mid: int | None,
    context: int, pooled: int, time_ids: int, groups: int,
) -> UNetArchitecture:  # fmt: skip
    heads = tuple(width // head for width in widths)
    up = up or mirrored(depths, layers)
    return UNetArchitecture(
        name, sample, tokens, widths, heads, layers, depths, up, mid,
        context, pooled, time_ids, groups, linear=True,
    )  # fmt: skip


ARCHITECTURES: dict[str, UNetArchitecture] = {}
for _values in _ROWS:
    ARCHITECTURES[_values[0]] = _row(*_values)
for _name, _teacher, _cut in _STUDENTS:
    ARCHITECTURES[_name] = student_of(ARCHITECTURES[_teacher], _cut)
ARCHITECTURES = {name: ARCHITECTURES[name] for name in _ORDER}


def get(name: str) -> UNetArchitecture:
    """The architecture of that name; `UserError` lists the names."""
    if name not in ARCHITECTURES:
        raise unknown("architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name]
