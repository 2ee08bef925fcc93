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


def readers(arch: UNetArchitecture) -> list[str]:
    """The resnet that joins each skip connection, in the order of `skip_connections`."""
    stages = range(len(arch.widths))
    return [f"up_blocks.{i}.resnets.{j}" for i in stages for j in range(arch.layers + 1)][::-1]


def skip_map(teacher: UNetArchitecture, student: UNetArchitecture) -> list[int]:
    """Which of the teacher's residuals each of the student's places takes.

    The places are the skip connections, and last where the mid block's output is, or would be. A
    skip connection takes what the teacher's resnet reads that the resnet which joins it inherits
    from: that learnt what the residual is added to. Raises `UserError` if `student` is not a cut of
    `teacher`.
    """
    inherited, theirs = block_map(teacher, student), readers(teacher)
    return [*(theirs.index(inherited[path]) for path in readers(student)), len(theirs)]
