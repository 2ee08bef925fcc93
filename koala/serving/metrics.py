"""Prometheus metrics: load, latency and errors. No prompt, client or file is ever a label."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from koala.generation import Pass
from koala.utils.device import allocated_bytes

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 300)
_IMAGES = (1, 2, 3, 4, 6, 8, 12, 16, 32)


class Metrics:
    """The metrics of one server, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._waiting = self._gauge("koala_queue_pictures", "Queued images.")
        self._active = self._gauge("koala_active_pictures", "Running images.")
        self._capacity = self._gauge(
            "koala_batch_limit", "Largest batch, in images of native size."
        )
        self._memory = self._gauge("koala_device_memory_bytes", "GPU memory allocated by torch.")
        self._memory.set_function(allocated_bytes)
        self._rows = self._histogram("koala_batch_pictures", "Images in one pass.", _IMAGES)
        self._step = self._histogram("koala_step_seconds", "Duration of one pass.")
        self._wait = self._histogram("koala_wait_seconds", "From acceptance to the first step.")
        self._preview = self._histogram(
            "koala_first_preview_seconds", "From acceptance to the first preview."
        )
        self._image = self._histogram(
            "koala_picture_seconds", "From acceptance to the finished image."
        )
        self._images = self._counter("koala_pictures", "Finished images.")
        self._cancelled = self._counter("koala_cancelled", "Cancelled images.")
        self._errors = self._counter(
            "koala_errors", "Rejected or failed requests, by reason.", "reason"
        )

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(name, help_text, registry=self.registry)

    def _histogram(
        self, name: str, help_text: str, buckets: tuple[float, ...] = _SECONDS
    ) -> Histogram:
        return Histogram(name, help_text, registry=self.registry, buckets=buckets)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(name, help_text, labels, registry=self.registry)

    def watch(self, waiting: Callable[[], int], active: Callable[[], int]) -> None:
        """Sets the functions that count queued and running images."""
        self._waiting.set_function(waiting)
        self._active.set_function(active)

    def passed(self, done: Pass, limit: int) -> None:
        self._rows.observe(done.images)
        self._step.observe(done.seconds)
        self._capacity.set(limit)

    def started(self, seconds: float) -> None:
        self._wait.observe(seconds)

    def previewed(self, seconds: float) -> None:
        self._preview.observe(seconds)

    def finished(self, seconds: float) -> None:
        self._images.inc()
        self._image.observe(seconds)

    def cancelled(self) -> None:
        self._cancelled.inc()

    def failed(self, reason: str) -> None:
        """Counts an error; `reason` is one of the fixed error codes."""
        self._errors.labels(reason).inc()

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
