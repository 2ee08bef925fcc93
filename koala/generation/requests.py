"""What is asked for: the record of one picture, and the request that carries what it is made from.

Settings are what a PNG keeps; they are complete, so that the same model makes the same picture
from them again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

Loras: TypeAlias = tuple[tuple[Path, float], ...]  # files and scales, in the order they are put on


@dataclass(frozen=True)
class Settings:
    """How one picture was made: enough to make it again."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    seed: int
    width: int  # pixels
    height: int  # pixels
    model: str
    version: str  # of koala
    sampler: str = "Euler"
    schedule: str = "trailing"
    loras: tuple[tuple[str, float], ...] = ()  # name and scale, in the order they were put on
    guidance_until: float = 1.0  # the share of the steps that is guided, from the first on
    strength: float = 1.0  # the share of the steps that is done, where a picture is given
    image: str = ""  # the given picture's fingerprint; empty where none is given
    mask: str = ""  # the mask's


@dataclass(frozen=True)
class Request:
    """One picture to draw, checked and complete; `Pipeline.requests` makes them."""

    settings: Settings
    image: Tensor | None = None  # float32 [1, 3, height, width] in -1..1
    mask: Tensor | None = None  # float32 [1, 1, h, w]: 1 is painted anew, 0 is kept
    lora: Loras = ()  # of its own, besides those that are on the model for all

    @property
    def pixels(self) -> int:
        return self.settings.width * self.settings.height
