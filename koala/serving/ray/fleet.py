"""The engine's place in a server whose pictures are drawn by replicas elsewhere.

A service submits here as it would to an engine, and the queue stays here, in the service's order:
replicas are given what they can draw at once and little more. A picture whose replica dies is
given to another, and its seed makes it the same picture.
"""

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from PIL import Image

from koala.errors import Failure
from koala.generation import Late, Pass, Progress, Request, Ticket
from koala.generation.engine import fail

DEATHS = 3  # of replicas, after which a picture is taken to be the cause
PAUSE = 0.5  # seconds after a death, and between looks at how much room there is


class Replicas(Protocol):
    """Those who draw, whichever way they are reached."""

    def draw(
        self, request: Request, size: str, seconds: float | None
    ) -> contextlib.AbstractAsyncContextManager[AsyncIterator[Any]]:
        """The news of one picture; leaving the context before the end cancels it."""

    def lost(self, error: BaseException) -> bool:
        """Whether an error says that a replica is gone, and nothing of the picture."""

    def room(self) -> int:
        """How many pictures they can have at once, all of them together. May take its time."""


class Fleet:
    """Takes requests as an `Engine` does; `order` and `on_pass` are as there.

    on_room: told how many pictures the replicas can have, whenever that was looked at.
    """

    def __init__(
        self,
        replicas: Replicas,
        order: Callable[[Ticket], Any],
        on_pass: Callable[[Pass], None] = lambda done: None,
        on_room: Callable[[int], None] = lambda room: None,
    ) -> None:
        self.replicas, self._order = replicas, order
        self._on_pass, self._on_room = on_pass, on_room
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # guards _waiting and _closed
        self._waiting: list[Ticket] = []
        self._closed = False
        self._tasks: dict[Ticket, asyncio.Task[None]] = {}  # the loop's own
        self._room = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._looking: Any = None

    @property
    def working(self) -> bool:
        """Whether there is a thread that works."""
        return self._thread.is_alive()

    def start(self) -> "Fleet":
        """Sets up the thread that sends and listens until `close`."""
        self._thread.start()
        self._looking = asyncio.run_coroutine_threadsafe(self._look(), self._loop)
        return self

    def submit(
        self,
        request: Request,
        on_step: Callable[[Progress], None] | None = None,
        on_start: Callable[[], None] | None = None,
        deadline: float | None = None,
        tag: Any = None,
    ) -> Ticket:
        """As `Engine.submit`; the callbacks are called on this fleet's thread."""
        with self._lock:
            if self._closed:
                raise Failure("the replicas are being left: no more requests are taken")
            ticket = Ticket(request, next(self._numbers), on_step, on_start, deadline, tag)
            self._waiting.append(ticket)
        ticket.add_done_callback(lambda _: self._soon(self._gone, ticket))
        self._soon(self._let_in)
        return ticket

    def waiting(self) -> list[Ticket]:
        """The requests that no replica has, in the order of submission."""
        with self._lock:
            return [ticket for ticket in self._waiting if not ticket.done()]

    def close(self) -> None:
        """Takes no more requests, cancels all that are there and ends the thread."""
        with self._lock:
            self._closed = True
            there = [*self._waiting, *self._tasks]
        for ticket in there:
            ticket.cancel()
        self._looking.cancel()
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- on the loop ------------------------------------------------------------------------

    def _soon(self, call: Callable[..., None], *given: Any) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(call, *given)

    async def _end(self) -> None:
        tasks = list(self._tasks.values())
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        """Keeps what is known of the replicas' room fresh, and deadlines watched."""
        while True:
            with contextlib.suppress(Exception):  # the cluster may be busy with itself
                self._room = await asyncio.to_thread(self.replicas.room)
                self._on_room(self._room)
            now = time.monotonic()
            for ticket in self.waiting():
                if ticket.deadline is not None and ticket.deadline <= now:
                    fail(ticket, _late())
            self._let_in()
            await asyncio.sleep(PAUSE)

    def _gone(self, ticket: Ticket) -> None:
        """A ticket has come to its end, by itself or by being cancelled."""
        task = self._tasks.get(ticket)
        if ticket.cancelled():
            ticket.set_running_or_notify_cancel()
            if task is not None:
                task.cancel()
        self._let_in()

    def _let_in(self) -> None:
        """Waiting requests to the replicas, in their order, as long as there is room."""
        while True:
            with self._lock:
                self._waiting = [ticket for ticket in self._waiting if not ticket.done()]
                if not self._waiting or len(self._tasks) >= self._room:
                    return
                ticket = min(self._waiting, key=self._order)
                self._waiting.remove(ticket)
                self._tasks[ticket] = self._loop.create_task(self._draw(ticket))

    async def _draw(self, ticket: Ticket) -> None:
        try:
            image = await self._drawn(ticket)
            if ticket.set_running_or_notify_cancel():
                ticket.set_result(image)
        except asyncio.CancelledError:
            pass  # its ticket was
        except Exception as error:
            fail(ticket, error)
        finally:
            with self._lock:
                del self._tasks[ticket]
            self._let_in()

    async def _drawn(self, ticket: Ticket) -> Image.Image:
        """The picture, from whichever replica lives long enough."""
        way = _Way(ticket)
        for deaths in itertools.count(1):
            try:
                return await self._once(ticket, way)
            except Exception as error:
                if not self.replicas.lost(error):
                    raise
                if deaths == DEATHS:
                    raise Failure(f"{DEATHS} replicas died while they drew it") from error
            await asyncio.sleep(PAUSE)
        raise AssertionError

    async def _once(self, ticket: Ticket, way: "_Way") -> Image.Image:
        asked, left = ticket.request.settings, None
        if ticket.deadline is not None:
            left = ticket.deadline - time.monotonic()
            if left <= 0:
                raise _late()
        size = f"{asked.width}x{asked.height}"
        async with self.replicas.draw(ticket.request, size, left) as coming:
            async for news in coming:
                for done in news.passes:
                    self._on_pass(done)
                if news.error is not None:
                    raise news.error
                way.on(news.done, news.preview)
                if news.image is not None:
                    return news.image
        raise Failure("a replica gave no picture")


class _Way:
    """A picture's way, told to its ticket's callbacks step by step, each step once."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket, self.told, self.begun = ticket, 0, False
        self.preview: Image.Image | None = None

    def on(self, done: int, preview: Image.Image | None) -> None:
        """So many steps are done. After a replica's death they are fewer: nothing new, then."""
        self.preview = preview or self.preview
        if not self.begun and self.ticket.on_start is not None:
            self.ticket.on_start()
        self.begun = True
        for step in range(self.told + 1, done + 1):
            self.told = step
            if self.ticket.on_step is not None:
                self.ticket.on_step(Progress(step, self.ticket.request.settings.steps, self._seen))

    def _seen(self) -> Image.Image:
        """The newest preview there is."""
        assert self.preview is not None
        return self.preview


def _late() -> Late:
    return Late("the picture was not done by its deadline")
