"""U-Nets stored in 4 bits: what their files hold in place of a layer's weight. Without torch.

    NAME.values   uint8: two whole numbers from -8 to 7 a byte, [out, groups, GROUP / 2]
    NAME.scale    fp16 [out, groups, 1]: one for each GROUP weights of an output channel
    NAME.left     fp16 [out, r], and NAME.right fp16 [r, inputs]: what is added to values * scale,
                  where the layer is wide enough (`rank_of`)

What `IN_8_BITS` begins is int8 with a scale for each output channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]  # of tensors, by name
KIND = "int4"
GROUP = 32  # weights with one scale in int4
# What is int8 in a model in int4, by the beginnings of its names. The outer stages of a U-Net are
# 0.6 % of SDXL's weights; in koala-mini they make 70 % of the error. Text encoders lose more in
# 4 bits than the whole U-Net does.
IN_8_BITS = (
    *("conv_in", "conv_out", "time_embedding", "add_embedding", "down_blocks.0.", "up_blocks.2."),
    *("encoder.", "text_model.", "text_projection"),
)
RANK = 16  # at most
PARTS = ("values", "scale", "left", "right")


def rank_of(out: int, inputs: int) -> int:
    """Of what is added to a layer's 4-bit weight: a sixteenth of their size or so; 0: nothing."""
    return min(RANK, min(out, inputs) // GROUP)


def stored_tensors(shapes: Shapes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of the tensors in place of the layers' weights among `shapes`."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if not is_layer(name, shape):
            continue
        base, out, inputs = name.removesuffix(".weight"), shape[0], math.prod(shape[1:])
        if name.startswith(IN_8_BITS):
            found[f"{base}.values"] = "U8", shape
            found[f"{base}.scale"] = "F16", (out, *(1 for _ in shape[1:]))
            continue
        groups = math.ceil(inputs / GROUP)
        found[f"{base}.values"] = "U8", (out, groups, GROUP // 2)
        found[f"{base}.scale"] = "F16", (out, groups, 1)
        if rank := rank_of(out, inputs):
            found[f"{base}.left"] = "F16", (out, rank)
            found[f"{base}.right"] = "F16", (rank, inputs)
    return found


def is_layer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a U-Net is the weight of a linear layer or convolution, and not empty."""
    return name.endswith(".weight") and len(shape) in (2, 4) and math.prod(shape) > 0


def stored_shapes(shapes: Shapes) -> Shapes:
    """Name and shape of every tensor of a U-Net with these, stored in 4 bits."""
    rest = {name: shape for name, shape in shapes.items() if not is_layer(name, shape)}
    return rest | {name: shape for name, (_, shape) in stored_tensors(shapes).items()}
