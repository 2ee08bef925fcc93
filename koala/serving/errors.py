"""Errors as HTTP responses, in OpenAI's format for every API. The only place that assigns codes.

{"error": {"message", "type", "param", "code"}}: `message` is for people, `code` for programs.
AUTOMATIC1111's tools look for the message in `detail`, so its API has it there too.
"""

import logging
import math
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from koala.errors import Failure, UserError
from koala.generation import Late
from koala.serving.admission import UNAVAILABLE, Busy
from koala.serving.content_filter import HeldBackError
from koala.utils.device import ran_out

A1111 = "/sdapi/"
_log = logging.getLogger("koala.serving")


class ApiError(Exception):
    """An error response."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry: float = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry = retry  # seconds; 0: do not retry
        self.allow = ""  # methods that the path has

    def body(self, path: str = "") -> dict[str, Any]:
        """The response's JSON, to a request for a path."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        param = None if self.param is None else _sendable(self.param)
        message = _sendable(self.message)
        error = {"message": message, "type": kind, "param": param, "code": self.code}
        for_a1111 = {"detail": message, "errors": message} if path.startswith(A1111) else {}
        return {"error": error, **for_a1111}

    def response(self, path: str = "") -> JSONResponse:
        headers = {"Retry-After": str(math.ceil(self.retry))} if self.retry else {}
        if self.allow:
            headers["Allow"] = self.allow
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(path), self.status, headers)


def to_api_error(error: BaseException) -> ApiError:
    """The response for an exception. The details of an unexpected one go to the log only."""
    match error:
        case ApiError():
            return error
        case UserError():
            return ApiError(400, " ".join(str(error).split()), "invalid_value")
        case Busy():
            status = 503 if error.reason in UNAVAILABLE else 429
            return ApiError(status, str(error), error.reason, retry=error.retry_after)
        case Late():
            return ApiError(504, str(error), "deadline")
        case HeldBackError():
            return ApiError(400, str(error), "content_filter")
        case Failure():
            return ApiError(500, " ".join(str(error).split()), "failed")
        case ValidationError() | RequestValidationError():
            return _invalid(error)
        case HTTPException():
            phrase = HTTPStatus(error.status_code).phrase
            return ApiError(error.status_code, str(error.detail), phrase.lower().replace(" ", "_"))
    if ran_out(error):
        return ApiError(
            503, "out of memory: ask for a smaller image, or retry later", "memory", retry=5
        )
    _log.error("unexpected error", exc_info=error)
    return ApiError(500, "internal server error; see the server's log", "failed")


def install(app: FastAPI, on_error: Callable[[str], None]) -> None:
    """Registers the handlers; `on_error` is called with each error's code."""

    async def answer(request: Request, error: Exception) -> Response:
        path = request.scope["path"]
        failure = to_api_error(error)
        if isinstance(error, HTTPException) and error.status_code in _MISSED:
            failure = _missed(request.method, path, error)
            if request.method == "OPTIONS" and failure.allow:
                return Response(status_code=204, headers={"Allow": f"{failure.allow}, OPTIONS"})
        on_error(failure.code)
        return failure.response(path)

    kinds = (
        ApiError, UserError, Busy, HeldBackError, Failure, ValidationError, RequestValidationError,
    )  # fmt: skip
    for kind in (*kinds, HTTPException):
        app.add_exception_handler(kind, answer)
    _document(app)


_JOB = re.compile(r"/v1/jobs/[^/]+")
_MISSED = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)


def _missed(method: str, path: str, error: HTTPException) -> ApiError:
    """What is said to a request for a path, or a method, that is not here."""
    shown = repr(path[:80])
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allow = (error.headers or {}).get("Allow", "")
        instead = "; a job is cancelled by POST to its /cancel" if _JOB.fullmatch(path) else ""
        failure = ApiError(
            405, f"{shown} does not take {method[:20]}: it takes {allow}{instead}",
            "method_not_allowed",
        )  # fmt: skip
        failure.allow = allow
        return failure
    here = "GET /openapi.json lists what is"
    if path.startswith("/v1/"):
        here = (
            "this server draws images, by POST to /v1/images/generations, /v1/images/edits and "
            "/v1/responses"
        )
    return ApiError(404, f"{shown} is not here: {here}", "not_found")


def _document(app: FastAPI) -> None:
    """Puts these errors into the OpenAPI document in place of FastAPI's own."""
    original = app.openapi

    def documented() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        schema = original()
        parts = schema.setdefault("components", {}).setdefault("schemas", {})
        parts["Error"] = _ERROR
        for name in ("HTTPValidationError", "ValidationError"):
            parts.pop(name, None)
        reference = {"$ref": "#/components/schemas/Error"}
        content = {"application/json": {"schema": reference}}
        for operation in (o for path in schema["paths"].values() for o in path.values()):
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = {"description": "an error", "content": content}
        return schema

    app.openapi = documented  # type: ignore[method-assign]  # FastAPI's own way


_OF_EDITS = ("image", "images", "image_url", "mask")
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
    """The text without lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode()


def _invalid(error: ValidationError | RequestValidationError) -> ApiError:
    """The first validation error, with the name of its field."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    name = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        instead = "images are edited at /v1/images/edits" if name in _OF_EDITS else "leave it out"
        return ApiError(400, f"unknown field {name!r}: {instead}", "unknown_parameter", name)
    if first["type"] == "missing":
        return ApiError(400, f"{name or 'the body'} is missing", "missing_parameter", name)
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{name or 'the body'}: {message}", "invalid_value", name)
