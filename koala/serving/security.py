"""Authentication, rate limits and body limits, checked before a request reaches the app.

With API keys, every path but the open ones needs a key. Without keys, a page of another site could
make its visitor's browser call this server, so requests of another origin are rejected, and so are
host names that only a DNS rebinding attack would use.
"""

import ipaddress
import re
import socket
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from koala.serving import links
from koala.serving.admission import Busy
from koala.serving.bodies import Bodies
from koala.serving.errors import ApiError, to_api_error
from koala.serving.keys import ApiKeys
from koala.serving.paths import own_path
from koala.serving.settings import LOOPBACK, Limits, Options

OPEN = ("/", "/health", "/ready", "/favicon.ico")
OPEN_FOLDERS = ("/page/", links.FOLDER)
PREFLIGHT_SECONDS = 600  # that a browser may remember an allowed origin
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
        self.rates, self.bodies = RateLimiter(options.limits), Bodies(options.limits)
        self._own_name = socket.gethostname().lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = self._plain(scope)
        headers, path = Headers(scope=scope), scope["path"]
        send = sending = _Sending(send, _request_id(headers))
        if headers.get("origin") in self.options.allow_origins:
            sending.origin = headers["origin"]
            if scope["method"] == "OPTIONS":
                await _allow(headers)(scope, receive, send)
                return
        buffered = 0
        try:
            client = self._client(scope)
            scope.setdefault("state", {})["client_name"] = client
            if scope["method"] == "POST":
                self.rates.take(client)
                body = await self.bodies.read(path, headers, receive)
                buffered = len(body)
                receive = _replayed(body, receive)
            await self.app(scope, receive, send)
        except Exception as error:
            if sending.started:
                raise
            failure = to_api_error(error)
            self.on_error(failure.code)
            await failure.response(path)(scope, receive, send)
        finally:
            self.bodies.release(buffered)

    def _plain(self, scope: Scope) -> Scope:
        """The request under our path, and as GET if it asks for a GET's headers."""
        method = "GET" if scope["method"] == "HEAD" else scope["method"]  # uvicorn omits the body
        path = own_path(scope["path"], self.options.root_path)
        return {**scope, "method": method, "path": path}

    def _client(self, scope: Scope) -> str:
        """The client's name, from its key, or from its address without keys. ApiError."""
        headers = Headers(scope=scope)
        address = scope["client"][0] if scope.get("client") else "local"
        path = scope["path"]
        name = _name_of(headers.get("host", ""))
        if self.keys is None:
            self._check_host(name)
            self._check_origin(headers)
        elif path not in OPEN and not path.startswith(OPEN_FOLDERS):
            client = self.keys.client(_authorization(headers))
            if client is None:
                raise ApiError(401, "send an API key: Authorization: Bearer KEY", "invalid_api_key")
            return client
        return f"address-{address}"

    def _check_host(self, name: str) -> None:
        """ApiError for a name that only a DNS rebinding attack would use.

        Such an attack needs a name of its own with a dot, which a browser sends. An address, a name
        without a dot and this machine's own are none.
        """
        allowed = (*LOOPBACK, *self.options.allow_hosts)
        safe = not name or name.endswith(".localhost") or _is_address(name)
        if name in allowed or "*" in allowed or safe:
            return
        own = name == self._own_name or "." not in name
        if self.options.on_loopback or not own:
            raise ApiError(
                403, f"host {name!r} is not a name of this server: start it with --allow-host",
                "host",
            )  # fmt: skip

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or origin in self.options.allow_origins:
            return
        hosts = [headers.get("host", "")]
        if self.options.trusted_proxies:
            hosts.append(headers.get("x-forwarded-host", ""))
        try:
            same = urlsplit(origin).netloc in hosts
        except ValueError:
            same = False
        if not same:
            raise ApiError(
                403, "requests from other origins are not allowed: start the server with "
                "--allow-origin", "origin",
            )  # fmt: skip


def _name_of(host: str) -> str:
    """The name in a Host header, in lower case. ApiError for what is none."""
    try:
        parts = urlsplit(f"//{host}")
        if parts.username is not None or parts.port == 0:
            raise ValueError
        return (parts.hostname or "").rstrip(".")
    except ValueError:
        raise ApiError(400, "the Host header is no name", "host") from None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _allow(headers: Headers) -> Response:
    """The answer to a browser that asks, for an allowed page, what it may send."""
    wanted = headers.get("access-control-request-headers", "")
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Methods": "GET, HEAD, POST, DELETE",
            "Access-Control-Allow-Headers": wanted or "Authorization, Content-Type",
            "Access-Control-Allow-Private-Network": "true",
            "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
        },
    )


class _Sending:
    """A `send` that names the request, and tells the browser which page may read the answer."""

    def __init__(self, send: Send, id: str) -> None:
        self.send, self.id = send, id
        self.origin, self.started = "", False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.id
            if self.origin:
                headers["Access-Control-Allow-Origin"] = self.origin
                headers["Access-Control-Expose-Headers"] = "Retry-After, X-Request-Id"
                headers.add_vary_header("Origin")
        await self.send(message)


def _request_id(headers: Headers) -> str:
    """The client's name of its request, or one of our own."""
    given = headers.get("x-request-id") or headers.get("x-client-request-id") or ""
    return given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex


def _authorization(headers: Headers) -> str:
    """The header with the key; as Azure's and Anthropic's clients send it, too."""
    key = headers.get("api-key") or headers.get("x-api-key")
    return headers.get("authorization") or (f"Bearer {key}" if key else "")


def root_of(request: Request) -> str:
    """The address of this server as its clients know it, without a slash at its end."""
    options: Options = request.app.state.options
    trusted: Mapping[str, str] = request.headers if options.trusted_proxies else {}
    host = trusted.get("x-forwarded-host") or request.url.netloc
    root = options.root_path or trusted.get("x-forwarded-prefix", "").rstrip("/")
    return f"{request.url.scheme}://{host}{root}"


def client_of(request: Request) -> str:
    """The client's name, for fair queueing, limits and ownership."""
    return request.state.client_name


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that replays a body already read, then continues."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay
