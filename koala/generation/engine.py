"""The step engine: requests join and leave a batch between two steps of the denoising.

A U-Net takes a timestep for every row, so that a request need not wait until others are done: it
steps beside them from the next step on. What they share is a forward pass, nothing else. Each has
its own noise, sampler and guidance; a request that fails or is cancelled leaves the others alone.

One thread works: either the caller's, which takes `turn` after `turn` until nothing is left, or
one that `start` sets up, while other threads `submit`, wait for their tickets and cancel them.
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

import torch
from PIL import Image

from koala.errors import Failure
from koala.generation.denoise import Predict, Row, evaluate
from koala.generation.requests import Loras, Request

PIXELS_AT_ONCE = 512 * 512  # what a batch holds where no number of rows is named
STEPS_AHEAD = 2  # that a GPU is given before the first of them is done


class Model(Protocol):
    """What the engine needs of a pipeline."""

    @property
    def predict(self) -> Predict:
        """One evaluation of the U-Net."""

    def wear(self, lora: Loras) -> None:
        """Puts on the LoRAs of one request's own, in the place of those worn until now."""

    def begin(self, request: Request) -> Row:
        """The row before its first step."""

    def finish(self, rows: Sequence[Row]) -> list[Image.Image]:
        """The pictures of rows of one shape that have taken their last step."""

    def preview(self, row: Row) -> Image.Image:
        """A rough picture of a row on its way, a pixel for each place of the latent."""


@dataclass(frozen=True)
class Progress:
    """Where a request stands after a step. Only to be used while the callback runs."""

    done: int  # steps
    steps: int
    preview: Callable[[], Image.Image]  # RGB, 1/8 of the size; computed when it is called


@dataclass(frozen=True)
class Pass:
    """What one step of one group took."""

    pictures: int
    pixels: int  # of all of them; those that are guided count twice, as they are evaluated
    seconds: float


class Late(Failure):
    """A request was not done by its deadline."""


class Ticket(Future[Image.Image]):
    """A request's future picture.

    `result` waits for it and raises what went wrong, `cancel` takes effect before the next step
    (False once the picture is being decoded), and asyncio can await it (`asyncio.wrap_future`).
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
        self.row: Row | None = None  # the engine's: None while the request waits


class Engine:
    """Draws requests, as many at once as its batch holds.

    max_batch: so many rows at most are on their way; by default as many as hold 512 x 512 pixels,
    and always one. max_pixels: they hold so many pixels at most. strict: every row is evaluated and
    decoded by itself, so that its picture is bit for bit what it is alone; otherwise it is so
    within rounding, since a kernel may add up in another order in a batch of another size. order:
    the key by which waiting requests are taken in, lowest first; by default they come in the order
    of submission. on_pass: told on the worker's thread what each pass took.
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
        self._active: list[Ticket] = []  # the worker's own; the group that waited longest is first
        self._closed = False
        self._thread: threading.Thread | None = None
        self._ahead: deque[torch.cuda.Event] = deque()  # the ends of steps that a GPU was given

    # --- from any thread --------------------------------------------------------------------

    def submit(
        self,
        request: Request,
        on_step: Callable[[Progress], None] | None = None,
        on_start: Callable[[], None] | None = None,
        deadline: float | None = None,
        tag: Any = None,
    ) -> Ticket:
        """Takes a request in.

        On the worker's thread `on_start` is called when it is let in and `on_step` after each of
        its steps; an exception in either is the request's failure. With a `deadline` (by
        time.monotonic()) it fails with `Late` before the first step after it. `tag` is the
        ticket's, for `order` to look at. Failure if the engine is closed.
        """
        with self._changed:
            if self._closed:
                raise Failure("the engine is closed: it takes no more requests")
            ticket = Ticket(request, next(self._numbers), on_step, on_start, deadline, tag)
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def waiting(self) -> list[Ticket]:
        """The requests that are not let in yet, in the order of submission."""
        with self._changed:
            return [ticket for ticket in self._waiting if not ticket.done()]

    @property
    def working(self) -> bool:
        """Whether there is a thread that works."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> "Engine":
        """Sets up the thread that works until `close`."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._work, name="koala-engine", daemon=True)
        self._thread.start()
        return self

    def close(self, finish: bool = False) -> None:
        """Takes no more requests, ends all that are there and the thread; then returns.

        `finish` draws them to their end, otherwise they are cancelled.
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
        while self.turn():  # what is left where no thread worked
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

    @torch.inference_mode()
    def turn(self) -> bool:
        """One step of one group of requests, after letting in those that fit.

        Returns whether there is more to do. Only ever called by one thread.
        """
        self._active = _without_cancelled(self._active)
        self._fail_late()
        self._let_in()
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
        except BaseException as error:  # a fault of ours: nobody must wait for ever
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
            fail(ticket, Late("the picture was not done by its deadline"))

    def _let_in(self) -> None:
        """Waiting requests, in their order, as long as there is room."""
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
                self.model.wear(ticket.request.lora)
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
        """Tickets that can share a pass; they go to the end, so that every kind gets its turn."""
        first = self._active[0]
        group = [ticket for ticket in self._active if _kind(ticket) == _kind(first)]
        if self.strict:
            group = [first]
        self._active = [ticket for ticket in self._active if ticket not in group] + group
        return group

    def _step(self, group: list[Ticket]) -> None:
        """One step of each; if the pass over all fails, each alone shows whose fault it is."""
        rows = [ticket.row for ticket in group if ticket.row is not None]
        start = time.perf_counter()
        pixels = sum(
            ticket.request.pixels * (2 if row.guided else 1)
            for ticket, row in zip(group, rows, strict=True)
        )
        try:
            self.model.wear(group[0].request.lora)
            epsilons = evaluate(self.model.predict, rows)
        except Exception as error:
            self._one_by_one(self._step, group, error)
            return
        self._keep_pace(epsilons[0].device)
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

    def _keep_pace(self, device: torch.device) -> None:
        """Waits until a GPU has but `STEPS_AHEAD` steps to do.

        It never idles, and yet who joins, cancels or reports progress is not steps behind it.
        """
        if device.type == "cuda":
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(device))
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


def _kind(ticket: Ticket) -> tuple[tuple[int, ...], Loras]:
    """Tickets that agree in it can share a pass: of one shape, and by the same weights."""
    assert ticket.row is not None
    return ticket.row.shape, ticket.request.lora


# A future is told once that its cancelling has been seen: where its ticket leaves the lists.


def _without_cancelled(tickets: list[Ticket]) -> list[Ticket]:
    for ticket in tickets:
        if ticket.cancelled():
            ticket.row = None
            ticket.set_running_or_notify_cancel()
    return [ticket for ticket in tickets if not ticket.cancelled()]


def fail(ticket: Ticket, error: BaseException) -> None:
    if ticket.running() or ticket.set_running_or_notify_cancel():
        ticket.set_exception(error)
