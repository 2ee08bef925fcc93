"""Processes that read images ahead of the device that encodes them."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait

from koala.data.items import Source
from koala.data.preprocess import Dropped, Preparation, Sample, read_samples
from koala.data.units import UnitPlan
from koala.errors import Failure
from koala.utils.threads import available_cores

AHEAD = 4  # chunks of items read ahead, per process


def own_cores() -> int:
    """This process's share of the available cores."""
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def pool_of(workers: int) -> Iterator[Executor | None]:
    """A pool of processes that read images; None for one worker: this process itself."""
    if workers == 1:
        yield None
        return
    # Not forked directly: this process has threads and perhaps a GPU.
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(workers, context, _end_with_parent)
    try:
        yield pool
    except BrokenProcessPool:
        raise Failure(
            "a process that reads images was killed (out of memory?); run again with fewer "
            "--workers to continue"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this worker when its parent dies; it would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_ahead(
    source: Source, plan: UnitPlan, units: list[int], preparation: Preparation,
    pool: Executor | None, workers: int,
) -> Iterator[tuple[int, list[Sample | Dropped]]]:  # fmt: skip
    """(unit, results of some of its items), in order; reads ahead."""
    pieces = plan.pieces(units)
    if pool is None:
        for unit, piece in pieces:
            yield unit, read_samples(source, *piece, preparation)
        return

    reading: deque[tuple[int, Future]] = deque()

    def begin(some: int) -> None:
        for unit, piece in islice(pieces, some):
            reading.append((unit, pool.submit(read_samples, source, *piece, preparation)))

    begin(AHEAD * workers)
    while reading:
        unit, job = reading.popleft()
        yield unit, job.result()
        begin(1)
