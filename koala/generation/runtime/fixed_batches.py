"""Batches of a few fixed sizes, for what is compiled for a shape. Importing this loads no torch."""

from collections.abc import Sequence

from koala.generation.denoise import Condition, Predict
from koala.generation.pixels import Decode
from koala.utils.arrays import Array, joined

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # fixed batch sizes: at most a third is padding


def in_fixed_batches(predict: Predict, sizes: Sequence[int] = ROWS) -> Predict:
    """`predict` for any number of rows, which calls it with batches of the given sizes only.

    It takes the smallest size that holds the rows, padded with copies of the last row; more rows
    than the largest size are split. So requests that join and leave cause no new shape.
    """
    largest = max(sizes)

    def predict_all(x: Array, timesteps: Array, condition: Condition) -> Array:
        parts = (condition.text, condition.pooled, condition.time_ids)
        given = (x, timesteps, *parts)
        starts = range(0, len(x), largest)
        return joined([one_batch(*(part[i : i + largest] for part in given)) for i in starts])

    def one_batch(*given: Array) -> Array:
        rows = len(given[0])
        more = min(size for size in sizes if size >= rows) - rows
        x, timesteps, *parts = (_padded(part, more) for part in given)
        return predict(x, timesteps, Condition(*parts))[:rows]

    return predict_all


def _padded(array: Array, more: int) -> Array:
    """The array with `more` copies of its last row appended."""
    return joined([array, *[array[-1:]] * more]) if more else array


def one_by_one(decode: Decode) -> Decode:
    """`decode`, one image at a time."""
    return lambda latents: joined([decode(latents[i : i + 1]) for i in range(len(latents))])
