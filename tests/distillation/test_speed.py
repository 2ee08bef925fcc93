"""Speed of a training: work is counted as published, and the CPU has no peak to be held against."""

import pytest
import torch

from koala.architectures.config import unet_config
from koala.architectures.table import get
from koala.distillation.parallel import World
from koala.distillation.speed import Meter, matmul_peak, unet_flops


@pytest.mark.parametrize(
    ("name", "side", "tera"), [("koala-700m", 64, 0.62), ("koala-700m", 128, 2.70)]
)
def test_a_forward_pass_costs_what_is_published(name: str, side: int, tera: float) -> None:
    flops = unet_flops(unet_config(get(name)), side, side, tokens=77)
    assert flops / 1e12 == pytest.approx(tera, abs=0.005)


def test_rate_is_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 102.0, 112.0])
    monkeypatch.setattr("koala.distillation.speed.time.monotonic", lambda: next(clock))
    meter = Meter(World(), 40, flops=1e12)
    first, second = meter.read(60), meter.read(65)
    assert (first["samples_per_second"], second["samples_per_second"]) == (10.0, 0.5)
    assert first["memory_gib"] > 0.05
    assert "share_of_peak" not in first  # no peak is measured on the CPU
    assert matmul_peak(torch.device("cpu")) is None
