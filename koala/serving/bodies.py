"""Request bodies, bounded in bytes while they arrive, in time, and in what they are made of."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import Receive

from koala.serving.admission import Busy
from koala.serving.errors import ApiError
from koala.serving.settings import Limits

BODY_SECONDS = 60.0  # a body may take to arrive
STALL_SECONDS = 10.0  # between two parts of it
BODIES = 8  # of the largest size in memory at once
SMALL = 64 * 1024  # bytes of a body that has room however many large ones there are
JSON_BYTES = 1024 * 1024  # of a body that holds no image
# Each key, item or object takes far more time and memory than its bytes. A prompt may hold 10,000
# commas, and so may a negative prompt.
MOST_PARTS = 50_000
# Paths whose bodies hold images.
WITH_IMAGES = (
    "/v1/jobs",
    "/v1/images/edits",
    "/v1/images/variations",
    "/v1/responses",
    "/sdapi/v1/img2img",
    "/sdapi/v1/png-info",
    "/sdapi/v1/extra-batch-images",
    "/sdapi/v1/extra-single-image",
    "/sdapi/v1/interrogate",
)


class Bodies:
    """The bodies of all requests that are in memory."""

    def __init__(self, limits: Limits) -> None:
        self.most_bytes = limits.upload_bytes
        self._bytes = 0

    async def read(self, path: str, headers: Headers, receive: Receive) -> bytes:
        """Reads a body, to be given to `release` when its request is done.

        ApiError if it is too large, too slow or of too many parts; Busy if memory is short.
        """
        limit = self.most_bytes if path in WITH_IMAGES else min(JSON_BYTES, self.most_bytes)
        length = headers.get("content-length", "0")
        if length.isdecimal() and (len(length) > 18 or int(length) > limit):
            raise _too_large(limit)
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(BODY_SECONDS):
                await self._receive(parts, limit, receive)
            body = b"".join(parts)
            if not headers.get("content-type", "").startswith("multipart/"):
                _check_parts(body)
            return body
        except BaseException as error:
            self.release(sum(map(len, parts)))
            if isinstance(error, TimeoutError):
                raise ApiError(408, "the body took too long to arrive", "timeout") from None
            raise

    def release(self, size: int) -> None:
        """Forgets so many bytes."""
        self._bytes -= size

    async def _receive(self, parts: list[bytes], limit: int, receive: Receive) -> None:
        """Appends the parts as they arrive, and counts them."""
        size = 0
        while True:
            async with asyncio.timeout(STALL_SECONDS):
                message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the body is incomplete", "cut_short")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._bytes += len(parts[-1])
            if size > limit:
                raise _too_large(limit)
            if size > SMALL and self._bytes > BODIES * self.most_bytes:
                raise Busy("memory", 1.0)
            if not message.get("more_body", False):
                return


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is too large: allowed are {limit:,} bytes", "too_large")


def _check_parts(body: bytes) -> None:
    """ApiError for JSON of so many parts that reading it would keep the server busy."""
    if sum(body.count(mark) for mark in (b",", b":", b"[", b"{")) > MOST_PARTS:
        raise ApiError(
            413, f"the body has too many keys and items: allowed are {MOST_PARTS:,}", "too_large"
        )
