"""One pipeline and one engine, shared by many clients.

The engine's thread owns the device. Any thread may call a `Service`; only `Submission.result` and
`drain` block. Checking a request decodes its images, so do not do it on an event loop.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from koala.errors import UserError
from koala.generation import Engine, Late, Pass, Progress, Request, Ticket
from koala.generation.drawing import Drawing, Result
from koala.generation.validation import SMALLEST, is_far
from koala.generation.validation import size as checked_size
from koala.lora.folder import lora_file, lora_names
from koala.serving.admission import Admission, Busy
from koala.serving.content_filter import ContentFilter
from koala.serving.fair_queue import FairQueue, QueueEntry
from koala.serving.fit import matched, native_size, whole_size
from koala.serving.image_request import ImageRequest
from koala.serving.metrics import Metrics
from koala.serving.settings import Limits
from koala.serving.uploads import open_upload
from koala.serving.warmup import warm_up

LARGEST = 4  # default limit of an image, in multiples of the native size
LONGEST_DEADLINE = 7 * 24 * 3600.0  # seconds


@dataclass(frozen=True)
class Event:
    """Something that happened to one image of a request.

    Callbacks run on the engine's thread ("cancelled": on the canceller's) and must return at once.
    """

    kind: str  # "started", "step", "picture", "failed", "cancelled"
    index: int  # of the image in its request, from 0
    done: int  # steps
    steps: int
    preview: Callable[[], Image.Image] | None = None  # for "step"; call it in the callback only


EventCallback = Callable[[Event], None]


class Submission:
    """The images of one accepted request."""

    def __init__(self, requests: list[Request], waiting: Callable[[], list[Ticket]]) -> None:
        self.requests = requests
        self._tickets: list[Ticket] = []
        self._shown: list[Future[Image.Image]] = []  # the tickets, or what a filter leaves of them
        self._waiting = waiting

    def position(self) -> int:
        """How many images are ahead of its first queued one; 0 if none is queued."""
        own = set(self._tickets)
        return next((i for i, ticket in enumerate(self._waiting()) if ticket in own), 0)

    def cancel(self) -> None:
        """Cancels all unfinished images; the engine drops them at its next step."""
        for ticket in self._tickets:
            ticket.cancel()

    @property
    def done(self) -> bool:
        """Whether every image is finished, failed or cancelled."""
        return all(ticket.done() for ticket in self._tickets)

    def futures(self) -> list[Future[Image.Image]]:
        """One future per image; `asyncio.wrap_future` makes them awaitable."""
        return list(self._shown)

    def result(self) -> Result:
        """Waits for all images. Raises the error of the first that failed."""
        images = [shown.result() for shown in self._shown]
        return Result(images, [request.settings for request in self.requests])


class Service:
    """Accepts requests from every API and runs them on one engine.

    loras, embeddings: folders of what requests may name. sizes: batch sizes to compile or capture
    during warm-up. fit: draws sizes that the model was not made for at its native area, and has
    them resized (`koala.serving.fit`), unless a request says otherwise. content_filter: looks at
    every image before it is given; there are no previews then.
    """

    def __init__(
        self,
        pipeline: Drawing,
        limits: Limits,
        loras: Path | None = None,
        metrics: Metrics | None = None,
        sizes: Sequence[int] = (),
        embeddings: Path | None = None,
        fit: bool = False,
        content_filter: ContentFilter | None = None,
    ) -> None:
        self.pipeline, self.limits, self.lora_folder = pipeline, limits, loras
        self.embedding_folder = embeddings
        self.metrics = metrics or Metrics()
        self.ready = False
        self.max_batch = limits.max_batch or 1  # images of the native size
        self._admission = Admission(limits)
        self._fair_queue = FairQueue(limits.patience)
        self._sizes, self.fit, self.content_filter = sizes, fit, content_filter
        self._draining = False
        self._idle = threading.Condition()  # notified when an image leaves
        self._submissions: set[Submission] = set()
        self._engine: Engine | None = None
        self.metrics.watch(self._waiting_images, self._active_images)

    # --- lifecycle --------------------------------------------------------------------------

    def start(self) -> None:
        """Warms up (this can take minutes), then sets `ready`."""
        self.max_batch = warm_up(self.pipeline, self.limits.max_batch, self._sizes)
        with self._idle:
            if self._draining:
                return
            self._engine = Engine(
                self.pipeline,
                max_batch=self.max_batch,
                max_pixels=self.max_batch * self.native * self.native,
                order=self._fair_queue.rank,
                on_pass=self._on_pass,
            ).start()
        self.ready = True

    def drain(self, seconds: float) -> bool:
        """Rejects new requests, waits, then cancels the rest. Returns whether all finished."""
        self._draining, self.ready = True, False
        with self._idle:
            finished = self._idle.wait_for(lambda: not self._admission.images, seconds)
        if not finished:
            self.cancel()
        return finished

    def cancel(self) -> None:
        """Cancels all queued and running images."""
        for submission in list(self._submissions):
            submission.cancel()

    def close(self) -> None:
        """Cancels what is left and stops the engine's thread."""
        with self._idle:
            self._draining, self.ready = True, False
        if self._engine is not None:
            self._engine.close()
        if self.content_filter is not None:
            self.content_filter.close()

    @property
    def alive(self) -> bool:
        """False once the engine's thread has died."""
        return self._engine is None or self._draining or self._engine.working

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def native(self) -> int:
        """The model's native side in pixels."""
        return self.pipeline.known.native

    @property
    def most_pixels(self) -> int:
        """The largest image allowed."""
        return self.limits.size or LARGEST * self.native * self.native

    # --- requests ---------------------------------------------------------------------------

    def loras(self) -> list[str]:
        """The LoRA names that requests may use."""
        return lora_names(self.lora_folder)

    def requests(self, spec: ImageRequest) -> list[Request]:
        """Checks a request and returns one engine request per image. UserError for a bad value."""
        limits = self.limits
        for name, value, most in (
            ("n", spec.number, limits.images), ("steps", spec.steps, limits.steps),
        ):  # fmt: skip
            if isinstance(value, int) and value > most:
                raise UserError(f"{name} is {value}: this server allows at most {most}")
        _check_deadline(spec.deadline)
        image, mask = (
            None if data is None else open_upload(data, limits.upload_pixels, what)
            for data, what in ((spec.image, "image"), (spec.mask, "mask"))
        )
        if image is not None and mask is not None:
            mask = matched(mask, image)
        size = spec.size
        fits = self.fit if spec.fit is None else spec.fit
        enlarged = ""
        if image is not None and size is None:
            far = fits and is_far(image.size, self.native)
            size = self._fitted(image.size) if far else self._size_for(image)
        elif fits and size is not None:
            asked = checked_size(size, 1)
            if is_far(asked, self.native):
                size, enlarged = self._fitted(asked), f"{asked[0]}x{asked[1]}"
            elif image is None and asked != (whole := whole_size(asked, self.pipeline.factor)):
                size, enlarged = f"{whole[0]}x{whole[1]}", f"{asked[0]}x{asked[1]}"
        requests = self.pipeline.requests(
            spec.prompt, negative_prompt=spec.negative_prompt, steps=spec.steps,
            guidance=spec.guidance, guidance_until=spec.guidance_until,
            guidance_rescale=spec.guidance_rescale, scheduler=spec.scheduler, size=size,
            number=spec.number, seed=spec.seed, image=image, strength=spec.strength, mask=mask,
            mask_blur=spec.mask_blur, mask_fill=spec.mask_fill,
            lora=self._lora_files(spec.loras), lora_dir=self.lora_folder,
            embedding_dir=self.embedding_folder,
        )  # fmt: skip
        if requests[0].pixels > self.most_pixels:
            settings = requests[0].settings
            raise UserError(
                f"size {settings.width}x{settings.height}: this server allows at most "
                f"{self.most_pixels:,} pixels per image, such as {self.native}x{self.native}"
            )
        if enlarged:
            requests = [
                replace(request, settings=replace(request.settings, enlarged=enlarged))
                for request in requests
            ]
        return requests

    def submit(self, spec: ImageRequest, on_event: EventCallback | None = None) -> Submission:
        """Queues a request. UserError for a bad value, Busy when a limit is reached."""
        self._check_open()
        if isinstance(spec.number, int):
            self._admission.check(spec.client, min(spec.number, self.limits.images))
        requests = self.requests(spec)
        work = [self._work(request) for request in requests]
        self._check_open()
        self._admission.admit(spec.client, requests, sum(work))
        assert self._engine is not None
        submission = Submission(requests, self._queue)
        self._submissions.add(submission)
        callback = on_event or (lambda event: None)
        for i, request in enumerate(requests):
            entry = QueueEntry(spec.client, spec.priority, work[i], time.monotonic())
            ticket = self._enter(request, entry, i, spec.deadline, callback)
            submission._tickets.append(ticket)
            submission._shown.append(
                ticket if self.content_filter is None else self.content_filter.screened(ticket)
            )
        for shown in submission.futures():
            shown.add_done_callback(lambda _: self._forget(submission))
        return submission

    def _forget(self, submission: Submission) -> None:
        if submission.done:
            self._submissions.discard(submission)

    def _check_open(self) -> None:
        if self._draining:
            raise Busy("draining", self.limits.drain)
        if not (self.ready and self.alive):
            raise Busy("starting", 5.0)

    def _enter(
        self,
        request: Request,
        entry: QueueEntry,
        index: int,
        deadline: float | None,
        on_event: EventCallback,
    ) -> Ticket:
        """Submits one admitted image to the engine."""
        assert self._engine is not None
        steps = self.pipeline.steps([request])
        tracker = _Tracker(index, steps, on_event, self.metrics, self.content_filter is None)
        left = [entry.work]

        def on_start() -> None:
            self._fair_queue.start(entry)
            tracker.started()

        def on_step(progress: Progress) -> None:
            left[0] -= entry.work / steps
            self._admission.progress(entry.work / steps)
            tracker.stepped(progress)

        def on_done(_: object) -> None:
            self._fair_queue.leave(entry)
            self._admission.release(entry.client, request, left[0])
            with self._idle:
                self._idle.notify_all()
            tracker.ended(ticket)

        self._fair_queue.arrive(entry)
        due = None if deadline is None else entry.arrived + deadline
        ticket = self._engine.submit(request, on_step, on_start, due, tag=entry)
        ticket.add_done_callback(on_done)
        return ticket

    # --- helpers ----------------------------------------------------------------------------

    def _lora_files(self, named: Sequence[tuple[str, float]]) -> dict[str | Path, float]:
        """The files of a request's LoRAs and their scales."""
        found: dict[str | Path, float] = {}
        for name, scale in named:
            if self.lora_folder is None:
                raise UserError(f"lora {name!r}: this server has no LoRA folder; leave it out")
            file = lora_file(self.lora_folder, name)
            if file in found:
                raise UserError(f"lora {name!r} is named twice: each may be named once")
            found[file] = scale
        return found

    def _fitted(self, size: tuple[int, int]) -> str:
        return "x".join(map(str, native_size(size, self.native, self.pipeline.factor)))

    def _size_for(self, image: Image.Image) -> str:
        """The image's size, shrunk to this server's limit."""
        shrink = min(1.0, math.sqrt(self.most_pixels / (image.width * image.height)))
        return "x".join(str(max(SMALLEST, int(side * shrink))) for side in image.size)

    def _work(self, request: Request) -> float:
        """Pixels to evaluate for an image over all its steps."""
        steps, settings = self.pipeline.steps([request]), request.settings
        guided = math.ceil(settings.guidance_until * steps) if settings.guidance > 1 else 0
        return float(request.pixels * (steps + guided))

    def _on_pass(self, done: Pass) -> None:
        self._admission.throughput.update(done)
        self.metrics.passed(done, self.max_batch)

    def _queue(self) -> list[Ticket]:
        """The queued images in the order in which they will run."""
        return [] if self._engine is None else self._fair_queue.order(self._engine.waiting())

    def _waiting_images(self) -> int:
        return 0 if self._engine is None else len(self._engine.waiting())

    def _active_images(self) -> int:
        return max(0, self._admission.images - self._waiting_images())


class _Tracker:
    """Reports one image's progress to its callback and the metrics."""

    def __init__(
        self, index: int, steps: int, on_event: EventCallback, metrics: Metrics, previews: bool
    ) -> None:
        self.index, self.steps, self.on_event, self.metrics = index, steps, on_event, metrics
        self.previews = previews
        self.arrived, self.done, self.previewed = time.monotonic(), 0, False

    def started(self) -> None:
        self.metrics.started(time.monotonic() - self.arrived)
        self._notify("started")

    def stepped(self, progress: Progress) -> None:
        self.done = progress.done
        self._notify("step", partial(self._preview, progress) if self.previews else None)

    def ended(self, ticket: Ticket) -> None:
        if ticket.cancelled():
            self.metrics.cancelled()
            self._notify("cancelled")
        elif error := ticket.exception():
            self.metrics.failed("deadline" if isinstance(error, Late) else "failed")
            self._notify("failed")
        else:
            self.metrics.finished(time.monotonic() - self.arrived)
            self._notify("picture")

    def _preview(self, progress: Progress) -> Image.Image:
        image = progress.preview()
        if not self.previewed:
            self.previewed = True
            self.metrics.previewed(time.monotonic() - self.arrived)
        return image

    def _notify(self, kind: str, preview: Callable[[], Image.Image] | None = None) -> None:
        self.on_event(Event(kind, self.index, self.done, self.steps, preview))


def _check_deadline(deadline: float | None) -> None:
    if deadline is None:
        return
    numeric = isinstance(deadline, (int, float)) and not isinstance(deadline, bool)
    if not numeric or not 0 < deadline <= LONGEST_DEADLINE:
        raise UserError(
            f"deadline is {deadline!r}: allowed are seconds above 0 up to {LONGEST_DEADLINE:g}"
        )
