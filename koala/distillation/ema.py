"""Exponential moving average of weights, with its half-life counted in samples.

Counting in samples instead of steps keeps the average the same when the batch size changes
(Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from koala.distillation.dtensor import local
from koala.distillation.optimizers import trained_parameters
from koala.errors import UserError

# Early in a run the half-life is limited to this share of the samples seen, so that the average
# forgets the initial weights quickly.
RAMP_UP = 0.05


def ema_decay(batch: int, seen: int, half_life: float) -> float:
    """Weight of the old average, in [0, 1): 0.5 ** (batch / half-life).

    batch: samples of this update, at least 1. seen: samples seen so far, this batch included.
    half_life: in samples; limited to `RAMP_UP * seen`.
    """
    assert 0 < batch <= seen, (batch, seen)
    return float(0.5 ** (batch / min(half_life, RAMP_UP * seen)))


class EMA:
    """fp32 running average of a module's trained parameters; of sharded ones, the local part.

    module: its parameters start the average. It must not have persistent buffers.
    half_life: samples after which a weight counts half; UserError unless above 0.
    on_cpu: keep the average in main memory instead of on the parameters' device.
    """

    def __init__(self, module: nn.Module, half_life: float, on_cpu: bool = False) -> None:
        if not (math.isfinite(half_life) and half_life > 0):
            raise UserError(
                f"EMA half-life {half_life} samples: it must be a finite number above 0"
            )
        self.half_life = half_life
        self._weights = {
            name: part.to("cpu" if on_cpu else part.device, torch.float32, copy=True)
            for name, part in _parts(module).items()
        }
        named = {name for name, _ in module.named_parameters()}
        assert named == set(module.state_dict()), "buffers or tied weights"

    @torch.no_grad()
    def update(self, module: nn.Module, batch: int, seen: int) -> None:
        """Moves the average towards the weights of `module`, after a step on `batch` samples.

        seen: samples seen so far, including these.
        """
        parts = _parts(module)
        assert parts.keys() == self._weights.keys()
        decay = ema_decay(batch, seen, self.half_life)
        new = [parts[name].to(weight) for name, weight in self._weights.items()]
        torch._foreach_lerp_(list(self._weights.values()), new, 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Writes the average into the parameters of `module`, in their own dtype."""
        parts = _parts(module)
        assert parts.keys() == self._weights.keys()
        for name, weight in self._weights.items():
            parts[name].copy_(weight)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchanges the average and the fp32 parameters of `module`; a second call reverts it."""
        parts = _parts(module)
        assert parts.keys() == self._weights.keys()
        for name, weight in self._weights.items():
            assert parts[name].dtype == torch.float32, "the average would be rounded"
            kept = parts[name].clone()
            parts[name].copy_(weight)
            weight.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name, fp32: the local parts, not copies."""
        return dict(self._weights)


def _parts(module: nn.Module) -> dict[str, Tensor]:
    """The trained parameters' local parts by name."""
    return {name: local(p.detach()) for name, p in trained_parameters(module).items()}
