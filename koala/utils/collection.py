"""Python's search for objects to be freed, kept from what has just been imported."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_OWN: list[bool] = []  # not empty: see `own_process`


def own_process() -> None:
    """Says that this process ends with its command: what it imports need never be freed."""
    _OWN.append(True)


@contextmanager
def kept() -> Iterator[None]:
    """Nothing is searched inside the block: it is for imports, which leave nothing to be freed.

    Importing PyTorch and the rest would otherwise search all that it has made, again and again.
    In a process of its own what the block has made is not searched later either, at the end least
    of all: that takes as long as drawing a small image.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if _OWN:
            gc.freeze()
        if enabled:
            gc.enable()
