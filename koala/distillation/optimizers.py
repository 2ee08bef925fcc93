"""Optimisers: AdamW, fused or with moments in 8 bits, and the little that the loop asks of them.

torchao's keeps its rate in a tensor and its moments in a kind of their own; nothing else needs to
know.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from koala.distillation.settings import Training
from koala.errors import UserError


def new_optimizer(settings: Training, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) by the settings; UserError where it is not installed."""
    common: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(module.parameters(), **common, fused=True)
    assert settings.optimizer == "adamw-8bit"
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(f"optimizer {settings.optimizer} needs `pip install torchao`") from error
    return AdamW8bit(module.parameters(), **common)


def plain_parts(moment: Tensor) -> dict[str, Tensor]:
    """The tensors of which a moment is made, by what they add to its name.

    A plain or a sharded one is its own; torchao's has ".codes", their ".scale" and a ".qmap".
    """
    if isinstance(moment, DTensor) or type(moment) is Tensor:
        return {"": moment}
    names, _ = moment.__tensor_flatten__()  # type: ignore[attr-defined]  # of wrapper subclasses
    return {f".{name}": getattr(moment, name) for name in names}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Makes `rate` the learning rate of the next steps."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def make_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Lets a new optimiser lay out the state of these parameters as it likes it, without a step.

    What it lays out may be of other types and orders in memory than plain tensors: it is filled,
    not replaced. The weights stay as they are: a step at rate 0 along no gradient.
    """
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    set_rate(optimizer, 0.0)  # the loop sets the rate before each step
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
