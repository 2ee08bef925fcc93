"""What every metric is: scores of single pictures, and the number that they add up to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from koala.evaluation.distances import frechet, kernel_distance, kernel_left_out, polynomial
from koala.evaluation.metrics.catalogue import MetricInfo
from koala.evaluation.prompts import Prompt

BATCH = 16  # pictures in one forward pass


class Metric(ABC):
    """A metric whose value is the mean over pictures. `info` says what it needs and means."""

    def __init__(self, info: MetricInfo) -> None:
        self.info = info
        self.device = torch.device("cpu")

    def prepare(self, weights: Mapping[str, Path], device: torch.device) -> None:
        """Loads its models. weights: the path of each of `info.models`.

        UserError for files that are damaged or of another model.
        """
        self.device = device

    @abstractmethod
    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        """float32 [n, k]: what is computed of n RGB pictures, each of the prompt beside it."""

    def values(self, scores: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """float [n]: each picture's value, from all pictures' scores, one of each prompt."""
        return scores[:, 0]


class Distance(Metric):
    """A metric of all pictures together: how far they are from real ones."""

    @abstractmethod
    def distance(self, scores: Tensor, real: Tensor) -> float:
        """From the features of n pictures [n, k] to those of m real ones [m, k]."""

    def left_out(self, scores: Tensor, real: Tensor, groups: np.ndarray) -> np.ndarray:
        """The distance without each group of pictures. groups: int [n], the group of each."""
        kept = (torch.from_numpy(groups != group) for group in np.unique(groups))
        return np.array([self.distance(scores[rest], real) for rest in kept])


class FrechetDistance(Distance):
    """Between the Gaussians of the features' means and covariances."""

    def distance(self, scores: Tensor, real: Tensor) -> float:
        return frechet(scores, real)


class KernelDistance(Distance):
    """KID's, over random subsets of `subset` pictures, fewer where there are not so many."""

    subset: int

    def distance(self, scores: Tensor, real: Tensor) -> float:
        return kernel_distance(scores, real, self.subset)

    def left_out(self, scores: Tensor, real: Tensor, groups: np.ndarray) -> np.ndarray:
        return kernel_left_out(scores, real, groups, polynomial)


def create(info: MetricInfo) -> Metric:
    """A metric by what the catalogue says of it. It loads nothing before `prepare`."""
    module, _, name = info.home.partition(":")
    kind: type[Metric] = getattr(import_module(f"koala.evaluation.metrics.{module}"), name)
    return kind(info, **info.options)
