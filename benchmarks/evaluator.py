"""The illustrations' metrics of pictures that a benchmark drew, as `koala evaluate` has them."""

from dataclasses import dataclass

from torch import Tensor, nn

from koala.data.illustrations.images import ImageSet
from koala.evaluation.distances import frechet, kernel_distance
from koala.evaluation.features import extract
from koala.evaluation.metrics.bundled import KERNEL_SUBSET
from koala.evaluation.pictures import at_size
from koala.evaluation.retrieval import Judge, Sentences, check_judge, train_judge
from koala.utils.progress import progress


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
