"""What a model takes on a GPU in half precision, from its tensors' shapes alone, without torch.

Weights are counted to the byte, as `koala.generation.memory.plan` counts them. The memory of the
work is the planner's own, which `python -m benchmarks.ladder` recorded for SDXL's widths at 1024 x
1024 pixels (`ladder.json`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from koala.checkpoints.quantised import GROUP, IN_8_BITS
from koala.checkpoints.validate import Shapes

GIB = 2**30
MARGIN = 1.3  # on activations, for what the libraries' kernels take besides: up to 1.25 was seen
CARRIED = 2 * 2**20  # bytes: latents, embeddings and the like of a request
ALIGNED = 256  # bytes: every tensor of a unit begins at a multiple, which GPUs read fastest
TEXT, UNET, VAE = "text encoders", "U-Net", "VAE"
# (quantised, place, decode) from the fastest to the smallest. If no weights are asked for, 8 bits
# come before offloading the U-Net: dequantising a layer takes less time than copying it. On the
# device are:
#   resident            all parts
#   text group offload  text encoders a block at a time, only to encode a new prompt
#   model offload       a part at a time
#   group offload       text encoders and U-Net a block at a time, the VAE as a whole
LADDER: tuple[tuple[str | None, str, str], ...] = (
    (None, "resident", "full"),
    (None, "resident", "tiled"),
    (None, "text group offload", "tiled"),
    ("int8", "resident", "tiled"),
    ("int8", "model offload", "tiled"),
    ("int8", "group offload", "tiled"),
    ("int8", "group offload", "tiny"),
)
# (place, decode) of the ladder, without the tiny decoder.
PLACES = tuple(dict.fromkeys((place, decode) for _, place, decode in LADDER if decode != "tiny"))
_UNIT = re.compile(
    r".*?\b(?:transformer_blocks|resnets|downsamplers|upsamplers|encoder\.layers)\.\d+\b"
    r"|.*\bembeddings\b"
)


@dataclass(frozen=True)
class Peak:
    """The most bytes of a model on the device at once, and the mode that takes them."""

    bytes: int
    place: str
    decode: str


def bytes_of(name: str, shape: tuple[int, ...], quantised: str | None) -> int:
    """A tensor in float16, or in 8 or 4 bits with its scales if it is a layer's weight."""
    layer = len(shape) in (2, 4) and not re.search(r"\b\w*embeddings?\.\w*embedding\b", name)
    if quantised is None or not layer:
        return _aligned(2 * math.prod(shape))
    out, inputs = shape[0], math.prod(shape[1:])
    if quantised == "int4" and not name.startswith(IN_8_BITS):
        groups = out * math.ceil(inputs / GROUP)
        return _aligned(groups * GROUP // 2) + _aligned(2 * groups)
    return _aligned(out * inputs) + _aligned(2 * out)


def _aligned(size: int) -> int:
    return math.ceil(size / ALIGNED) * ALIGNED


def weights(part: str, shapes: Shapes, quantised: str | None = None) -> tuple[int, dict[str, int]]:
    """(bytes of all of a part's tensors, bytes of each unit that can be offloaded)."""
    kind = {VAE: None, TEXT: "int8" if quantised else None}.get(part, quantised)
    total, units = 0, dict[str, int]()
    for name, shape in shapes.items():
        size = bytes_of(name, shape, kind)
        total += size
        if unit := _UNIT.match(name):
            units[unit[0]] = units.get(unit[0], 0) + size
    return total, units


def peak(
    parts: Mapping[str, Shapes],
    work: Mapping[str, int],
    quantised: str | None,
    place: str,
    decode: str,
) -> Peak:
    """The peak of one mode.

    parts: shapes of TEXT, UNET and VAE. work: bytes of activations of "encode", "denoise", "full"
    and "tiled". quantised: "int8", "int4" or None. place, decode: of `PLACES`.
    """
    on_device = {}  # while the part works, and while others do
    for part, shapes in parts.items():
        total, units = weights(part, shapes, quantised)
        rest = total - sum(units.values())
        by_block = place == "group offload" or (place, part) == ("text group offload", TEXT)
        if place == "resident" or (place == "text group offload" and part != TEXT):
            on_device[part] = total, total
        elif by_block and part != VAE:
            on_device[part] = rest + 2 * max(units.values()), rest
        else:
            on_device[part] = total, rest
    phases = {TEXT: work["encode"], UNET: work["denoise"], VAE: work[decode]}
    most = max(
        sum(sizes[part != busy] for part, sizes in on_device.items())
        + int(MARGIN * activations)
        + CARRIED
        for busy, activations in phases.items()
    )
    return Peak(most, place, decode)
