"""Answers that wait: until pictures are there, or the client is gone."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from PIL import Image
from starlette.types import Receive, Scope, Send

from koala.serving.admission import Busy
from koala.serving.errors import Refusal
from koala.serving.service import Drawing, Service

KEEP_ALIVE = 15.0  # seconds of silence after which a comment is sent


def event(name: str, data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


class EventStream(Response):
    """Sends events as they come, to their end; stops them as soon as the client is gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        sending = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            await self.events.aclose()

    async def _send(self, send: Send) -> None:
        coming = self._next()
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=KEEP_ALIVE)
                part = coming.result() if done else b": waiting\n\n"
                if part is None:
                    break
                await send({"type": "http.response.body", "body": part, "more_body": True})
                if done:
                    coming = self._next()
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _next(self) -> "asyncio.Task[bytes | None]":
        async def following() -> bytes | None:
            return await anext(self.events, None)

        return asyncio.create_task(following())


async def disconnected(receive: Receive) -> None:
    """Returns when the client is gone. To be called when its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def drawn(request: Request, service: Service, drawing: Drawing) -> list[Image.Image]:
    """The pictures; cancelled if the client goes before they are done.

    Raises what the first that failed raised.
    """
    pictures = asyncio.gather(*map(asyncio.wrap_future, drawing.futures()))
    # What becomes of them when the client is gone is nobody's concern.
    pictures.add_done_callback(lambda done: done.cancelled() or done.exception())
    gone = asyncio.create_task(disconnected(request.receive))
    both: set[asyncio.Future[Any]] = {pictures, gone}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if pictures.done():
            return finished(pictures, service)
        raise Refusal(499, "the client is gone", "gone")
    finally:
        gone.cancel()
        drawing.cancel()
        pictures.cancel()


def finished(done: "asyncio.Future[Any]", service: Service) -> Any:
    """The result of a future of the engine's. Where it was cancelled, an error that says so."""
    try:
        return done.result()
    except asyncio.CancelledError:  # it is done: nobody cancels the caller here
        raise cancelled(service) from None


def cancelled(service: Service) -> Exception:
    """What a client is told whose picture was cancelled by somebody else."""
    if service.draining:
        return Busy("draining", service.limits.drain)
    return Refusal(409, "the request was cancelled", "cancelled")
