"""The metrics whose weights come in Python packages: nothing is downloaded for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from koala.evaluation.distances import frechet, kernel_distance, kernel_left_out, polynomial
from koala.evaluation.features import EffLite0, extract
from koala.evaluation.metrics.catalogue import MetricInfo
from koala.evaluation.metrics.metric import Distance, Metric
from koala.evaluation.prompts import Prompt
from koala.evaluation.retrieval import Judge

KERNEL_SUBSET = 100


class _OfEffLite0(Metric):
    """Scores are the features of EfficientNet-Lite0, or of `extractor` where one is set."""

    extractor: nn.Module | None = None

    def prepare(self, weights: Mapping[str, Path], device: torch.device) -> None:
        super().prepare(weights, device)
        self.extractor = (self.extractor or EffLite0()).to(device)

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        assert self.extractor is not None
        if len({picture.size for picture in pictures}) == 1:
            return extract(self.extractor, pictures)
        return torch.cat([extract(self.extractor, [picture]) for picture in pictures])


class EffLite0Distance(_OfEffLite0, Distance):
    """FD-EffLite0: a Frechet distance. It is not FID, nor comparable with published numbers."""

    def distance(self, scores: Tensor, real: Tensor) -> float:
        return frechet(scores, real)


class EffLite0Kernel(_OfEffLite0, Distance):
    """The kernel distance (KID's) on EfficientNet-Lite0."""

    def distance(self, scores: Tensor, real: Tensor) -> float:
        size = min(KERNEL_SUBSET, len(scores), len(real))
        generator = torch.Generator().manual_seed(0)  # the same subsets for every row
        return kernel_distance(scores, real, generator, size=size)

    def left_out(self, scores: Tensor, real: Tensor, groups: np.ndarray) -> np.ndarray:
        return kernel_left_out(scores, real, groups, polynomial)


class Retrieval(_OfEffLite0):
    """R@k: whether a picture's own prompt is among the k that a judge ranks highest of all.

    `judge` and `texts` (the prompts' features, [n, d]) are set before `values` is asked.
    """

    judge: Judge
    texts: Tensor

    def __init__(self, info: MetricInfo, rank: int) -> None:
        super().__init__(info)
        self.rank = rank

    def values(self, scores: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return (self.judge.ranks(scores, self.texts) < self.rank).float()
