"""OpenAI's images API: what its clients send is taken, or refused by name, never ignored silently.

https://platform.openai.com/docs/api-reference/images. `quality`, `style`, `moderation`, `user`,
`safety_identifier` and `input_fidelity` are checked and have no effect here. Besides OpenAI's
there are fields of our own: seed, steps, guidance, guidance_until, negative_prompt, scheduler,
strength, lora.
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

from koala.generation import Request as Drawn
from koala.serving import uploads
from koala.serving.api.streams import EventStream, cancelled, drawn, event
from koala.serving.errors import Refusal, refusal
from koala.serving.image_request import Order
from koala.serving.jobs.delivery import deliver, encoded
from koala.serving.security import client_of
from koala.serving.service import Drawing, Event, Service

router = APIRouter(prefix="/v1")
STARTED = int(time.time())
MOST_FIELDS = 64  # of a form


class Worn(BaseModel):
    """A LoRA of the server's folder, and its scale."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    scale: float = 1.0


class Generation(BaseModel):
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
    lora: Annotated[list[Worn], Field(max_length=8)] | None = None

    def check(self, service: Service) -> None:
        """Refuses what this server cannot do, in words that say what it can."""
        if self.model not in (None, service.pipeline.name):
            raise Refusal(
                404, f"model {self.model!r} is not here: this server has {service.pipeline.name!r}",
                "model_not_found", "model",
            )  # fmt: skip
        if self.response_format not in (None, "b64_json"):
            raise Refusal(
                400, f"response_format {self.response_format!r}: only b64_json is given out",
                "invalid_value", "response_format",
            )  # fmt: skip
        if self.background not in (None, "auto", "opaque"):
            raise Refusal(
                400, f"background {self.background!r}: the model draws opaque pictures; leave it "
                "out", "invalid_value", "background",
            )  # fmt: skip
        if self.format == "png" and self.output_compression not in (None, 100):
            raise Refusal(
                400, "output_compression is for webp and jpeg: leave it out for png",
                "invalid_value", "output_compression",
            )  # fmt: skip
        if self.partial_images and not self.stream:
            raise Refusal(
                400, "partial_images come in a stream only: say stream as well", "invalid_value",
                "partial_images",
            )  # fmt: skip

    @property
    def format(self) -> str:
        return self.output_format or "png"

    def order(self, client: str) -> Order:
        """The same for the service."""
        given: dict[str, Any] = {
            "negative_prompt": self.negative_prompt, "steps": self.steps,
            "guidance": self.guidance, "guidance_until": self.guidance_until,
            "scheduler": self.scheduler, "number": self.n, "seed": self.seed,
            "size": None if self.size == "auto" else self.size,
        }  # fmt: skip
        loras = tuple((each.name, each.scale) for each in self.lora or ())
        said = {name: value for name, value in given.items() if value is not None}
        return Order(self.prompt, client=client, loras=loras, **said)


class Edit(Generation):
    """The fields of an edit that are no files."""

    strength: float | None = None
    input_fidelity: Literal["high", "low"] | None = None


@router.get("/models", summary="The model that is served")
async def models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model(request.app.state.service)]}


@router.get("/models/{name:path}", summary="One model")
async def model(name: str, request: Request) -> dict[str, Any]:
    found = _model(request.app.state.service)
    if name != found["id"]:
        raise Refusal(404, f"there is no model {name!r}", "model_not_found", "model")
    return found


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.pipeline.name, "object": "model", "created": STARTED, "owned_by": "koala",
        "loras": service.loras(), "size": f"{service.native}x{service.native}",
    }  # fmt: skip


@router.post("/images/generations", summary="Draw pictures")
async def generations(asked: Generation, request: Request) -> Response:
    asked.check(request.app.state.service)
    return await _answer(request, asked, asked.order(client_of(request)), "image_generation")


def _form_schema() -> dict[str, Any]:
    """An edit's form, for the OpenAPI document."""
    schema = Edit.model_json_schema()
    schema.pop("$defs", None)
    file = {"type": "string", "format": "binary"}
    lora = {"type": "string", "description": "JSON: a list of objects with name and scale"}
    schema["properties"] |= {"image": file, "mask": file, "lora": lora}
    schema["required"] = ["image", "prompt"]
    content = {"multipart/form-data": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


@router.post("/images/edits", summary="Draw from a picture", openapi_extra=_form_schema())
async def edits(request: Request) -> Response:
    service: Service = request.app.state.service
    fields, files = await _form(request)
    asked = Edit.model_validate(fields, strict=False)
    asked.check(service)
    if "image" not in files:
        raise Refusal(400, "image is missing", "missing_parameter", "image")
    order = replace(asked.order(client_of(request)), image=files["image"], strength=asked.strength)
    if "mask" in files:
        most = service.limits.upload_pixels
        mask = await asyncio.to_thread(uploads.mask_of_transparency, files["mask"], most)
        order = replace(order, mask=mask, strength=asked.strength or 1.0)
    return await _answer(request, asked, order, "image_edit")


async def _form(request: Request) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A form's fields and files. Refusal for what is there twice or has the wrong kind."""
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=4, max_fields=MOST_FIELDS) as form:
        for name, value in form.multi_items():
            key = name.removesuffix("[]")
            if isinstance(value, UploadFile) != (key in ("image", "mask")):
                kind = "a file" if key in ("image", "mask") else "text"
                raise Refusal(400, f"{key} has to be {kind}", "invalid_value", key)
            if isinstance(value, UploadFile):
                if key in files:
                    raise Refusal(400, f"{key} is there twice: give one", "invalid_value", key)
                files[key] = await value.read()
            elif name in ("lora[][name]", "lora[][scale]"):
                fields.setdefault(name, []).append(value)
            elif key in fields:
                raise Refusal(400, f"{key} is there twice: give one", "invalid_value", key)
            elif value != "":
                fields[key] = value
    return _with_loras(fields), files


def _with_loras(fields: dict[str, Any]) -> dict[str, Any]:
    """`lora` as a list: given as JSON, or item by item as OpenAI's client does."""
    names, scales = (fields.pop(f"lora[][{part}]", []) for part in ("name", "scale"))
    if names or scales:
        if scales and len(scales) != len(names):
            raise Refusal(400, "lora: give every one a scale, or none", "invalid_value", "lora")
        pairs = zip(names, scales or ["1"] * len(names), strict=True)
        fields["lora"] = [{"name": name, "scale": scale} for name, scale in pairs]
    elif "lora" in fields:
        try:
            fields["lora"] = json.loads(fields["lora"])
        except (ValueError, RecursionError):
            raise Refusal(400, "lora is no JSON", "invalid_value", "lora") from None
    return fields


# --- answers --------------------------------------------------------------------------------


async def _answer(request: Request, asked: Generation, order: Order, what: str) -> Response:
    service: Service = request.app.state.service
    if asked.stream:
        return await _stream(request, asked, order, what)
    drawing = await asyncio.to_thread(service.submit, order)
    images = await drawn(request, service, drawing)
    data = [
        {"b64_json": await _delivered(request, asked, image, drawing, i)}
        for i, image in enumerate(images)
    ]
    return JSONResponse({**_described(asked, drawing), "data": data, "usage": _usage(drawing)})


async def _delivered(
    request: Request, asked: Generation, image: Image.Image, drawing: Drawing, index: int
) -> str:
    settings = drawing.requests[index].settings
    data = await asyncio.to_thread(
        deliver, request.app.state.keeper, image, settings, client_of(request), asked.format,
        asked.output_compression,
    )  # fmt: skip
    return base64.b64encode(data).decode()


def _described(asked: Generation, drawing: Drawing) -> dict[str, Any]:
    settings = drawing.requests[0].settings
    return {
        "created": int(time.time()), "background": "opaque", "output_format": asked.format,
        "quality": asked.quality or "auto", "size": f"{settings.width}x{settings.height}",
        "seed": settings.seed,
    }  # fmt: skip


def _usage(drawing: Drawing) -> dict[str, Any]:
    """What stands for tokens here: words, and for pictures places of the latent."""
    first = drawing.requests[0]
    text = len(first.settings.prompt.split())
    given = first.pixels // 64 if first.image is not None else 0
    made = sum(request.pixels // 64 for request in drawing.requests)
    return {
        "input_tokens": text + given, "output_tokens": made, "total_tokens": text + given + made,
        "input_tokens_details": {"text_tokens": text, "image_tokens": given},
    }  # fmt: skip


# --- streams --------------------------------------------------------------------------------


async def _stream(request: Request, asked: Generation, order: Order, what: str) -> Response:
    """Partial pictures while they are drawn, then each when it is done."""
    service: Service = request.app.state.service
    loop, coming = asyncio.get_running_loop(), asyncio.Queue[tuple[Event, Image.Image | None]]()
    partial_images = asked.partial_images or 0

    def told(seen: Event) -> None:
        shown = seen.kind == "step" and seen.done in _shown(seen.steps, partial_images)
        if shown or seen.kind in ("picture", "failed", "cancelled"):
            preview = seen.preview() if shown and seen.preview else None
            loop.call_soon_threadsafe(coming.put_nowait, (seen, preview))

    drawing = await asyncio.to_thread(service.submit, order, told)
    return EventStream(_events(request, asked, what, drawing, coming))


def _shown(steps: int, partial_images: int) -> set[int]:
    """After which steps a partial picture is sent: the first after two, the others evenly."""
    first = min(2, steps - 1)
    if not partial_images or first < 1:
        return set()
    return {first + round(i * (steps - 1 - first) / partial_images) for i in range(partial_images)}


async def _events(
    request: Request, asked: Generation, what: str, drawing: Drawing,
    coming: "asyncio.Queue[tuple[Event, Image.Image | None]]",
) -> AsyncGenerator[bytes, None]:  # fmt: skip
    service: Service = request.app.state.service
    futures, partials = drawing.futures(), [0] * len(drawing.requests)
    left = len(futures)

    def told(kind: str, index: int, **more: Any) -> bytes:
        described = _described(asked, drawing)
        described["created_at"] = described.pop("created")
        settings = drawing.requests[index].settings
        name = f"{what}.{kind}"
        return event(name, {"type": name, **described, "seed": settings.seed, **more})

    try:
        while left:
            seen, preview = await coming.get()
            i = seen.index
            if preview is not None:
                data = await asyncio.to_thread(_enlarged, preview, drawing.requests[i], asked)
                yield told("partial_image", i, b64_json=data, partial_image_index=partials[i])
                partials[i] += 1
                continue
            left -= 1
            if seen.kind != "picture":
                error = futures[i].exception() if seen.kind == "failed" else cancelled(service)
                assert error is not None
                yield event("error", refusal(error).body())
                return
            data = await _delivered(request, asked, futures[i].result(), drawing, i)
            yield told("completed", i, b64_json=data, usage=_usage(drawing))
    finally:
        drawing.cancel()


def _enlarged(preview: Image.Image, request: Drawn, asked: Generation) -> str:
    """A preview at the picture's size, base64."""
    size = (request.settings.width, request.settings.height)
    image = preview.resize(size, Image.Resampling.BICUBIC)
    return base64.b64encode(encoded(image, None, asked.format, asked.output_compression)).decode()
