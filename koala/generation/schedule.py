"""Noise schedules: SDXL's discrete one, in trailing or LCM spacing.

KOALA samples in 10 steps. With so few, the first must start at the noisiest level of training, as
"trailing" spacing does (arXiv 2305.08891, table 2); "leading", SDXL's own, starts below it. Latent
consistency models were trained on 50 levels of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from koala.checkpoints.load import noise_levels
from koala.checkpoints.prediction import EPSILON, of_config
from koala.generation import validation
from koala.generation.validation import LCM_LEVELS


@dataclass(frozen=True)
class Schedule:
    """Step i goes from noise level `sigmas[i]`, the U-Net's `timesteps[i]`, to the next."""

    timesteps: np.ndarray  # float32 [steps], falling, 0..999
    sigmas: np.ndarray  # float32 [steps + 1], falling, the last one 0
    prediction: str = EPSILON  # the U-Net's, a type of `koala.checkpoints.prediction`

    def __len__(self) -> int:
        return len(self.timesteps)

    def last(self, share: float) -> "Schedule":
        """The last `share` (0..1] of the steps, rounded down: what starts from an image.

        UserError if that leaves no step.
        """
        skipped = len(self) - validation.steps_done(len(self), share)
        return replace(self, timesteps=self.timesteps[skipped:], sigmas=self.sigmas[skipped:])


def trailing(config: dict[str, Any], steps: int) -> Schedule:
    """`steps` steps in trailing spacing, for a folder's scheduler config.

    Equal to diffusers' `EulerDiscreteScheduler(timestep_spacing="trailing")`, whatever sampler
    and spacing the config names. UserError for a schedule that is not SDXL's kind (discrete,
    predicting epsilon or v), or for more steps than it has noise levels.
    """
    levels = validation.schedule(config, "trailing", steps)
    # Equal parts of the levels, down from the last; halves round to even, and the slice drops a
    # zero that rounding errors add for some numbers of steps.
    ends = np.arange(levels, 0, -levels / steps)[:steps].round()
    return _schedule(config, ends - 1)


def lcm(config: dict[str, Any], steps: int) -> Schedule:
    """`steps` of the 50 levels of latent consistency models (arXiv 2310.04378).

    Equal to diffusers' `LCMScheduler`. UserError as for `trailing`, or for more than 50 steps.
    """
    levels = validation.schedule(config, "lcm", steps)
    trained = levels // LCM_LEVELS * np.arange(LCM_LEVELS, 0, -1) - 1
    chosen = np.floor(np.linspace(0, LCM_LEVELS, steps, endpoint=False)).astype(int)
    return _schedule(config, trained[chosen])


SPACINGS: dict[str, Callable[[dict[str, Any], int], Schedule]] = {"trailing": trailing, "lcm": lcm}


def _schedule(config: dict[str, Any], timesteps: np.ndarray) -> Schedule:
    chosen = timesteps.astype(int)
    sigmas = np.append(_sigmas(config)[chosen], np.float32(0))
    return Schedule(chosen.astype(np.float32), sigmas, of_config(config).type)


def _sigmas(config: dict[str, Any]) -> np.ndarray:
    """sigma_t = sqrt((1 - abar_t) / abar_t) for every t, float32 [levels]."""
    abar = noise_levels(config)
    return np.sqrt((1 - abar) / abar)
