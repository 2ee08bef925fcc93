"""Metrics that ask questions about a picture: DPG-Bench and GenEval 2's Soft-TIFA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from koala.evaluation.metrics.answers import Blip, ChatModel
from koala.evaluation.metrics.catalogue import MetricInfo
from koala.evaluation.metrics.metric import Metric
from koala.evaluation.prompts import Prompt

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_LEAST = 1e-12  # of a probability in a geometric mean


class Dpg(Metric):
    """DPG-Bench: 100 times the share of a prompt's propositions that hold, over its pictures.

    A question counts only if those that it builds on hold. The authors ask mPLUG-large, which
    transformers does not have; here BLIP-VQA is asked, so the numbers are not those of the paper.
    """

    model: Blip

    def prepare(self, weights: Mapping[str, Path], device: torch.device) -> None:
        super().prepare(weights, device)
        self.model = Blip(weights["blip-vqa"], device)

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        asked = [prompt.facts["propositions"] for prompt in prompts]
        flat = [
            (p, one["question"]) for p, every in zip(pictures, asked, strict=True) for one in every
        ]
        yes = self.model.yes([p for p, _ in flat], [q for _, q in flat]) > 0.5
        of_prompts = yes.split([len(every) for every in asked])
        values = [
            share(every, answers.tolist()) for every, answers in zip(asked, of_prompts, strict=True)
        ]
        return 100 * torch.tensor(values)[:, None]


def share(propositions: Sequence[Mapping[str, Any]], holds: Sequence[bool]) -> float:
    """The share of propositions that hold, each only if all that it builds on hold."""
    answers = {one["number"]: answer for one, answer in zip(propositions, holds, strict=True)}
    right = (
        answers[one["number"]] and all(answers.get(parent, True) for parent in one["after"])
        for one in propositions
    )
    return sum(right) / len(propositions)


class SoftTifa(Metric):
    """Soft-TIFA: 100 times the mean probability of the right answers to a prompt's questions.

    geometric: the geometric mean, for whole prompts; else the arithmetic one, for atoms.
    """

    model: ChatModel

    def __init__(self, info: MetricInfo, geometric: bool) -> None:
        super().__init__(info)
        self.geometric = geometric

    def prepare(self, weights: Mapping[str, Path], device: torch.device) -> None:
        super().prepare(weights, device)
        self.model = ChatModel(weights["vlm"], device)

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        """[n, 2]: the arithmetic and the geometric mean."""
        rows = []
        for picture, prompt in zip(pictures, prompts, strict=True):
            chances = torch.tensor(
                [
                    self.model.probability(
                        picture, f"{question} Answer in one word.", spellings(question, answer)
                    )
                    for question, answer in prompt.facts["questions"]
                ]
            )
            rows.append(torch.stack([chances.mean(), chances.clamp_min(_LEAST).log().mean().exp()]))
        return 100 * torch.stack(rows)

    def values(self, scores: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return scores[:, int(self.geometric)]


def spellings(question: str, answer: str) -> list[str]:
    """The ways in which a right answer may begin: a number in words and figures, else yes."""
    words = ["yes"]
    if question.startswith("How many"):
        words = [answer]
        if answer.lower() in _NUMBERS:
            words.append(str(_NUMBERS.index(answer.lower()) + 1))
    every = [form for word in words for form in (word, word.capitalize())]
    return [*every, *(f" {form}" for form in every)]
