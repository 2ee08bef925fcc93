"""GenEval: does a detector find the objects, their numbers, colours and places?

The authors' detector is mmdetection's Mask2Former with Swin-S, trained on COCO's instances; here it
is transformers' copy of the same weights. transformers resizes pictures and joins queries to
instances in its own way, so single boxes differ. The colours are CLIP ViT-L/14's, as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from koala.evaluation.metrics.boxes import Found, relations
from koala.evaluation.metrics.clip import Clip
from koala.evaluation.metrics.loading import pretrained
from koala.evaluation.metrics.metric import Metric
from koala.evaluation.prompts import Prompt

COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
SURE, SURE_TO_COUNT = 0.3, 0.9  # the least score of a detection, and where things are counted
MOST = 16  # objects of a class
GREY = (0x99, 0x99, 0x99)  # around an object whose colour is asked
_NAMES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}


class GenEval(Metric):
    """1 for a picture that shows all that its prompt asks for, else 0."""

    clip: Clip
    network: Any

    def prepare(self, weights: Mapping[str, Path], device: torch.device) -> None:
        from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

        super().prepare(weights, device)
        folder = weights["mask2former"]
        network = pretrained(Mask2FormerForUniversalSegmentation, folder)
        self.network = network.requires_grad_(False).eval().to(device)
        self.pictures = pretrained(Mask2FormerImageProcessorPil, folder)
        self.clip = Clip.read(weights["clip-vit-large-patch14"], device)
        self._colours = lru_cache(maxsize=256)(self._colour_texts)

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        rows = [
            self.shows(picture, prompt.facts, self.detect(picture, prompt.category))
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        return torch.tensor(rows).float()[:, None]

    def detect(self, picture: Image.Image, category: str) -> dict[str, list[Found]]:
        """What is found, by class, the surest first."""
        pixels = self.pictures([picture], return_tensors="pt")
        found = self.network(
            pixel_values=pixels["pixel_values"].to(self.device),
            pixel_mask=pixels["pixel_mask"].to(self.device),
        )
        least = SURE_TO_COUNT if category == "counting" else SURE
        result = self.pictures.post_process_instance_segmentation(
            found, threshold=least, target_sizes=[picture.size[::-1]], return_binary_maps=True
        )[0]
        names = self.network.config.id2label
        things: dict[str, list[Found]] = {}
        for mask, segment in zip(
            result["segmentation"] if result["segments_info"] else (), result["segments_info"],
            strict=True,
        ):  # fmt: skip
            where = mask.bool().cpu().numpy()
            if where.any():
                one = Found(names[segment["label_id"]], segment["score"], _box(where), where)
                things.setdefault(one.name, []).append(one)
        return {
            name: sorted(every, key=lambda one: -one.score)[:MOST] for name, every in things.items()
        }

    def shows(
        self, picture: Image.Image, asked: Mapping[str, Any], found: Mapping[str, list[Found]]
    ) -> bool:
        """Whether the things that were found are all that is asked for."""
        right = True
        groups: list[Sequence[Found]] = []
        for wanted in asked["include"]:
            things = found.get(_coco(wanted["class"]), [])[: wanted["count"]]
            fits = len(things) == wanted["count"]
            if fits and "color" in wanted:
                seen = self.colours(picture, things, wanted["class"])
                fits = seen.count(wanted["color"]) >= wanted["count"]
            if fits and "position" in wanted:
                relation, other = wanted["position"]
                fits = bool(groups[other]) and all(
                    relation in relations(one, target) for one in things for target in groups[other]
                )
            right &= fits
            groups.append(things if fits else [])
        return right and all(
            len(found.get(_coco(unwanted["class"]), [])) < unwanted["count"]
            for unwanted in asked.get("exclude", [])
        )

    def colours(self, picture: Image.Image, things: Sequence[Found], name: str) -> list[str]:
        """The colour of each thing, cut out on grey, by CLIP."""
        crops = []
        for thing in things:
            cut = picture
            if thing.mask is not None:
                grey = Image.new("RGB", picture.size, GREY)
                cut = Image.composite(picture, grey, Image.fromarray(thing.mask))
            left, top, right, bottom = (round(side) for side in thing.box)
            crops.append(cut.crop((left, top, max(right, left + 1), max(bottom, top + 1))))
        best = (self.clip.pictures(crops) @ self._colours(name).T).argmax(1)
        return [COLOURS[i] for i in best.tolist()]

    def _colour_texts(self, name: str) -> Tensor:
        """[10, e]: each colour, as the mean of three ways to say it."""
        forms = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
        texts = [form.format(colour, name) for colour in COLOURS for form in forms]
        every = self.clip.texts(texts).reshape(len(COLOURS), len(forms), -1)
        return F.normalize(every.mean(1), dim=-1)


def _coco(name: str) -> str:
    """COCO's name for a class of GenEval's prompts."""
    return _NAMES.get(name, name)


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
