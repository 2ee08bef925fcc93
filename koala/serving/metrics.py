"""What the server says about itself, for Prometheus: load, speed and what went wrong.

No prompt, client or file is ever a label.
"""

from collections.abc import Callable

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from koala.generation import Pass

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 300)
_PICTURES = (1, 2, 3, 4, 6, 8, 12, 16, 32)


class Metrics:
    """One server's, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._waiting = self._gauge("koala_queue_pictures", "Pictures that wait.")
        self._active = self._gauge("koala_active_pictures", "Pictures on their way.")
        self._capacity = self._gauge(
            "koala_batch_limit", "Pictures of the native size that one pass may hold."
        )
        self._memory = self._gauge("koala_device_memory_bytes", "Allocated by torch on the GPU.")
        self._memory.set_function(_device_memory)
        self._rows = self._histogram("koala_batch_pictures", "Pictures in one pass.", _PICTURES)
        self._step = self._histogram("koala_step_seconds", "One pass.")
        self._wait = self._histogram("koala_wait_seconds", "From acceptance until let in.")
        self._preview = self._histogram(
            "koala_first_preview_seconds", "From acceptance until the first preview."
        )
        self._picture = self._histogram(
            "koala_picture_seconds", "From acceptance until the picture is drawn."
        )
        self._pictures = self._counter("koala_pictures", "Pictures drawn.")
        self._cancelled = self._counter("koala_cancelled", "Pictures cancelled.")
        self._errors = self._counter("koala_errors", "Refused or failed, by reason.", "reason")

    def _gauge(self, name: str, says: str) -> Gauge:
        return Gauge(name, says, registry=self.registry)

    def _histogram(self, name: str, says: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(name, says, registry=self.registry, buckets=buckets)

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(name, says, labels, registry=self.registry)

    def watch(self, waiting: Callable[[], int], active: Callable[[], int]) -> None:
        """Where the numbers of pictures come from, whenever somebody asks."""
        self._waiting.set_function(waiting)
        self._active.set_function(active)

    def passed(self, done: Pass, limit: int) -> None:
        self._rows.observe(done.pictures)
        self._step.observe(done.seconds)
        self._capacity.set(limit)

    def started(self, seconds: float) -> None:
        self._wait.observe(seconds)

    def previewed(self, seconds: float) -> None:
        self._preview.observe(seconds)

    def drawn(self, seconds: float) -> None:
        self._pictures.inc()
        self._picture.observe(seconds)

    def cancelled(self) -> None:
        self._cancelled.inc()

    def failed(self, reason: str) -> None:
        """`reason` is one of the few words that the program itself knows."""
        self._errors.labels(reason).inc()

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)


def _device_memory() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
