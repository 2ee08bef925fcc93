"""Who is taken in: the queue's limits, each with a name, and how long to wait when one is met."""

import math
import threading
from collections import Counter
from collections.abc import Sequence

from koala.errors import UserError
from koala.generation import Pass, Request
from koala.serving.settings import Limits

_FADING = 0.98  # of what earlier passes say about the pace, with every further one
SHORTEST_WAIT, LONGEST_WAIT = 1.0, 600.0  # seconds that a client is told to wait

_SAYS = {
    "queue_full": "the queue is full",
    "client_queue_full": "you have as many pictures in the queue as one client may",
    "memory": "the pictures on their way hold as many pixels as there may be",
    "rate": "you ask more often than one client may",
    "draining": "the server is being stopped and takes no more requests",
    "starting": "the server is not ready yet",
}
UNAVAILABLE = ("draining", "starting")  # the server's state rather than its load


class Busy(Exception):
    """The server cannot take a request in now; later it may."""

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__(f"{_SAYS[reason]}: try again in {math.ceil(retry_after)} s")
        self.reason = reason
        self.retry_after = retry_after  # seconds


class Pace:
    """How fast pixels are evaluated, by the passes there were."""

    def __init__(self) -> None:
        self._pixels = self._seconds = 0.0

    def note(self, done: Pass) -> None:
        """Takes a pass into account."""
        self._pixels = _FADING * self._pixels + done.pixels
        self._seconds = _FADING * self._seconds + done.seconds

    def seconds(self, work: float) -> float:
        """How long so many pixels would take, within what a client may be told."""
        known = work * self._seconds / self._pixels if self._pixels else 0.0
        return min(max(known, SHORTEST_WAIT), LONGEST_WAIT)


class Admission:
    """The pictures that wait or are on their way, counted. Any thread may call it."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.pace = limits, Pace()
        self._lock = threading.Lock()
        self._clients: Counter[str] = Counter()
        self._pixels = 0
        self._work = 0.0  # pixels still to be evaluated

    @property
    def pictures(self) -> int:
        """How many there are."""
        return self._clients.total()

    def check(self, client: str, number: int, pixels: int = 0) -> None:
        """Busy if `number` pictures of `pixels` in all would be over a limit now."""
        with self._lock:
            self._check(client, number, pixels)

    def admit(self, client: str, requests: Sequence[Request], work: float) -> None:
        """Counts them in. Busy if that is over a limit; UserError where it always would be."""
        pixels = sum(request.pixels for request in requests)
        most = min(self.limits.queue, self.limits.client_queue)
        if len(requests) > most or pixels > self.limits.pixels:
            raise UserError(
                f"{len(requests)} pictures of {pixels:,} pixels in all are more than the server "
                f"holds: allowed are {most} pictures of {self.limits.pixels:,}; ask for fewer or "
                "smaller ones"
            )
        with self._lock:
            self._check(client, len(requests), pixels)
            self._clients[client] += len(requests)
            self._pixels += pixels
            self._work += work

    def progress(self, work: float) -> None:
        """So much less is to be done."""
        with self._lock:
            self._work = max(0.0, self._work - work)

    def release(self, client: str, request: Request, work: float) -> None:
        """One picture is gone, and with it what was still to be done of it."""
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
        self._room("client_queue_full", own + number, self.limits.client_queue, own)
        self._room("queue_full", everyone + number, self.limits.queue, everyone)
        self._room("memory", self._pixels + pixels, self.limits.pixels, self._pixels)

    def _room(self, reason: str, wanted: int, limit: int, there: int) -> None:
        """Busy until so much of what is there has gone that what is wanted fits."""
        if wanted > limit:
            share = min(1.0, (wanted - limit) / max(1, there))
            raise Busy(reason, self.pace.seconds(share * self._work))
