"""The open jobs in memory: what of each waits, is on its way or done, and which comes next.

The service's own queue is short, so that it can say no at once; jobs may be many, and wait here.
They are let into the service as room appears there: the urgent before the patient, then the
client that has least on its way, then the oldest.
"""

import time
from collections import Counter
from dataclasses import dataclass, field

from koala.serving.jobs.listeners import Listener
from koala.serving.jobs.table import Job
from koala.serving.service import Drawing


@dataclass(eq=False)
class Live:
    """An open job. Its pictures are known by their places, from 0."""

    job: Job  # as it was when it was taken in
    waiting: list[int]  # places that the service has not been given
    drawings: dict[int, Drawing] = field(default_factory=dict)  # those that it has
    steps: dict[int, int] = field(default_factory=dict)  # done, by place
    previewed: dict[int, float] = field(default_factory=dict)  # when the last was made
    started: float | None = None  # Unix seconds
    listeners: set[Listener] = field(default_factory=set)
    over: bool = False

    @staticmethod
    def of(job: Job) -> "Live":
        """What is left of a job: all of a new one, after a crash what has had no end."""
        waiting = [place for place in range(job.number) if place not in job.ended]
        steps = dict.fromkeys(job.ended, job.steps)
        return Live(job, waiting, steps=steps, started=job.started)

    @property
    def deadline(self) -> float:
        """Unix seconds; infinity if there is none."""
        seconds = self.job.request.get("deadline")
        return float("inf") if seconds is None else self.job.created + seconds

    def tell(self, what: str, index: int = 0, value: object = None) -> None:
        """News to all that follow it."""
        for listener in self.listeners:
            listener.tell(what, index, value)


class Queue:
    """The open jobs, by id. Not safe by itself: its owner holds a lock.

    patience: seconds after which what waits counts one priority higher.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.jobs: dict[str, Live] = {}
        self.given = 0  # pictures that the service has
        self.of_client: Counter[str] = Counter()  # the same by client
        self._paused: dict[str, float] = {}  # clients, until when; "": everybody
        self._newest: tuple[Live, int] | None = None  # what the service was given last

    def pause(self, client: str, seconds: float) -> None:
        """Gives nothing of a client's ("": of anybody's) for a while."""
        self._paused[client] = time.monotonic() + seconds

    def take(self, most: int, now: float) -> tuple[Live, int] | None:
        """The picture that comes next, no longer among those that wait; None if none can.

        The service may have `most` of them at once. One that is past its deadline at `now` (Unix
        seconds) needs no room.
        """
        waiting = [live for live in self.jobs.values() if live.waiting]
        late = next((live for live in waiting if live.deadline <= now), None)
        if late is None:
            clock = time.monotonic()
            self._paused = {who: until for who, until in self._paused.items() if until > clock}
            waiting = [live for live in waiting if live.job.client not in self._paused]
            if self.given >= most or "" in self._paused or not waiting:
                return None
            late = min(waiting, key=lambda live: self._rank(live, now))
        self.given += 1
        self.of_client[late.job.client] += 1
        return late, late.waiting.pop(0)

    def gave(self, live: Live, place: int, drawing: Drawing) -> None:
        """The service has taken a picture."""
        live.drawings[place] = drawing
        self._newest = live, place

    def back(self, live: Live, place: int) -> None:
        """The service has a picture no longer, and it has had no end: it waits again."""
        live.waiting = sorted([*live.waiting, place])
        self.left(live, place)

    def left(self, live: Live, place: int) -> None:
        """The service has a picture no longer."""
        live.drawings.pop(place, None)
        self.given -= 1
        self.of_client[live.job.client] -= 1
        if not self.of_client[live.job.client]:
            del self.of_client[live.job.client]

    def ahead(self, live: Live, now: float) -> int:
        """How many pictures of other jobs that wait here come before this one's."""
        own = self._rank(live, now)
        others = (each for each in self.jobs.values() if each is not live and each.waiting)
        return sum(len(each.waiting) for each in others if self._rank(each, now) < own)

    def last(self) -> Drawing | None:
        """What the service was given last, if it still waits there."""
        if self._newest is None:
            return None
        live, place = self._newest
        return None if place in live.steps else live.drawings.get(place)

    def _rank(self, live: Live, now: float) -> tuple[float, int, str]:
        aged = (now - live.job.created) // self.patience
        priority = max(0.0, live.job.request["priority"] - aged)
        return priority, self.of_client[live.job.client], live.job.id
