"""The step engine: continuous batching of requests, which join and leave between two steps.

A U-Net takes a timestep per row, so a request need not wait until others are done: it joins them
at the next step. Requests share forward passes and nothing else. Each has its own noise, sampler
and guidance, and one that fails or is cancelled does not affect the others.

One thread works: the caller's, which calls `turn` until nothing is left, or one that `start`
creates, while other threads `submit` requests, wait for their tickets and cancel them.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol

from PIL import Image

from koala.errors import Failure
from koala.generation.denoise import BatchRow, Predict, evaluate
from koala.generation.requests import Loras, Request
from koala.utils.arrays import Array, no_gradients

PIXELS_AT_ONCE = 512 * 512  # of a batch whose number of rows is not given
STEPS_AHEAD = 2  # steps that are queued on a GPU


class Model(Protocol):
    """What the engine needs of a pipeline."""

    @property
    def predict(self) -> Predict:
        """One evaluation of the U-Net."""

    def use_loras(self, lora: Loras) -> None:
        """Applies the LoRAs of one request, in place of those applied before."""

    def begin(self, request: Request) -> BatchRow:
        """The row before its first step."""

    def finish(self, rows: Sequence[BatchRow]) -> list[Image.Image]:
        """The images of rows of one shape that have taken their last step."""

    def preview(self, row: BatchRow) -> Image.Image:
        """A rough image of an unfinished row, one pixel per latent position."""


@dataclass(frozen=True)
class Progress:
    """A request's progress after a step. Valid only while the callback runs."""

    done: int  # steps
    steps: int
    preview: Callable[[], Image.Image]  # RGB, 1/8 of the size; computed when called


@dataclass(frozen=True)
class Pass:
    """The cost of one step of one group."""

    images: int
    pixels: int  # of all of them; guided ones count twice
    seconds: float


class Late(Failure):
    """A request missed its deadline."""


class Ticket(Future[Image.Image]):
    """The future of a request's image.

    `result` waits for it and raises its failure, `cancel` takes effect before the next step
    (False once the image is being decoded), and asyncio can await it (`asyncio.wrap_future`).
    """

    def __init__(
        self,
        request: Request,
        number: int,
        on_step: Callable[[Progress], None] | None,
        on_start: Callable[[], None] | None,
        deadline: float | None,
        tag: Any,
    ) -> None:
        super().__init__()
        self.request = request
        self.number = number  # in the order of submission
        self.on_step, self.on_start = on_step, on_start
        self.deadline = deadline  # by time.monotonic()
        self.tag = tag
        self.row: BatchRow | None = None  # set by the engine: None while the request waits


class Engine:
    """Draws requests, as many at once as its batch holds.

    max_batch: the most rows at once; by default as many as hold 512 x 512 pixels, at least one.
    max_pixels: the most pixels of all rows. strict: evaluates and decodes every row by itself, so
    its image is bit for bit what it is alone; otherwise it is equal up to rounding, since kernels
    may sum in another order in a batch of another size. order: a key; the waiting request with the
    lowest goes first, by default in the order of submission. on_pass: called on the worker's
    thread with the cost of each pass.
    """

    def __init__(
        self,
        model: Model,
        max_batch: int | None = None,
        strict: bool = False,
        order: Callable[[Ticket], Any] | None = None,
        max_pixels: int | None = None,
        on_pass: Callable[[Pass], None] | None = None,
    ) -> None:
        assert max_batch is None or max_batch >= 1
        self.model, self.max_batch, self.strict = model, max_batch, strict
        if max_batch is None and max_pixels is None:
            max_pixels = PIXELS_AT_ONCE
        self.max_pixels, self.on_pass = max_pixels, on_pass
        self._order = order or (lambda ticket: ticket.number)
        self._numbers = itertools.count()
        self._changed = threading.Condition()  # guards _waiting and _closed
        self._waiting: list[Ticket] = []
        self._active: list[Ticket] = []  # the worker's; the group that waited longest is first
        self._closed = False
        self._thread: threading.Thread | None = None
        self._ahead: deque[Any] = deque()  # torch.cuda.Event: ends of the steps queued on a GPU

    # --- from any thread --------------------------------------------------------------------

    def submit(
        self,
        request: Request,
        on_step: Callable[[Progress], None] | None = None,
        on_start: Callable[[], None] | None = None,
        deadline: float | None = None,
        tag: Any = None,
    ) -> Ticket:
        """Adds a request to those that wait.

        On the worker's thread `on_start` is called when its first step is next and `on_step` after
        each of its steps; an exception in either fails the request. `deadline` (seconds, by
        time.monotonic()): it fails with `Late` before the first step after that. `tag` is kept on
        the ticket, for `order`. Failure if the engine is closed.
        """
        with self._changed:
            if self._closed:
                raise Failure("the engine is closed: it takes no more requests")
            ticket = Ticket(request, next(self._numbers), on_step, on_start, deadline, tag)
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def waiting(self) -> list[Ticket]:
        """The requests that have not started, in the order of submission."""
        with self._changed:
            return [ticket for ticket in self._waiting if not ticket.done()]

    @property
    def working(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> "Engine":
        """Starts the thread that works until `close`."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._work, name="koala-engine", daemon=True)
        self._thread.start()
        return self

    def close(self, finish: bool = False) -> None:
        """Accepts no more requests, ends those that are left and the thread; then returns.

        finish: draw those that are left, instead of cancelling them.
        """
        assert threading.current_thread() is not self._thread, "a callback cannot close the engine"
        with self._changed:
            self._closed = True
            there = [*self._waiting, *self._active]
            self._changed.notify()
        if not finish:
            for ticket in there:
                ticket.cancel()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        while self.turn():  # the rest, if no thread was started
            pass

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(finish=error is None)

    # --- the worker -------------------------------------------------------------------------

    def turn(self) -> bool:
        """One step of one group of requests, after admitting those that fit.

        Returns whether there is more to do. To be called by one thread only.
        """
        with no_gradients():
            return self._turn()

    def _turn(self) -> bool:
        self._active = _without_cancelled(self._active)
        self._fail_late()
        self._admit()
        if self._active:
            self._step(self._next_group())
        with self._changed:
            return bool(self._active or self._waiting)

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._waiting or self._active or self._closed):
                        self._changed.wait()
                if not self.turn() and self._closed:
                    return
        except BaseException as error:  # a bug of ours: nobody must wait for ever
            with self._changed:
                self._closed = True
                left = [*self._waiting, *self._active]
                self._waiting, self._active = [], []
            for ticket in left:
                fail(ticket, error)
            raise

    def _fail_late(self) -> None:
        now = time.monotonic()
        with self._changed:
            there = [*self._waiting, *self._active]
            late = [t for t in there if t.deadline is not None and t.deadline <= now]
            self._waiting = [ticket for ticket in self._waiting if ticket not in late]
        self._active = [ticket for ticket in self._active if ticket not in late]
        for ticket in late:
            ticket.row = None
            fail(ticket, Late("the image missed its deadline"))

    def _admit(self) -> None:
        """Starts waiting requests, in their order, as long as there is room."""
        while True:
            with self._changed:
                self._waiting = _without_cancelled(self._waiting)
                if not self._waiting:
                    return
                ticket = min(self._waiting, key=self._order)
                if not self._fits(ticket):
                    return
                self._waiting.remove(ticket)
                self._active.append(ticket)
            try:
                self.model.use_loras(ticket.request.lora)
                ticket.row = self.model.begin(ticket.request)
                if ticket.on_start is not None:
                    ticket.on_start()
            except Exception as error:
                self._leave(ticket, error)

    def _fits(self, ticket: Ticket) -> bool:
        if not self._active:
            return True
        if self.max_batch is not None and len(self._active) >= self.max_batch:
            return False
        pixels = sum(each.request.pixels for each in (*self._active, ticket))
        return self.max_pixels is None or pixels <= self.max_pixels

    def _next_group(self) -> list[Ticket]:
        """Tickets that can share a pass; they go to the end, so that every group gets its turn."""
        first = self._active[0]
        group = [ticket for ticket in self._active if _kind(ticket) == _kind(first)]
        if self.strict:
            group = [first]
        self._active = [ticket for ticket in self._active if ticket not in group] + group
        return group

    def _step(self, group: list[Ticket]) -> None:
        """One step of each; if the pass fails, each is run alone to find the one that fails."""
        rows = [ticket.row for ticket in group if ticket.row is not None]
        start = time.perf_counter()
        pixels = sum(
            ticket.request.pixels * (2 if row.guided else 1)
            for ticket, row in zip(group, rows, strict=True)
        )
        try:
            self.model.use_loras(group[0].request.lora)
            epsilons = evaluate(self.model.predict, rows)
        except Exception as error:
            self._one_by_one(self._step, group, error)
            return
        self._keep_pace(epsilons[0])
        if self.on_pass is not None:
            self.on_pass(Pass(len(group), pixels, time.perf_counter() - start))
        for ticket, row, epsilon in zip(group, rows, epsilons, strict=True):
            try:
                row.advance(epsilon)
                if ticket.on_step is not None:
                    preview = partial(self.model.preview, row)
                    ticket.on_step(Progress(row.done, row.steps, preview))
            except Exception as error:
                self._leave(ticket, error)
        ready = [ticket for ticket in group if ticket.row is not None and ticket.row.finished]
        for ticket in ready:
            if not ticket.set_running_or_notify_cancel():
                self._drop(ticket)
        if ready := [ticket for ticket in ready if ticket.row is not None]:
            self._finish(ready)

    def _keep_pace(self, epsilon: Array) -> None:
        """Waits until a GPU has at most `STEPS_AHEAD` steps queued.

        So it never idles, and joining, cancelling and progress are not many steps behind it.
        """
        if getattr(epsilon, "is_cuda", False):
            import torch

            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(epsilon.device))
            self._ahead.append(event)
            if len(self._ahead) > STEPS_AHEAD:
                self._ahead.popleft().synchronize()

    def _finish(self, group: list[Ticket]) -> None:
        rows = [ticket.row for ticket in group if ticket.row is not None]
        try:
            images = self.model.finish(rows)
        except Exception as error:
            self._one_by_one(self._finish, group, error)
            return
        for ticket, image in zip(group, images, strict=True):
            self._drop(ticket)
            ticket.set_result(image)

    def _one_by_one(
        self, work: Callable[[list[Ticket]], None], group: list[Ticket], error: Exception
    ) -> None:
        if len(group) == 1:
            self._leave(group[0], error)
        else:
            for ticket in group:
                work([ticket])

    def _leave(self, ticket: Ticket, error: Exception) -> None:
        self._drop(ticket)
        fail(ticket, error)

    def _drop(self, ticket: Ticket) -> None:
        self._active.remove(ticket)
        ticket.row = None


def _kind(ticket: Ticket) -> tuple[object, ...]:
    """Tickets of equal kind can share a pass: one shape, the same weights."""
    assert ticket.row is not None
    return ticket.row.shape, ticket.request.lora, ticket.row.controlled_by


# A future must be notified once that its cancellation was seen: when its ticket leaves the lists.


def _without_cancelled(tickets: list[Ticket]) -> list[Ticket]:
    for ticket in tickets:
        if ticket.cancelled():
            ticket.row = None
            ticket.set_running_or_notify_cancel()
    return [ticket for ticket in tickets if not ticket.cancelled()]


def fail(ticket: Ticket, error: BaseException) -> None:
    if ticket.running() or ticket.set_running_or_notify_cancel():
        ticket.set_exception(error)
