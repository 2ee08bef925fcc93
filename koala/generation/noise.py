"""The noise of one image."""

import torch
from torch import Tensor

from koala.utils.device import to_device


class Noise:
    """Standard normal noise of one image, a function of its seed alone.

    Sampled on the CPU, so that it depends neither on the device nor on other images.
    """

    def __init__(self, seed: int, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Tensor:
        """The next noise, float32 of the shape, on the device."""
        return to_device(torch.randn(self.shape, generator=self.generator), self.device)
