"""Applies a LoRA to a loaded model: attached, with a variable scale, or merged into the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from koala.checkpoints.tensors import load_tensor
from koala.errors import UserError
from koala.lora.names import PARTS, Target
from koala.lora.reading import Adapter, Lora

Layer = nn.Linear | nn.Conv2d
Modules = Mapping[Target, Layer]


def modules_of(unet: nn.Module, text_encoder: nn.Module, text_encoder_2: nn.Module) -> Modules:
    """Every module of a pipeline that a LoRA may change, by its `Target`."""
    found: dict[Target, Layer] = {}
    for part, model in zip(PARTS, (unet, text_encoder, text_encoder_2), strict=True):
        for path, module in model.named_modules():
            if isinstance(module, Layer):
                # Since transformers 5 the first encoder's paths lack "text_model.".
                short = part != "unet" and path.startswith("encoder.")
                found[Target(part, f"text_model.{path}" if short else path)] = module
    return found


class Attached:
    """A LoRA attached to a model through forward hooks, until it is removed.

    Each module adds scale * factor * up(mid(down(x))) to its output. `scale` may be set at any
    time. The weights are unchanged, so `remove` restores the model exactly.
    """

    def __init__(
        self, modules: Modules, lora: Lora, scale: float = 1.0, attach: bool = True
    ) -> None:
        self.scale = scale
        self._hooks = [
            (modules[target], self._hook(modules[target], adapter, lora))
            for target, adapter in lora.adapters.items()
        ]
        self._handles: list[RemovableHandle] = []
        if attach:
            self.attach()

    def _hook(self, module: Layer, adapter: Adapter, lora: Lora) -> Callable[..., Tensor]:
        weight = module.weight
        matrices = [t.to(weight.device, weight.dtype) for t in _load(adapter, module, lora)]

        def add(module: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + self.scale * adapter.factor * _through(matrices, module, inputs[0])

        return add

    def attach(self) -> None:
        """Activates the LoRA, after those that are attached already."""
        assert not self._handles
        self._handles = [module.register_forward_hook(hook) for module, hook in self._hooks]

    def remove(self) -> None:
        """Deactivates the LoRA; its matrices stay loaded for `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


@dataclass(frozen=True)
class Merged:
    """A LoRA merged into the weights; this cannot be undone."""

    scale: float


@torch.no_grad()
def merge(modules: Modules, lora: Lora, scale: float = 1.0) -> Merged:
    """Adds scale * factor * up @ down to the weights, in float32, and keeps their dtype.

    Raises `UserError` if a sum overflows the dtype (the model must then be loaded again), or the
    weights are quantised.
    """
    for target, adapter in lora.adapters.items():
        weight = modules[target].weight
        if not isinstance(weight, nn.Parameter):
            raise UserError(
                f"{lora.file} cannot be merged into quantised weights: merge it before "
                "quantising, or attach it unmerged"
            )
        matrices = [t.to(weight.device) for t in _load(adapter, modules[target], lora)]
        change = scale * adapter.factor * product(matrices).reshape(weight.shape)
        weight.copy_(weight.float() + change)
        if not weight.isfinite().all():
            raise UserError(
                f"{lora.file} at scale {scale:g} overflows the weights of {target.path}"
            )
    return Merged(scale)


def product(matrices: list[Tensor]) -> Tensor:
    """up @ down, or up @ mid @ down, as one weight [out, in, *kernel]."""
    down, *mid, up = matrices
    if mid:
        return torch.einsum("or,rskl,si->oikl", up.flatten(1), *mid, down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _through(matrices: list[Tensor], module: Layer, x: Tensor) -> Tensor:
    """The module's output for x with `product(matrices)` as its weight and no bias."""
    down, *mid, up = matrices
    if isinstance(module, nn.Linear):
        return F.linear(F.linear(x, down), up)
    if mid:
        x = F.conv2d(x, down)
    kernel = mid[0] if mid else down
    x = F.conv2d(x, kernel, None, module.stride, module.padding, module.dilation)
    return F.conv2d(x, up)


def _load(adapter: Adapter, module: Layer, lora: Lora) -> list[Tensor]:
    """float32 [down, up] or [down, mid, up] on the CPU, with as many axes as the module's weight.

    Raises `UserError` for values that are not finite.
    """
    outer, inner, *kernel = module.weight.shape
    ones = [1] * len(kernel)
    down, up = load_tensor(adapter.down, "F32"), load_tensor(adapter.up, "F32")
    matrices = [
        down.reshape(adapter.rank, inner, *(ones if adapter.mid else kernel)),
        *([load_tensor(adapter.mid, "F32")] if adapter.mid else []),
        up.reshape(outer, adapter.rank, *ones),
    ]
    if not all(matrix.isfinite().all() for matrix in matrices):
        raise UserError(f"{lora.file} has NaN or infinite values; download it again")
    return matrices
