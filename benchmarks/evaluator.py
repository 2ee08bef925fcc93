"""The illustrations' metrics of pictures that a benchmark drew, as `koala evaluate` has them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor, nn

from koala.data.illustrations.images import ImageSet
from koala.evaluation.distances import frechet, kernel_distance
from koala.evaluation.features import extract
from koala.evaluation.metrics.bundled import KERNEL_SUBSET
from koala.evaluation.pictures import at_size
from koala.evaluation.retrieval import Judge, Sentences, check_judge, train_judge
from koala.generation.pipeline import Pipeline
from koala.utils.progress import progress

CHUNK = 32  # pictures that are asked for at once


@dataclass(frozen=True)
class Evaluator:
    """Computes all metrics, from the features of the real images.

    held_out [m, d]: the reference of the distances. own [n, d]: the prompts' real images, part of
    the reference. texts [n, d_t]: the prompts.
    """

    held_out: Tensor
    own: Tensor
    texts: Tensor
    judge: Judge

    def measure(self, features: Tensor) -> dict[str, float]:
        """The metrics of images generated for the prompts, features [n, d]."""
        return {
            "FD-EffLite0": frechet(features, self.held_out),
            "kernel distance": kernel_distance(features, self.held_out, KERNEL_SUBSET),
        } | self.judge.retrieval(features, self.texts)


def build_evaluator(
    real: ImageSet,
    chosen: list[int],
    reference: list[int],
    train: list[int],
    size: tuple[int, int],
    extractor: nn.Module,
    sentences: Sentences,
    judge: Judge | None,
) -> Evaluator:
    """Extracts the real pictures' features, and trains a judge unless one is given.

    chosen, reference, train: of `koala.evaluation.illustrations.choose`.
    """
    held_out = _features(real, reference, size, extractor, "held-out pictures")
    if judge is None:
        seen = _features(real, train, size, extractor, "training pictures")
        judge = train_judge([real.rows[i] for i in train], seen, sentences, size)
    texts = sentences([real.rows[i]["short"] for i in chosen]).float().cpu()
    check_judge(judge, held_out, texts)
    own = held_out[[reference.index(i) for i in chosen]]
    return Evaluator(held_out, own, texts, judge)


def _features(
    real: ImageSet, indices: list[int], size: tuple[int, int], extractor: nn.Module, what: str
) -> Tensor:
    with progress(f"features of {what}", len(indices), "pictures") as advance:
        some = (at_size(real.image(i), size) for i in indices)
        return extract(extractor, some, on_batch=advance)


def draw(
    name: str, pipeline: Pipeline, texts: Sequence[str], seeds: Sequence[int], **asked: Any
) -> list[Image.Image]:
    """Each text once for each seed, seed by seed; every picture has noise of its own."""
    images: list[Image.Image] = []
    with progress(name, len(texts) * len(seeds), "pictures") as advance:
        for seed in seeds:
            for start in range(0, len(texts), CHUNK):
                first = seed * len(texts) + start
                made = pipeline(list(texts[start : start + CHUNK]), seed=first, **asked).images
                images += made
                advance(len(made))
    return images


def relative_error(some: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The squared error over all values, as a share of the exact ones' squares."""
    errors = sum(float((a - b).square().sum()) for a, b in zip(some, exact, strict=True))
    return errors / sum(float(b.square().sum()) for b in exact)
