"""/v1/jobs and /v1/gallery: jobs that outlive their client, and all finished images."""

import base64
import io
from collections.abc import AsyncGenerator
from dataclasses import fields
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from koala.serving.api.openai_fields import LoraScale
from koala.serving.api.streams import EventStream, event
from koala.serving.api.values import Number, SamplerName, Size, Whole, told
from koala.serving.errors import ApiError
from koala.serving.image_request import IMAGES, ImageRequest
from koala.serving.jobs import serialise
from koala.serving.jobs.database import ID
from koala.serving.jobs.gallery import Gallery
from koala.serving.jobs.jobs import Jobs
from koala.serving.jobs.subscribers import Subscriber
from koala.serving.json_bodies import JsonRoute
from koala.serving.security import client_of
from koala.serving.upload_thread import UploadThread
from koala.serving.uploads import decode_base64

router = APIRouter(prefix="/v1", route_class=JsonRoute)
CACHED = {"Cache-Control": "private, max-age=86400, immutable", "X-Content-Type-Options": "nosniff"}

Limit = Annotated[int, Query(ge=1, le=200)]
Before = Annotated[
    str | None, Query(pattern=f"^{ID.pattern}$", description="an id; lists older entries only")
]
Search = Annotated[str | None, Query(max_length=200, description="text that the prompt holds")]


class JobRequest(BaseModel):
    """The fields of a job. Defaults are those of `koala generate`."""

    model_config = ConfigDict(extra="forbid")
    prompt: str
    negative_prompt: str | None = None
    n: Annotated[Whole, Field(ge=1)] | None = None
    size: Size = None
    steps: Whole | None = None
    guidance: Number | None = None
    guidance_until: Number | None = None
    guidance_rescale: Number | None = None
    scheduler: SamplerName = None
    seed: Whole | None = None
    image: Annotated[str, Field(description="base64 or a data: URL")] | None = None
    mask: (
        Annotated[
            str, Field(description="base64 or a data: URL; light or transparent is repainted")
        ]
        | None
    ) = None
    mask_blur: Whole | None = None
    mask_fill: str | None = None
    strength: Number | None = None
    lora: Annotated[list[LoraScale], Field(max_length=8)] | None = None
    fit: bool | None = None
    priority: Literal["interactive", "batch"] | None = None
    deadline: Annotated[Number, Field(description="seconds from now")] | None = None

    @model_validator(mode="before")
    @classmethod
    def _told(cls, given: Any) -> Any:
        return told(given) if isinstance(given, dict) else given

    def to_image_request(self, client: str) -> ImageRequest:
        """Converts the fields. UserError for images that are not base64."""
        names = {one.name for one in fields(ImageRequest)}
        values = {name: value for name, value in self if value is not None and name in names}
        values |= {name: decode_base64(values[name], name) for name in IMAGES if name in values}
        values["number"] = self.n or 1
        values["loras"] = tuple((each.name, each.scale) for each in self.lora or ())
        values["priority"] = serialise.PRIORITIES.index(self.priority or "interactive")
        if self.size == "auto":
            del values["size"]
        return ImageRequest(**values, client=client)


async def _jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs


async def _gallery(request: Request) -> Gallery:
    gallery: Gallery = request.app.state.gallery
    return gallery


async def _owner(request: Request) -> str | None:
    """With API keys, the client whose jobs and images a request may see; else None, for all."""
    return client_of(request) if request.app.state.options.api_key_file else None


OurJobs = Annotated[Jobs, Depends(_jobs)]
OurGallery = Annotated[Gallery, Depends(_gallery)]
Owner = Annotated[str | None, Depends(_owner)]


def only(*names: str) -> Any:
    """A route's dependency that refuses every other parameter of the query."""

    def check(request: Request) -> None:
        if other := sorted({*request.query_params} - {*names}):
            raise ApiError(
                400, f"unknown parameter {other[0]!r}: allowed are {', '.join(names)}",
                "unknown_parameter", other[0],
            )  # fmt: skip

    return Depends(check)


def _found(found: Any, what: str, id: str) -> Any:
    if found is None or found is False:
        raise ApiError(404, f"no {what} has the id {id!r}", "not_found", "id")
    return found


# --- jobs -----------------------------------------------------------------------------------


@router.post("/jobs", status_code=202, summary="Submit a job")
async def submit(body: JobRequest, request: Request, jobs: OurJobs) -> dict[str, Any]:
    spec = await run_in_threadpool(body.to_image_request, client_of(request))
    if spec.image is None:
        return await run_in_threadpool(jobs.submit, spec)
    thread: UploadThread = request.app.state.upload_thread
    return await thread.run(jobs.submit, spec)


@router.get("/jobs", summary="Jobs, newest first", dependencies=[only("limit", "before")])
def page(jobs: OurJobs, owner: Owner, limit: Limit = 50, before: Before = None) -> dict[str, Any]:
    return {"object": "list", "data": jobs.page(limit, before, owner)}


@router.get("/jobs/{id}", summary="One job")
def get(id: str, jobs: OurJobs, owner: Owner) -> dict[str, Any]:
    return _found(jobs.get(id, owner), "job", id)


@router.post("/jobs/{id}/cancel", summary="Cancel a job")
def cancel(id: str, jobs: OurJobs, owner: Owner) -> dict[str, Any]:
    return _found(jobs.cancel(id, owner), "job", id)


@router.get(
    "/jobs/{id}/events",
    summary="Follow a job",
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def events(id: str, jobs: OurJobs, owner: Owner) -> EventStream:
    """Server-sent events: status, progress, preview, picture; `end` comes last."""
    _found(await run_in_threadpool(jobs.get, id, owner), "job", id)
    return EventStream(_events(jobs, id, owner))


async def _events(jobs: Jobs, id: str, owner: str | None) -> AsyncGenerator[bytes, None]:
    subscriber = Subscriber()
    await run_in_threadpool(jobs.subscribe, id, subscriber)
    try:
        job = await run_in_threadpool(jobs.get, id, owner)
        yield event("status", job or {})
        sent = {one["id"] for one in job["pictures"]} if job else set()
        while job and job["status"] in ("queued", "running"):
            for what, index, value in await subscriber.updates():
                if what == "closed":
                    return
                if what == "preview":
                    data = await run_in_threadpool(_webp, value)
                    yield event("preview", {"index": index, "b64_json": data})
                    continue
                job = await run_in_threadpool(jobs.get, id, owner)
                if job is None:
                    return
                for new in (one for one in job["pictures"] if one["id"] not in sent):
                    sent.add(new["id"])
                    yield event("picture", {"index": new["index"], "picture": new})
                if what == "progress":
                    yield event("progress", {**job["progress"], "position": job["position"]})
                elif what == "status":
                    yield event("status", job)
        if job:
            yield event("end", job)
    finally:
        jobs.unsubscribe(id, subscriber)


def _webp(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return base64.b64encode(file.getvalue()).decode()


# --- the gallery ----------------------------------------------------------------------------


@router.get(
    "/gallery",
    summary="Finished images, newest first",
    dependencies=[only("limit", "before", "search")],
)
def list_images(
    gallery: OurGallery, owner: Owner, limit: Limit = 60, before: Before = None,
    search: Search = None,
) -> dict[str, Any]:  # fmt: skip
    found = gallery.page(limit, before, owner, search)
    return {"object": "list", "data": [serialise.image(one) for one in found]}


@router.get("/gallery/{id}", summary="One image's settings")
def image_settings(id: str, gallery: OurGallery, owner: Owner) -> dict[str, Any]:
    return serialise.image(_found(gallery.get(id, owner), "picture", id))


@router.get(
    "/gallery/{id}/image",
    summary="One image as PNG with its settings",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}},
)
def image_png(id: str, gallery: OurGallery, owner: Owner) -> Response:
    found = _found(gallery.png(id, owner), "picture", id)
    return Response(found, media_type="image/png", headers=CACHED)


@router.get(
    "/gallery/{id}/thumbnail",
    summary="A WebP thumbnail",
    response_class=Response,
    responses={200: {"content": {"image/webp": {}}}},
)
def thumbnail(id: str, gallery: OurGallery, owner: Owner) -> Response:
    found = _found(gallery.thumbnail(id, owner), "picture", id)
    return Response(found, media_type="image/webp", headers=CACHED)


@router.delete("/gallery/{id}", summary="Delete an image")
def delete(id: str, gallery: OurGallery, owner: Owner) -> dict[str, Any]:
    _found(gallery.remove(id, owner), "picture", id)
    return {"id": id, "object": "picture", "deleted": True}
