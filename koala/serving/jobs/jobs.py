"""Jobs: accepted once they are on disk, drawn once, whatever happens to client or server.

One thread gives the service what waits, as room appears; some others put finished pictures into
the gallery. What the engine's thread tells is only noted. A job's end is decided by the table:
whoever is first there, the last picture or a cancelling, has ended it.
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

from koala.errors import Failure, UserError
from koala.generation import Late, Settings
from koala.generation.memory.placement import ran_out
from koala.serving.admission import Busy
from koala.serving.image_request import PICTURES, Order
from koala.serving.jobs import serialise
from koala.serving.jobs.gallery import Gallery
from koala.serving.jobs.listeners import Listener
from koala.serving.jobs.queue import Live, Queue
from koala.serving.jobs.table import Ended, Full, Job, Table
from koala.serving.service import Drawing, Event, Service

WRITERS = 4  # pictures that are compressed at once
RETRY = 30.0  # seconds that a client is told to wait where too many jobs do
TICK = 1.0  # seconds between looks at deadlines, while something waits
DISK = 30.0  # seconds between attempts to keep a picture that the disk does not take
TIDY = 60.0  # seconds between looks at what is too old
BETWEEN_PREVIEWS = 0.1  # seconds, of one picture

log = logging.getLogger(__name__)


class Jobs:
    """The jobs of a service. Every method may be called from any thread but the engine's.

    Where `owner` is given, only that client's jobs are there.
    """

    def __init__(self, service: Service, table: Table, gallery: Gallery) -> None:
        self.service, self.table, self.gallery = service, table, gallery
        self._queue = Queue(service.limits.patience)
        self._changed = threading.Condition()  # guards _queue and all that is in it
        self._closing = False
        self._tidied = time.monotonic()
        self._writers = ThreadPoolExecutor(WRITERS, "koala-gallery")
        self._feeder = threading.Thread(target=self._feed, name="koala-jobs", daemon=True)

    def start(self) -> None:
        """Queues again what a crash or a restart left open, and begins to work."""
        for job in self.table.open():
            self._queue.jobs[job.id] = Live.of(job)
        self._feeder.start()

    def close(self) -> None:
        """Ends the threads; what is open stays so, for the next start. After `Service.close`."""
        with self._changed:
            self._closing = True
            for live in self._queue.jobs.values():
                live.tell("closed")
            self._changed.notify_all()
        if self._feeder.ident is not None:
            self._feeder.join()
        self._writers.shutdown()

    # --- what clients do --------------------------------------------------------------------

    def submit(self, order: Order) -> dict[str, Any]:
        """Takes a job; when this returns it is on disk, and will be drawn.

        UserError for what is not allowed, Busy if too much waits.
        """
        if self._closing or self.service.draining:
            raise Busy("draining", RETRY)
        requests = self.service.requests(order)
        steps = self.service.pipeline.steps(requests[:1])
        values = replace(order, seed=requests[0].settings.seed).to_dict()
        client = values.pop("client")
        given = {name: values.pop(name) for name in PICTURES}
        uploads = {name: data for name, data in given.items() if data is not None}
        try:
            job = self.table.accept(client, values, uploads, order.number, steps)
        except Full as full:
            raise Busy("client_queue_full" if full.mine else "queue_full", RETRY) from None
        live = Live.of(job)
        with self._changed:
            self._queue.jobs[job.id] = live
            self._changed.notify_all()
        return self._view(job)

    def cancel(self, id: str, owner: str | None = None) -> dict[str, Any] | None:
        """Ends a job if it has not ended; None if there is none."""
        job = self.table.get(id, owner)
        if job is None:
            return None
        if self.table.cancel(id):
            self._over(id)
        return self.get(id, owner)

    def get(self, id: str, owner: str | None = None) -> dict[str, Any] | None:
        """The job as clients see it; None if there is none."""
        job = self.table.get(id, owner)
        return None if job is None else self._view(job)

    def page(
        self, limit: int, before: str | None = None, owner: str | None = None
    ) -> list[dict[str, Any]]:
        """At most `limit` jobs, newest first; those older than `before` if it is given."""
        behind = self._behind()
        return [self._view(job, behind) for job in self.table.page(limit, before, owner)]

    def follow(self, id: str, listener: Listener) -> None:
        """Has the listener told what happens to an open job from now on."""
        with self._changed:
            live = self._queue.jobs.get(id)
            if live is not None:
                live.listeners.add(listener)
            if self._closing:
                listener.tell("closed")

    def leave(self, id: str, listener: Listener) -> None:
        """Has it told nothing more."""
        with self._changed:
            live = self._queue.jobs.get(id)
            if live is not None:
                live.listeners.discard(listener)

    def _behind(self) -> int:
        """How many pictures the service has that wait before all that wait here."""
        with self._changed:
            last = self._queue.last()
        return 0 if last is None else last.position() + 1

    def _view(self, job: Job, behind: int | None = None) -> dict[str, Any]:
        with self._changed:
            live = self._queue.jobs.get(job.id)
        if live is None and job.status == "open":  # it has ended meanwhile, or is just coming in
            job = self.table.get(job.id) or job
        pictures = {
            place: found
            for place, picture in job.ended.items()
            if picture is not None and (found := self.gallery.get(picture)) is not None
        }
        if job.status != "open":
            return serialise.ended_job(job, pictures)
        if live is None:
            return serialise.open_job(job, pictures, None, 0, 0)
        with self._changed:
            started, done = live.started, sum(live.steps.values())
            drawings = list(live.drawings.values())
            waits = bool(live.waiting) and not drawings and started is None
            ahead = self._queue.ahead(live, time.time()) if waits else 0
        if started is not None:
            position = 0
        elif drawings:
            position = min(drawing.position() for drawing in drawings)
        else:
            position = ahead + (self._behind() if behind is None else behind)
        return serialise.open_job(job, pictures, started, done, position)

    # --- the feeder -------------------------------------------------------------------------

    def _feed(self) -> None:
        while True:
            with self._changed:
                found = None if self._closing else self._queue.take(self._most(), time.time())
                if self._closing:
                    return
                if found is None:
                    waits = any(live.waiting for live in self._queue.jobs.values())
                    self._changed.wait(TICK if waits else TIDY)
            if found is not None:
                self._give(*found)
            if time.monotonic() - self._tidied > TIDY:
                self._tidy()

    def _most(self) -> int:
        """Pictures that the service may have at once: enough to fill the batch, and room left."""
        limits, fills = self.service.limits, 2 * self.service.max_batch
        return max(1, min(fills, limits.queue // 2, limits.client_queue // 2))

    def _give(self, live: Live, place: int) -> None:
        """Gives the service one picture of a job."""
        left = live.deadline - time.time()
        settled: Future[Image.Image] = Future()
        try:
            if left <= 0:
                raise Late("the picture was not done by its deadline")
            order = self._order(live, place, left)
            drawing = self.service.submit(order, partial(self._note, live, place))
        except Busy as busy:
            with self._changed:
                mine = busy.reason == "client_queue_full"
                self._queue.pause(live.job.client if mine else "", min(busy.retry_after, TICK))
                self._queue.back(live, place)
        except Exception as error:
            settled.set_exception(error)
            self._settle(live, place, None, settled)
        else:
            self._watch(live, place, drawing)

    def _watch(self, live: Live, place: int, drawing: Drawing) -> None:
        with self._changed:
            self._queue.gave(live, place, drawing)
            over = live.over
        if over:
            drawing.cancel()
        settings, (future,) = drawing.requests[0].settings, drawing.futures()
        future.add_done_callback(partial(self._settle_later, live, place, settings))

    def _order(self, live: Live, place: int, left: float) -> Order:
        values = {**live.job.request, **self.table.uploads(live.job.id)}
        order = Order.from_dict({**values, "client": live.job.client})
        assert order.seed is not None
        deadline = None if order.deadline is None else left
        return replace(order, number=1, seed=order.seed + place, deadline=deadline)

    def _tidy(self) -> None:
        self._tidied = time.monotonic()
        try:
            self.gallery.tidy()
            self.table.tidy()
        except Failure as error:
            log.error("%s", error)

    # --- what becomes of a picture ----------------------------------------------------------

    def _note(self, live: Live, place: int, event: Event) -> None:
        """On the engine's thread: what happens is noted and told, no more."""
        if event.kind not in ("started", "step"):
            return  # its end comes by its future
        with self._changed:
            live.steps[place] = event.done
            if live.started is None:
                live.started = time.time()
                live.tell("status")
            if event.kind == "started":  # all that wait have moved up
                for each in self._queue.jobs.values():
                    each.tell("progress")
            live.tell("progress")
            now = time.monotonic()
            due = now - live.previewed.get(place, 0.0) >= BETWEEN_PREVIEWS
            if not (event.preview and live.listeners and due):
                return
            live.previewed[place] = now
        image = event.preview()
        with self._changed:
            live.tell("preview", place, image)

    def _settle_later(
        self, live: Live, place: int, settings: Settings, future: Future[Image.Image]
    ) -> None:
        """On the engine's thread. What ends after `close` is drawn again after the next start."""
        with contextlib.suppress(RuntimeError):
            self._writers.submit(self._settle, live, place, settings, future)

    def _settle(
        self, live: Live, place: int, settings: Settings | None, future: Future[Image.Image]
    ) -> None:
        """A picture has come to its end: it is recorded, or waits again where it has had none."""
        id, again = live.job.id, False
        try:
            if future.cancelled():
                again = not live.over
            elif error := future.exception():
                self.table.failed(id, place, *_words(error), live.started)
            else:
                assert settings is not None and live.started is not None
                also = partial(self._drawn, live, place)
                self.gallery.add(future.result(), settings, live.job.client, also)
        except Ended:
            pass  # it was cancelled meanwhile
        except Exception as error:
            again = not live.over
            log.error("a picture of job %s is drawn again: %s", id, error)
            with self._changed:
                self._queue.pause("", DISK)
        with self._changed:
            if again:
                self._queue.back(live, place)
                live.steps.pop(place, None)
            else:
                self._queue.left(live, place)
                live.steps[place] = live.job.steps
                live.tell("picture", place)
            self._changed.notify_all()
        job = None if again else self.table.get(id)
        if job is not None and job.status != "open":
            self._over(id)

    def _drawn(self, live: Live, place: int, db: Any, picture: str) -> None:
        assert live.started is not None
        self.table.drawn(db, live.job.id, place, picture, live.started)

    def _over(self, id: str) -> None:
        """A job has ended: what the service still has of it is cancelled."""
        with self._changed:
            live = self._queue.jobs.pop(id, None)
            if live is None:
                return
            live.over, live.waiting = True, []
            drawings = list(live.drawings.values())
            live.tell("end")
        for drawing in drawings:
            drawing.cancel()


def _words(error: BaseException) -> tuple[str, str]:
    """A message and a code for what went wrong; what nobody foresaw goes to the log."""
    match error:
        case Late():
            return str(error), "deadline"
        case UserError():
            return " ".join(str(error).split()), "invalid_value"
        case Failure():
            return " ".join(str(error).split()), "failed"
    if ran_out(error):
        return "out of memory: ask for a smaller picture, or later", "memory"
    log.error("a picture failed", exc_info=error)
    return "the server failed; its log says why", "failed"
