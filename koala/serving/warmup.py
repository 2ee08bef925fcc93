"""Warm-up before the first request, and the choice of the batch size.

The batch size is measured: it doubles as long as that makes each image clearly cheaper. A larger
batch would only add latency.
"""

import time
from collections.abc import Sequence

from koala.generation import Engine, Progress
from koala.generation.denoise import BatchRow, evaluate
from koala.generation.drawing import Drawing
from koala.utils.arrays import no_gradients, wait_for
from koala.utils.device import free_unused, ran_out

GAIN = 1.05  # least speed-up per image from doubling the batch
MOST = 16  # images, of two rows each with guidance
LONGEST = 2.0  # seconds of a pass; beyond it the batch is not doubled


def warm_up(pipeline: Drawing, max_batch: int | None = None, sizes: Sequence[int] = ()) -> int:
    """Generates one image, and returns the best batch size in images of native size.

    max_batch: skips the measurement. sizes: numbers of rows that are compiled or captured
    separately; all that the batch can need are run once.
    """
    _generate(pipeline)
    guided, plain = (
        pipeline.begin(pipeline.requests("a", steps=2, seed=0, guidance=g)[0]) for g in (2.0, 1.0)
    )
    best = max_batch or _best_batch(pipeline, guided)
    for rows in sizes:
        _seconds(pipeline, [plain] * rows, runs=1)
        if rows >= 2 * best:
            break
    return best


def _generate(pipeline: Drawing) -> None:
    """Generates a complete image with previews."""

    def preview(progress: Progress) -> None:
        progress.preview()

    engine = Engine(pipeline)
    ticket = engine.submit(pipeline.requests("a", steps=2, seed=0)[0], preview)
    while engine.turn():
        pass
    ticket.result()


def _best_batch(pipeline: Drawing, row: BatchRow) -> int:
    best, cost = 1, _seconds(pipeline, [row])
    while best < MOST and cost * best < LONGEST:
        try:
            cheaper = _seconds(pipeline, [row] * 2 * best) / (2 * best)
        except Exception as error:
            if not ran_out(error):
                raise
            free_unused()
            return max(1, best // 2)  # leave memory for others
        if cheaper * GAIN > cost:
            break
        best, cost = 2 * best, cheaper
    return best


def _seconds(pipeline: Drawing, rows: list[BatchRow], runs: int = 3) -> float:
    """Seconds of one step of the rows: the best of `runs` after one warm-up."""
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        with no_gradients():
            wait_for(evaluate(pipeline.predict, rows)[0])
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
