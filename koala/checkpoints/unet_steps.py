"""A U-Net's evaluation as a list of steps, so that it can be run step by step.

`UNet2DConditionModel` runs from input to output in one call. As steps, many evaluations can go
through one module before the next one is read, with what lies between on the disk; and a
backward pass can hold the inputs of the steps alone.

Letters: n rows, c channels, h and w a latent's sides, t text tokens, d text width, p pooled width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from koala.utils.networks import UNet2DConditionModel

ROWS = 16  # of an evaluation, at most


def rows_at_once(pixels: int) -> int:
    """Rows of an evaluation for images of so many pixels: at most two of 1024 x 1024.

    The inputs of SDXL's steps take 0.6 GB for one of them.
    """
    return max(1, min(ROWS, 2 * 1024 * 1024 // pixels))


class Asked(NamedTuple):
    """The arguments of one evaluation."""

    x: Tensor  # [n, c, h, w]
    timesteps: Tensor  # [n]
    text: Tensor  # [n, t, d]
    pooled: Tensor  # [n, p]
    time_ids: Tensor  # [n, 6]


class Step(NamedTuple):
    """A part of an evaluation: its output has the step's place in the list as its number.

    Numbers below 0 are of the evaluation's arguments, -1 being the last of `Asked`.
    """

    path: str  # of the module that runs in it, alone or with small ones beside it
    reads: tuple[int, ...]  # numbers of its inputs
    run: Callable[..., Tensor]


_X, _T, _TEXT, _POOLED, _IDS = range(-5, 0)  # numbers of `Asked`'s fields
_EMB = 0  # number of the first step's output, the embedding of time and sizes
_FIRST = 1  # of the second's, from which on gradients are of interest


def steps(unet: Any) -> list[Step]:
    """Those of a U-Net, in order; the last one's output is the U-Net's."""
    found: list[Step] = []

    def add(path: str, run: Callable[..., Tensor], *reads: int) -> int:
        found.append(Step(path, reads, run))
        return len(found) - 1

    def resnet(path: str, h: int) -> int:
        return add(path, unet.get_submodule(path), h, _EMB)

    def transformer(path: str, entered: int) -> int:
        module = unet.get_submodule(path)
        h = add(f"{path}.proj_in", lambda x: _tokens(module, x), entered)
        for k, block in enumerate(module.transformer_blocks):
            h = add(f"{path}.transformer_blocks.{k}", _attending(block), h, _TEXT)
        return add(f"{path}.proj_out", lambda x, before: _image(module, x, before), h, entered)

    def transformers(path: str) -> Sequence[Any]:
        return getattr(unet.get_submodule(path), "attentions", None) or ()

    emb = add("time_embedding", lambda *given: _embedded(unet, *given), _X, _T, _POOLED, _IDS)
    h = add("conv_in", unet.conv_in, _X)
    assert (emb, h) == (_EMB, _FIRST)
    skips = [h]
    for i, block in enumerate(unet.down_blocks):
        path = f"down_blocks.{i}"
        for j in range(len(block.resnets)):
            h = resnet(f"{path}.resnets.{j}", h)
            if transformers(path):
                h = transformer(f"{path}.attentions.{j}", h)
            skips.append(h)
        if block.downsamplers:
            h = add(f"{path}.downsamplers.0", block.downsamplers[0], h)
            skips.append(h)
    if unet.mid_block is not None:
        h = resnet("mid_block.resnets.0", h)
        for j in range(1, len(unet.mid_block.resnets)):
            if len(transformers("mid_block")) >= j and transformers("mid_block")[j - 1] is not None:
                h = transformer(f"mid_block.attentions.{j - 1}", h)
            h = resnet(f"mid_block.resnets.{j}", h)
    for i, block in enumerate(unet.up_blocks):
        path = f"up_blocks.{i}"
        for j, module in enumerate(block.resnets):
            h = add(f"{path}.resnets.{j}", _joining(module), h, skips.pop(), _EMB)
            if transformers(path):
                h = transformer(f"{path}.attentions.{j}", h)
        if block.upsamplers:
            h = add(f"{path}.upsamplers.0", _doubling(block.upsamplers[0]), h, skips[-1])
    add("conv_out", lambda x: unet.conv_out(unet.conv_act(unet.conv_norm_out(x))), h)
    assert not skips
    return found


def _embedded(unet: Any, x: Tensor, timesteps: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
    emb: Tensor = unet.time_embedding(unet.time_proj(timesteps.expand(len(x))).to(x.dtype))
    if unet.config.addition_embed_type is None:
        return emb
    sizes = unet.add_time_proj(time_ids.flatten()).reshape(len(x), -1)
    added: Tensor = unet.add_embedding(torch.cat([pooled, sizes], dim=-1).to(emb.dtype))
    return emb + added


def _tokens(module: Any, x: Tensor) -> Tensor:
    """What a transformer's blocks read, [n, h * w, c], of an image [n, c, h, w]."""
    x = module.norm(x)
    if not module.use_linear_projection:
        x = module.proj_in(x)
    x = x.flatten(2).transpose(1, 2)
    return module.proj_in(x) if module.use_linear_projection else x


def _image(module: Any, x: Tensor, before: Tensor) -> Tensor:
    """The reverse, added to what the transformer was given."""
    if module.use_linear_projection:
        x = module.proj_out(x)
    x = x.transpose(1, 2).unflatten(2, before.shape[2:]).contiguous()
    return before + (x if module.use_linear_projection else module.proj_out(x))


def _attending(block: Any) -> Callable[..., Tensor]:
    return lambda x, text: block(x, encoder_hidden_states=text)


def _joining(resnet: Any) -> Callable[..., Tensor]:
    return lambda x, skip, emb: resnet(torch.cat([x, skip], dim=1), emb)


def _doubling(upsampler: Any) -> Callable[..., Tensor]:
    """Upsampling to the size of what comes next, which is odd where the latent's is."""
    return lambda x, skip: upsampler(x, tuple(skip.shape[2:]))


def _last_uses(found: Sequence[Step]) -> list[set[int]]:
    """For each step, the numbers that no later step reads."""
    last = {number: k for k, step in enumerate(found) for number in step.reads}
    return [{number for number in step.reads if last[number] == k} for k, step in enumerate(found)]


def evaluate(unet: UNet2DConditionModel, asked: Asked) -> Tensor:
    """The U-Net's output [n, c, h, w].

    Where gradients are enabled, they are of what the second step puts out and all after it. Between
    the passes only the steps' inputs are in memory; a step is run again in the backward pass.
    """
    found = steps(unet)
    values = dict(enumerate(asked, -len(asked)))
    for k, (step, unused) in enumerate(zip(found, _last_uses(found), strict=True)):
        given = [values[number] for number in step.reads]
        if k > _FIRST and torch.is_grad_enabled():
            made = checkpoint(step.run, *given, use_reentrant=True, preserve_rng_state=False)
        else:
            with torch.no_grad():
                made = step.run(*given)
        values[k] = made.requires_grad_() if k == _FIRST and torch.is_grad_enabled() else made
        for number in unused:
            del values[number]
    return made


@torch.no_grad()
def side_by_side(
    unet: UNet2DConditionModel, every: Sequence[Asked], scratch: Path
) -> Iterator[tuple[str, Callable[[bool], None]]]:
    """All evaluations together, step by step: yields a step's path, and run(again) for all.

    Each must be called before the next is asked for: once, or several times, all but the last with
    again=True. What lies between the steps is in files in `scratch`, which are removed at the end.
    """
    found = steps(unet)
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        kept = [_Kept(Path(place), k, asked) for k, asked in enumerate(every)]
        for k, (step, unused) in enumerate(zip(found, _last_uses(found), strict=True)):

            def run(again: bool, k: int = k, step: Step = step, unused: set[int] = unused) -> None:
                for values in kept:
                    made = step.run(*map(values.get, step.reads))
                    if not again:
                        values.put(k, made)
                        values.drop(unused)

            yield step.path, run


class _Kept:
    """What lies between the steps of one evaluation: its arguments in memory, the rest in files."""

    def __init__(self, place: Path, which: int, asked: Asked) -> None:
        self.place, self.which = place, which
        self.given = dict(enumerate(asked, -len(asked)))
        self.shapes: dict[int, torch.Size] = {}

    def _file(self, number: int) -> Path:
        return self.place / f"{self.which}.{number}"

    def put(self, number: int, value: Tensor) -> None:
        assert value.dtype == torch.float32
        self.shapes[number] = value.shape
        value.contiguous().numpy().tofile(self._file(number))

    def get(self, number: int) -> Tensor:
        if number in self.given:
            return self.given[number]
        content = np.fromfile(self._file(number), np.float32)
        return torch.from_numpy(content).view(self.shapes[number])

    def drop(self, numbers: set[int]) -> None:
        for number in numbers:
            if number not in self.given:
                self._file(number).unlink()
