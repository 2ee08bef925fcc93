"""Noise without PyTorch: the numbers that PyTorch would draw."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from koala.generation.noise import Generator, NumpyNoise, TorchNoise


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**63 - 1), st.lists(st.integers(1, 100), min_size=1, max_size=6))
def test_draws_of_any_size_are_pytorchs(seed, counts):
    ours, theirs = Generator(seed), torch.Generator().manual_seed(seed)
    for count in counts:
        wanted = torch.randn(count, generator=theirs).numpy()
        np.testing.assert_allclose(ours.normal(count), wanted, atol=1e-6, rtol=1e-6)


def test_an_images_noise_is_the_same_with_and_without_pytorch():
    shape = (1, 4, 13, 9)
    ours, theirs = NumpyNoise(2**40 + 7, shape), TorchNoise(2**40 + 7, shape, torch.device("cpu"))
    for _ in range(3):
        drawn = ours.draw()
        assert drawn.dtype == np.float32
        np.testing.assert_allclose(drawn, theirs.draw().numpy(), atol=1e-6, rtol=1e-6)
    assert not np.array_equal(NumpyNoise(1, shape).draw(), NumpyNoise(2, shape).draw())
