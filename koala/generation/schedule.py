"""Noise schedules: SDXL's noise levels, and how the steps of a drawing are spaced over them.

KOALA samples in 10 steps. With so few, the first must start at the noisiest level of training, as
"trailing" spacing does (arXiv 2305.08891, table 2); "leading", SDXL's own, starts below it. Latent
consistency models were trained on 50 levels of their own. The other spacings are those that
AUTOMATIC1111's web UI and diffusers offer besides.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from koala.checkpoints.load import noise_levels
from koala.checkpoints.prediction import of_config
from koala.generation import validation
from koala.generation.validation import LCM_LEVELS


@dataclass(frozen=True)
class Schedule:
    """Step i goes from noise level `sigmas[i]`, the U-Net's `timesteps[i]`, to the next."""

    timesteps: np.ndarray  # float64 [steps], falling, 0..999; not whole in every spacing
    sigmas: np.ndarray  # float32 [steps + 1], falling, the last one 0
    trained: np.ndarray  # float32 [levels], rising: the noise level of each timestep of training
    prediction: str  # the U-Net's, a type of `koala.checkpoints.prediction`

    def __len__(self) -> int:
        return len(self.timesteps)

    def last(self, share: float) -> "Schedule":
        """The last `share` (0..1] of the steps, rounded down: what starts from an image.

        UserError if that leaves no step.
        """
        skipped = len(self) - validation.steps_done(len(self), share)
        return replace(self, timesteps=self.timesteps[skipped:], sigmas=self.sigmas[skipped:])

    def whole(self, nearest: bool) -> "Schedule":
        """With whole timesteps, the nearest or those below."""
        return replace(self, timesteps=(np.rint if nearest else np.floor)(self.timesteps))

    def with_midpoints(self) -> "Schedule":
        """With a step more between each two, half way in log(sigma): 2 * steps - 1 in all."""
        between = np.sqrt(self.sigmas[:-2] * self.sigmas[1:-1])
        sigmas = np.insert(self.sigmas, np.arange(1, len(self)), between)
        timesteps = np.insert(
            self.timesteps, np.arange(1, len(self)), _timesteps(self.trained, between)
        )
        return replace(self, timesteps=timesteps, sigmas=sigmas)


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
    return _at(config, ends - 1)


def lcm(config: dict[str, Any], steps: int) -> Schedule:
    """`steps` of the 50 levels of latent consistency models (arXiv 2310.04378).

    Equal to diffusers' `LCMScheduler`. UserError as for `trailing`, or for more than 50 steps.
    """
    levels = validation.schedule(config, "lcm", steps)
    trained = levels // LCM_LEVELS * np.arange(LCM_LEVELS, 0, -1) - 1
    chosen = np.floor(np.linspace(0, LCM_LEVELS, steps, endpoint=False)).astype(int)
    return _at(config, trained[chosen])


def uniform(config: dict[str, Any], steps: int) -> Schedule:
    """`steps` equal parts of the timesteps from the last to 0, both among them.

    Equal to diffusers' `EulerDiscreteScheduler(timestep_spacing="linspace")`. UserError as for
    `trailing`.
    """
    levels = validation.schedule(config, "uniform", steps)
    timesteps = np.linspace(levels - 1, 0, steps)
    sigmas = np.interp(timesteps, np.arange(levels), _sigmas(config))
    return _schedule(config, timesteps, sigmas)


def karras(config: dict[str, Any], steps: int) -> Schedule:
    """Noise levels of which the seventh roots are equally spaced (arXiv 2206.00364, equation 5).

    Equal to diffusers' `use_karras_sigmas`. UserError as for `trailing`.
    """
    return _between(
        config, "karras", steps,
        lambda low, high, ramp: (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7,
    )  # fmt: skip


def exponential(config: dict[str, Any], steps: int) -> Schedule:
    """Noise levels of which the logarithms are equally spaced.

    Equal to diffusers' `use_exponential_sigmas`. UserError as for `trailing`.
    """
    return _between(
        config, "exponential", steps, lambda low, high, ramp: high * (low / high) ** ramp
    )


def beta(config: dict[str, Any], steps: int) -> Schedule:
    """Noise levels at quantiles of a beta distribution (arXiv 2407.12173, alpha = beta = 0.6).

    Equal to diffusers' `use_beta_sigmas`. UserError as for `trailing`.
    """
    return _between(
        config, "beta", steps,
        lambda low, high, ramp: low + _beta_quantile(1 - ramp, 0.6) * (high - low),
    )  # fmt: skip


def align_your_steps(config: dict[str, Any], steps: int) -> Schedule:
    """Noise levels that were found best for SDXL in 10 steps (arXiv 2404.14507, table of SDXL).

    Other numbers of steps interpolate their logarithms. UserError as for `trailing`.
    """
    validation.schedule(config, "align-your-steps", steps)
    ends = np.linspace(0, len(_ALIGNED) - 1, steps + 1)[:-1]
    sigmas = np.exp(np.interp(ends, np.arange(len(_ALIGNED)), np.log(_ALIGNED)))
    return _schedule(config, _timesteps(_sigmas(config), sigmas), sigmas)


_ALIGNED = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
SPACINGS: dict[str, Callable[[dict[str, Any], int], Schedule]] = {
    "trailing": trailing,
    "uniform": uniform,
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
    "align-your-steps": align_your_steps,
    "lcm": lcm,
}


def _at(config: dict[str, Any], timesteps: np.ndarray) -> Schedule:
    """The schedule of whole timesteps."""
    chosen = timesteps.astype(int)
    return _schedule(config, chosen, _sigmas(config)[chosen])


def _between(
    config: dict[str, Any], spacing: str, steps: int,
    curve: Callable[[float, float, np.ndarray], np.ndarray],
) -> Schedule:  # fmt: skip
    """From the highest to the lowest level of training: `curve` of both and 0..1 [steps]."""
    validation.schedule(config, spacing, steps)
    trained = _sigmas(config)
    sigmas = curve(float(trained[0]), float(trained[-1]), np.linspace(0, 1, steps))
    return _schedule(config, _timesteps(trained, sigmas), sigmas)


def _schedule(config: dict[str, Any], timesteps: np.ndarray, sigmas: np.ndarray) -> Schedule:
    return Schedule(
        timesteps.astype(np.float64), np.append(sigmas, 0).astype(np.float32), _sigmas(config),
        of_config(config).type,
    )  # fmt: skip


def _timesteps(trained: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """The timesteps of noise levels, between those of training by their logarithms."""
    return np.interp(np.log(sigmas), np.log(trained), np.arange(len(trained)))


def _sigmas(config: dict[str, Any]) -> np.ndarray:
    """sigma_t = sqrt((1 - abar_t) / abar_t) for every t, float32 [levels]."""
    abar = noise_levels(config)
    return np.sqrt((1 - abar) / abar)


def _beta_quantile(shares: np.ndarray, shape: float) -> np.ndarray:
    """Where a beta distribution with both parameters `shape` has these shares below it.

    By bisection of its distribution function's series at 0, for the lower half; the upper one
    mirrors it.
    """
    whole = math.gamma(shape) ** 2 / math.gamma(2 * shape)
    factors = [1.0]
    for n in range(1, 60):  # at 0.5 each term is less than half of the one before
        factors.append(factors[-1] * (n - shape) / n)
    terms = np.array([factor / (shape + n) for n, factor in enumerate(factors)])
    wanted = np.minimum(shares, 1 - shares)
    low, high = np.zeros_like(wanted), np.full_like(wanted, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = middle**shape * np.polynomial.polynomial.polyval(middle, terms) / whole < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(shares <= 0.5, high, 1 - high)
