"""The web page: its files, read once, and the model's name, size and samplers.

The files need no key, since the page itself asks for it. Request paths are only looked up among
the known names. The Content-Security-Policy allows scripts from these files and calls to this
server only.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

from koala.generation import samplers
from koala.generation.requests import Known
from koala.serving.errors import ApiError

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
    "Cache-Control": "no-cache",  # revalidate with the ETag
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page."""

    content: bytes
    kind: str
    tag: str  # ETag, from the content


def files() -> dict[str, PageFile]:
    """The page's files, by name."""
    return {path.name: _file(path.read_bytes(), path.suffix) for path in sorted(FOLDER.iterdir())}


def router(model: Known) -> APIRouter:
    """Routes for `/` and the files below `/page`, of a server of that model."""
    about = {
        "model": model.name,
        "size": model.native,
        "sampling": asdict(model.sampling),
        "schedulers": {key: sampler.name for key, sampler in samplers.SAMPLERS.items()},
    }
    known = files() | {"about.json": _file(json.dumps(about).encode(), ".json")}
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    def index(request: Request) -> Response:
        return _respond(known["index.html"], request)

    @routes.get("/favicon.ico")
    def icon(request: Request) -> Response:
        return _respond(known["koala.svg"], request)

    @routes.get("/page/{name}")
    def file(name: str, request: Request) -> Response:
        if name not in known:
            raise ApiError(404, f"the page has no file {name!r}", "not_found")
        return _respond(known[name], request)

    return routes


def _file(content: bytes, ending: str) -> PageFile:
    return PageFile(content, KINDS[ending], f'"{hashlib.sha256(content).hexdigest()[:16]}"')


def _respond(file: PageFile, request: Request) -> Response:
    headers = {**HEADERS, "ETag": file.tag}
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.kind, headers=headers)
