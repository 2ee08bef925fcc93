"""Fair queueing between clients, with priorities that age.

Each client has a virtual time: the work it has received. The queued image of the client with the
least goes first, so a client that sends a hundred images and one that sends two share the machine
evenly. A client that returns after a pause starts level with the others and cannot claim unused
time (start-time fair queueing, Goyal et al., SIGCOMM 1996).

Priority is compared first, but an image gains one level with every `patience` seconds of waiting,
so urgent images never starve the others.
"""

import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from koala.generation import Ticket


@dataclass(frozen=True)
class QueueEntry:
    """A queued image, as the tag of its ticket."""

    client: str
    priority: int
    work: float  # pixels to evaluate over all steps
    arrived: float  # monotonic seconds


class FairQueue:
    """Orders queued images. Thread-safe."""

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.patience, self.clock = patience, clock
        self._lock = threading.Lock()
        self._given: dict[str, float] = {}  # virtual time by client
        self._present: Counter[str] = Counter()  # queued and running images
        self._now = 0.0  # virtual time of the image started last

    def arrive(self, entry: QueueEntry) -> None:
        """Adds an image to the queue."""
        with self._lock:
            if not self._present[entry.client]:
                given = self._given.get(entry.client, 0.0)
                self._given[entry.client] = max(given, self._now)
            self._present[entry.client] += 1

    def start(self, entry: QueueEntry) -> None:
        """Charges a started image to its client."""
        with self._lock:
            self._now = max(self._now, self._given[entry.client])
            self._given[entry.client] += entry.work

    def leave(self, entry: QueueEntry) -> None:
        """Removes an image that finished, failed or was cancelled."""
        with self._lock:
            self._present[entry.client] -= 1
            for client in [name for name, count in self._present.items() if not count]:
                del self._present[client]
                if self._given[client] <= self._now:  # like a new client
                    del self._given[client]

    def rank(self, ticket: Ticket) -> tuple[float, float, int]:
        """The sort key of a queued image; the lowest runs first."""
        entry: QueueEntry = ticket.tag
        with self._lock:
            given = self._given.get(entry.client, 0.0)
        return self._urgency(entry), given, ticket.number

    def order(self, tickets: Sequence[Ticket]) -> list[Ticket]:
        """Queued images, given by arrival, in the order in which they would run."""
        lines: dict[float, dict[str, deque[Ticket]]] = {}
        for ticket in tickets:
            clients = lines.setdefault(self._urgency(ticket.tag), {})
            clients.setdefault(ticket.tag.client, deque()).append(ticket)
        with self._lock:
            given = dict(self._given)
        ordered: list[Ticket] = []
        for urgency in sorted(lines):
            clients = lines[urgency]
            heads = [(given.get(c, 0.0), line[0].number, c) for c, line in clients.items()]
            heapq.heapify(heads)
            while heads:
                had, _, client = heapq.heappop(heads)
                ordered.append(clients[client].popleft())
                given[client] = had + ordered[-1].tag.work
                if clients[client]:
                    head = (given[client], clients[client][0].number, client)
                    heapq.heappush(heads, head)
        return ordered

    def _urgency(self, entry: QueueEntry) -> float:
        """The priority, less one level for each `patience` seconds of waiting."""
        return max(0.0, entry.priority - (self.clock() - entry.arrived) // self.patience)
