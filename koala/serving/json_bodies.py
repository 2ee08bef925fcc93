"""JSON from clients: the only place that reads and limits it.

Programs send their fields as JSON with any Content-Type, or none, and some as a form; both become
one object. What JSON does not have, or what would mean two things, is refused here: NaN, infinite
numbers, half characters, a key with two values, nesting that nothing here needs.
"""

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import UploadFile

from koala.serving.errors import ApiError

# Each key, item or object takes far more time and memory than its bytes. A prompt may hold 10,000
# commas, and so may a negative prompt.
MOST_PARTS = 50_000
DEEPEST = 32  # lists and objects within each other
LONGEST_NUMBER = 40  # digits of a whole one
MOST_FIELDS = 64  # of a form
MOST_FILES = 4
EXAMPLE = 'send JSON, such as {"prompt": "a red fox"}'
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


class JsonRoute(APIRoute):
    """A route whose body is read here, whatever its Content-Type."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def handle_parsed(request: Request) -> Response:
            parsed = await fields(request)
            return await handle(_Parsed(request, parsed))

        return handle_parsed


class _Parsed(Request):
    """A request whose body was read as JSON."""

    def __init__(self, request: Request, parsed: dict[str, Any]) -> None:
        headers = [pair for pair in request.scope["headers"] if pair[0] != b"content-type"]
        headers.append((b"content-type", b"application/json"))
        super().__init__({**request.scope, "headers": headers}, request.receive)
        self._body, self._parsed = b"{}", parsed

    async def json(self) -> Any:
        return self._parsed


async def fields(request: Request) -> dict[str, Any]:
    """The fields of a body, as JSON or as a form without files. ApiError."""
    body = await request.body()
    if kind_of(request) in FORMS and body.lstrip()[:1] not in (b"{", b"["):
        return await _of_form(request)
    if not body:
        raise ApiError(400, f"the body is missing: {EXAMPLE}", "missing_parameter")
    parsed = parse(body)
    if not isinstance(parsed, dict):
        raise ApiError(400, f"the body is no JSON object: {EXAMPLE}", "invalid_json")
    return parsed


def kind_of(request: Request) -> str:
    """The Content-Type without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _of_form(request: Request) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                raise ApiError(400, f"{name} must be text", "invalid_value", name)
            if name in found:
                raise ApiError(400, f"{name} is given twice: give one", "invalid_value", name)
            found[name] = value
    return found


def parse(text: bytes | str, what: str = "the body") -> Any:
    """The value of JSON text, which errors call `what`. ApiError for anything that is none."""
    if isinstance(text, bytes):
        _check_parts(text)
        try:
            text = text.decode(json.detect_encoding(text))
        except UnicodeDecodeError:
            raise _invalid(f"{what} is no text in UTF-8: send it as that") from None
    try:
        parsed = json.loads(
            text, parse_constant=_no_number, parse_float=_float, parse_int=_int,
            object_pairs_hook=_object,
        )  # fmt: skip
        _check(parsed)
    except json.JSONDecodeError as error:
        raise _invalid(
            f"{what} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise _invalid(f"{what} is nested too deeply: allowed are {DEEPEST} levels") from None
    except ValueError as error:
        raise _invalid(f"{what} {error}") from None
    return parsed


def _check_parts(body: bytes) -> None:
    """ApiError for JSON of so many parts that reading it would keep the server busy."""
    if sum(body.count(mark) for mark in (b",", b":", b"[", b"{")) > MOST_PARTS:
        raise ApiError(
            413, f"the body has too many keys and items: allowed are {MOST_PARTS:,}", "too_large"
        )


def _invalid(message: str) -> ApiError:
    return ApiError(400, message, "invalid_json")


def _no_number(text: str) -> float:
    raise ValueError(f"has {text}, which is no JSON: send a number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"has the number {text[:LONGEST_NUMBER]}: it is too large")
    return value


def _int(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"has the number {text[:LONGEST_NUMBER]}...: it is too long")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise ValueError(f"has {name[:LONGEST_NUMBER]!r} twice, with two values: give one")
    return found


def _check(value: Any, depth: int = 1) -> None:
    """ValueError for half a character; RecursionError for deep nesting."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    "holds half a character (a lone surrogate): type it again"
                ) from None
        return
    if not isinstance(value, (dict, list)):
        return
    if depth > DEEPEST:
        raise RecursionError
    if isinstance(value, dict):
        for name in value:
            _check(name)
        value = list(value.values())
    for each in value:
        _check(each, depth + 1)
