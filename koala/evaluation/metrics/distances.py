"""Distances to real pictures on published networks: FID, KID, CMMD and FD-DINOv2.

Letters: n pictures, d the width of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from koala.errors import UserError
from koala.evaluation.distances import kernel_left_out, squared_mmd
from koala.evaluation.features import as_tensor
from koala.evaluation.metrics.loading import pretrained, read_pickled
from koala.evaluation.metrics.metric import BATCH, Distance, FrechetDistance, KernelDistance
from koala.evaluation.prompts import Prompt

CMMD_WIDTH, CMMD_SCALE = 10.0, 1000.0  # sigma and the factor of the published numbers


class _OfNetwork(Distance):
    """Scores are features, computed batch by batch by `features`."""

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        starts = range(0, len(pictures), BATCH)
        return torch.cat([self.features(pictures[i : i + BATCH]).float().cpu() for i in starts])

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """float [n, d]"""
        raise NotImplementedError


class _Inception(_OfNetwork):
    """torch-fidelity's Inception-v3, of the original TensorFlow weights, up to 2048 features."""

    network: nn.Module

    def prepare(self, weights: Mapping[str, Path], device: torch.device) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().prepare(weights, device)
        file = weights["inception"]
        read_pickled(file)  # it reads the file in a way that would run code
        try:
            network = FeatureExtractorInceptionV3("inception", ["2048"], str(file))
        except RuntimeError:
            raise UserError(f"{file} does not hold torch-fidelity's Inception") from None
        self.network = network.requires_grad_(False).eval().to(device)

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        if len({picture.size for picture in pictures}) > 1:
            return torch.cat([self.features([picture]) for picture in pictures])
        return self.network(as_tensor(pictures).to(self.device))[0]


class InceptionFrechet(_Inception, FrechetDistance):
    """FID."""


class InceptionKernel(_Inception, KernelDistance):
    """KID: 100 subsets of 1,000 pictures."""

    subset = 1000


class Cmmd(_OfNetwork):
    """CMMD: the biased MMD of CLIP ViT-L/14 at 336 pixels, kernel exp(-|x - y|^2 / 2 sigma^2).

    Pictures are resized to 336 x 336 whatever their shape, bicubically, as its authors do.
    """

    network: nn.Module

    def prepare(self, weights: Mapping[str, Path], device: torch.device) -> None:
        from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

        super().prepare(weights, device)
        folder = weights["clip-vit-large-patch14-336"]
        network = pretrained(CLIPVisionModelWithProjection, folder)
        self.network = network.requires_grad_(False).eval().to(device)
        self.pictures = pretrained(
            CLIPImageProcessorPil, folder, do_resize=False, do_center_crop=False
        )
        self.side = network.vision_model.embeddings.image_size

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        size = (self.side, self.side)
        resized = [picture.resize(size, Image.Resampling.BICUBIC) for picture in pictures]
        pixels = self.pictures(resized, return_tensors="pt")["pixel_values"]
        return F.normalize(self.network(pixels.to(self.device)).image_embeds.float(), dim=-1)

    def distance(self, scores: Tensor, real: Tensor) -> float:
        return CMMD_SCALE * squared_mmd(scores, real, gaussian, unbiased=False)

    def left_out(self, scores: Tensor, real: Tensor, groups: np.ndarray) -> np.ndarray:
        return CMMD_SCALE * kernel_left_out(scores, real, groups, gaussian, unbiased=False)


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """CMMD's kernel, exp(-|x - y|^2 / 2 sigma^2) with sigma 10."""
    return torch.exp(-torch.cdist(x, y).square() / (2 * CMMD_WIDTH**2))


class DinoFrechet(_OfNetwork, FrechetDistance):
    """FD-DINOv2: a Frechet distance on the class token of DINOv2 ViT-L/14.

    Pictures are resized to 224 x 224 bicubically and normalised with ImageNet's statistics.
    """

    network: nn.Module
    side = 224
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def prepare(self, weights: Mapping[str, Path], device: torch.device) -> None:
        from transformers import Dinov2Model

        super().prepare(weights, device)
        network: Any = pretrained(Dinov2Model, weights["dinov2"])
        self.network = network.requires_grad_(False).eval().to(device)

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        size = (self.side, self.side)
        resized = [picture.resize(size, Image.Resampling.BICUBIC) for picture in pictures]
        x = as_tensor(resized).float() / 255
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (self.mean, self.deviation))
        return self.network(((x - mean) / deviation).to(self.device)).pooler_output
