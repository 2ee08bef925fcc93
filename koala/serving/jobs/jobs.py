"""Jobs: once accepted they are on disk, and run exactly once through disconnects and crashes.

One thread submits images to the service as it has room; a pool stores the finished ones in the
gallery. Callbacks on the engine's thread only record events. The table decides how a job ends:
with its last image or by a cancellation, whichever is committed first.
"""

import contextlib
import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from PIL import Image

from koala.errors import Failure
from koala.generation import Late, Settings
from koala.serving.admission import Busy
from koala.serving.errors import to_api_error
from koala.serving.image_request import IMAGES, ImageRequest
from koala.serving.jobs import serialise
from koala.serving.jobs.gallery import Gallery
from koala.serving.jobs.queue import JobQueue, OpenJob
from koala.serving.jobs.subscribers import Subscriber
from koala.serving.jobs.table import AlreadyEnded, Job, JobTable, TooManyJobs
from koala.serving.service import Event, Service, Submission

WRITERS = 4  # images encoded at once
RETRY = 30.0  # seconds, of Retry-After when too many jobs are open
TICK = 1.0  # seconds between checks of the deadlines
DISK_RETRY = 5.0  # seconds before retrying when an image cannot be stored
TIDY = 60.0  # seconds between deletions of old jobs and images
BETWEEN_PREVIEWS = 0.1  # seconds, for each image

log = logging.getLogger(__name__)


class Jobs:
    """The jobs of a service. Thread-safe, but not to be called on the engine's thread.

    owner, in methods: only that client's jobs are visible.
    """

    def __init__(self, service: Service, table: JobTable, gallery: Gallery) -> None:
        self.service, self.table, self.gallery = service, table, gallery
        self._queue = JobQueue(service.limits.patience)
        self._changed = threading.Condition()  # guards _queue and its jobs
        self._closing = self._disk_full = False
        self._tidied = time.monotonic()
        self._writers = ThreadPoolExecutor(WRITERS, "koala-gallery")
        self._submitter = threading.Thread(target=self._run, name="koala-jobs", daemon=True)

    def start(self) -> None:
        """Queues the jobs that a crash or restart left open, and starts the threads."""
        for job in self.table.open():
            self._queue.jobs[job.id] = OpenJob.of(job)
        self._submitter.start()

    def close(self) -> None:
        """Stops the threads; open jobs stay open for the next start. Call `Service.close` first."""
        with self._changed:
            self._closing = True
            for open_job in self._queue.jobs.values():
                open_job.notify("closed")
            self._changed.notify_all()
        if self._submitter.ident is not None:
            self._submitter.join()
        self._writers.shutdown()

    # --- called by clients ------------------------------------------------------------------

    def submit(self, spec: ImageRequest) -> dict[str, Any]:
        """Accepts a job; it is on disk when this returns. UserError, Busy."""
        if self._closing or self.service.draining:
            raise Busy("draining", RETRY)
        requests = self.service.requests(spec)
        steps = self.service.pipeline.steps(requests[:1])
        values = replace(spec, seed=requests[0].settings.seed).to_dict()
        client = values.pop("client")
        given = {name: values.pop(name) for name in IMAGES}
        uploads = {name: data for name, data in given.items() if data is not None}
        try:
            job = self.table.accept(client, values, uploads, spec.number, steps)
        except TooManyJobs as full:
            raise Busy("client_queue_full" if full.mine else "queue_full", RETRY) from None
        open_job = OpenJob.of(job)
        with self._changed:
            self._queue.jobs[job.id] = open_job
            self._changed.notify_all()
        return self._view(job)

    def cancel(self, id: str, owner: str | None = None) -> dict[str, Any] | None:
        """Cancels a job unless it has ended. None for an unknown id."""
        job = self.table.get(id, owner)
        if job is None:
            return None
        with self._changed:
            open_job = self._queue.jobs.get(id)
            started = open_job.started if open_job else None
        if self.table.cancel(id, started):
            self._finish(id)
        return self.get(id, owner)

    def get(self, id: str, owner: str | None = None) -> dict[str, Any] | None:
        """The job as JSON-able values, or None."""
        job = self.table.get(id, owner)
        return None if job is None else self._view(job)

    def page(
        self, limit: int, before: str | None = None, owner: str | None = None
    ) -> list[dict[str, Any]]:
        """Up to `limit` jobs, newest first, older than `before`."""
        queued = self._queued_in_service()
        return [self._view(job, queued) for job in self.table.page(limit, before, owner)]

    def subscribe(self, id: str, subscriber: Subscriber) -> None:
        """Sends the subscriber updates of an open job from now on."""
        with self._changed:
            open_job = self._queue.jobs.get(id)
            if open_job is not None:
                open_job.subscribers.add(subscriber)
            if self._closing:
                subscriber.notify("closed")

    def unsubscribe(self, id: str, subscriber: Subscriber) -> None:
        """Stops the updates."""
        with self._changed:
            open_job = self._queue.jobs.get(id)
            if open_job is not None:
                open_job.subscribers.discard(subscriber)

    def _queued_in_service(self) -> int:
        """How many images queued in the service are ahead of all that wait here."""
        with self._changed:
            last = self._queue.last()
        return 0 if last is None else last.position() + 1

    def _view(self, job: Job, queued: int | None = None) -> dict[str, Any]:
        with self._changed:
            open_job = self._queue.jobs.get(job.id)
        if open_job is None and job.status == "open":  # just accepted, or just ended
            job = self.table.get(job.id) or job
        images = {
            index: found
            for index, stored in job.ended.items()
            if stored is not None and (found := self.gallery.get(stored)) is not None
        }
        if job.status != "open":
            return serialise.ended_job(job, images)
        if open_job is None:
            return serialise.open_job(job, images, None, 0, 0)
        with self._changed:
            started, done = open_job.started, sum(open_job.steps.values())
            submissions = list(open_job.submissions.values())
            waits = bool(open_job.waiting) and not submissions and started is None
            ahead = self._queue.ahead(open_job, time.time()) if waits else 0
        if started is not None:
            position = 0
        elif submissions:
            position = min(submission.position() for submission in submissions)
        else:
            position = ahead + (self._queued_in_service() if queued is None else queued)
        return serialise.open_job(job, images, started, done, position)

    # --- the submitting thread --------------------------------------------------------------

    def _run(self) -> None:
        while True:
            if self._disk_full:
                self._disk_full = not self.gallery.database.has_room()
            with self._changed:
                idle = self._closing or self._disk_full
                found = None if idle else self._queue.take(self._capacity(), time.time())
                if self._closing:
                    return
                if found is None:
                    waits = any(open_job.waiting for open_job in self._queue.jobs.values())
                    self._changed.wait(TICK if waits else TIDY)
            if found is not None:
                self._submit(*found)
            if time.monotonic() - self._tidied > TIDY:
                self._tidy()

    def _capacity(self) -> int:
        """Images to have in the service at once: two batches, and room for other requests."""
        limits, wanted = self.service.limits, 2 * self.service.max_batch
        return max(1, min(wanted, limits.queue // 2, limits.client_queue // 2))

    def _submit(self, open_job: OpenJob, index: int) -> None:
        """Submits one image of a job to the service."""
        left = open_job.deadline - time.time()
        settled: Future[Image.Image] = Future()
        try:
            if left <= 0:
                raise Late("the image was not finished by its deadline")
            spec = self._spec(open_job, index, left)
            submission = self.service.submit(spec, partial(self._on_event, open_job, index))
        except Busy as busy:
            with self._changed:
                mine = busy.reason == "client_queue_full"
                self._queue.pause(open_job.job.client if mine else "", min(busy.retry_after, TICK))
                self._queue.requeue(open_job, index)
        except Exception as error:
            settled.set_exception(error)
            self._settle(open_job, index, None, settled)
        else:
            self._watch(open_job, index, submission)

    def _watch(self, open_job: OpenJob, index: int, submission: Submission) -> None:
        with self._changed:
            self._queue.record(open_job, index, submission)
            ended = open_job.ended
        if ended:
            submission.cancel()
        settings, (future,) = submission.requests[0].settings, submission.futures()
        future.add_done_callback(partial(self._settle_later, open_job, index, settings))

    def _spec(self, open_job: OpenJob, index: int, left: float) -> ImageRequest:
        values = {**open_job.job.request, **self.table.uploads(open_job.job.id)}
        spec = ImageRequest.from_dict({**values, "client": open_job.job.client})
        assert spec.seed is not None
        deadline = None if spec.deadline is None else left
        return replace(spec, number=1, seed=spec.seed + index, deadline=deadline)

    def _tidy(self) -> None:
        self._tidied = time.monotonic()
        try:
            self.gallery.tidy()
            self.table.tidy()
        except Failure as error:
            log.error("%s", error)

    # --- events of an image -----------------------------------------------------------------

    def _on_event(self, open_job: OpenJob, index: int, event: Event) -> None:
        """Records and publishes progress; called on the engine's thread."""
        if event.kind not in ("started", "step"):
            return  # the end comes with the future
        with self._changed:
            open_job.steps[index] = event.done
            if open_job.started is None:
                open_job.started = time.time()
                open_job.notify("status")
            if event.kind == "started":  # every queued job has moved up
                for each in self._queue.jobs.values():
                    each.notify("progress")
            open_job.notify("progress")
            now = time.monotonic()
            due = now - open_job.previewed.get(index, 0.0) >= BETWEEN_PREVIEWS
            if not (event.preview and open_job.subscribers and due):
                return
            open_job.previewed[index] = now
        image = event.preview()
        with self._changed:
            open_job.notify("preview", index, image)

    def _settle_later(
        self, open_job: OpenJob, index: int, settings: Settings, future: Future[Image.Image]
    ) -> None:
        """Called on the engine's thread. After `close`, the image runs again at the next start."""
        with contextlib.suppress(RuntimeError):
            self._writers.submit(self._settle, open_job, index, settings, future)

    def _settle(
        self, open_job: OpenJob, index: int, settings: Settings | None, future: Future[Image.Image]
    ) -> None:
        """Records the end of an image, or queues it again if it has no result."""
        id, retry = open_job.job.id, False
        try:
            if future.cancelled():
                retry = not open_job.ended
            elif error := future.exception():
                failure = to_api_error(error)
                self.table.image_failed(id, index, failure.message, failure.code, open_job.started)
            else:
                assert settings is not None and open_job.started is not None
                also = partial(self._on_stored, open_job, index)
                self.gallery.add(future.result(), settings, open_job.job.client, also)
        except AlreadyEnded:
            pass  # cancelled meanwhile
        except Exception as error:
            retry = not open_job.ended
            log.error("image of job %s queued again: %s", id, error)
            with self._changed:
                self._disk_full = True
                self._queue.pause("", DISK_RETRY)
        with self._changed:
            if retry:
                self._queue.requeue(open_job, index)
                open_job.steps.pop(index, None)
            else:
                self._queue.release(open_job, index)
                open_job.steps[index] = open_job.job.steps
                open_job.notify("picture", index)
            self._changed.notify_all()
        job = None if retry else self.table.get(id)
        if job is not None and job.status != "open":
            self._finish(id)

    def _on_stored(self, open_job: OpenJob, index: int, db: Any, stored: str) -> None:
        assert open_job.started is not None
        self.table.image_finished(db, open_job.job.id, index, stored, open_job.started)

    def _finish(self, id: str) -> None:
        """Drops an ended job and cancels its images in the service."""
        with self._changed:
            open_job = self._queue.jobs.pop(id, None)
            if open_job is None:
                return
            open_job.ended, open_job.waiting = True, []
            submissions = list(open_job.submissions.values())
            open_job.notify("end")
        for submission in submissions:
            submission.cancel()
