"""The metrics whose weights come in Python packages: nothing is downloaded for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from koala.evaluation.features import EffLite0, extract
from koala.evaluation.metrics.catalogue import MetricInfo
from koala.evaluation.metrics.metric import FrechetDistance, KernelDistance, Metric
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


class EffLite0Distance(_OfEffLite0, FrechetDistance):
    """FD-EffLite0: it is not FID, nor comparable with published numbers."""


class EffLite0Kernel(_OfEffLite0, KernelDistance):
    """The kernel distance (KID's) on EfficientNet-Lite0."""

    subset = KERNEL_SUBSET


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
