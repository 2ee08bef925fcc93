"""The samplers: from one noise level to the next, given the estimated image.

All use one notation: x = x0 + sigma * noise. The U-Net sees x / sqrt(sigma^2 + 1), of variance
one; the papers of DDIM and LCM write their formulas for that. Every image has a sampler of its
own, with its own history and noise. Importing this loads no torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from koala.checkpoints.prediction import VELOCITY
from koala.errors import unknown

if TYPE_CHECKING:
    from koala.generation.noise import Noise
    from koala.generation.schedule import Schedule
    from koala.utils.arrays import Array


class Sampler:
    """One image's sampler over a schedule. Subclasses define `step`.

    name: as AUTOMATIC1111 calls it. spacing: a key of `schedule.SPACINGS`.
    """

    name: ClassVar[str]
    spacing: ClassVar[str] = "trailing"

    def __init__(self, schedule: Schedule, noise: Noise) -> None:
        self.timesteps: list[float] = schedule.timesteps.tolist()
        self.sigmas: list[float] = schedule.sigmas.tolist()
        self.prediction = schedule.prediction
        self.noise = noise

    def start(self, noise: Array) -> Array:
        """x before the first step, of standard normal noise."""
        return noise * self.sigmas[0]

    def denoised(self, i: int, x: Array, output: Array) -> Array:
        """The estimate of x0 before step i, from the U-Net's output.

        That is epsilon, or v = sqrt(abar) epsilon - sqrt(1 - abar) x0 (arXiv 2202.00512, section
        2.2); abar = 1 / (sigma^2 + 1).
        """
        sigma = self.sigmas[i]
        if self.prediction == VELOCITY:
            return x / (sigma**2 + 1) - sigma / _std(sigma) * output
        return x - sigma * output

    def step(self, i: int, x: Array, denoised: Array) -> Array:
        """x after step i, from sigmas[i] to sigmas[i + 1], given the estimate of x0."""
        raise NotImplementedError


class Euler(Sampler):
    """Euler's method (arXiv 2206.00364, algorithm 1 without its correction)."""

    name = "Euler"

    def step(self, i: int, x: Array, denoised: Array) -> Array:
        sigma, to = self.sigmas[i], self.sigmas[i + 1]
        slope = (x - denoised) / sigma
        return x + (to - sigma) * slope


class DDIM(Euler):
    """DDIM without added noise (arXiv 2010.02502, equation 12, its sigma 0).

    Written for x = x0 + sigma * noise it is Euler's method. Only the start differs: its variance
    is that of training, sigma^2 + 1; Euler's leaves out the image's variance of one.
    """

    name = "DDIM"

    def start(self, noise: Array) -> Array:
        return noise * _std(self.sigmas[0])


class EulerAncestral(Sampler):
    """Euler's method to below the next noise level, then noise up to it.

    The noise is that of the diffusion process itself (arXiv 2010.02502, equation 16, eta 1).
    """

    name = "Euler a"

    def step(self, i: int, x: Array, denoised: Array) -> Array:
        sigma, to = self.sigmas[i], self.sigmas[i + 1]
        up = to * math.sqrt(sigma**2 - to**2) / sigma
        down = math.sqrt(to**2 - up**2)
        slope = (x - denoised) / sigma
        x = x + (down - sigma) * slope
        return x + up * self.noise.draw() if up > 0 else x


class DPMSolver2M(Sampler):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): second order from the step before.

    The first step has no predecessor and the last ends without noise: both are of first order.
    """

    name = "DPM++ 2M"

    def __init__(self, schedule: Schedule, noise: Noise) -> None:
        super().__init__(schedule, noise)
        self.before: Array | None = None  # the last step's denoised
        self.before_length = 0.0  # of the last step, in log(1 / sigma)

    def start(self, noise: Array) -> Array:
        return noise * _std(self.sigmas[0])

    def step(self, i: int, x: Array, denoised: Array) -> Array:
        sigma, to = self.sigmas[i], self.sigmas[i + 1]
        if to == 0:
            return denoised
        length = math.log(sigma / to)
        toward = denoised
        if self.before is not None:
            toward = denoised + (denoised - self.before) * (length / self.before_length / 2)
        self.before, self.before_length = denoised, length
        return to / sigma * x + (1 - to / sigma) * toward


class LCM(Sampler):
    """Multistep consistency sampling (arXiv 2310.04378, algorithm 3), for models made for it."""

    name = "LCM"
    spacing = "lcm"

    def start(self, noise: Array) -> Array:
        return noise * _std(self.sigmas[0])

    def step(self, i: int, x: Array, denoised: Array) -> Array:
        sigma, to = self.sigmas[i], self.sigmas[i + 1]
        scaled_time, data = 10 * self.timesteps[i], 0.5  # the boundary condition, section 4.1
        norm = scaled_time**2 + data**2
        skip, out = data**2 / norm, scaled_time / math.sqrt(norm)
        x = out * denoised + skip * x / _std(sigma)
        return x + to * self.noise.draw() if to > 0 else x


def _std(sigma: float) -> float:
    """The standard deviation of x at a noise level, for x0 of standard deviation one."""
    return math.sqrt(sigma**2 + 1)


SAMPLERS: dict[str, type[Sampler]] = {
    "euler": Euler,
    "euler-a": EulerAncestral,
    "dpm++2m": DPMSolver2M,
    "ddim": DDIM,
    "lcm": LCM,
}
BY_NAME = {sampler.name: sampler for sampler in SAMPLERS.values()}


def get(name: str) -> type[Sampler]:
    """The sampler of that name. UserError for an unknown one lists all."""
    if name not in SAMPLERS:
        raise unknown("scheduler", name, SAMPLERS)
    return SAMPLERS[name]
