"""What a difference is worth: paired bootstrap over prompts, training seeds, verdicts.

Two things vary. Other prompts would give another mean; and the same recipe trained again, with
another seed, would give another model. The first is drawn again from the prompts that there are,
the same for every row, so that what is easy for all cancels in a difference (Efron & Tibshirani
1993, chapter 8). The second is seen only where a row has several trainings: its variance is the
spread of their means, and its share follows Student's distribution, since three trainings tell
little of it (Welch 1947).

Letters: r trainings of a row, m units (prompts, or groups of them), b draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

DRAWS = 2000
BLOCK = 100  # draws that are made at once
LEVEL = 0.95  # of intervals and verdicts
POWER = 2.80  # standard errors: an effect so large is told at LEVEL in 80 % of the cases
GROUPS = 20  # of the jackknife
MANY = 1_000_000  # prompts: more than anybody draws


@dataclass(frozen=True)
class Measured:
    """One metric of one row.

    totals: [r], the metric of each training. units: [r, m], what the prompts add to it: the value
        of each prompt; for a distance the pseudo-values of groups of prompts (`pseudo_values`).
    """

    totals: np.ndarray
    units: np.ndarray

    @property
    def value(self) -> float:
        """The mean over the trainings."""
        return float(self.totals.mean())

    @property
    def of_prompts(self) -> np.ndarray:
        """[m]: the units' means over the trainings."""
        return self.units.mean(0)

    @property
    def training_error(self) -> float:
        """The standard error of `value` from training again; 0 for one training."""
        r = len(self.totals)
        return float(self.totals.std(ddof=1)) / math.sqrt(r) if r > 1 else 0.0


@dataclass(frozen=True)
class Interval:
    """A value with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """Whether one row is better than another, by one metric.

    difference: first minus second. prompts, trainings: about how many of each would tell, where it
    cannot be told; None where no number would.
    """

    difference: Interval
    says: Literal["better", "worse", "equal", "cannot be told"]
    prompts: int | None = None
    trainings: int | None = None

    @property
    def text(self) -> str:
        if self.says != "cannot be told":
            return self.says
        if self.prompts is not None:
            return f"cannot be told: {self.prompts:,} prompts would"
        if self.trainings is not None:
            return f"cannot be told: {self.trainings} trainings of each would"
        return f"cannot be told, nor by {MANY:,} prompts"


def prompt_draws(units: Sequence[np.ndarray], strata: Sequence[int] | None = None) -> np.ndarray:
    """[k, b]: means of units on other prompts, minus their means here; all on the same prompts.

    units: k times [m], such as a row's `of_prompts`, or the difference of two rows'. strata: [m],
        the category of each prompt where the metric is the mean over the categories' means:
        prompts are then drawn within each. None: all are drawn together.
    """
    values = np.stack(list(units))  # [k, m]
    kinds = np.zeros(values.shape[1], int) if strata is None else np.asarray(strata)
    groups = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
    rng = np.random.default_rng(0)
    drawn = np.zeros((len(values), DRAWS))
    for start in range(0, DRAWS, BLOCK):
        for group in groups:
            n = len(group)
            counts = rng.multinomial(n, np.full(n, 1 / n), size=BLOCK)  # [block, n]
            own = values[:, group] - values[:, group].mean(1, keepdims=True)
            # The bootstrap's variance is (n - 1) / n of the unbiased one.
            scale = math.sqrt(n / (n - 1)) if n > 1 else 0.0
            drawn[:, start : start + BLOCK] += scale * (own @ counts.T) / n / len(groups)
    return drawn


def interval(value: float, draws: np.ndarray, errors: Sequence[tuple[float, int]]) -> Interval:
    """The 95 % interval of a value.

    draws: [b], its deviations on other prompts. errors: the standard error from training again,
        and the number of trainings, of each row that goes into the value.
    """
    total = draws + _training_noise(errors, len(draws))
    low, high = np.quantile(total, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, value + float(low), value + float(high))


def _training_noise(errors: Sequence[tuple[float, int]], size: int) -> np.ndarray:
    """[size]: Student's noise of the summed variance, its degrees of freedom by Welch."""
    parts = [(error**2, trainings - 1) for error, trainings in errors if error > 0]
    if not parts:
        return np.zeros(size)
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / of for part, of in parts)
    return math.sqrt(variance) * np.random.default_rng(1).standard_t(freedom, size)


def compare(
    first: Measured, second: Measured, apart: np.ndarray, prompts: int, higher: bool
) -> Verdict:
    """Whether `first` is better than `second`.

    apart: [b], `prompt_draws` of the difference. prompts: their number. higher: is better.
    """
    errors = [(row.training_error, len(row.totals)) for row in (first, second)]
    difference = interval(first.value - second.value, apart, errors)
    if difference.low > 0 or difference.high < 0:
        return Verdict(difference, "better" if (difference.low > 0) == higher else "worse")
    if difference.low == difference.high:
        return Verdict(difference, "equal")
    of_prompts = float(apart.std()) ** 2
    of_training = sum(error**2 for error, _ in errors)
    allowed = (difference.value / POWER) ** 2  # the variance that would tell
    if allowed > of_training and (needed := prompts * of_prompts / (allowed - of_training)) < MANY:
        return Verdict(difference, "cannot be told", prompts=_rounded(max(needed, prompts + 1)))
    if of_training and allowed > of_prompts:
        most = max(trainings for _, trainings in errors)
        needed = most * of_training / (allowed - of_prompts)
        if needed < MANY:
            return Verdict(difference, "cannot be told", trainings=max(math.ceil(needed), most + 1))
    return Verdict(difference, "cannot be told")


def _rounded(number: float) -> int:
    """Rounded up to two figures: it is an estimate."""
    step = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / step) * step


def pseudo_values(total: float, left_out: np.ndarray) -> np.ndarray:
    """[m] the jackknife's pseudo-values of a metric that is no mean over prompts.

    total: on all prompts. left_out: [m], without each of m groups of equal size. Their mean is the
    metric and their spread its error, as if they were values of prompts (Tukey 1958). The metric
    must be smooth in the distribution of the pictures, as the Frechet and kernel distances are.
    """
    m = len(left_out)
    return m * total - (m - 1) * left_out


def groups_of(prompts: int) -> np.ndarray:
    """[prompts]: the group of the jackknife that each is in, in turn, to spread categories."""
    return np.arange(prompts) % min(GROUPS, prompts)
