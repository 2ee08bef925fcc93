"""Rounding to 4 bits by what a layer sees, against the same told plainly."""

import pytest
import torch
from torch import Tensor

from koala.checkpoints.quantised import GROUP
from koala.generation.memory.calibrated import calibrated
from koala.generation.quantise import hold, quantised, scale_of


def correlated(inputs: int) -> Tensor:
    """Second moments of inputs that depend on one another."""
    draw = torch.Generator().manual_seed(1)
    mixed = torch.randn(inputs, inputs, generator=draw, dtype=torch.float64)
    x = torch.randn(4 * inputs, inputs // 4, generator=draw, dtype=torch.float64)
    x = x @ mixed[: inputs // 4] + 0.3 * torch.randn(4 * inputs, inputs, generator=draw)
    h = x.T @ x / len(x)
    return h + 0.1 * h.diagonal().mean() * torch.eye(inputs)


def drawn(*shape: int) -> Tensor:
    return (0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).half()


def plainly(weight: Tensor, h: Tensor) -> Tensor:
    """Column by column from the last; those left make up for it, by their moments' inverse."""
    left = weight.double().flatten(1)
    for j in reversed(range(left.shape[1])):
        a = j // GROUP * GROUP
        if j == left.shape[1] - 1 or (j + 1) % GROUP == 0:
            group = torch.zeros(len(left), GROUP)
            group[:, : j + 1 - a] = left[:, a : j + 1]
            scale = scale_of(group, weight.dtype)[:, 0].double()
        inverse = torch.linalg.inv(h[: j + 1, : j + 1])
        rounded = (left[:, j] / scale).round().clamp(-8, 7) * scale
        error = (left[:, j] - rounded) / inverse[j, j]
        left[:, : j + 1] -= error[:, None] * inverse[j]
        left[:, j] = rounded
    return left


def held(weight: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """The weights [out, inputs] that a layer computes with."""
    conv = weight.ndim == 4
    layer = torch.nn.Conv2d(1, 1, 1) if conv else torch.nn.Linear(1, 1)
    layer.weight = torch.nn.Parameter(weight.float())
    hold(layer, "down", [values, scale.float()])
    return layer.weight.double().flatten(1)


@pytest.mark.parametrize("shape", [(24, 96), (8, 70), (16, 9, 3, 3), (6, 20)])
def test_it_is_that_of_columns_one_by_one(shape):
    weight = drawn(*shape)
    h = correlated(weight[0].numel())
    made = held(weight, *calibrated(weight, torch.linalg.cholesky(h)))
    assert (made - plainly(weight, h)).abs().max() < 1e-5
    assert (made - held(weight, *quantised(weight, "int4"))).abs().max() > 1e-3  # not the same


@pytest.mark.parametrize("shape", [(24, 96), (8, 70), (16, 9, 3, 3)])
def test_without_correlations_it_is_plain_rounding(shape):
    weight = drawn(*shape)
    factor = torch.linalg.cholesky(3 * torch.eye(weight[0].numel(), dtype=torch.float64))
    for own, plain in zip(calibrated(weight, factor), quantised(weight, "int4"), strict=True):
        assert torch.equal(own, plain)


def test_a_layers_output_is_nearer_than_by_plain_rounding():
    weight = drawn(64, 128)
    h = correlated(128)
    exact = weight.double()

    def error(values: Tensor, scale: Tensor) -> float:
        lost = exact - held(weight, values, scale)
        return float((lost @ h @ lost.T).trace())

    own = error(*calibrated(weight, torch.linalg.cholesky(h)))
    assert own < 0.5 * error(*quantised(weight, "int4"))
