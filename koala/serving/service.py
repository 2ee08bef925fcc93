"""One pipeline, one engine, many clients: what is taken in, in which order, and until when.

The engine's thread owns the device. Everybody else asks here, from any thread; nothing waits but
`Drawing.result` and `drain`. Checking an order decodes its pictures: not to be done on an event
loop.
"""

import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from koala.errors import UserError
from koala.generation import Engine, Late, Pass, Pipeline, Progress, Request, Ticket
from koala.generation.pipeline import Result
from koala.serving.admission import Admission, Busy
from koala.serving.fairness import Fairness, Place
from koala.serving.image_request import Order
from koala.serving.metrics import Metrics
from koala.serving.settings import Limits
from koala.serving.uploads import open_upload
from koala.serving.warmup import warm_up

_LORA_NAME = re.compile(r"\w[\w .+-]{0,127}")
LARGEST = 4  # times the native size: what a picture may have where the limits do not say
LONGEST_DEADLINE = 7 * 24 * 3600.0  # seconds


@dataclass(frozen=True)
class Event:
    """What happens to one picture of an order.

    Told on the engine's thread, "cancelled" on that of whoever cancels: a handler only puts it
    somewhere.
    """

    kind: str  # "started", "step", "picture", "failed", "cancelled"
    index: int  # which picture of the order, from 0
    done: int  # steps
    steps: int
    preview: Callable[[], Image.Image] | None = None  # at a "step": only to be called there


Listener = Callable[[Event], None]


class Drawing:
    """The pictures of one order, under way."""

    def __init__(self, requests: list[Request], waiting: Callable[[], list[Ticket]]) -> None:
        self.requests = requests
        self._tickets: list[Ticket] = []
        self._waiting = waiting

    def position(self) -> int:
        """How many pictures are ahead of its first waiting one; 0 where none waits."""
        own = set(self._tickets)
        there = self._waiting()
        return next((i for i, ticket in enumerate(there) if ticket in own), 0)

    def cancel(self) -> None:
        """Ends all that is not done; their places are free at the next step."""
        for ticket in self._tickets:
            ticket.cancel()

    @property
    def done(self) -> bool:
        """Whether every picture is drawn, has failed or was cancelled."""
        return all(ticket.done() for ticket in self._tickets)

    def futures(self) -> list[Future[Image.Image]]:
        """One a picture; `asyncio.wrap_future` makes them awaitable."""
        return list(self._tickets)

    def result(self) -> Result:
        """Waits for all pictures. Raises what the first that failed raised."""
        images = [ticket.result() for ticket in self._tickets]
        return Result(images, [request.settings for request in self.requests])


class Service:
    """What the interfaces submit to.

    loras: the folder whose LoRAs orders may name. sizes: of the batches that are compiled or
    captured, all of which are gone through before the first request.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        limits: Limits,
        loras: Path | None = None,
        metrics: Metrics | None = None,
        sizes: Sequence[int] = (),
    ) -> None:
        self.pipeline, self.limits, self.lora_folder = pipeline, limits, loras
        self.metrics = metrics or Metrics()
        self.ready = False
        self.max_batch = limits.max_batch or 1  # pictures of the native size
        self._admission = Admission(limits)
        self._fairness = Fairness(limits.patience)
        self._sizes = sizes
        self._draining = False
        self._idle = threading.Condition()  # told when a picture leaves
        self._drawings: set[Drawing] = set()
        self._engine: Engine | None = None
        self.metrics.watch(self._waiting_pictures, self._active_pictures)

    # --- coming and going -------------------------------------------------------------------

    def start(self) -> None:
        """Warms up, which takes as long as it takes, then is ready."""
        self.max_batch = warm_up(self.pipeline, self.limits.max_batch, self._sizes)
        with self._idle:
            if self._draining:
                return
            self._engine = Engine(
                self.pipeline,
                max_batch=self.max_batch,
                max_pixels=self.max_batch * self.native * self.native,
                order=self._fairness.rank,
                on_pass=self._note_pass,
            ).start()
        self.ready = True

    def drain(self, seconds: float) -> bool:
        """Takes no more, waits so long for what is there, then cancels it; whether all was done."""
        self._draining, self.ready = True, False
        with self._idle:
            finished = self._idle.wait_for(lambda: not self._admission.pictures, seconds)
        if not finished:
            self.cancel()
        return finished

    def cancel(self) -> None:
        """Cancels everything that waits or is under way."""
        for drawing in list(self._drawings):
            drawing.cancel()

    def close(self) -> None:
        """Cancels what is left and ends the engine's thread."""
        with self._idle:
            self._draining, self.ready = True, False
        if self._engine is not None:
            self._engine.close()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread is there, as soon as there was one."""
        return self._engine is None or self._draining or self._engine.working

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def native(self) -> int:
        """Pixels a side of the model's own size."""
        return self.pipeline.unet.config.sample_size * self.pipeline.factor

    @property
    def most_pixels(self) -> int:
        """Of one picture."""
        return self.limits.size or LARGEST * self.native * self.native

    # --- orders -----------------------------------------------------------------------------

    def loras(self) -> list[str]:
        """The names that orders may use."""
        if self.lora_folder is None:
            return []
        files = self.lora_folder.glob("*.safetensors")
        return sorted(file.stem for file in files if _LORA_NAME.fullmatch(file.stem))

    def requests(self, order: Order) -> list[Request]:
        """The order's pictures, checked and complete. UserError for a value that is not allowed."""
        limits = self.limits
        for name, value, most in (
            ("n", order.number, limits.pictures), ("steps", order.steps, limits.steps),
        ):  # fmt: skip
            if isinstance(value, int) and value > most:
                raise UserError(f"{name} is {value}: this server allows at most {most}")
        _check_deadline(order.deadline)
        image, mask = (
            None if data is None else open_upload(data, limits.upload_pixels, what)
            for data, what in ((order.image, "image"), (order.mask, "mask"))
        )
        size = order.size
        if image is not None and size is None:
            size = self._size_for(image)
        names = [name for name, _ in order.loras]
        if len(set(names)) < len(names):
            raise UserError(f"lora: each may be named once, not {', '.join(names)}")
        requests = self.pipeline.requests(
            order.prompt, negative_prompt=order.negative_prompt, steps=order.steps,
            guidance=order.guidance, guidance_until=order.guidance_until,
            scheduler=order.scheduler, size=size, number=order.number, seed=order.seed,
            image=image, strength=order.strength, mask=mask,
            lora={self._lora_file(name): scale for name, scale in order.loras},
        )  # fmt: skip
        if requests[0].pixels > self.most_pixels:
            settings = requests[0].settings
            raise UserError(
                f"size {settings.width}x{settings.height}: this server draws at most "
                f"{self.most_pixels:,} pixels a picture, such as {self.native}x{self.native}"
            )
        return requests

    def submit(self, order: Order, on_event: Listener | None = None) -> Drawing:
        """Takes an order in. UserError for what is not allowed, Busy for what has no room now."""
        self._check_open()
        if isinstance(order.number, int):
            self._admission.check(order.client, min(order.number, self.limits.pictures))
        requests = self.requests(order)
        work = [self._work(request) for request in requests]
        self._check_open()
        self._admission.admit(order.client, requests, sum(work))
        assert self._engine is not None
        drawing = Drawing(requests, self._queue)
        self._drawings.add(drawing)
        listener = on_event or (lambda event: None)
        for i, request in enumerate(requests):
            place = Place(order.client, order.priority, work[i], time.monotonic())
            drawing._tickets.append(self._enter(request, place, i, order.deadline, listener))
        for ticket in drawing.futures():
            ticket.add_done_callback(lambda _: self._forget(drawing))
        return drawing

    def _forget(self, drawing: Drawing) -> None:
        if drawing.done:
            self._drawings.discard(drawing)

    def _check_open(self) -> None:
        if self._draining:
            raise Busy("draining", self.limits.drain)
        if not (self.ready and self.alive):
            raise Busy("starting", 5.0)

    def _enter(
        self, request: Request, place: Place, index: int, deadline: float | None, told: Listener
    ) -> Ticket:
        """Gives one picture, which is counted in already, to the engine."""
        assert self._engine is not None
        steps = self.pipeline.steps([request])
        watch = _Watch(index, steps, told, self.metrics)
        left = [place.work]

        def on_start() -> None:
            self._fairness.start(place)
            watch.started()

        def on_step(progress: Progress) -> None:
            left[0] -= place.work / steps
            self._admission.progress(place.work / steps)
            watch.stepped(progress)

        def on_done(ticket: Ticket) -> None:
            self._fairness.leave(place)
            self._admission.release(place.client, request, left[0])
            with self._idle:
                self._idle.notify_all()
            watch.ended(ticket)

        self._fairness.arrive(place)
        late = None if deadline is None else place.arrived + deadline
        ticket = self._engine.submit(request, on_step, on_start, late, tag=place)
        ticket.add_done_callback(on_done)  # type: ignore[arg-type]
        return ticket

    # --- small things -----------------------------------------------------------------------

    def _lora_file(self, name: str) -> Path:
        if self.lora_folder is None:
            raise UserError(f"lora {name!r}: this server has no folder of LoRAs; leave it out")
        if name not in self.loras():
            raise UserError(
                f"lora {name!r} is not there: allowed are {', '.join(self.loras()) or 'none'}"
            )
        return self.lora_folder / f"{name}.safetensors"

    def _size_for(self, image: Image.Image) -> str:
        """The picture's size, made to fit the model's grid and this server's limit."""
        grid = self.pipeline.factor
        shrink = min(1.0, math.sqrt(self.most_pixels / (image.width * image.height)))
        sides = (max(2 * grid, int(side * shrink) // grid * grid) for side in image.size)
        return "x".join(map(str, sides))

    def _work(self, request: Request) -> float:
        """Pixels that are evaluated for a picture, over all its steps."""
        steps, asked = self.pipeline.steps([request]), request.settings
        guided = math.ceil(asked.guidance_until * steps) if asked.guidance > 1 else 0
        return float(request.pixels * (steps + guided))

    def _note_pass(self, done: Pass) -> None:
        self._admission.pace.note(done)
        self.metrics.passed(done, self.max_batch)

    def _queue(self) -> list[Ticket]:
        """The pictures that wait, in the order in which they will be taken as things are."""
        return [] if self._engine is None else self._fairness.order(self._engine.waiting())

    def _waiting_pictures(self) -> int:
        return 0 if self._engine is None else len(self._engine.waiting())

    def _active_pictures(self) -> int:
        return max(0, self._admission.pictures - self._waiting_pictures())


class _Watch:
    """One picture's way, told to its listener and to the metrics."""

    def __init__(self, index: int, steps: int, told: Listener, metrics: Metrics) -> None:
        self.index, self.steps, self.told, self.metrics = index, steps, told, metrics
        self.arrived, self.done, self.previewed = time.monotonic(), 0, False

    def started(self) -> None:
        self.metrics.started(time.monotonic() - self.arrived)
        self._tell("started")

    def stepped(self, progress: Progress) -> None:
        self.done = progress.done
        self._tell("step", partial(self._preview, progress))

    def ended(self, ticket: Ticket) -> None:
        if ticket.cancelled():
            self.metrics.cancelled()
            self._tell("cancelled")
        elif error := ticket.exception():
            self.metrics.failed("deadline" if isinstance(error, Late) else "failed")
            self._tell("failed")
        else:
            self.metrics.drawn(time.monotonic() - self.arrived)
            self._tell("picture")

    def _preview(self, progress: Progress) -> Image.Image:
        image = progress.preview()
        if not self.previewed:
            self.previewed = True
            self.metrics.previewed(time.monotonic() - self.arrived)
        return image

    def _tell(self, kind: str, preview: Callable[[], Image.Image] | None = None) -> None:
        self.told(Event(kind, self.index, self.done, self.steps, preview))


def _check_deadline(deadline: float | None) -> None:
    if deadline is None:
        return
    numeric = isinstance(deadline, (int, float)) and not isinstance(deadline, bool)
    if not numeric or not 0 < deadline <= LONGEST_DEADLINE:
        raise UserError(
            f"deadline is {deadline!r}: allowed are seconds above 0, up to {LONGEST_DEADLINE:g}"
        )
