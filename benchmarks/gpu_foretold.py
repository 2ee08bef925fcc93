"""What the dry run foretells, reckoned in processes beside the GPU's work: ten seconds each."""

from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

from koala.recipes.memory import TrainingSetup, device_memory

PROCESSES = 4


class Foretold:
    """Bytes of trainings, each reckoned with one sample at once, of which any number follows.

    here: reckon in this process, when asked.
    """

    def __init__(self, here: bool):
        self._pool = None if here else ProcessPoolExecutor(PROCESSES, get_context("spawn"))
        self._coming: dict[TrainingSetup, Future[dict[str, int]]] = {}
        self._done: dict[TrainingSetup, dict[str, int]] = {}

    def __enter__(self) -> "Foretold":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, plan: TrainingSetup) -> None:
        """Begins to reckon."""
        if self._pool is not None and _single(plan) not in self._coming:
            self._coming[_single(plan)] = self._pool.submit(device_memory, _single(plan))

    def parts(self, plan: TrainingSetup) -> dict[str, int]:
        """Bytes of the device's allocator by part, the text side apart."""
        single = _single(plan)
        self.begin(plan)
        if single not in self._done:
            coming = self._coming.get(single)
            self._done[single] = device_memory(single) if coming is None else coming.result()
        done = self._done[single]
        parts = done | {"activations": done["activations"] * plan.micro_batch}
        parts.pop("context and workspaces", None)  # which the allocator does not see
        return parts

    def bytes(self, plan: TrainingSetup) -> int:
        """All parts together."""
        return sum(self.parts(plan).values())


def _single(plan: TrainingSetup) -> TrainingSetup:
    """One sample at once, in as many parts as it takes to keep gradients or not; uncompiled."""
    parts = min(2, plan.hardware.accumulate)
    hardware = replace(plan.hardware, accumulate=parts, compile="")
    training = replace(plan.training, batch=parts, samples=parts)
    return replace(plan, hardware=hardware, training=training)
