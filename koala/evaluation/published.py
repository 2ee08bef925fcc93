"""Figures that others published, as lines to compare with. Each names where it was read.

They were measured by their authors, on pictures of theirs: none of koala's settings, seeds or
versions went into them. A figure whose source was not at hand is not here.
"""

from __future__ import annotations

from dataclasses import dataclass

_HPS = "https://github.com/tgxs002/HPSv2, v2.1 benchmark"


@dataclass(frozen=True)
class PublishedRow:
    """A line of a published table: the metric's value, and by category in the set's order."""

    name: str
    prompts: str
    metric: str
    value: float
    categories: tuple[float, ...]
    source: str


def _hps(name: str, value: float, *styles: float) -> PublishedRow:
    return PublishedRow(name, "hpsv2", "hpsv2.1", value, styles, _HPS)


PUBLISHED = (  # HPSv2: anime, concept-art, paintings, photo
    _hps("SDXL Refiner 0.9", 31.34, 33.26, 32.07, 31.63, 28.38),
    _hps("SDXL Base 0.9", 30.63, 32.84, 31.36, 30.86, 27.48),
    _hps("Dreamlike Photoreal 2.0", 29.73, 30.87, 29.75, 29.46, 28.85),
    _hps("DeepFloyd-XL", 26.88, 27.71, 26.07, 25.79, 27.96),
    _hps("Stable Diffusion v2.0", 26.38, 27.09, 26.02, 25.68, 26.73),
    _hps("Stable Diffusion v1.4", 25.35, 26.03, 24.87, 24.80, 25.70),
)


def published(prompts: str, metric: str) -> list[PublishedRow]:
    """What was published of a metric on a prompt set."""
    return [row for row in PUBLISHED if (row.prompts, row.metric) == (prompts, metric)]
