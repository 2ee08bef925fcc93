"""/v1/jobs and /v1/gallery: work that outlives its client, and what came of all work."""

import base64
import io
from collections.abc import AsyncGenerator
from dataclasses import fields
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from koala.serving.api.openai import Worn
from koala.serving.api.streams import EventStream, event
from koala.serving.errors import Refusal
from koala.serving.image_request import PICTURES, Order
from koala.serving.jobs import serialise
from koala.serving.jobs.database import ID
from koala.serving.jobs.gallery import Gallery
from koala.serving.jobs.jobs import Jobs
from koala.serving.jobs.listeners import Listener
from koala.serving.security import client_of
from koala.serving.uploads import from_text

router = APIRouter(prefix="/v1")
KEPT = {"Cache-Control": "private, max-age=86400, immutable", "X-Content-Type-Options": "nosniff"}

Limit = Annotated[int, Query(ge=1, le=200)]
Before = Annotated[str | None, Query(pattern=f"^{ID.pattern}$", description="an id: only older")]


class Asked(BaseModel):
    """A job. What is left out is as in `koala generate`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str
    negative_prompt: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: str | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_until: float | None = None
    scheduler: str | None = None
    seed: int | None = None
    image: Annotated[str, Field(description="base64 or a data: URL")] | None = None
    mask: Annotated[str, Field(description="base64 or a data: URL; light is drawn anew")] | None = (
        None
    )
    strength: float | None = None
    lora: list[Worn] | None = None
    priority: Literal["interactive", "batch"] | None = None
    deadline: Annotated[float, Field(description="seconds from now")] | None = None

    def order(self, client: str) -> Order:
        """The same for the service. UserError for pictures that are no base64."""
        said = {name: value for name, value in self if value is not None}
        values = {name: said[name] for name in said.keys() & {one.name for one in fields(Order)}}
        values |= {name: from_text(said[name], name) for name in PICTURES if name in said}
        values["number"] = self.n or 1
        values["loras"] = tuple((each.name, each.scale) for each in self.lora or ())
        values["priority"] = serialise.PRIORITIES.index(self.priority or "interactive")
        if self.size == "auto":
            del values["size"]
        return Order(**values, client=client)


def owner_of(request: Request) -> str | None:
    """Whose jobs and pictures are there for a request: where keys are in use, the client's own."""
    return client_of(request) if request.app.state.options.api_key_file else None


def _found(found: Any, what: str, id: str) -> Any:
    if found is None or found is False:
        raise Refusal(404, f"there is no {what} {id!r}", "not_found", "id")
    return found


# --- jobs -----------------------------------------------------------------------------------


@router.post("/jobs", status_code=202, summary="Have pictures drawn, whether or not one waits")
def submit(asked: Asked, request: Request) -> dict[str, Any]:
    jobs: Jobs = request.app.state.jobs
    return jobs.submit(asked.order(client_of(request)))


@router.get("/jobs", summary="Jobs, newest first")
def page(request: Request, limit: Limit = 50, before: Before = None) -> dict[str, Any]:
    jobs: Jobs = request.app.state.jobs
    return {"object": "list", "data": jobs.page(limit, before, owner_of(request))}


@router.get("/jobs/{id}", summary="One job")
def get(id: str, request: Request) -> dict[str, Any]:
    jobs: Jobs = request.app.state.jobs
    return _found(jobs.get(id, owner_of(request)), "job", id)


@router.post("/jobs/{id}/cancel", summary="End a job")
def cancel(id: str, request: Request) -> dict[str, Any]:
    jobs: Jobs = request.app.state.jobs
    return _found(jobs.cancel(id, owner_of(request)), "job", id)


@router.get(
    "/jobs/{id}/events",
    summary="Follow a job",
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def events(id: str, request: Request) -> EventStream:
    """The present state, then what happens: status, progress, preview, picture; last `end`."""
    jobs: Jobs = request.app.state.jobs
    owner = owner_of(request)
    _found(await run_in_threadpool(jobs.get, id, owner), "job", id)
    return EventStream(_events(jobs, id, owner))


async def _events(jobs: Jobs, id: str, owner: str | None) -> AsyncGenerator[bytes, None]:
    listener = Listener()
    await run_in_threadpool(jobs.follow, id, listener)
    try:
        job = await run_in_threadpool(jobs.get, id, owner)
        yield event("status", job or {})
        shown = {one["id"] for one in job["pictures"]} if job else set()
        while job and job["status"] in ("queued", "running"):
            for what, index, value in await listener.news():
                if what == "closed":
                    return
                if what == "preview":
                    data = await run_in_threadpool(_small, value)
                    yield event("preview", {"index": index, "b64_json": data})
                    continue
                job = await run_in_threadpool(jobs.get, id, owner)
                if job is None:
                    return
                for new in (one for one in job["pictures"] if one["id"] not in shown):
                    shown.add(new["id"])
                    yield event("picture", {"index": new["index"], "picture": new})
                if what == "progress":
                    yield event("progress", {**job["progress"], "position": job["position"]})
                elif what == "status":
                    yield event("status", job)
        if job:
            yield event("end", job)
    finally:
        jobs.leave(id, listener)


def _small(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return base64.b64encode(file.getvalue()).decode()


# --- the gallery ----------------------------------------------------------------------------


@router.get("/gallery", summary="Pictures, newest first")
def pictures(request: Request, limit: Limit = 60, before: Before = None) -> dict[str, Any]:
    gallery: Gallery = request.app.state.gallery
    found = gallery.page(limit, before, owner_of(request))
    return {"object": "list", "data": [serialise.picture(one) for one in found]}


@router.get("/gallery/{id}", summary="One picture's settings")
def picture(id: str, request: Request) -> dict[str, Any]:
    gallery: Gallery = request.app.state.gallery
    return serialise.picture(_found(gallery.get(id, owner_of(request)), "picture", id))


@router.get(
    "/gallery/{id}/image",
    summary="One picture as PNG, settings inside",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}},
)
def image(id: str, request: Request) -> Response:
    gallery: Gallery = request.app.state.gallery
    found = _found(gallery.png(id, owner_of(request)), "picture", id)
    return Response(found, media_type="image/png", headers=KEPT)


@router.get(
    "/gallery/{id}/thumbnail",
    summary="One picture, small",
    response_class=Response,
    responses={200: {"content": {"image/webp": {}}}},
)
def thumbnail(id: str, request: Request) -> Response:
    gallery: Gallery = request.app.state.gallery
    found = _found(gallery.thumbnail(id, owner_of(request)), "picture", id)
    return Response(found, media_type="image/webp", headers=KEPT)


@router.delete("/gallery/{id}", summary="Delete a picture")
def delete(id: str, request: Request) -> dict[str, Any]:
    gallery: Gallery = request.app.state.gallery
    _found(gallery.remove(id, owner_of(request)), "picture", id)
    return {"id": id, "object": "picture", "deleted": True}
