"""OpenAI's images API. Every field takes effect, is checked and ignored as listed, or is rejected.

https://platform.openai.com/docs/api-reference/images. `quality`, `style`, `moderation`, `user`,
`safety_identifier` and `input_fidelity` are checked and have no effect. Our own additional fields
are seed, steps, guidance, guidance_until, negative_prompt, scheduler, strength and lora.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile

from koala.generation import Request as EngineRequest
from koala.serving import uploads
from koala.serving.api.streams import (
    EventStream,
    cancelled_error,
    event,
    submit,
    wait_for_images,
)
from koala.serving.decoder import Decoder
from koala.serving.errors import ApiError, to_api_error
from koala.serving.image_request import ImageRequest
from koala.serving.jobs.gallery_writer import encode, encode_and_store
from koala.serving.security import client_of
from koala.serving.service import Event, Service, Submission

router = APIRouter(prefix="/v1")
STARTED = int(time.time())
MOST_FIELDS = 64  # of a form


class LoraScale(BaseModel):
    """A LoRA in the server's folder, and its scale."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    scale: float = 1.0


class GenerationRequest(BaseModel):
    """The fields that generations and edits share."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: str | None = None
    response_format: str | None = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    background: str | None = None
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = None
    style: Literal["vivid", "natural"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_until: float | None = None
    negative_prompt: str | None = None
    scheduler: str | None = None
    lora: Annotated[list[LoraScale], Field(max_length=8)] | None = None

    def check(self, service: Service) -> None:
        """Raises ApiError for what this server cannot do."""
        if self.model not in (None, service.pipeline.name):
            raise ApiError(
                404, f"unknown model {self.model!r}: this server has {service.pipeline.name!r}",
                "model_not_found", "model",
            )  # fmt: skip
        if self.response_format not in (None, "b64_json"):
            raise ApiError(
                400, f"response_format {self.response_format!r}: allowed is b64_json",
                "invalid_value", "response_format",
            )  # fmt: skip
        if self.background not in (None, "auto", "opaque"):
            raise ApiError(
                400, f"background {self.background!r}: images are opaque; leave it out",
                "invalid_value", "background",
            )  # fmt: skip
        if self.format == "png" and self.output_compression not in (None, 100):
            raise ApiError(
                400, "output_compression applies to webp and jpeg: leave it out for png",
                "invalid_value", "output_compression",
            )  # fmt: skip
        if self.partial_images and not self.stream:
            raise ApiError(
                400, "partial_images needs stream: set stream to true", "invalid_value",
                "partial_images",
            )  # fmt: skip

    @property
    def format(self) -> str:
        return self.output_format or "png"

    def to_image_request(self, client: str) -> ImageRequest:
        """Converts the fields."""
        optional: dict[str, Any] = {
            "negative_prompt": self.negative_prompt, "steps": self.steps,
            "guidance": self.guidance, "guidance_until": self.guidance_until,
            "scheduler": self.scheduler, "number": self.n, "seed": self.seed,
            "size": None if self.size == "auto" else self.size,
        }  # fmt: skip
        loras = tuple((each.name, each.scale) for each in self.lora or ())
        given = {name: value for name, value in optional.items() if value is not None}
        return ImageRequest(self.prompt, client=client, loras=loras, **given)


class EditRequest(GenerationRequest):
    """The fields of an edit, without its files."""

    strength: float | None = None
    input_fidelity: Literal["high", "low"] | None = None


@router.get("/models", summary="The served model")
async def models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model(request.app.state.service)]}


@router.get("/models/{name:path}", summary="One model")
async def model(name: str, request: Request) -> dict[str, Any]:
    found = _model(request.app.state.service)
    if name != found["id"]:
        raise ApiError(404, f"unknown model {name!r}", "model_not_found", "model")
    return found


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.pipeline.name, "object": "model", "created": STARTED, "owned_by": "koala",
        "loras": service.loras(), "size": f"{service.native}x{service.native}",
    }  # fmt: skip


@router.post("/images/generations", summary="Generate images")
async def generations(body: GenerationRequest, request: Request) -> Response:
    body.check(request.app.state.service)
    return await _respond(
        request, body, body.to_image_request(client_of(request)), "image_generation"
    )


def _form_schema() -> dict[str, Any]:
    """The form of an edit, for the OpenAPI document."""
    schema = EditRequest.model_json_schema()
    schema.pop("$defs", None)
    file = {"type": "string", "format": "binary"}
    lora = {"type": "string", "description": "JSON: a list of objects with name and scale"}
    schema["properties"] |= {"image": file, "mask": file, "lora": lora}
    schema["required"] = ["image", "prompt"]
    content = {"multipart/form-data": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


@router.post("/images/edits", summary="Edit an image", openapi_extra=_form_schema())
async def edits(request: Request) -> Response:
    service: Service = request.app.state.service
    fields, files = await _form(request)
    body = EditRequest.model_validate(fields, strict=False)
    body.check(service)
    if "image" not in files:
        raise ApiError(400, "image is missing", "missing_parameter", "image")
    spec = replace(
        body.to_image_request(client_of(request)), image=files["image"], strength=body.strength
    )
    if "mask" in files:
        most = service.limits.upload_pixels
        decoder: Decoder = request.app.state.decoder
        mask = await decoder.run(uploads.mask_of_transparency, files["mask"], most)
        spec = replace(spec, mask=mask, strength=body.strength or 1.0)
    return await _respond(request, body, spec, "image_edit")


async def _form(request: Request) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A form's fields and files. ApiError for duplicates and wrong kinds."""
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=4, max_fields=MOST_FIELDS) as form:
        for name, value in form.multi_items():
            key = name.removesuffix("[]")
            if isinstance(value, UploadFile) != (key in ("image", "mask")):
                kind = "a file" if key in ("image", "mask") else "text"
                raise ApiError(400, f"{key} must be {kind}", "invalid_value", key)
            if isinstance(value, UploadFile):
                if key in files:
                    raise ApiError(400, f"{key} is given twice: give one", "invalid_value", key)
                files[key] = await value.read()
            elif name in ("lora[][name]", "lora[][scale]"):
                fields.setdefault(name, []).append(value)
            elif key in fields:
                raise ApiError(400, f"{key} is given twice: give one", "invalid_value", key)
            elif value != "":
                fields[key] = value
    return _with_loras(fields), files


def _with_loras(fields: dict[str, Any]) -> dict[str, Any]:
    """Parses `lora`: JSON, or item by item as OpenAI's client sends it."""
    names, scales = (fields.pop(f"lora[][{part}]", []) for part in ("name", "scale"))
    if names or scales:
        if scales and len(scales) != len(names):
            raise ApiError(400, "lora: give every LoRA a scale, or none", "invalid_value", "lora")
        pairs = zip(names, scales or ["1"] * len(names), strict=True)
        fields["lora"] = [{"name": name, "scale": scale} for name, scale in pairs]
    elif "lora" in fields:
        try:
            fields["lora"] = json.loads(fields["lora"])
        except (ValueError, RecursionError):
            raise ApiError(400, "lora is not valid JSON", "invalid_value", "lora") from None
    return fields


# --- responses ------------------------------------------------------------------------------


async def _respond(
    request: Request, body: GenerationRequest, spec: ImageRequest, what: str
) -> Response:
    service: Service = request.app.state.service
    if body.stream:
        return await _stream(request, body, spec, what)
    submission = await submit(request, spec)
    images = await wait_for_images(request, service, submission)
    data = [
        {"b64_json": await _base64(request, body, image, submission, i)}
        for i, image in enumerate(images)
    ]
    return JSONResponse({**_described(body, submission), "data": data, "usage": _usage(submission)})


async def _base64(
    request: Request,
    body: GenerationRequest,
    image: Image.Image,
    submission: Submission,
    index: int,
) -> str:
    settings = submission.requests[index].settings
    data = await asyncio.to_thread(
        encode_and_store, request.app.state.gallery_writer, image, settings, client_of(request),
        body.format, body.output_compression,
    )  # fmt: skip
    return base64.b64encode(data).decode()


def _described(body: GenerationRequest, submission: Submission) -> dict[str, Any]:
    settings = submission.requests[0].settings
    return {
        "created": int(time.time()), "background": "opaque", "output_format": body.format,
        "quality": body.quality or "auto", "size": f"{settings.width}x{settings.height}",
        "seed": settings.seed,
    }  # fmt: skip


def _usage(submission: Submission) -> dict[str, Any]:
    """Counts words as text tokens and latent positions as image tokens."""
    first = submission.requests[0]
    text = len(first.settings.prompt.split())
    given = first.pixels // 64 if first.image is not None else 0
    made = sum(request.pixels // 64 for request in submission.requests)
    return {
        "input_tokens": text + given, "output_tokens": made, "total_tokens": text + given + made,
        "input_tokens_details": {"text_tokens": text, "image_tokens": given},
    }  # fmt: skip


# --- streams --------------------------------------------------------------------------------


async def _stream(
    request: Request, body: GenerationRequest, spec: ImageRequest, what: str
) -> Response:
    """Streams partial images, then each finished image."""
    loop, coming = asyncio.get_running_loop(), asyncio.Queue[tuple[Event, Image.Image | None]]()
    partial_images = body.partial_images or 0

    def on_event(seen: Event) -> None:
        shown = seen.kind == "step" and seen.done in _preview_steps(seen.steps, partial_images)
        if shown or seen.kind in ("picture", "failed", "cancelled"):
            preview = seen.preview() if shown and seen.preview else None
            loop.call_soon_threadsafe(coming.put_nowait, (seen, preview))

    submission = await submit(request, spec, on_event)
    return EventStream(_events(request, body, what, submission, coming))


def _preview_steps(steps: int, partial_images: int) -> set[int]:
    """The steps after which a partial image is sent: the second, then evenly spaced."""
    first = min(2, steps - 1)
    if not partial_images or first < 1:
        return set()
    return {first + round(i * (steps - 1 - first) / partial_images) for i in range(partial_images)}


async def _events(
    request: Request, body: GenerationRequest, what: str, submission: Submission,
    coming: "asyncio.Queue[tuple[Event, Image.Image | None]]",
) -> AsyncGenerator[bytes, None]:  # fmt: skip
    service: Service = request.app.state.service
    futures, partials = submission.futures(), [0] * len(submission.requests)
    left = len(futures)

    def message(kind: str, index: int, **more: Any) -> bytes:
        described = _described(body, submission)
        described["created_at"] = described.pop("created")
        settings = submission.requests[index].settings
        name = f"{what}.{kind}"
        return event(name, {"type": name, **described, "seed": settings.seed, **more})

    try:
        while left:
            seen, preview = await coming.get()
            i = seen.index
            if preview is not None:
                data = await asyncio.to_thread(_enlarged, preview, submission.requests[i], body)
                yield message("partial_image", i, b64_json=data, partial_image_index=partials[i])
                partials[i] += 1
                continue
            left -= 1
            if seen.kind != "picture":
                error = (
                    futures[i].exception() if seen.kind == "failed" else cancelled_error(service)
                )
                assert error is not None
                yield event("error", to_api_error(error).body())
                return
            data = await _base64(request, body, futures[i].result(), submission, i)
            yield message("completed", i, b64_json=data, usage=_usage(submission))
    finally:
        submission.cancel()


def _enlarged(preview: Image.Image, request: EngineRequest, body: GenerationRequest) -> str:
    """A preview, enlarged to the image's size, as base64."""
    size = (request.settings.width, request.settings.height)
    image = preview.resize(size, Image.Resampling.BICUBIC)
    return base64.b64encode(encode(image, None, body.format, body.output_compression)).decode()
