"""The open jobs in memory, and which image goes to the service next.

The service's own queue is short, so that it can reject requests at once; jobs may be many and wait
here. As the service has room it gets the image with the highest priority, then of the client with
the fewest submitted images, then of the oldest job.
"""

import time
from collections import Counter
from dataclasses import dataclass, field

from koala.serving.jobs.subscribers import Subscriber
from koala.serving.jobs.table import Job
from koala.serving.service import Submission


@dataclass(eq=False)
class OpenJob:
    """A job that has not ended. Its images are numbered from 0."""

    job: Job  # as it was accepted
    waiting: list[int]  # images not yet submitted to the service
    submissions: dict[int, Submission] = field(default_factory=dict)  # by image
    steps: dict[int, int] = field(default_factory=dict)  # finished steps, by image
    previewed: dict[int, float] = field(default_factory=dict)  # time of the last preview, by image
    started: float | None = None  # Unix seconds
    subscribers: set[Subscriber] = field(default_factory=set)
    ended: bool = False

    @staticmethod
    def of(job: Job) -> "OpenJob":
        """A job with the images that are unfinished: all of a new job, fewer after a crash."""
        waiting = [index for index in range(job.number) if index not in job.ended]
        steps = dict.fromkeys(job.ended, job.steps)
        return OpenJob(job, waiting, steps=steps, started=job.started)

    @property
    def deadline(self) -> float:
        """Unix seconds; infinity without a deadline."""
        seconds = self.job.request.get("deadline")
        return float("inf") if seconds is None else self.job.created + seconds

    def notify(self, what: str, index: int = 0, value: object = None) -> None:
        """Notifies all subscribers."""
        for subscriber in self.subscribers:
            subscriber.notify(what, index, value)


class JobQueue:
    """The open jobs, by id. Not thread-safe: its owner holds a lock.

    patience: seconds of waiting that raise the priority by one.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.jobs: dict[str, OpenJob] = {}
        self.submitted = 0  # images in the service
        self.of_client: Counter[str] = Counter()  # the same, by client
        self._paused: dict[str, float] = {}  # client ("": all) -> monotonic time
        self._newest: tuple[OpenJob, int] | None = None  # the last image submitted

    def pause(self, client: str, seconds: float) -> None:
        """Submits nothing of a client ("": of any client) for some seconds."""
        self._paused[client] = time.monotonic() + seconds

    def take(self, most: int, now: float) -> tuple[OpenJob, int] | None:
        """Removes and returns the next image; None if there is none, or no room.

        most: images in the service at once; one past its deadline at `now` (Unix seconds) needs
        no room.
        """
        waiting = [open_job for open_job in self.jobs.values() if open_job.waiting]
        found = next((open_job for open_job in waiting if open_job.deadline <= now), None)
        if found is None:
            clock = time.monotonic()
            self._paused = {
                client: until for client, until in self._paused.items() if until > clock
            }
            waiting = [open_job for open_job in waiting if open_job.job.client not in self._paused]
            if self.submitted >= most or "" in self._paused or not waiting:
                return None
            found = min(waiting, key=lambda open_job: self._rank(open_job, now))
        self.submitted += 1
        self.of_client[found.job.client] += 1
        return found, found.waiting.pop(0)

    def record(self, open_job: OpenJob, index: int, submission: Submission) -> None:
        """Records an image that the service accepted."""
        open_job.submissions[index] = submission
        self._newest = open_job, index

    def requeue(self, open_job: OpenJob, index: int) -> None:
        """Puts an unfinished image that left the service back into the queue."""
        open_job.waiting = sorted([*open_job.waiting, index])
        self.release(open_job, index)

    def release(self, open_job: OpenJob, index: int) -> None:
        """Records that an image left the service."""
        open_job.submissions.pop(index, None)
        self.submitted -= 1
        self.of_client[open_job.job.client] -= 1
        if not self.of_client[open_job.job.client]:
            del self.of_client[open_job.job.client]

    def ahead(self, open_job: OpenJob, now: float) -> int:
        """How many waiting images of other jobs come before this job's."""
        own = self._rank(open_job, now)
        others = (each for each in self.jobs.values() if each is not open_job and each.waiting)
        return sum(len(each.waiting) for each in others if self._rank(each, now) < own)

    def last(self) -> Submission | None:
        """The last submission, if it is still queued in the service."""
        if self._newest is None:
            return None
        open_job, index = self._newest
        return None if index in open_job.steps else open_job.submissions.get(index)

    def _rank(self, open_job: OpenJob, now: float) -> tuple[float, int, str]:
        aged = (now - open_job.job.created) // self.patience
        priority = max(0.0, open_job.job.request["priority"] - aged)
        return priority, self.of_client[open_job.job.client], open_job.job.id
