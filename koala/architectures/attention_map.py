"""The cross-attentions of a U-Net, and which of a teacher's each of its student's stands for.

An IP-Adapter (arXiv 2308.06721) has a layer for each. One that was trained for the teacher is
carried over by the block map, as weights are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from koala.architectures.block_map import block_map
from koala.architectures.layout import modules
from koala.architectures.table import ARCHITECTURES, UNetArchitecture, mirrored
from koala.errors import UserError

_PARTS = ("down_blocks", "up_blocks", "mid_block")  # as diffusers orders attention processors
_ROOT_LAYERS = 2  # resnets of a down block, in SDXL and what is like it
_MOST_DEPTH = 100


def cross_attentions(arch: UNetArchitecture) -> dict[str, int]:
    """Path -> width of each, in the order of diffusers' attention processors.

    Widths are those of the whole U-Net where it is pruned.
    """
    whole = modules(replace(arch, inner=()))
    found = [(module.path, module.bias) for module in whole if module.attends == "cross"]
    return dict(sorted(found, key=lambda item: _PARTS.index(item[0].split(".")[0])))


def attention_map(teacher: UNetArchitecture, student: UNetArchitecture) -> list[int]:
    """Which of the teacher's cross-attentions each of the student's inherits from.

    Places are those in `cross_attentions`. Raises `UserError` if `student` is not a cut of
    `teacher`.
    """
    inherited, theirs = block_map(teacher, student), [*cross_attentions(teacher)]
    blocks = (path.removesuffix(".attn2") for path in cross_attentions(student))
    return [theirs.index(f"{inherited[block]}.attn2") for block in blocks]


def roots(student: UNetArchitecture, widths: Sequence[int]) -> list[UNetArchitecture]:
    """The U-Nets like SDXL's that `student` can be a cut of and that have such cross-attentions.

    widths: of the cross-attentions, as in `cross_attentions`. There is one if the stages' widths
    differ, as SDXL's do, or none.
    """
    if len(student.depths) != 3:
        return []
    each = 2 * _ROOT_LAYERS + 1  # resnets of a stage, down and up; the mid block is as the last one
    most = min(_MOST_DEPTH, len(widths) // each)
    found = []
    for first, second in product(range(most + 1), repeat=2):
        last, rest = divmod(len(widths) - each * (first + second), each + 1)
        if rest or not 0 < last <= _MOST_DEPTH:
            continue
        depths = (first, second, last)
        counts = [(width, depth) for width, depth in zip(student.widths, depths, strict=True)]
        own = [width for width, depth in counts for _ in range(_ROOT_LAYERS * depth)]
        own += [width for width, depth in counts[::-1] for _ in range((_ROOT_LAYERS + 1) * depth)]
        if [*own, *last * (student.widths[-1],)] == [*widths] and (root := _root(student, depths)):
            found.append(root)
    return found


def _root(student: UNetArchitecture, depths: tuple[int, ...]) -> UNetArchitecture | None:
    """The U-Net of those depths; None if `student` is no cut of it."""
    up = mirrored(depths, _ROOT_LAYERS)
    root = replace(
        student, name="custom", layers=_ROOT_LAYERS, depths=depths, up=up, mid=depths[-1], inner=()
    )
    try:
        block_map(root, student)
    except UserError:
        return None
    return next((row for row in ARCHITECTURES.values() if row == root), root)
