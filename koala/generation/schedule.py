"""The noise levels a picture goes through: Euler's discrete schedule with trailing spacing.

KOALA samples in 10 steps, and with so few the first one must start at the noisiest level that
training saw. "Trailing" spacing does (arXiv 2305.08891, table 2); "leading", SDXL's own,
starts below it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from koala.errors import UserError

# Settings of diffusers' scheduler configs that would change the numbers below, and the one
# value of each that means SDXL's schedule. A config that lacks a key means that value.
_REQUIRED: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "final_sigmas_type": "zero",
}


@dataclass(frozen=True)
class Schedule:
    """Step i goes from noise level `sigmas[i]`, the U-Net's `timesteps[i]`, to the next."""

    timesteps: Tensor  # float32 [steps], falling, 0..999
    sigmas: Tensor  # float32 [steps + 1], falling, the last one 0


def trailing(config: dict[str, Any], steps: int) -> Schedule:
    """The schedule of `steps` Euler steps for a folder's scheduler config.

    Equal to diffusers' `EulerDiscreteScheduler(timestep_spacing="trailing")`, whatever sampler
    and spacing the config itself names. UserError for a config that is not SDXL's discrete,
    epsilon-predicting kind, or for more steps than it has noise levels.
    """
    for key, wanted in _REQUIRED.items():
        found = config.get(key, wanted)
        if found != wanted:
            raise UserError(
                f"the scheduler config says {key} = {found!r}; Euler with trailing spacing is "
                f"made for {wanted!r}: use a model trained on SDXL's schedule"
            )
    levels = config["num_train_timesteps"]
    if not 1 <= steps <= levels:
        raise UserError(f"{steps} steps: this model takes 1 to {levels}")
    # The n-th part of the levels at a time, down from the last; a half rounds to even, and the
    # slice drops the zero that rounding errors add at a few numbers of steps.
    ends = np.arange(levels, 0, -levels / steps)[:steps].round()
    timesteps = torch.from_numpy(ends).long() - 1
    sigmas = torch.cat([_sigmas(config)[timesteps], torch.zeros(1)])
    return Schedule(timesteps.float(), sigmas)


def _sigmas(config: dict[str, Any]) -> Tensor:
    """sqrt((1 - abar_t) / abar_t) for every t, float32 [levels]: noise over signal."""
    start, end = config["beta_start"] ** 0.5, config["beta_end"] ** 0.5
    betas = torch.linspace(start, end, config["num_train_timesteps"], dtype=torch.float32) ** 2
    alphas_bar = torch.cumprod(1.0 - betas, dim=0)
    return ((1 - alphas_bar) / alphas_bar) ** 0.5
