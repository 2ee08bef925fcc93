"""EMA of weights: its closed form, in samples and not in steps."""

import pytest
import torch
from torch import nn

from koala.distillation.ema import EMA, ema_decay
from koala.errors import UserError

LONG_AGO = 10**9  # samples seen, far beyond the ramp-up


def filled(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    module = nn.Linear(3, 2).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def values(ema: EMA) -> list[float]:
    return [value for weight in ema.state_dict().values() for value in weight.flatten().tolist()]


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_after_n_samples_the_start_counts_half_to_the_n_over_half_life(batch: int) -> None:
    ema = EMA(filled(2.0), half_life=64)
    for step in range(128 // batch):
        ema.update(filled(-1.0), batch, LONG_AGO + step * batch)
    expected = -1.0 + 3.0 * 0.5 ** (128 / 64)
    assert values(ema) == pytest.approx([expected] * 8, abs=1e-5)


def test_the_half_life_ramps_up_with_the_samples_seen() -> None:
    assert ema_decay(10, 100, half_life=10**9) == 0.5 ** (10 / 5)
    assert ema_decay(10, 100, half_life=2) == 0.5 ** (10 / 2)
    assert ema_decay(8, 8, half_life=10**9) == 0.5**20


def test_changing_weights_follow_the_recursion() -> None:
    ema, expected, seen = EMA(filled(0.0), half_life=50), 0.0, 0
    for weight in (1.0, 3.0, -2.0, 5.0):
        seen += 8
        decay = 0.5 ** (8 / min(50, 0.05 * seen))
        expected = decay * expected + (1 - decay) * weight
        ema.update(filled(weight), 8, seen)
    assert values(ema) == pytest.approx([expected] * 8, rel=1e-6)


def test_the_average_is_a_float32_copy_and_goes_back_in_the_dtype_of_the_module() -> None:
    module = filled(1.0, torch.bfloat16)
    ema = EMA(module, half_life=10)
    ema.update(filled(2.0, torch.bfloat16), 10, LONG_AGO)
    assert values(ema) == [1.5] * 8
    assert all(weight.dtype == torch.float32 for weight in ema.state_dict().values())
    assert module.bias.tolist() == [1.0, 1.0]
    ema.copy_to(module)
    assert module.bias.dtype == torch.bfloat16
    assert module.bias.tolist() == [1.5, 1.5]


def test_swapping_twice_is_as_before() -> None:
    ema, module = EMA(filled(2.0), half_life=10), filled(5.0)
    ema.swap(module)
    assert (module.bias.tolist(), values(ema)) == ([2.0, 2.0], [5.0] * 8)
    ema.swap(module)
    assert (module.bias.tolist(), values(ema)) == ([5.0, 5.0], [2.0] * 8)


@pytest.mark.parametrize("half_life", [0, -1.0, float("nan"), float("inf")])
def test_a_half_life_that_is_none_is_refused(half_life: float) -> None:
    with pytest.raises(UserError, match="half-life"):
        EMA(filled(1.0), half_life)
