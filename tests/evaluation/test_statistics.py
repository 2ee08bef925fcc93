"""Intervals and verdicts, against what is known of the distributions that the numbers come from."""

import numpy as np
import pytest

from koala.evaluation.statistics import (
    Measured,
    compare,
    groups_of,
    interval,
    prompt_draws,
    pseudo_values,
)


def one(units) -> Measured:
    units = np.atleast_2d(np.asarray(units, float))
    return Measured(units.mean(1), units)


def verdict(a: Measured, b: Measured, higher: bool = True):
    apart = prompt_draws([a.of_prompts - b.of_prompts])[0]
    return compare(a, b, apart, a.units.shape[1], higher)


def test_the_draws_have_the_standard_error_of_the_mean():
    row = one(np.random.default_rng(3).normal(size=400))
    draws = prompt_draws([row.of_prompts])[0]
    assert abs(draws.mean()) < 4 * draws.std() / 2000**0.5
    assert draws.std() == pytest.approx(row.units.std(ddof=1) / 20, rel=0.06)
    again = prompt_draws([np.zeros(400), row.of_prompts])
    np.testing.assert_allclose(again[1], draws, atol=1e-12)
    assert not again[0].any()


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Of 300 intervals of 95 %, 285 hold the mean, but for four standard errors of that count."""
    rng = np.random.default_rng(0)
    samples = rng.exponential(size=(300, 60))
    found = [
        interval(sample.mean(), draws, [])
        for sample, draws in zip(samples, prompt_draws(samples), strict=True)
    ]
    assert 270 <= sum(one.low <= 1 <= one.high for one in found) <= 300


def test_what_is_hard_for_both_cancels():
    rng = np.random.default_rng(1)
    prompts = rng.normal(scale=10, size=200)
    a, b = one(prompts + 0.2 + rng.normal(scale=0.5, size=200)), one(prompts)
    assert verdict(a, b).says == "better"
    assert verdict(a, b, higher=False).says == "worse"
    assert verdict(b, a).says == "worse"
    shuffled = one(rng.permutation(prompts))
    assert verdict(a, shuffled).says == "cannot be told"


def test_so_many_prompts_as_it_says_do_tell():
    """At the number that a verdict names, four of five repetitions tell; at the given one, few."""
    rng = np.random.default_rng(2)
    few = 100
    effect = 1.4 / few**0.5  # of the noise: half of what 100 prompts tell
    named = verdict(one(_exact(rng, few, effect)), one(np.zeros(few)))
    assert named.prompts is not None and 370 <= named.prompts <= 430
    assert named.text == f"cannot be told: {named.prompts} prompts would"
    told = dict.fromkeys((few, 400), 0)
    for n in told:
        better = effect + rng.normal(size=(60, n))
        for units, apart in zip(better, prompt_draws(better), strict=True):
            found = compare(one(units), one(np.zeros(n)), apart, n, higher=True)
            told[n] += found.says == "better"
    assert told[few] < 30 < 38 <= told[400]


def _exact(rng, n: int, mean: float) -> np.ndarray:
    """n values of that mean and of variance 1."""
    x = rng.normal(size=n)
    return mean + (x - x.mean()) / x.std(ddof=1)


def test_equal_rows_are_equal():
    row = one(np.arange(30))
    assert verdict(row, row).text == "equal"
    assert verdict(row, row).difference.low == 0


def test_trainings_widen_what_prompts_alone_would_tell():
    rng = np.random.default_rng(4)
    noise = rng.normal(scale=0.1, size=(3, 300))
    a = one(noise + 0.3 + np.array([[-0.4], [0.0], [0.4]]))  # trainings differ by 0.4
    b = one(rng.normal(scale=0.1, size=(3, 300)))
    assert verdict(one(a.units[1]), b).says == "better"
    found = verdict(a, b)
    assert found.says == "cannot be told" and found.prompts is None
    assert found.trainings is not None and found.trainings > 3
    assert "trainings of each would" in found.text
    wide = interval(a.value, prompt_draws([a.of_prompts])[0], [(a.training_error, 3)])
    assert wide.high - wide.low > 2 * 4 * a.training_error, "Student's t of three is wide"


def test_strata_keep_the_categories_shares():
    """Two categories of equal values each: drawn within them, nothing varies."""
    row = Measured(np.array([0.5]), np.array([[0.0] * 90 + [1.0] * 10]))
    strata = [0] * 90 + [1] * 10
    assert prompt_draws(row.units, strata).std() == 0
    assert prompt_draws(row.units).std() > 0.02
    spread = Measured(np.array([0.5]), np.array([[0.0, 1.0] * 45 + [0.0, 1.0] * 5]))
    weights = [0] * 90 + [1] * 10
    expected = (0.25 / 89 + 0.25 / 9) ** 0.5 / 2  # of the mean of two means
    assert prompt_draws(spread.units, weights).std() == pytest.approx(expected, rel=0.06)


def test_pseudo_values_of_a_mean_are_its_values():
    values = np.random.default_rng(5).normal(size=40)
    left_out = (values.sum() - values) / 39
    np.testing.assert_allclose(pseudo_values(values.mean(), left_out), values)
    assert groups_of(45).max() == 19 and np.bincount(groups_of(45)).max() == 3
    assert list(groups_of(3)) == [0, 1, 2]
