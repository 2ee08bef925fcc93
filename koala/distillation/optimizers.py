"""Optimisers: AdamW, fused or with 8-bit moments, and the operations that the loop needs.

torchao's optimiser keeps its learning rate in a tensor and its moments in a tensor subclass; only
this module knows.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from koala.distillation.settings import Training
from koala.utils.extras import require


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a training moves, by name: those that are not frozen."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def new_optimizer(settings: Training, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) from the settings; UserError if torchao is missing."""
    common: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    parameters = [*trained_parameters(module).values()]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **common, fused=True)
    assert settings.optimizer == "adamw-8bit"
    require(f"optimizer {settings.optimizer}", "torchao", "torchao")
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, **common)


def plain_parts(moment: Tensor) -> dict[str, Tensor]:
    """The tensors of a moment, by name suffix.

    A plain or sharded moment is one tensor, ""; torchao's has ".codes", ".scale" and ".qmap".
    """
    if isinstance(moment, DTensor) or type(moment) is Tensor:
        return {"": moment}
    names, _ = moment.__tensor_flatten__()  # type: ignore[attr-defined]  # of wrapper subclasses
    return {f".{name}": getattr(moment, name) for name in names}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of the next steps."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def make_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Makes a new optimiser allocate its state for these parameters, without changing weights.

    The state may use special tensor types and memory formats, so loading fills it instead of
    replacing it. Takes a step at learning rate 0 with zero gradients.
    """
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    set_rate(optimizer, 0.0)  # the loop sets the rate before each step
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
