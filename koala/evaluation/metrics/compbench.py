"""T2I-CompBench: attributes by BLIP-VQA, relations by a detector or CLIP, complex prompts by all.

What differs from the authors' program: the detector of spatial relations is OWLv2, asked for the
two things by name, where theirs is UniDet with its classes; and "on top of" is a relation like "on
the top of", which their program never finds. BLIP-VQA and CLIP are the same models.
Noun phrases are those of spaCy's en_core_web_sm, as there, unless prompts bring their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from koala.errors import UserError
from koala.evaluation.metrics.answers import Blip
from koala.evaluation.metrics.boxes import Found, placed
from koala.evaluation.metrics.clip import Clip
from koala.evaluation.metrics.loading import pretrained
from koala.evaluation.metrics.metric import Metric
from koala.evaluation.prompts import Prompt

SPACY = "en_core_web_sm"
_NO_THINGS = ("top", "the side", "the left", "the right")
_RELATIONS = {  # words of a prompt -> the relation of `boxes.placed`
    "on side of": "next to", "next to": "next to", "near": "next to", "on the left of": "left",
    "on the right of": "right", "on the bottom of": "bottom", "on the top of": "top",
    "on top of": "top",
}  # fmt: skip
_PEOPLE = ("girl", "boy", "man", "woman")
SIDE = 512  # pixels that distances are told for
SURE = 0.1  # the least score of a detection


class BlipVqa(Metric):
    """BLIP-VQA: the product of P(yes) over a prompt's noun phrases, each asked as "phrase?"."""

    blip: Blip

    def prepare(self, weights: Mapping[str, Path], device: torch.device) -> None:
        super().prepare(weights, device)
        self.blip = Blip(weights["blip-vqa"], device)

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        return attributes(self.blip, pictures, [p.facts["phrases"] for p in prompts])[:, None]


def attributes(
    blip: Blip, pictures: Sequence[Image.Image], phrases: Sequence[Sequence[str]]
) -> Tensor:
    """float [n]: the product of P(yes) over each picture's phrases."""
    pairs = [(p, f"{one}?") for p, every in zip(pictures, phrases, strict=True) for one in every]
    if not pairs:
        return torch.ones(len(pictures))
    yes = blip.yes([p for p, _ in pairs], [q for _, q in pairs])
    return torch.stack([part.prod() for part in yes.split([len(every) for every in phrases])])


class CompBench(Metric):
    """T2I-CompBench's own measure of each category."""

    blip: Blip
    clip: Clip
    detector: Any
    language: Any
    words: Any

    def prepare(self, weights: Mapping[str, Path], device: torch.device) -> None:
        from transformers import AutoTokenizer, Owlv2ForObjectDetection, Owlv2ImageProcessorPil

        super().prepare(weights, device)
        self.blip = Blip(weights["blip-vqa"], device)
        self.clip = Clip.read(weights["clip-vit-base-patch32"], device)
        folder = weights["owlv2"]
        network = pretrained(Owlv2ForObjectDetection, folder)
        self.detector = network.requires_grad_(False).eval().to(device)
        self.words = pretrained(AutoTokenizer, folder)
        self.pictures = pretrained(Owlv2ImageProcessorPil, folder)
        self.language = self.language_model()

    def language_model(self) -> Any:
        """spaCy's, which the authors split prompts with. UserError if it is not installed."""
        import spacy

        try:
            return spacy.load(SPACY)
        except OSError:
            raise UserError(
                f"compbench splits prompts with spaCy's {SPACY}, which is not installed: run "
                f"python -m spacy download {SPACY}"
            ) from None

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        rows = [
            self._one(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        return torch.tensor(rows)[:, None]

    def _one(self, picture: Image.Image, prompt: Prompt) -> float:
        relation = prompt.facts["relation"]
        if relation in ("color", "shape", "texture"):
            return self._attribute(picture, prompt)
        if relation == "non_spatial":
            return self._action(picture, prompt.text)
        if prompt.category == "spatial":
            return self.spatial(picture, prompt.text)
        parts = [self._attribute(picture, prompt)]  # a complex prompt: the authors' 3-in-1
        if relation in ("spatial", "both"):
            parts.append(self.spatial(picture, prompt.text))
        if relation in ("action", "both"):
            words = (word.text for word in self.language(prompt.text) if word.pos_ != "ADJ")
            parts.append(self._action(picture, " ".join(words)))
        return sum(parts) / len(parts)

    def _attribute(self, picture: Image.Image, prompt: Prompt) -> float:
        return float(attributes(self.blip, [picture], [self.phrases(prompt)])[0])

    def phrases(self, prompt: Prompt) -> list[str]:
        chunks = (chunk.text for chunk in self.language(prompt.text.rstrip(".")).noun_chunks)
        return [text for text in chunks if text not in _NO_THINGS]

    def _action(self, picture: Image.Image, text: str) -> float:
        return float(self.clip.similarity([picture], [text])[0])

    def spatial(self, picture: Image.Image, text: str) -> float:
        """Half of the detector's mean certainty and half for the place; below one half, nothing."""
        words = next((words for words in _RELATIONS if words in text), None)
        nouns = [word.text for word in self.language(text) if word.pos_ == "NOUN"]
        if words is None or len(nouns) < 2:
            return 0.0
        names = ["person" if noun in _PEOPLE else noun for noun in (nouns[0], nouns[-1])]
        first, second = (self.best(picture, name) for name in names)
        if first is None or second is None:
            return 0.0
        scale = SIDE / max(picture.size)
        value = (first.score + second.score) / 4
        value += placed(_RELATIONS[words], first, second, scale) / 2
        return value if value >= 0.5 else 0.0

    def best(self, picture: Image.Image, name: str) -> Found | None:
        """The surest box of a thing."""
        pixels = self.pictures([picture], return_tensors="pt")["pixel_values"]
        text = self.words([f"a photo of a {name}"], return_tensors="pt", padding=True)
        found = self.detector(
            input_ids=text["input_ids"].to(self.device),
            attention_mask=text["attention_mask"].to(self.device),
            pixel_values=pixels.to(self.device),
        )
        scores = found.logits[0, :, 0].float().sigmoid()
        best = int(scores.argmax())
        if float(scores[best]) < SURE:
            return None
        x, y, width, height = (found.pred_boxes[0, best].float() * max(picture.size)).tolist()
        corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        return Found(name, float(scores[best]), corners)
