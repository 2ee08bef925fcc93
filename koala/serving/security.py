"""Who may ask, how often and how much: before anything of a request is looked at.

Everything needs a key where there are keys, but for what is listed as open. Without keys a page
of another site could still have its reader's browser ask this server, so requests that come from
another origin are refused, and names for loopback that only a forged DNS answer would use.
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
from koala.serving.errors import Refusal, refusal
from koala.serving.keys import Keys
from koala.serving.settings import LOOPBACK, Limits, Options

OPEN = ("/", "/health", "/ready", "/favicon.ico")
OPEN_FOLDER = "/page/"
BODY_SECONDS = 60.0  # that a body may take to arrive
BODIES = 8  # of the largest size, that may be held at once
_REMEMBERED = 10_000  # clients whose rates are known


class Rates:
    """Token buckets: `limits.burst` requests at once, `limits.rate` a minute in the long run."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self.clock = limits, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, when

    def take(self, client: str) -> None:
        """Busy if the client has none left."""
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


class Guard:
    """ASGI middleware that lets a request in, with its whole body, or answers it itself."""

    def __init__(
        self, app: ASGIApp, options: Options, keys: Keys | None, note: Callable[[str], None]
    ) -> None:
        self.app, self.options, self.keys, self.note = app, options, keys, note
        self.rates = Rates(options.limits)
        self._held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held = 0
        try:
            client = self._client(scope)
            scope.setdefault("state", {})["client_name"] = client
            if scope["method"] == "POST":
                self.rates.take(client)
                body = await self._body(Headers(scope=scope), receive)
                self._held += (held := len(body))
                receive = _replayed(body, receive)
            await self.app(scope, receive, send)
        except (Refusal, Busy) as error:
            found = refusal(error)
            self.note(found.code)
            await found.response()(scope, receive, send)
        finally:
            self._held -= held

    def _client(self, scope: Scope) -> str:
        """Who asks: by key, or by address where there are no keys. Refusal."""
        headers = Headers(scope=scope)
        address = scope["client"][0] if scope.get("client") else "local"
        path = scope["path"]
        if self.keys is None:
            self._check_origin(headers)
        elif path not in OPEN and not path.startswith(OPEN_FOLDER):
            client = self.keys.client(headers.get("authorization", ""))
            if client is None:
                raise Refusal(401, "give a key: Authorization: Bearer KEY", "invalid_api_key")
            return client
        return f"address-{address}"

    def _check_origin(self, headers: Headers) -> None:
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or ""
        if self.options.on_loopback and name not in LOOPBACK:
            raise Refusal(403, f"host {name!r} is not this server's name", "host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise Refusal(403, "requests from other sites are not answered", "origin")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """All of it. Refusal if it is too large or too slow, Busy if many are held already."""
        limit = self.options.limits.upload_bytes
        told = headers.get("content-length", "0")
        too_large = Refusal(413, f"the body is too large: allowed are {limit:,} bytes", "too_large")
        if told.isdecimal() and int(told) > limit:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(400, "the body was cut short", "cut_short")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise too_large
                    if self._held + size > BODIES * limit:
                        raise Busy("memory", 1.0)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(408, f"the body took over {BODY_SECONDS:g} s", "timeout") from None


def client_of(request: Request) -> str:
    """Who asks, for fairness, limits and ownership."""
    return request.state.client_name


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives a body that was received already, then what comes after it."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay
