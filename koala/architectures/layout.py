"""Every tensor of a U-Net, computed from its architecture.

`modules` walks through the U-Net from input to output and yields the modules that diffusers'
`UNet2DConditionModel` would build. Names, shapes, parameter counts and FLOPs all come from this
walk, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from koala.architectures.table import LATENT_CHANNELS, TIME_IDS, UNetArchitecture


class Module(NamedTuple):
    """A leaf of the U-Net with its tensors, or the attention product itself (`attends`)."""

    path: str
    weight: tuple[int, ...]  # shape; () for an attention product
    bias: int  # length; 0: none
    at: int | str  # stage whose positions it processes, or "text", or "vector" (once per image)
    attends: str = ""  # "self" or "cross": query-key and value products of width `bias`


def _resnet(path: str, cin: int, cout: int, time: int, at: int) -> Iterator[Module]:
    yield Module(f"{path}.norm1", (cin,), cin, at)
    yield Module(f"{path}.conv1", (cout, cin, 3, 3), cout, at)
    yield Module(f"{path}.time_emb_proj", (cout, time), cout, "vector")
    yield Module(f"{path}.norm2", (cout,), cout, at)
    yield Module(f"{path}.conv2", (cout, cout, 3, 3), cout, at)
    if cin != cout:
        yield Module(f"{path}.conv_shortcut", (cout, cin, 1, 1), cout, at)


def _transformer(
    path: str, width: int, depth: int, context: int, linear: bool, at: int
) -> Iterator[Module]:
    projection = (width, width) if linear else (width, width, 1, 1)
    yield Module(f"{path}.norm", (width,), width, at)
    yield Module(f"{path}.proj_in", projection, width, at)
    for k in range(depth):
        block = f"{path}.transformer_blocks.{k}"
        for norm in ("norm1", "norm2", "norm3"):
            yield Module(f"{block}.{norm}", (width,), width, at)
        for attn, source, keys in (("attn1", width, at), ("attn2", context, "text")):
            yield Module(f"{block}.{attn}.to_q", (width, width), 0, at)
            yield Module(f"{block}.{attn}.to_k", (width, source), 0, keys)
            yield Module(f"{block}.{attn}.to_v", (width, source), 0, keys)
            yield Module(f"{block}.{attn}.to_out.0", (width, width), width, at)
            yield Module(f"{block}.{attn}", (), width, at, "self" if attn == "attn1" else "cross")
        yield Module(f"{block}.ff.net.0.proj", (8 * width, width), 8 * width, at)
        yield Module(f"{block}.ff.net.2", (width, 4 * width), width, at)
    yield Module(f"{path}.proj_out", projection, width, at)


def modules(arch: UNetArchitecture) -> Iterator[Module]:
    """Every module of the U-Net with tensors or products, from input to output."""
    widths, stages = arch.widths, len(arch.widths)
    first, time = widths[0], 4 * widths[0]

    def stage(path: str, i: int, cins: list[int], depths: tuple[int, ...]) -> Iterator[Module]:
        for j, (cin, depth) in enumerate(zip(cins, depths, strict=True)):
            yield from _resnet(f"{path}.resnets.{j}", cin, widths[i], time, i)
            if depth:
                yield from _transformer(
                    f"{path}.attentions.{j}", widths[i], depth, arch.context, arch.linear, i
                )

    yield Module("conv_in", (first, LATENT_CHANNELS, 3, 3), first, 0)
    added = (("add_embedding", arch.pooled + TIME_IDS * arch.time_ids),) if arch.pooled else ()
    for path, cin in (("time_embedding", first), *added):
        yield Module(f"{path}.linear_1", (time, cin), time, "vector")
        yield Module(f"{path}.linear_2", (time, time), time, "vector")
    skips = [first]
    for i, width in enumerate(widths):
        path = f"down_blocks.{i}"
        cins = [widths[max(0, i - 1)]] + [width] * (arch.layers - 1)
        yield from stage(path, i, cins, (arch.depths[i],) * arch.layers)
        skips += [width] * arch.layers
        if i + 1 < stages:
            skips.append(width)
            yield Module(f"{path}.downsamplers.0.conv", (width, width, 3, 3), width, i + 1)
    last = stages - 1
    if arch.mid is not None:
        yield from stage("mid_block", last, [widths[last]], (arch.mid,))
        if arch.mid:
            yield from _resnet("mid_block.resnets.1", widths[last], widths[last], time, last)
    flow = widths[last]
    for i, depths in enumerate(arch.up):
        path, level = f"up_blocks.{i}", last - i
        width = widths[level]
        cins = [flow + skips.pop()] + [width + skips.pop() for _ in range(arch.layers)]
        yield from stage(path, level, cins, depths)
        if level:
            yield Module(f"{path}.upsamplers.0.conv", (width, width, 3, 3), width, level - 1)
        flow = width
    assert not skips
    yield Module("conv_norm_out", (first,), first, 0)
    yield Module("conv_out", (LATENT_CHANNELS, first, 3, 3), LATENT_CHANNELS, 0)


def tensor_shapes(arch: UNetArchitecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the U-Net's state dict."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in modules(arch):
        if not module.attends:
            shapes[f"{module.path}.weight"] = module.weight
            if module.bias:
                shapes[f"{module.path}.bias"] = (module.bias,)
    return shapes


def parameters(arch: UNetArchitecture) -> int:
    """Number of parameters."""
    return sum(math.prod(shape) for shape in tensor_shapes(arch).values())
