"""The noise of one image: PyTorch's for a seed, with PyTorch or without it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from koala.utils.arrays import Array
from koala.utils.device import to_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BLOCK = 16  # numbers that PyTorch makes at once


class Noise(Protocol):
    """Standard normal noise of one image, a function of its seed alone."""

    def draw(self) -> Array:
        """The next noise, float32 of the image's shape."""


class TorchNoise:
    """Drawn by PyTorch on the CPU, so that it depends neither on the device nor on other images."""

    def __init__(self, seed: int, shape: tuple[int, ...], device: torch.device) -> None:
        import torch

        self.shape, self.device = shape, device
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Tensor:
        import torch

        return to_device(torch.randn(self.shape, generator=self.generator), self.device)


class NumpyNoise:
    """The same numbers within 1e-6, drawn by NumPy."""

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.generator = Generator(seed)

    def draw(self) -> np.ndarray:
        return self.generator.normal(math.prod(self.shape)).reshape(self.shape)


class Generator:
    """`torch.Generator` of the CPU as far as `torch.randn` in float32 goes.

    The bits are the Mersenne Twister's. From 16 numbers on, PyTorch turns blocks of 16 uniform
    numbers into normal ones (Box and Muller 1958), of 24 random bits each; fewer are made in pairs
    of 53 bits, of which the second waits for the next draw.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.RandomState(seed & 0xFFFFFFFF)._bit_generator
        self._pairs = self._single()

    def normal(self, count: int) -> np.ndarray:
        """The next `count` standard normal numbers, float32."""
        if count < _BLOCK:
            return np.array([next(self._pairs) for _ in range(count)], np.float32)
        uniform, whole = self._uniform(count), count // _BLOCK * _BLOCK
        normal = np.empty_like(uniform)
        normal[:whole] = _normal_blocks(uniform[:whole])
        if whole < count:  # the last block overlaps the one before, with numbers of its own
            normal[-_BLOCK:] = _normal_blocks(self._uniform(_BLOCK))
        return normal

    def _uniform(self, count: int) -> np.ndarray:
        words = self._bits.random_raw(count).astype(np.uint32)
        return (words & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)

    def _single(self) -> Iterator[float]:
        while True:
            high, low, high_2, low_2 = (int(word) for word in self._bits.random_raw(4))
            angle = 2 * math.pi * _fraction(high, low)
            radius = math.sqrt(-2 * math.log1p(-_fraction(high_2, low_2)))
            yield radius * math.cos(angle)
            yield radius * math.sin(angle)


def _fraction(high: int, low: int) -> float:
    return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def _normal_blocks(uniform: np.ndarray) -> np.ndarray:
    first, second = np.split(uniform.reshape(-1, _BLOCK), 2, axis=1)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - first))
    angle = np.float32(2 * math.pi) * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
