"""Every tensor of a U-Net, computed from its architecture.

`modules` walks through the U-Net from input to output and yields the modules that diffusers'
`UNet2DConditionModel` would build. Names, shapes, parameter counts and FLOPs all come from this
walk, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from koala.architectures.table import LATENT_CHANNELS, TIME_IDS, UNetArchitecture


class Module(NamedTuple):
    """A leaf of the U-Net with its tensors, or the attention product itself (`attends`)."""

    path: str
    weight: tuple[int, ...]  # shape; () for an attention product
    bias: int  # length; 0: none
    at: int | str  # stage whose positions it processes, or "text", or "vector" (once per image)
    attends: str = ""  # "self" or "cross": query-key and value products of width `bias`


def _resnet(
    path: str, cin: int, cout: int, time: int, at: int, inner: Mapping[str, int]
) -> Iterator[Module]:
    width = inner.get(path, cout)
    yield Module(f"{path}.norm1", (cin,), cin, at)
    yield Module(f"{path}.conv1", (width, cin, 3, 3), width, at)
    yield Module(f"{path}.time_emb_proj", (width, time), width, "vector")
    yield Module(f"{path}.norm2", (width,), width, at)
    yield Module(f"{path}.conv2", (cout, width, 3, 3), cout, at)
    if cin != cout:
        yield Module(f"{path}.conv_shortcut", (cout, cin, 1, 1), cout, at)


def _transformer(
    path: str, width: int, depth: int, arch: UNetArchitecture, at: int, inner: Mapping[str, int]
) -> Iterator[Module]:
    projection = (width, width) if arch.linear else (width, width, 1, 1)
    yield Module(f"{path}.norm", (width,), width, at)
    yield Module(f"{path}.proj_in", projection, width, at)
    for k in range(depth):
        block = f"{path}.transformer_blocks.{k}"
        for norm in ("norm1", "norm2", "norm3"):
            yield Module(f"{block}.{norm}", (width,), width, at)
        for attn, source, keys in (("attn1", width, at), ("attn2", arch.context, "text")):
            own = inner.get(f"{block}.{attn}", width)
            yield Module(f"{block}.{attn}.to_q", (own, width), 0, at)
            yield Module(f"{block}.{attn}.to_k", (own, source), 0, keys)
            yield Module(f"{block}.{attn}.to_v", (own, source), 0, keys)
            yield Module(f"{block}.{attn}.to_out.0", (width, own), width, at)
            yield Module(f"{block}.{attn}", (), own, at, "self" if attn == "attn1" else "cross")
        hidden = inner.get(f"{block}.ff", 4 * width)
        yield Module(f"{block}.ff.net.0.proj", (2 * hidden, width), 2 * hidden, at)
        yield Module(f"{block}.ff.net.2", (width, hidden), width, at)
    yield Module(f"{path}.proj_out", projection, width, at)


def modules(arch: UNetArchitecture) -> Iterator[Module]:
    """Every module of the U-Net with tensors or products, from input to output."""
    widths, stages = arch.widths, len(arch.widths)
    first, time, inner = widths[0], 4 * widths[0], dict(arch.inner)

    def stage(path: str, i: int, cins: list[int], depths: tuple[int, ...]) -> Iterator[Module]:
        for j, (cin, depth) in enumerate(zip(cins, depths, strict=True)):
            yield from _resnet(f"{path}.resnets.{j}", cin, widths[i], time, i, inner)
            if depth:
                yield from _transformer(f"{path}.attentions.{j}", widths[i], depth, arch, i, inner)

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
            yield from _resnet("mid_block.resnets.1", widths[last], widths[last], time, last, inner)
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


class Inner(NamedTuple):
    """A module whose inside can be narrower than the rule's, and by what steps."""

    kind: str  # "attention", "feed-forward" or "resnet"
    width: int  # by the rule
    unit: int  # channels of a head, one channel, or those of a group of the inner group norm


def inner_widths(arch: UNetArchitecture) -> dict[str, Inner]:
    """The modules by path, in the U-Net's order; whether `arch` is pruned makes no difference."""
    found = {}
    for module in modules(replace(arch, inner=())):
        path, _, leaf = module.path.rpartition(".")
        if module.attends:
            stage = int(module.at)
            head = arch.widths[stage] // arch.heads[stage]
            found[module.path] = Inner("attention", module.bias, head)
        elif path.endswith("ff.net") and leaf == "2":
            found[path.removesuffix(".net")] = Inner("feed-forward", module.weight[1], 1)
        elif leaf == "conv2":
            found[path] = Inner("resnet", module.weight[1], module.weight[1] // arch.groups)
    return found


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
