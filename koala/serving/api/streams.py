"""Responses that wait for images, and stop when the client disconnects."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from koala.serving.admission import Busy
from koala.serving.errors import ApiError
from koala.serving.image_request import ImageRequest
from koala.serving.service import EventCallback, Service, Submission
from koala.serving.upload_thread import UploadThread

KEEP_ALIVE = 15.0  # seconds of silence before a comment is sent


def event(name: str, data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


class EventStream(Response):
    """Streams events to their end, or until the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        sending = asyncio.create_task(self._send(send))
        disconnect = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({sending, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, disconnect):
                task.cancel()
            await asyncio.gather(sending, disconnect, return_exceptions=True)
            await self.events.aclose()

    async def _send(self, send: Send) -> None:
        pending = self._next()
        try:
            while True:
                done, _ = await asyncio.wait({pending}, timeout=KEEP_ALIVE)
                part = pending.result() if done else b": waiting\n\n"
                if part is None:
                    break
                await send({"type": "http.response.body", "body": part, "more_body": True})
                if done:
                    pending = self._next()
        finally:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _next(self) -> "asyncio.Task[bytes | None]":
        async def next_event() -> bytes | None:
            return await anext(self.events, None)

        return asyncio.create_task(next_event())


async def disconnected(receive: Receive) -> None:
    """Returns when the client disconnects. Call it after the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def submit(
    request: Request, spec: ImageRequest, on_event: EventCallback | None = None
) -> Submission:
    """Queues a request off the event loop; uploads are decoded one after the other."""
    service: Service = request.app.state.service
    if spec.image is None:
        return await asyncio.to_thread(service.submit, spec, on_event)
    thread: UploadThread = request.app.state.upload_thread
    return await thread.run(service.submit, spec, on_event)


async def wait_for_images(
    request: Request, service: Service, submission: Submission, return_exceptions: bool = False
) -> list[Any]:
    """The images in order; the submission is cancelled if the client disconnects first.

    Raises the first error, or, as in `asyncio.gather`, returns each error in its image's place.
    """
    images = asyncio.gather(
        *map(asyncio.wrap_future, submission.futures()), return_exceptions=return_exceptions
    )
    # Marks the exception as retrieved: nobody awaits it after a disconnect.
    images.add_done_callback(lambda done: done.cancelled() or done.exception())
    disconnect = asyncio.create_task(disconnected(request.receive))
    tasks: set[asyncio.Future[Any]] = {images, disconnect}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not images.done():
            raise ApiError(499, "the client disconnected", "gone")
        try:
            return images.result()
        except asyncio.CancelledError:  # an image was cancelled, not this task
            raise cancelled_error(service) from None
    finally:
        disconnect.cancel()
        submission.cancel()
        images.cancel()


def cancelled_error(service: Service) -> Exception:
    """The error for an image that someone other than its client cancelled."""
    if service.draining:
        return Busy("draining", service.limits.drain)
    return ApiError(409, "the request was cancelled", "cancelled")
