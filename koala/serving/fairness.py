"""Whose picture comes next: the client's that has had least, the urgent before the patient.

Each client has a virtual time: the work it has been given. The waiting picture of the client with
the least goes first, so that one who sends a hundred pictures and one who sends two share the
machine evenly while both wait. Who comes back after a pause starts where the others are and
cannot claim what it did not use (start-time fair queueing, Goyal et al., SIGCOMM 1996).

Priorities come before that, but a picture gains one with every `patience` seconds of waiting:
so urgent ones never shut the others out.
"""

import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from koala.generation import Ticket


@dataclass(frozen=True)
class Place:
    """What is known of a picture in the queue; the tag of its ticket."""

    client: str
    priority: int
    work: float  # pixels to evaluate, over all its steps
    arrived: float  # by the clock


class Fairness:
    """The order of the queue. Any thread may call it."""

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.patience, self.clock = patience, clock
        self._lock = threading.Lock()
        self._given: dict[str, float] = {}  # virtual time by client
        self._there: Counter[str] = Counter()  # pictures that wait or are on their way
        self._now = 0.0  # the virtual time of the picture that was let in last

    def arrive(self, place: Place) -> None:
        """A picture joins the queue."""
        with self._lock:
            if not self._there[place.client]:
                given = self._given.get(place.client, 0.0)
                self._given[place.client] = max(given, self._now)
            self._there[place.client] += 1

    def start(self, place: Place) -> None:
        """A picture is let in: its client has had so much more."""
        with self._lock:
            self._now = max(self._now, self._given[place.client])
            self._given[place.client] += place.work

    def leave(self, place: Place) -> None:
        """A picture is done, has failed or was cancelled."""
        with self._lock:
            self._there[place.client] -= 1
            for client in [name for name, there in self._there.items() if not there]:
                del self._there[client]
                if self._given[client] <= self._now:  # as one who was never here
                    del self._given[client]

    def rank(self, ticket: Ticket) -> tuple[float, float, int]:
        """The key by which waiting pictures are taken, lowest first."""
        place: Place = ticket.tag
        with self._lock:
            given = self._given.get(place.client, 0.0)
        return self._urgency(place), given, ticket.number

    def order(self, tickets: Sequence[Ticket]) -> list[Ticket]:
        """Waiting pictures, given in the order of their arrival, as they would be taken."""
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

    def _urgency(self, place: Place) -> float:
        """Its priority, less what waiting has gained it."""
        return max(0.0, place.priority - (self.clock() - place.arrived) // self.patience)
