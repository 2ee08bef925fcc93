"""The judge of an evaluation: trained on the illustrations, or read from a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koala.errors import UserError
from koala.evaluation.judge import Judge
from koala.evaluation.models import Size, named

Sentences = Callable[[list[str]], Tensor]  # n texts -> [n, d] of length 1


def train_judge(
    rows: Sequence[dict[str, Any]], features: Tensor, sentences: Sentences, size: Size
) -> Judge:
    """A judge of pictures of that size. rows: of the illustrations; features: of their pictures."""
    texts = [sentences([row[caption] for row in rows]).cpu() for caption in ("short", "long")]

    def numbered(names: list[str]) -> Tensor:
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return torch.tensor([numbers[name] for name in names])

    groups = numbered([row["short"] for row in rows])
    concepts = numbered([row["concept"] for row in rows])
    judge = Judge.fit(features, torch.stack(texts, 1).float(), groups, concepts)
    judge.about["size"] = named(size)
    return judge


def load_judge(path: Path, size: Size) -> Judge:
    """The judge of an earlier report. UserError if it was trained at another size."""
    judge = Judge.load(path)
    if judge.about.get("size") != named(size):
        raise UserError(
            f"the judge {path} was trained on {judge.about.get('size')} pixels, the models "
            f"generate {named(size)}: leave it out to train one"
        )
    return judge


def check_judge(judge: Judge, features: Tensor, texts: Tensor) -> None:
    """UserError unless the judge was trained on features like these."""
    widths = len(judge.picture.mean), len(judge.text.mean)
    if widths != (features.shape[1], texts.shape[1]):
        raise UserError(
            f"the judge was trained on features of widths {widths}, these have "
            f"{features.shape[1], texts.shape[1]}: leave it out to train one"
        )
