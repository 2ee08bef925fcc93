"""Scores pictures by the metrics, once: scores that are kept are read again.

    OUT/scores/WHAT/KEY-UNIT.safetensors   one unit's scores; KEY changes with pictures and weights

The processes of torchrun share the units as they share the drawing, so each scores what it drew.
The first one waits for the others' scores and goes on alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import koala
from koala.errors import Failure
from koala.evaluation.drawing import UNIT, share
from koala.evaluation.metrics.metric import Metric
from koala.evaluation.pictures import stamp
from koala.evaluation.prompts import Prompt
from koala.utils.atomic import new_file
from koala.utils.digest import digest
from koala.utils.progress import progress

PAUSE = 0.2  # seconds between looks for the others' files


@dataclass(frozen=True)
class Pictures:
    """Pictures in an order, each with its prompt. digest: changes when they do."""

    name: str
    image: Callable[[int], Image.Image]  # RGB
    prompts: Sequence[Prompt]
    digest: str

    def __len__(self) -> int:
        return len(self.prompts)


class ScoreFiles:
    """The scores of one metric's `info.scores`, in units on disk."""

    def __init__(self, out: Path, metric: Metric, weights: Mapping[str, Path]) -> None:
        self.folder = out / "scores" / metric.info.scores
        self.metric = metric
        self._stamps = [stamp(_files(weights[name])) for name in metric.info.models]

    def _file(self, pictures: Pictures, unit: int) -> Path:
        told = [[p.id, p.text, p.facts] for p in pictures.prompts]
        key = digest([koala.__version__, self._stamps, pictures.digest, told, UNIT])[:16]
        return self.folder / f"{key}-{unit:05d}.safetensors"

    def missing(self, pictures: Pictures) -> list[int]:
        """The units of this process that have no scores yet."""
        return [u for u in share(_units(pictures)) if not self._file(pictures, u).exists()]

    def compute(self, pictures: Pictures, unit: int) -> int:
        """Scores a unit and keeps it; returns the number of its pictures. `Failure` for NaN."""
        indices = range(unit * UNIT, min(len(pictures), (unit + 1) * UNIT))
        images = [pictures.image(i) for i in indices]
        with torch.inference_mode():
            scores = self.metric.score(images, [pictures.prompts[i] for i in indices])
        scores = scores.float().cpu().clone()
        assert scores.shape[0] == len(indices) and scores.ndim == 2, scores.shape
        if not scores.isfinite().all():
            raise Failure(
                f"{self.metric.info.name} of {pictures.name} is NaN or infinite: its weights do "
                "not fit this device's precision, or are damaged"
            )
        with new_file(self._file(pictures, unit)) as part:
            save_file({"scores": scores.contiguous()}, part)
        return len(indices)

    def read(self, pictures: Pictures) -> Tensor:
        """float32 [n, k], waiting for what other processes compute."""
        files = [self._file(pictures, unit) for unit in range(_units(pictures))]
        while not all(file.exists() for file in files):
            time.sleep(PAUSE)
        return torch.cat([load_file(file)["scores"] for file in files])


def score(
    metric: Metric,
    every: Sequence[Pictures],
    out: Path,
    weights: Mapping[str, Path],
    device: torch.device,
    first: bool,
) -> ScoreFiles:
    """Computes this process's share of the scores of all pictures, where they are not kept yet.

    The metric's models are loaded only if something is missing.
    """
    files = ScoreFiles(out, metric, weights)
    todo = [(pictures, unit) for pictures in every for unit in files.missing(pictures)]
    if todo:
        metric.prepare(weights, device)
        total = sum(min(UNIT, len(p) - unit * UNIT) for p, unit in todo)
        what = f"scoring {metric.info.scores}"
        with progress(what, total, "pictures", silent=not first) as advance:
            for pictures, unit in todo:
                advance(files.compute(pictures, unit))
    return files


def _units(pictures: Pictures) -> int:
    return -(-len(pictures) // UNIT)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
