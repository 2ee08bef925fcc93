"""What the server says about itself, for Prometheus: load, speed and what went wrong.

No prompt, client or file is ever a label.
"""

from collections.abc import Callable

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from koala.generation import Pass

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 300)


class Metrics:
    """One server's, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        new = {"registry": self.registry}
        self._waiting = Gauge("koala_queue_pictures", "pictures that wait", **new)
        self._active = Gauge("koala_active_pictures", "pictures on their way", **new)
        self._memory = Gauge("koala_device_memory_bytes", "allocated by torch on the GPU", **new)
        self._memory.set_function(_device_memory)
        self._rows = Histogram(
            "koala_batch_pictures", "pictures in one pass", buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32),
            **new,
        )  # fmt: skip
        self._capacity = Gauge("koala_batch_limit", "pictures of the native size a pass", **new)
        self._step = Histogram("koala_step_seconds", "one pass", buckets=_SECONDS, **new)
        self._wait = Histogram("koala_wait_seconds", "until let in", buckets=_SECONDS, **new)
        self._preview = Histogram(
            "koala_first_preview_seconds", "until the first preview", buckets=_SECONDS, **new
        )
        self._picture = Histogram(
            "koala_picture_seconds", "until the picture", buckets=_SECONDS, **new
        )
        self._pictures = Counter("koala_pictures", "pictures drawn", **new)
        self._cancelled = Counter("koala_cancelled", "pictures cancelled", **new)
        self._errors = Counter("koala_errors", "refused or failed, by reason", ["reason"], **new)

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
