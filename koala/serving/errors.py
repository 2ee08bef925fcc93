"""Errors as OpenAI's clients understand them, whatever they come from.

{"error": {"message", "type", "param", "code"}}: `message` for people, `code` for programs.
"""

import logging
import math
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from koala.errors import Failure, UserError
from koala.generation import Late
from koala.generation.memory.placement import ran_out
from koala.serving.admission import UNAVAILABLE, Busy

_log = logging.getLogger("koala.serving")


class Refusal(Exception):
    """A request that is answered with an error, and which."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry: float = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry = retry  # seconds; 0: there is no sense in trying again

    def body(self) -> dict[str, Any]:
        """What the client reads."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        param = None if self.param is None else _sendable(self.param)
        message = _sendable(self.message)
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(math.ceil(self.retry))} if self.retry else {}
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def refusal(error: BaseException) -> Refusal:
    """What an exception means to a client. What nobody foresaw keeps its details to itself."""
    match error:
        case Refusal():
            return error
        case UserError():
            return Refusal(400, " ".join(str(error).split()), "invalid_value")
        case Busy():
            status = 503 if error.reason in UNAVAILABLE else 429
            return Refusal(status, str(error), error.reason, retry=error.retry_after)
        case Late():
            return Refusal(504, str(error), "deadline")
        case Failure():
            return Refusal(500, " ".join(str(error).split()), "failed")
        case ValidationError() | RequestValidationError():
            return _invalid(error)
        case HTTPException():
            phrase = HTTPStatus(error.status_code).phrase
            return Refusal(error.status_code, str(error.detail), phrase.lower().replace(" ", "_"))
    if ran_out(error):
        return Refusal(503, "out of memory: ask for a smaller picture, or later", "memory", retry=5)
    _log.error("a request failed", exc_info=error)
    return Refusal(500, "the server failed; its log says why", "failed")


def install(app: FastAPI, note: Callable[[str], None]) -> None:
    """Has the app answer every exception so, and say so; `note` is told each code."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        found = refusal(error)
        note(found.code)
        return found.response()

    kinds = (Refusal, UserError, Busy, Failure, ValidationError, RequestValidationError)
    for kind in (*kinds, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
    describe(app)


def describe(app: FastAPI) -> None:
    """Has the app's OpenAPI document name these errors in place of FastAPI's own."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        schema = plain()
        parts = schema.setdefault("components", {}).setdefault("schemas", {})
        parts["Error"] = _ERROR
        for name in ("HTTPValidationError", "ValidationError"):
            parts.pop(name, None)
        answer = {"$ref": "#/components/schemas/Error"}
        content = {"application/json": {"schema": answer}}
        for operation in (o for path in schema["paths"].values() for o in path.values()):
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = {"description": "an error", "content": content}
        return schema

    app.openapi = described  # type: ignore[method-assign]


_TEXT = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT,
                "code": _TEXT,
            },
        }
    },
}


def _sendable(text: str) -> str:
    """The text without halves of characters, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()


def _invalid(error: ValidationError | RequestValidationError) -> Refusal:
    """The first thing that is wrong with a body, with its field's name."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    name = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"there is no field {name!r}: leave it out", "unknown_parameter", name)
    if first["type"] == "json_invalid":
        return Refusal(400, "the body is no JSON", "invalid_json")
    if first["type"] == "missing":
        return Refusal(400, f"{name or 'the body'} is missing", "missing_parameter", name)
    said = first["msg"].removeprefix("Value error, ")
    return Refusal(400, f"{name or 'the body'}: {said}", "invalid_value", name)
