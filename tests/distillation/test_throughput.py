"""Throughput of a training, and that the CPU has no peak to be held against."""

import pytest
import torch

from koala.distillation.parallel import World
from koala.distillation.throughput import Meter, matmul_peak


def test_rate_is_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 102.0, 112.0])
    monkeypatch.setattr("koala.distillation.throughput.time.monotonic", lambda: next(clock))
    meter = Meter(World(), 40, flops=1e12)
    first, second = meter.read(60), meter.read(65)
    assert (first["samples_per_second"], second["samples_per_second"]) == (10.0, 0.5)
    assert first["memory_gib"] > 0.05
    assert "share_of_peak" not in first  # no peak is measured on the CPU
    assert matmul_peak(torch.device("cpu")) is None
