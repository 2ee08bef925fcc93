"""OpenAI's images API: https://platform.openai.com/docs/api-reference/images."""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image

from koala.generation import Request as EngineRequest
from koala.generation.requests import Known
from koala.serving import json_bodies, uploads
from koala.serving.api.openai_bodies import fields_and_images
from koala.serving.api.openai_fields import EditRequest, GenerationRequest, VariationRequest
from koala.serving.api.streams import (
    EventStream,
    cancelled_error,
    event,
    submit,
    wait_for_images,
)
from koala.serving.content_filter import HeldBackError
from koala.serving.errors import ApiError, to_api_error
from koala.serving.fit import note, shown_size
from koala.serving.image_request import ImageRequest
from koala.serving.jobs.gallery import Gallery
from koala.serving.jobs.gallery_writer import encode, encode_and_store
from koala.serving.json_bodies import JsonRoute
from koala.serving.links import Links
from koala.serving.security import client_of, root_of
from koala.serving.service import Event, Service, Submission
from koala.serving.upload_thread import UploadThread

router = APIRouter(prefix="/v1", route_class=JsonRoute)
STARTED = int(time.time())
# OpenAI's models for which an image's own transparency is no mask; for dall-e-2 it is.
WITHOUT_HOLES = ("gpt-image", "chatgpt-image")


@router.get("/models", summary="The served model")
async def models(request: Request) -> dict[str, Any]:
    data = [_model(request.app.state.service, name) for name in _names(request)]
    return {"object": "list", "data": data}


@router.get("/models/{name:path}", summary="One model")
async def model(name: str, request: Request) -> dict[str, Any]:
    if name not in _names(request):
        raise ApiError(404, f"unknown model {name!r}", "model_not_found", "model")
    return _model(request.app.state.service, name)


def _names(request: Request) -> tuple[str, ...]:
    """The names of the served model."""
    return (request.app.state.service.pipeline.name, *request.app.state.options.model_aliases)


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": STARTED, "owned_by": "koala",
        "loras": service.loras(), "size": f"{service.native}x{service.native}",
    }  # fmt: skip


@router.post("/images/generations", summary="Generate images")
async def generations(body: GenerationRequest, request: Request) -> Response:
    return await _respond(request, body, to_spec(request, body), "image_generation")


def to_spec(request: Request, body: GenerationRequest) -> ImageRequest:
    """The checked fields as a request. ApiError."""
    name, *aliases = _names(request)
    body.check(name, tuple(aliases))
    return body.to_image_request(client_of(request), dict(request.app.state.options.quality_steps))


def _form_schema(fields: type[EditRequest]) -> dict[str, Any]:
    """A form with images, for the OpenAPI document."""
    schema = fields.model_json_schema()
    schema.pop("$defs", None)
    file = {"type": "string", "format": "binary"}
    lora = {"type": "string", "description": "JSON: a list of objects with name and scale"}
    schema["properties"] |= {"image": file, "mask": file, "lora": lora}
    schema["required"] = ["image", *schema.get("required", ())]
    content = {"multipart/form-data": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


@router.post("/images/edits", summary="Edit an image", openapi_extra=_form_schema(EditRequest))
async def edits(request: Request) -> Response:
    fields, files = await fields_and_images(request)
    body = EditRequest.model_validate(fields)
    image, mask = _image(files), files.get("mask")
    if mask is None and not (body.model or "").startswith(WITHOUT_HOLES):
        thread: UploadThread = request.app.state.upload_thread
        most = request.app.state.service.limits.upload_pixels
        mask = await thread.run(uploads.with_hole, image, most)
    spec = await edit_spec(request, body, image, mask)
    return await _respond(request, body, spec, "image_edit")


async def edit_spec(
    request: Request, body: EditRequest, image: bytes | None, mask: bytes | None
) -> ImageRequest:
    """The checked fields of an edit as a request; transparent in the mask: repaint. ApiError."""
    spec = replace(
        to_spec(request, body), image=image, strength=body.strength,
        mask_blur=body.mask_blur, mask_fill=body.mask_fill,
    )  # fmt: skip
    if mask is None:
        return spec
    most = request.app.state.service.limits.upload_pixels
    thread: UploadThread = request.app.state.upload_thread
    light = await thread.run(uploads.mask_of_transparency, mask, most)
    return replace(spec, mask=light, strength=1.0 if body.strength is None else body.strength)


@router.post(
    "/images/variations", summary="Vary an image", openapi_extra=_form_schema(VariationRequest)
)
async def variations(request: Request) -> Response:
    fields, files = await fields_and_images(request)
    body = VariationRequest.model_validate(fields)
    image = _image(files)
    if "mask" in files:
        raise ApiError(400, "mask is for edits: leave it out", "unknown_parameter", "mask")
    spec = to_spec(request, body)
    thread: UploadThread = request.app.state.upload_thread
    most = request.app.state.service.limits.upload_pixels
    prompt = spec.prompt or await thread.run(_prompt_of, image, most)
    spec = replace(spec, prompt=prompt, image=image, strength=body.strength)
    return await _respond(request, body, spec, "image_edit")


def _image(files: dict[str, bytes]) -> bytes:
    if "image" not in files:
        raise ApiError(400, "image is missing", "missing_parameter", "image")
    return files["image"]


def _prompt_of(data: bytes, most_pixels: int) -> str:
    """The prompt that koala drew the image from, or else a word for any. UserError."""
    text = uploads.open_upload(data, most_pixels).info.get("koala")
    try:
        prompt = json_bodies.parse(text)["prompt"] if isinstance(text, str) else ""
    except (ApiError, KeyError, TypeError):
        prompt = ""
    return prompt if isinstance(prompt, str) and prompt else "picture"


@router.get(
    "/images/files/{id}.png",
    summary="An image at a signed address",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}},
)
def image_file(id: str, request: Request, expires: int = 0, signature: str = "") -> Response:
    links: Links = request.app.state.links
    found = request.app.state.gallery.png(id) if links.good(id, expires, signature) else None
    if found is None:
        raise ApiError(404, "the address has expired, or never was one", "not_found")
    return Response(found, media_type="image/png", headers={"Cache-Control": "private"})


# --- responses ------------------------------------------------------------------------------


async def _respond(
    request: Request, body: GenerationRequest, spec: ImageRequest, what: str
) -> Response:
    service: Service = request.app.state.service
    if body.stream:
        return await _stream(request, body, spec, what)
    submission = await submit(request, spec)
    images = await wait_for_images(request, service, submission)
    data = [await _datum(request, body, image, submission, i) for i, image in enumerate(images)]
    return JSONResponse(
        {
            **described(body, submission, service.pipeline.known),
            "data": data,
            "usage": usage(submission),
        }
    )


async def _datum(
    request: Request, body: GenerationRequest, image: Image.Image, submission: Submission, i: int
) -> dict[str, str]:
    """An image as the response holds it: its bytes, or its address in the gallery."""
    if not body.linked:
        return {"b64_json": await as_base64(request, body, image, submission, i)}
    gallery: Gallery = request.app.state.gallery
    settings = submission.requests[i].settings
    stored = await asyncio.to_thread(gallery.add, image, settings, client_of(request))
    return {"url": root_of(request) + request.app.state.links.path(stored.id)}


async def as_base64(
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


def described(body: GenerationRequest, submission: Submission, known: Known) -> dict[str, Any]:
    settings = submission.requests[0].settings
    return {
        "created": int(time.time()), "background": "opaque", "output_format": body.format,
        "quality": body.quality or "auto", "size": "{}x{}".format(*shown_size(settings)),
        "seed": settings.seed, "note": note(settings, known),
    }  # fmt: skip


def usage(submission: Submission) -> dict[str, Any]:
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
        preview = None
        if seen.preview and seen.done in _preview_steps(seen.steps, partial_images):
            preview = seen.preview()
        if preview is not None or seen.kind in ("picture", "failed", "cancelled"):
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
        told = described(body, submission, service.pipeline.known)
        told["created_at"] = told.pop("created")
        settings = submission.requests[index].settings
        name = f"{what}.{kind}"
        return event(name, {"type": name, **told, "seed": settings.seed, **more})

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
            try:
                image = await asyncio.wrap_future(futures[i])
            except HeldBackError as error:
                yield event("error", to_api_error(error).body())
                return
            data = await as_base64(request, body, image, submission, i)
            yield message("completed", i, b64_json=data, usage=usage(submission))
    finally:
        submission.cancel()


def _enlarged(preview: Image.Image, request: EngineRequest, body: GenerationRequest) -> str:
    """A preview, enlarged to the image's size, as base64."""
    image = preview.resize(shown_size(request.settings), Image.Resampling.BICUBIC)
    return base64.b64encode(encode(image, None, body.format, body.output_compression)).decode()
