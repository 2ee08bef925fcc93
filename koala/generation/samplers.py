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

# AUTOMATIC1111's names of the spacings, the keys of `schedule.SPACINGS`. Its "SGM Uniform" is
# closest to trailing spacing: both start at the last timestep of training, and no later step is two
# timesteps off. LCM has its own levels in both.
LABELS = {
    "trailing": "SGM Uniform",
    "uniform": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "align-your-steps": "Align Your Steps",
    "lcm": "Automatic",
}


class Sampler:
    """One image's sampler over a schedule. Subclasses define `step`.

    name: as AUTOMATIC1111 calls it. spacing: its own, a key of `schedule.SPACINGS`. spacings: those
    it works with. evaluations: of the U-Net, for each step of the schedule.
    """

    name: ClassVar[str]
    spacing: ClassVar[str] = "trailing"
    spacings: ClassVar[tuple[str, ...]] = tuple(name for name in LABELS if name != "lcm")
    evaluations: ClassVar[int] = 1
    # Whether x begins with training's variance, sigma^2 + 1; else the image's variance is left out.
    begins_as_trained: ClassVar[bool] = False

    @classmethod
    def adapted(cls, schedule: Schedule, spacing: str) -> Schedule:
        """The schedule with a step for each evaluation."""
        return schedule

    def __init__(self, schedule: Schedule, noise: Noise) -> None:
        self.timesteps: list[float] = schedule.timesteps.tolist()
        self.sigmas: list[float] = schedule.sigmas.tolist()
        self.prediction = schedule.prediction
        self.noise = noise

    def start(self, noise: Array) -> Array:
        """x before the first step, of standard normal noise."""
        sigma = self.sigmas[0]
        return noise * (_std(sigma) if self.begins_as_trained else sigma)

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

    Written for x = x0 + sigma * noise it is Euler's method. Only the start differs.
    """

    name = "DDIM"
    begins_as_trained = True


class EulerAncestral(Sampler):
    """Euler's method to below the next noise level, then noise up to it.

    The noise is that of the diffusion process itself (arXiv 2010.02502, equation 16, eta 1).
    """

    name = "Euler a"

    def step(self, i: int, x: Array, denoised: Array) -> Array:
        sigma, to = self.sigmas[i], self.sigmas[i + 1]
        return denoised if to == 0 else _ancestral(x, denoised, sigma, to, self.noise.draw())


class _Multistep(Sampler):
    """Second order from the step before: what DPM-Solver++(2M) and its relatives share.

    The timesteps are whole, as in diffusers, which rounds those of Karras' spacing and cuts the
    others off.
    """

    begins_as_trained = True

    def __init__(self, schedule: Schedule, noise: Noise) -> None:
        super().__init__(schedule, noise)
        self.before: list[Array] = []  # the last two estimates of x0, the latest first

    @classmethod
    def adapted(cls, schedule: Schedule, spacing: str) -> Schedule:
        return schedule.whole(nearest=spacing == "karras")

    def toward(self, i: int, denoised: Array) -> Array:
        """What step i leads to: denoised, and how it changes (arXiv 2211.01095, algorithm 2).

        The first step has no predecessor: it is of first order.
        """
        found = denoised
        if self.before:
            ratio = self.length(i) / self.length(i - 1)
            found = denoised + (denoised - self.before[0]) * (ratio / 2)
        self.before = [denoised, *self.before][:2]
        return found

    def length(self, i: int) -> float:
        """Of step i, in log(1 / sigma)."""
        return math.log(self.sigmas[i] / self.sigmas[i + 1])


class DPMSolver2M(_Multistep):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2).

    The last step ends without noise: it is of first order, as the first is.
    """

    name = "DPM++ 2M"

    def step(self, i: int, x: Array, denoised: Array) -> Array:
        ratio = self.sigmas[i + 1] / self.sigmas[i]
        return denoised if ratio == 0 else ratio * x + (1 - ratio) * self.toward(i, denoised)


class DPMSolver2MSDE(_Multistep):
    """DPM-Solver++(2M) with the diffusion process' noise (arXiv 2211.01095, its SDE form)."""

    name = "DPM++ 2M SDE"

    def step(self, i: int, x: Array, denoised: Array) -> Array:
        sigma, to = self.sigmas[i], self.sigmas[i + 1]
        if to == 0:
            return denoised
        return _ancestral(x, self.toward(i, denoised), sigma, to, self.noise.draw())


class DPMSolverSDE(Sampler):
    """DPM-Solver++ of second order with noise, half a step first: two evaluations a step.

    The solver is that of arXiv 2211.01095, algorithm 1 (r 1/2), its noise that of one Brownian
    motion in sigma: the whole step's is the first half's and some more.
    """

    name = "DPM++ SDE"
    evaluations = 2

    def __init__(self, schedule: Schedule, noise: Noise) -> None:
        super().__init__(schedule, noise)
        self.began: tuple[Array, Array] | None = None  # x before the step, noise of its first half

    @classmethod
    def adapted(cls, schedule: Schedule, spacing: str) -> Schedule:
        return schedule.with_midpoints()

    def step(self, i: int, x: Array, denoised: Array) -> Array:
        to = self.sigmas[i + 1]
        if to == 0:
            return denoised
        noise = self.noise.draw()
        if self.began is None:
            self.began = x, noise
            return _ancestral(x, denoised, self.sigmas[i], to, noise)
        (x, first), self.began = self.began, None
        sigma, middle = self.sigmas[i - 1], self.sigmas[i]
        share = (sigma - middle) / (sigma - to)
        noise = math.sqrt(share) * first + math.sqrt(1 - share) * noise
        return _ancestral(x, denoised, sigma, to, noise)


class UniPC(_Multistep):
    """UniPC-2 with B(h) = exp(h) - 1 (arXiv 2302.04867, algorithms 1 and 2, on estimates of x0).

    Its predictor is DPM-Solver++(2M)'s step. The corrector takes the step before once more, with
    the estimate at its end too.
    """

    name = "UniPC"

    def __init__(self, schedule: Schedule, noise: Noise) -> None:
        super().__init__(schedule, noise)
        self.last: Array | None = None  # x before the last step

    def step(self, i: int, x: Array, denoised: Array) -> Array:
        if self.last is not None:
            x = self._corrected(i - 1, self.last, denoised)
        ratio = self.sigmas[i + 1] / self.sigmas[i]
        self.last = x
        return denoised if ratio == 0 else ratio * x + (1 - ratio) * self.toward(i, denoised)

    def _corrected(self, i: int, x: Array, denoised: Array) -> Array:
        """x after step i, given x before it and the estimate of x0 at its end."""
        h, ratio = self.length(i), self.sigmas[i + 1] / self.sigmas[i]
        last, *older = self.before
        if not older:
            change = (denoised - last) / 2
        else:
            # The weights of both differences solve equation 6 for p = 2.
            place = -self.length(i - 1) / h
            first = (1 + (ratio - 1) / h) / (1 - ratio)
            second = 2 * (0.5 - first * (1 - ratio) / h) / (1 - ratio)
            weight = (first - second) / (1 - place)
            change = weight / place * (older[0] - last) + (first - weight) * (denoised - last)
        return ratio * x + (1 - ratio) * (last + change)


class LCM(Sampler):
    """Multistep consistency sampling (arXiv 2310.04378, algorithm 3), for models made for it."""

    name = "LCM"
    spacing = "lcm"
    spacings = ("lcm",)
    begins_as_trained = True

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


def _ancestral(x: Array, denoised: Array, sigma: float, to: float, noise: Array) -> Array:
    """From one noise level to below the next, then up to it with noise (eta 1)."""
    up = to * math.sqrt(sigma**2 - to**2) / sigma
    down = to**2 / sigma
    return x * (down / sigma) + (1 - down / sigma) * denoised + up * noise


SAMPLERS: dict[str, type[Sampler]] = {
    "euler": Euler,
    "euler-a": EulerAncestral,
    "dpm++2m": DPMSolver2M,
    "dpm++2m-sde": DPMSolver2MSDE,
    "dpm++sde": DPMSolverSDE,
    "unipc": UniPC,
    "ddim": DDIM,
    "lcm": LCM,
}
BY_NAME = {sampler.name: sampler for sampler in SAMPLERS.values()}


def get(name: str) -> tuple[type[Sampler], str]:
    """The sampler and the spacing of a name such as "dpm++2m", "dpm++2m-karras", "DPM++ 2M Karras".

    Capitals do not matter. UserError for an unknown one lists all.
    """
    asked = name.strip().lower()
    for key, sampler in SAMPLERS.items():
        for own, gap in ((key, "-"), (sampler.name.lower(), " ")):
            if asked == own:
                return sampler, sampler.spacing
            for spacing in sampler.spacings:
                if asked in (f"{own}-{spacing}", f"{own}{gap}{LABELS[spacing].lower()}"):
                    return sampler, spacing
    endings = ", ".join(f"-{spacing}" for spacing in Sampler.spacings)
    raise unknown("scheduler", name, SAMPLERS, f"; each but lcm also with {endings}")
