"""Before the first request: everything that happens once has happened, and the batch has a size.

How many pictures one pass should hold is measured: as long as doubling them makes each clearly
cheaper, they are doubled. More would only make all wait for all.
"""

import time
from collections.abc import Sequence

import torch

from koala.generation import Engine, Pipeline, Progress
from koala.generation.denoise import BatchRow, evaluate
from koala.generation.memory.placement import free_unused, ran_out

GAIN = 1.05  # that a doubled batch must make each picture cheaper
MOST = 16  # pictures, each of which is two rows
LONGEST = 2.0  # seconds of a pass that is not worth doubling


def warm_up(pipeline: Pipeline, max_batch: int | None = None, sizes: Sequence[int] = ()) -> int:
    """Draws once, and returns how many pictures of the native size are worth a pass.

    max_batch: the number, where it is not to be measured. sizes: numbers of rows that a pass may
    have, where each is compiled or captured on its own: all that such a batch can need are gone
    through.
    """
    _draw(pipeline)
    guided, plain = (
        pipeline.begin(pipeline.requests("a", steps=2, seed=0, guidance=g)[0]) for g in (2.0, 1.0)
    )
    best = max_batch or _worth(pipeline, guided)
    for rows in sizes:
        _seconds(pipeline, [plain] * rows, runs=1)
        if rows >= 2 * best:
            break
    return best


def _draw(pipeline: Pipeline) -> None:
    """A whole picture, with a preview."""

    def look(progress: Progress) -> None:
        progress.preview()

    engine = Engine(pipeline)
    ticket = engine.submit(pipeline.requests("a", steps=2, seed=0)[0], look)
    while engine.turn():
        pass
    ticket.result()


def _worth(pipeline: Pipeline, row: BatchRow) -> int:
    best, cost = 1, _seconds(pipeline, [row])
    while best < MOST and cost * best < LONGEST:
        try:
            cheaper = _seconds(pipeline, [row] * 2 * best) / (2 * best)
        except Exception as error:
            if not ran_out(error):
                raise
            free_unused(pipeline.device)
            return max(1, best // 2)  # others need memory, too
        if cheaper * GAIN > cost:
            break
        best, cost = 2 * best, cheaper
    return best


@torch.inference_mode()
def _seconds(pipeline: Pipeline, rows: list[BatchRow], runs: int = 3) -> float:
    """Of one step of the rows, the best of `runs` after one that warms up."""
    found = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        epsilons = evaluate(pipeline.predict, rows)
        if epsilons[0].device.type == "cuda":
            torch.cuda.synchronize(epsilons[0].device)
        found.append(time.perf_counter() - start)
    return min(found[1:])
