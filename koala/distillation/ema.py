"""Exponential moving average of weights, with its half-life counted in samples.

Counting in samples instead of steps keeps the average the same when the batch size changes
(Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from koala.errors import UserError

# Early in a run the half-life is at most this share of the samples seen, so that the average
# forgets the initial weights at once and not only after several half-lives.
RAMP_UP = 0.05


def ema_decay(batch: int, seen: int, half_life: float, ramp_up: float = RAMP_UP) -> float:
    """Factor in [0, 1) that the old average keeps: 0.5 ** (batch / half-life).

    batch: samples of this update, at least 1. seen: samples seen so far, this batch included.
    half_life: in samples; limited to `ramp_up * seen`.
    """
    assert 0 < batch <= seen, (batch, seen)
    return float(0.5 ** (batch / min(half_life, ramp_up * seen)))


class EMA:
    """fp32 running average of a module's parameters, on the devices where they lie.

    module: its parameters are the start of the average. It may not have persistent buffers.
    half_life: samples after which a weight counts half; above 0, else UserError.
    """

    def __init__(self, module: nn.Module, half_life: float) -> None:
        if not (math.isfinite(half_life) and half_life > 0):
            raise UserError(
                f"EMA half-life {half_life} samples: it must be a finite number above 0"
            )
        self.half_life = half_life
        self._weights = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in module.named_parameters()
        }
        assert set(self._weights) == set(module.state_dict()), "buffers or tied weights"

    @torch.no_grad()
    def update(self, module: nn.Module, batch: int, seen: int) -> None:
        """Moves the average towards the weights of `module`, after a step on `batch` samples.

        seen: samples seen so far, these included.
        """
        parameters = dict(module.named_parameters())
        assert parameters.keys() == self._weights.keys()
        decay = ema_decay(batch, seen, self.half_life)
        new = [parameters[name].detach().float() for name in self._weights]
        torch._foreach_lerp_(list(self._weights.values()), new, 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Writes the average into the parameters of `module`, in their own dtype."""
        parameters = dict(module.named_parameters())
        assert parameters.keys() == self._weights.keys()
        for name, weight in self._weights.items():
            parameters[name].copy_(weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name, fp32; the tensors themselves, not copies."""
        return dict(self._weights)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes the values of a `state_dict`; names and shapes must be the same (ValueError)."""
        if state.keys() != self._weights.keys():
            differing = sorted(state.keys() ^ self._weights.keys())[:10]
            raise ValueError(f"EMA state of another model; names that differ: {differing}")
        for name, weight in self._weights.items():
            if state[name].shape != weight.shape:
                raise ValueError(
                    f"EMA state of another model: {name} has shape {tuple(state[name].shape)}, "
                    f"here it is {tuple(weight.shape)}"
                )
        for name, weight in self._weights.items():
            weight.copy_(state[name])
