"""Metrics on CLIP: CLIP score, PickScore, HPSv2.1 and the aesthetic head.

All are computed by transformers' CLIP. HPSv2.1 is published in open_clip's format and converted.

Letters: n pictures, e CLIP's common width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from koala.evaluation.metrics.loading import pretrained, read_pickled
from koala.evaluation.metrics.metric import BATCH, Metric
from koala.evaluation.metrics.open_clip_format import converted, shape_of
from koala.evaluation.prompts import Prompt


class Clip:
    """CLIP with its tokenizer and its preparation of pictures, in evaluation mode."""

    def __init__(
        self, model: CLIPModel, tokenizer: CLIPTokenizer, prepare: CLIPImageProcessorPil,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.model = model.requires_grad_(False).eval().to(device)
        self.tokenizer, self.prepare, self.device = tokenizer, prepare, device

    @staticmethod
    def read(folder: Path, device: torch.device) -> Clip:
        """From a folder in transformers' format. UserError for another one."""
        return Clip(
            pretrained(CLIPModel, folder),
            pretrained(CLIPTokenizer, folder),
            pretrained(CLIPImageProcessorPil, folder),
            device,
        )

    @property
    def scale(self) -> float:
        return float(self.model.logit_scale.exp())

    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """float32 [n, e] of length 1."""
        parts = []
        for start in range(0, len(pictures), BATCH):
            pixels = self.prepare(list(pictures[start : start + BATCH]), return_tensors="pt")
            found = self.model.vision_model(pixels["pixel_values"].to(self.device))
            parts.append(self.model.visual_projection(found.pooler_output))
        return F.normalize(torch.cat(parts).float(), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """float32 [n, e] of length 1. What is longer than CLIP reads is cut off."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings, return_tensors="pt",
        ).to(self.device)  # fmt: skip
        found = self.model.text_model(**tokens).pooler_output
        return F.normalize(self.model.text_projection(found).float(), dim=-1)

    def similarity(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """float32 [n]: the cosine of each picture and its text."""
        return (self.pictures(pictures) * self.texts(texts)).sum(-1)


class _OfClip(Metric):
    """A metric that is a function of the cosine of picture and prompt."""

    clip: Clip

    def prepare(self, weights: Mapping[str, Path], device: torch.device) -> None:
        super().prepare(weights, device)
        self.clip = Clip.read(weights[self.info.models[0]], device)

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        cosine = self.clip.similarity(pictures, [prompt.text for prompt in prompts])
        return self.of_cosine(cosine)[:, None]

    def of_cosine(self, cosine: Tensor) -> Tensor:
        """float [n]: the score."""
        raise NotImplementedError


class ClipScore(_OfClip):
    """100 max(cos, 0), as torchmetrics scales it; the paper's factor is 2.5."""

    def of_cosine(self, cosine: Tensor) -> Tensor:
        return 100 * cosine.clamp_min(0)


class PickScore(_OfClip):
    """The cosine times the model's scale, about 100 (section 3 of the paper)."""

    def of_cosine(self, cosine: Tensor) -> Tensor:
        return self.clip.scale * cosine


class HPSv2(_OfClip):
    """100 cos, as the benchmark's tables have it.

    The authors resize tensors, in half precision; here pictures are resized by Pillow, in single
    precision, as CLIP was trained.
    """

    def prepare(self, weights: Mapping[str, Path], device: torch.device) -> None:
        from koala.mini.text import clip_tokenizer  # the vocabulary of every CLIP

        Metric.prepare(self, weights, device)
        tensors = read_pickled(weights["hpsv2.1"], "state_dict")
        shape = shape_of(tensors, str(weights["hpsv2.1"]))
        model = CLIPModel(CLIPConfig(**shape))
        model.load_state_dict(converted(tensors), strict=False)
        side = shape["vision_config"]["image_size"]
        size = {"shortest_edge": side}, {"height": side, "width": side}
        prepare = CLIPImageProcessorPil(size=size[0], crop_size=size[1])
        self.clip = Clip(model, self.tokenizer or clip_tokenizer(), prepare, device)

    tokenizer: CLIPTokenizer | None = None  # in place of CLIP's own

    def of_cosine(self, cosine: Tensor) -> Tensor:
        return 100 * cosine


class Aesthetic(Metric):
    """A head on CLIP's picture features that predicts people's ratings, about 1 to 10.

    Five linear layers without activations between them, as its authors trained and use it.
    """

    clip: Clip
    head: nn.Sequential

    def prepare(self, weights: Mapping[str, Path], device: torch.device) -> None:
        super().prepare(weights, device)
        self.clip = Clip.read(weights["clip-vit-large-patch14"], device)
        tensors = read_pickled(weights["aesthetic"])
        layers = sorted({int(name.split(".")[1]) for name in tensors})
        shapes = [tensors[f"layers.{i}.weight"].shape for i in layers]
        self.head = nn.Sequential(*(nn.Linear(inner, outer) for outer, inner in shapes))
        places = {i: place for place, i in enumerate(layers)}
        self.head.load_state_dict(
            {
                f"{places[int(name.split('.')[1])]}.{name.split('.')[2]}": tensor
                for name, tensor in tensors.items()
            }
        )
        self.head.requires_grad_(False).eval().to(device)

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        return self.head(self.clip.pictures(pictures))
