"""The teacher block that each student block inherits from.

The map is computed from the two architectures alone, so one rule makes KOALA of SDXL and
KOALA-mini of SDXL-mini, and distillation pairs the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from koala.architectures.layout import tensor_shapes
from koala.architectures.table import UNetArchitecture
from koala.errors import UserError, unknown

# Block of the teacher's t that student block k of s inherits from (KOALA, table 4):
DEPTH_RULES: dict[str, Callable[[int, int, int], int]] = {
    "bottom": lambda k, s, t: k,  # the first s; the paper's choice
    "interleave": lambda k, s, t: k * t // s,  # evenly spaced from the first: 0, 2, 4, ... of 2s
    "up": lambda k, s, t: t - s + k,  # the last s
}


def check_depth_rule(rule: str) -> None:
    """UserError unless it is one of `DEPTH_RULES`."""
    if rule not in DEPTH_RULES:
        raise unknown("depth rule", rule, DEPTH_RULES)


def _check_pair(teacher: UNetArchitecture, student: UNetArchitecture) -> None:
    """Raises `UserError` unless every student block has a teacher block of its size."""
    fits = (
        student.widths == teacher.widths
        and student.layers <= teacher.layers
        and all(s <= t for s, t in _depth_pairs(teacher, student))
        and (student.mid is None or (teacher.mid is not None and student.mid <= teacher.mid))
    )
    same = ("heads", "context", "pooled", "time_ids", "groups", "linear")
    fits = fits and all(getattr(student, key) == getattr(teacher, key) for key in same)
    if not fits:
        raise UserError(
            f"{student.name} cannot inherit from {teacher.name}: it must be the same U-Net with "
            f"fewer layers, less depth or no mid block; it has {_blocks(student)}, the teacher "
            f"{_blocks(teacher)}"
        )


def _blocks(unet: UNetArchitecture) -> str:
    """ "2 layers a block, depths 0,2,10 and a mid block", of a U-Net."""
    layers = f"{unet.layers} layer{'' if unet.layers == 1 else 's'} a block"
    depths = ",".join(map(str, unet.depths))
    return f"{layers}, depths {depths} and {'no' if unet.mid is None else 'a'} mid block"


def _depth_pairs(teacher: UNetArchitecture, student: UNetArchitecture) -> Iterator[tuple[int, int]]:
    """Depths of every student transformer and of the teacher's that it inherits from."""
    yield from zip(student.depths, teacher.depths, strict=True)
    for own, theirs in zip(student.up, teacher.up, strict=True):
        for j, depth in enumerate(own):
            yield depth, theirs[_up_layer(j, teacher, student)]


def _up_layer(j: int, teacher: UNetArchitecture, student: UNetArchitecture) -> int:
    """The teacher's resnet in an up block for the student's resnet j.

    The last one joins the skip of the stage above, whose width differs, so it must come from
    the teacher's last; the others keep their index.
    """
    return j if j < student.layers else teacher.layers


def block_map(
    teacher: UNetArchitecture, student: UNetArchitecture, depth_rule: str = "bottom"
) -> dict[str, str]:
    """Student module prefix -> teacher module prefix ("at the same block location", KOALA 3.1).

    Prefixes are of whole blocks: "conv_in", "up_blocks.0.resnets.1", "up_blocks.0.attentions.1"
    (its norm and projections), "up_blocks.0.attentions.1.transformer_blocks.3", ... A tensor
    belongs to the longest prefix of its name. Raises `UserError` if the depth rule is unknown or
    `student` is not a cut of `teacher`.
    """
    check_depth_rule(depth_rule)
    if len(student.depths) != len(teacher.depths):
        raise UserError(f"{student.name} and {teacher.name} have different numbers of stages")
    _check_pair(teacher, student)
    rule = DEPTH_RULES[depth_rule]
    ends = ["conv_in", "time_embedding", "conv_norm_out", "conv_out"]
    pairs = {end: end for end in [*ends, *(["add_embedding"] if student.pooled else [])]}

    def layer(block: str, j: int, i: int, s: int, t: int) -> None:
        pairs[f"{block}.resnets.{j}"] = f"{block}.resnets.{i}"
        if s:
            pairs[f"{block}.attentions.{j}"] = f"{block}.attentions.{i}"
        for k in range(s):
            mine, theirs = (f"{block}.attentions.{n}.transformer_blocks" for n in (j, i))
            pairs[f"{mine}.{k}"] = f"{theirs}.{rule(k, s, t)}"

    last = len(student.depths) - 1
    for n, (s, t) in enumerate(zip(student.depths, teacher.depths, strict=True)):
        for j in range(student.layers):
            layer(f"down_blocks.{n}", j, j, s, t)
        if n < last:
            pairs[f"down_blocks.{n}.downsamplers.0"] = f"down_blocks.{n}.downsamplers.0"
    if student.mid is not None:
        layer("mid_block", 0, 0, student.mid, teacher.mid or 0)
        if student.mid:
            pairs["mid_block.resnets.1"] = "mid_block.resnets.1"
    for n, (own, theirs) in enumerate(zip(student.up, teacher.up, strict=True)):
        for j, s in enumerate(own):
            i = _up_layer(j, teacher, student)
            layer(f"up_blocks.{n}", j, i, s, theirs[i])
        if n < last:
            pairs[f"up_blocks.{n}.upsamplers.0"] = f"up_blocks.{n}.upsamplers.0"
    return pairs


def tensor_map(
    teacher: UNetArchitecture, student: UNetArchitecture, depth_rule: str = "bottom"
) -> dict[str, str]:
    """Student tensor name -> teacher tensor name, for every tensor of the student.

    Shapes agree. Raises `UserError` as `block_map` does.
    """
    blocks = block_map(teacher, student, depth_rule)
    of_teacher, names = tensor_shapes(teacher), {}
    for name, shape in tensor_shapes(student).items():
        prefix = name
        while prefix not in blocks:
            prefix = prefix[: prefix.rindex(".")]
        names[name] = blocks[prefix] + name[len(prefix) :]
        assert of_teacher[names[name]] == shape, name
    return names
