"""Admission control: the queue's named limits, and how long to wait when one is reached."""

import math
import threading
from collections import Counter
from collections.abc import Sequence

from koala.errors import UserError
from koala.generation import Pass, Request
from koala.serving.settings import Limits

_DECAY = 0.98  # weight of earlier passes in the throughput estimate
SHORTEST_WAIT, LONGEST_WAIT = 1.0, 600.0  # seconds, of Retry-After

_MESSAGES = {
    "queue_full": "the queue is full",
    "client_queue_full": "you have reached the limit of queued images for one client",
    "memory": "the images in the queue hold as many pixels as the server allows",
    "rate": "you have reached the rate limit",
    "draining": "the server is shutting down and takes no new requests",
    "starting": "the server is not ready yet",
}
UNAVAILABLE = ("draining", "starting")  # the server's state, not its load


class Busy(Exception):
    """The server cannot accept a request now; it may later."""

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__(f"{_MESSAGES[reason]}: try again in {math.ceil(retry_after)} s")
        self.reason = reason
        self.retry_after = retry_after  # seconds


class ThroughputEstimate:
    """An estimate of the pixels evaluated per second, from recent passes."""

    def __init__(self) -> None:
        self._pixels = self._seconds = 0.0

    def update(self, done: Pass) -> None:
        """Adds a pass to the estimate."""
        self._pixels = _DECAY * self._pixels + done.pixels
        self._seconds = _DECAY * self._seconds + done.seconds

    def seconds(self, work: float) -> float:
        """How long `work` pixels take, clamped to the bounds of Retry-After."""
        known = work * self._seconds / self._pixels if self._pixels else 0.0
        return min(max(known, SHORTEST_WAIT), LONGEST_WAIT)


class Admission:
    """Counts the queued and running images. Thread-safe."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.throughput = limits, ThroughputEstimate()
        self._lock = threading.Lock()
        self._clients: Counter[str] = Counter()
        self._pixels = 0
        self._work = 0.0  # pixels left to evaluate

    @property
    def images(self) -> int:
        """How many images are queued or running."""
        return self._clients.total()

    def check(self, client: str, number: int, pixels: int = 0) -> None:
        """Raises Busy if `number` more images of `pixels` in all would exceed a limit."""
        with self._lock:
            self._check(client, number, pixels)

    def admit(self, client: str, requests: Sequence[Request], work: float) -> None:
        """Counts the images in. Busy if over a limit; UserError if that can never fit."""
        pixels = sum(request.pixels for request in requests)
        most = min(self.limits.queue, self.limits.client_queue)
        if len(requests) > most or pixels > self.limits.pixels:
            raise UserError(
                f"{len(requests)} images of {pixels:,} pixels in all exceed the server's capacity: "
                f"allowed are {most} images of {self.limits.pixels:,} pixels; ask for fewer or "
                "smaller ones"
            )
        with self._lock:
            self._check(client, len(requests), pixels)
            self._clients[client] += len(requests)
            self._pixels += pixels
            self._work += work

    def progress(self, work: float) -> None:
        """Subtracts finished work."""
        with self._lock:
            self._work = max(0.0, self._work - work)

    def release(self, client: str, request: Request, work: float) -> None:
        """Counts one image out, with its unfinished work."""
        self.progress(work)
        with self._lock:
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]
            self._pixels -= request.pixels

    def _check(self, client: str, number: int, pixels: int) -> None:
        own, everyone = self._clients[client], self._clients.total()
        if not own:
            del self._clients[client]
        self._check_limit("client_queue_full", own + number, self.limits.client_queue, own)
        self._check_limit("queue_full", everyone + number, self.limits.queue, everyone)
        self._check_limit("memory", self._pixels + pixels, self.limits.pixels, self._pixels)

    def _check_limit(self, reason: str, wanted: int, limit: int, present: int) -> None:
        """Raises Busy with the time until enough of what is present has finished."""
        if wanted > limit:
            share = min(1.0, (wanted - limit) / max(1, present))
            raise Busy(reason, self.throughput.seconds(share * self._work))
