"""Request bodies, bounded in bytes while they arrive, packed or not, and in time."""

import asyncio
import zlib

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
PLAIN, PACKED = ("", "identity"), ("gzip", "x-gzip", "deflate")  # Content-Encoding
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

        ApiError if it is too large, too slow or packed in a way that is not known; Busy if memory
        is short.
        """
        limit = self.most_bytes if path in WITH_IMAGES else min(JSON_BYTES, self.most_bytes)
        length = headers.get("content-length", "0")
        if length.isdecimal() and (len(length) > 18 or int(length) > limit):
            raise _too_large(limit)
        packing = headers.get("content-encoding", "").strip().lower()
        if packing not in (*PLAIN, *PACKED):
            raise ApiError(
                415, f"Content-Encoding {packing!r} is not known: send the body as it is, or as "
                "gzip", "content_encoding",
            )  # fmt: skip
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(BODY_SECONDS):
                await self._receive(parts, limit, receive)
            body = b"".join(parts)
            if packing in PACKED and body:
                body = await asyncio.to_thread(_unpacked, body, limit)
        except BaseException as error:
            self.release(sum(map(len, parts)))
            if isinstance(error, TimeoutError):
                raise ApiError(408, "the body took too long to arrive", "timeout") from None
            raise
        self._bytes += len(body) - sum(map(len, parts))
        return body

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


def _unpacked(body: bytes, limit: int) -> bytes:
    """The body that gzip or zlib packed. ApiError if it is damaged, or of more bytes."""
    unpacking = zlib.decompressobj(32 + zlib.MAX_WBITS)  # either, by its header
    try:
        unpacked = unpacking.decompress(body, limit + 1)
    except zlib.error:
        unpacked = b""
    if len(unpacked) > limit:
        raise _too_large(limit)
    if not unpacking.eof:
        raise ApiError(400, "the body is not what its Content-Encoding says", "content_encoding")
    return unpacked
