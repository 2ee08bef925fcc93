"""The page: its files, read once, and what it must know of the model before it may ask anything.

The files are open to anybody, since the page itself asks for the key. A request's path is only
looked up among their names. The Content-Security-Policy lets the page load and call nothing but
this server, and run no script that is not one of these files.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from koala.generation import samplers

FOLDER = Path(__file__).parents[1] / "page"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # ask each time whether it has changed
}


@dataclass(frozen=True)
class File:
    """A file of the page as it is sent."""

    content: bytes
    kind: str
    tag: str  # changes with the content


def files() -> dict[str, File]:
    """The page's files by name."""
    return {path.name: _file(path.read_bytes(), path.suffix) for path in sorted(FOLDER.iterdir())}


def router(model: str, size: int) -> APIRouter:
    """`/`, and its files below `/page`. model: its name; size: its usual side in pixels."""
    about = {
        "model": model,
        "size": size,
        "schedulers": {key: sampler.name for key, sampler in samplers.SAMPLERS.items()},
    }
    known = files() | {"about.json": _file(json.dumps(about).encode(), ".json")}
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    def index(request: Request) -> Response:
        return _answer(known["index.html"], request)

    @routes.get("/favicon.ico")
    def icon(request: Request) -> Response:
        return _answer(known["koala.svg"], request)

    @routes.get("/page/{name}")
    def file(name: str, request: Request) -> Response:
        if name not in known:
            message = f"the page has no file {name!r}"
            error = {"message": message, "type": "invalid_request_error", "param": None}
            return JSONResponse({"error": {**error, "code": "not_found"}}, status_code=404)
        return _answer(known[name], request)

    return routes


def _file(content: bytes, ending: str) -> File:
    return File(content, KINDS[ending], f'"{hashlib.sha256(content).hexdigest()[:16]}"')


def _answer(file: File, request: Request) -> Response:
    headers = {**HEADERS, "ETag": file.tag}
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.kind, headers=headers)
