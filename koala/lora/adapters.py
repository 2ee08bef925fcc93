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
from koala.lora import kinds
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

    Each module adds what scale times the change of its weight gives to its output. `scale` may be
    set at any time. The weights are unchanged, so `remove` restores the model exactly.
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
        factors = _load(adapter, module, lora)
        weight = module.weight
        if adapter.kind == "LoRA" and not adapter.decomposed:
            matrices = {role: t.to(weight.device, weight.dtype) for role, t in factors.items()}

            def add(module: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                return output + self.scale * adapter.factor * _through(matrices, module, inputs[0])

            return add

        factors = {role: t.to(weight.device) for role, t in factors.items()}

        def add_change(module: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            change = self.scale * _change(adapter, factors, module.weight)
            return output + _apply(change.to(output.dtype), module, inputs[0])

        return add_change

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
    """Adds scale times the change of each weight to it, in float32, and keeps the dtype.

    A DoRA scales the sum of weight and change, so it depends on what was merged before. Raises
    `UserError` if a sum overflows the dtype (the model must then be loaded again), or the weights
    are quantised.
    """
    for target, adapter in lora.adapters.items():
        weight = modules[target].weight
        if not isinstance(weight, nn.Parameter):
            raise UserError(
                f"{lora.file} cannot be merged into quantised weights: merge it before "
                "quantising, or attach it unmerged"
            )
        factors = _load(adapter, modules[target], lora)
        factors = {role: t.to(weight.device) for role, t in factors.items()}
        weight.copy_(weight.float() + scale * _change(adapter, factors, weight))
        if not weight.isfinite().all():
            raise UserError(
                f"{lora.file} at scale {scale:g} overflows the weights of {target.path}"
            )
    return Merged(scale)


def _change(adapter: Adapter, factors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """What an adapter at scale 1 adds to a weight, float32."""
    change = adapter.factor * kinds.change(factors, tuple(weight.shape))
    if not adapter.decomposed:
        return change
    whole = weight.detach().float()
    return kinds.renormalised(whole + change, factors) - whole


def _through(matrices: Mapping[str, Tensor], module: Layer, x: Tensor) -> Tensor:
    """The module's output for x with up @ mid @ down as its weight and no bias."""
    down, mid, up = matrices["down"], matrices.get("mid"), matrices["up"]
    if isinstance(module, nn.Linear):
        return F.linear(F.linear(x, down), up)
    if mid is not None:
        x = F.conv2d(x, down)
    return F.conv2d(_apply(down if mid is None else mid, module, x), up)


def _apply(weight: Tensor, module: Layer, x: Tensor) -> Tensor:
    """The module's output for x with another weight and no bias."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, module.stride, module.padding, module.dilation)


def _load(adapter: Adapter, module: Layer, lora: Lora) -> dict[str, Tensor]:
    """The factors by role, float32 on the CPU; down and up with as many axes as the weight.

    Raises `UserError` for values that are not finite.
    """
    outer, inner, *kernel = module.weight.shape
    ones = [1] * len(kernel)
    factors = {role: load_tensor(stored, "F32") for role, stored in adapter.factors.items()}
    if adapter.kind == "LoRA":
        own = ones if "mid" in factors else kernel
        factors["down"] = factors["down"].reshape(-1, inner, *own)
        factors["up"] = factors["up"].reshape(outer, -1, *ones)
    if not all(factor.isfinite().all() for factor in factors.values()):
        raise UserError(f"{lora.file} has NaN or infinite values; download it again")
    return factors
