"""What layers of a U-Net are given in many evaluations, as second moments of their inputs.

All evaluations go through one part of the U-Net before the next is read. A part whose layers have
many inputs runs several times, so that no more is in memory than the moments of SDXL's widest.

Letters: n rows, c channels, h and w an image's sides, i inputs of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from koala.checkpoints.moments import MOST_INPUTS, Moments
from koala.checkpoints.unet_steps import Asked, side_by_side
from koala.utils.networks import UNet2DConditionModel

_PART = 2**25  # numbers of a convolution's inputs, unfolded, that are there at a time


def observe(
    unet: UNet2DConditionModel, paths: Sequence[str], every: Sequence[Asked], scratch: Path
) -> Iterator[tuple[str, Moments]]:
    """The linear layers and convolutions `paths` with the moments of their inputs, part by part.

    paths: within those of `unet_steps.steps`. The moments are the caller's own, and nothing else
    holds them.
    """
    for path, run in side_by_side(unet, every, scratch):
        inside = [one for one in paths if f"{one}.".startswith(f"{path}.")]
        passes = _passes({one: _inputs(unet.get_submodule(one)) for one in inside})
        for k, together in enumerate(passes, 1):
            found: dict[str, Moments] = {}
            with contextlib.ExitStack() as hooks:
                for one in together:
                    layer = unet.get_submodule(one)
                    handle = layer.register_forward_pre_hook(_adding(one, found))
                    hooks.callback(handle.remove)
                run(k < len(passes))
            for one in together:
                yield one, found.pop(one)


def _passes(inputs: Mapping[str, int]) -> list[list[str]]:
    """The layers in their order, as many together as have moments in memory at a time."""
    passes: list[list[str]] = [[]]
    room = MOST_INPUTS**2
    for path, count in inputs.items():
        if passes[-1] and count**2 > room:
            passes.append([])
            room = MOST_INPUTS**2
        passes[-1].append(path)
        room -= count**2
    return passes


def _inputs(layer: Any) -> int:
    return int(layer.weight.shape[1:].numel())


def _adding(path: str, found: dict[str, Moments]) -> Callable[..., None]:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for rows in rows_of(layer, inputs[0].float()):
            if path not in found:
                found[path] = Moments.about(rows)
            found[path].add(rows)

    return hook


def rows_of(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """A layer's inputs as the rows [n, i] that its matrix multiplies, a part at a time.

    Parts of a convolution's are bands of its output.
    """
    if not isinstance(layer, nn.Conv2d):
        yield x.flatten(0, -2)
        return
    (high, wide), (down, across) = layer.kernel_size, layer.stride
    assert not isinstance(layer.padding, str)
    x = F.pad(x, (layer.padding[1], layer.padding[1], layer.padding[0], layer.padding[0]))
    outputs = [1 + (x.shape[2] - high) // down, 1 + (x.shape[3] - wide) // across]
    band = max(1, _PART // (len(x) * outputs[1] * _inputs(layer)))
    for a in range(0, outputs[0], band):
        b = min(a + band, outputs[0])
        part = x[:, :, a * down : (b - 1) * down + high]
        unfolded = F.unfold(part, layer.kernel_size, stride=layer.stride)
        yield unfolded.transpose(1, 2).flatten(0, 1)
