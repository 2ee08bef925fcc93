"""Authentication, rate limits and body limits, checked before a request reaches the app.

With API keys, every path but the open ones needs a key. Without keys, a page of another site could
make its visitor's browser call this server, so requests of another origin are rejected, and so are
host names that only a DNS rebinding attack would use.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from koala.serving.admission import Busy
from koala.serving.errors import ApiError, to_api_error
from koala.serving.keys import ApiKeys
from koala.serving.settings import LOOPBACK, Limits, Options

OPEN = ("/", "/health", "/ready", "/favicon.ico")
OPEN_FOLDER = "/page/"
BODY_SECONDS = 60.0  # a body may take to arrive
BODIES = 8  # of the largest size in memory at once
_REMEMBERED = 10_000  # clients whose rate is tracked


class RateLimiter:
    """Token buckets: bursts of `limits.burst` requests, `limits.rate` per minute sustained."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self.clock = limits, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, time

    def take(self, client: str) -> None:
        """Takes a token. Busy if the client has none left."""
        if not self.limits.rate:
            return
        now, per_second = self.clock(), self.limits.rate / 60
        tokens, then = self._buckets.pop(client, (float(self.limits.burst), now))
        tokens = min(float(self.limits.burst), tokens + (now - then) * per_second)
        enough = tokens >= 1
        self._buckets[client] = (tokens - enough, now)
        if len(self._buckets) > _REMEMBERED:
            self._buckets.popitem(last=False)
        if not enough:
            raise Busy("rate", (1 - tokens) / per_second)


class SecurityMiddleware:
    """ASGI middleware: passes a request on with its whole body, or rejects it."""

    def __init__(
        self, app: ASGIApp, options: Options, keys: ApiKeys | None, on_error: Callable[[str], None]
    ) -> None:
        self.app, self.options, self.keys, self.on_error = app, options, keys, on_error
        self.rates = RateLimiter(options.limits)
        self._buffered = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = _plain(scope)
        buffered = 0
        try:
            client = self._client(scope)
            scope.setdefault("state", {})["client_name"] = client
            if scope["method"] == "POST":
                self.rates.take(client)
                body = await self._body(Headers(scope=scope), receive)
                self._buffered += (buffered := len(body))
                receive = _replayed(body, receive)
            await self.app(scope, receive, send)
        except (ApiError, Busy) as error:
            failure = to_api_error(error)
            self.on_error(failure.code)
            await failure.response()(scope, receive, send)
        finally:
            self._buffered -= buffered

    def _client(self, scope: Scope) -> str:
        """The client's name, from its key, or from its address without keys. ApiError."""
        headers = Headers(scope=scope)
        address = scope["client"][0] if scope.get("client") else "local"
        path = scope["path"]
        if self.keys is None:
            self._check_origin(headers)
        elif path not in OPEN and not path.startswith(OPEN_FOLDER):
            client = self.keys.client(headers.get("authorization", ""))
            if client is None:
                raise ApiError(401, "send an API key: Authorization: Bearer KEY", "invalid_api_key")
            return client
        return f"address-{address}"

    def _check_origin(self, headers: Headers) -> None:
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or ""
        if self.options.on_loopback and name not in LOOPBACK:
            raise ApiError(403, f"host {name!r} is not a name of this server", "host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(403, "requests from other origins are not allowed", "origin")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """Reads the body. ApiError if too large or too slow, Busy if memory is short."""
        limit = self.options.limits.upload_bytes
        length = headers.get("content-length", "0")
        too_large = ApiError(
            413, f"the body is too large: allowed are {limit:,} bytes", "too_large"
        )
        if length.isdecimal() and int(length) > limit:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the body is incomplete", "cut_short")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise too_large
                    if self._buffered + size > BODIES * limit:
                        raise Busy("memory", 1.0)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408, f"the body took longer than {BODY_SECONDS:g} s", "timeout"
            ) from None


def client_of(request: Request) -> str:
    """The client's name, for fair queueing, limits and ownership."""
    return request.state.client_name


def _plain(scope: Scope) -> Scope:
    """The request without a slash at its path's end, and as GET if it asks for a GET's headers."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]  # uvicorn omits the body
    path = scope["path"].rstrip("/") or "/"
    return {**scope, "method": method, "path": path}


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that replays a body already read, then continues."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay
