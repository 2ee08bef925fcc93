"""The skip connections of a U-Net, and which of a teacher's each of its student's stands for.

A ControlNet (arXiv 2302.05543) adds a residual to each skip connection and to the mid block's
output. One that was trained for the teacher is carried over by the block map, as weights are.
"""

from __future__ import annotations

from dataclasses import replace

from koala.architectures.block_map import block_map
from koala.architectures.table import UNetArchitecture


def skip_connections(arch: UNetArchitecture) -> list[tuple[str, int]]:
    """The module that each skip connection comes from and its channels, in diffusers' order."""
    found = [("conv_in", arch.widths[0])]
    last = len(arch.widths) - 1
    for n, width in enumerate(arch.widths):
        found += [(f"down_blocks.{n}.resnets.{j}", width) for j in range(arch.layers)]
        if n < last:
            found.append((f"down_blocks.{n}.downsamplers.0", width))
    return found


def with_layers(arch: UNetArchitecture, layers: int) -> UNetArchitecture:
    """The U-Net that `arch` can be a cut of: with so many layers a stage, and a mid block."""
    up = tuple((max(stage),) * (layers + 1) for stage in arch.up)
    return replace(arch, name="custom", layers=layers, up=up, mid=arch.mid or 0, inner=())


def skip_map(teacher: UNetArchitecture, student: UNetArchitecture) -> list[int | None]:
    """Which of the teacher's residuals each of the student's places takes.

    The places are the skip connections and last the mid block's output; None: the student has no
    mid block. A skip connection takes that of the teacher's module that its own module inherits
    from. Raises `UserError` if `student` is not a cut of `teacher`.
    """
    inherited = block_map(teacher, student)
    numbers = {path: i for i, (path, _) in enumerate(skip_connections(teacher))}
    found: list[int | None] = [numbers[inherited[path]] for path, _ in skip_connections(student)]
    return [*found, None if student.mid is None else len(numbers)]
