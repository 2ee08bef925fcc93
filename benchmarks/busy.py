"""Other programs that keep every core busy, for the benchmarks."""

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many endless loops while the block runs."""
    spawn = multiprocessing.get_context("spawn")
    others = [spawn.Process(target=spin, daemon=True) for _ in range(loops)]
    for other in others:
        other.start()
    time.sleep(1)  # until they have started
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def spin() -> None:
    while True:
        pass
