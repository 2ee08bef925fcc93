"""/sdapi/v1: the part of AUTOMATIC1111's API that other programs call.

https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/API. Its progress and interrupt know
one picture at a time, the server's; here they are about the requests of the client that asks.
"""

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image

from koala import __version__
from koala.generation import Settings, samplers
from koala.generation.png import parameters
from koala.serving.api.a1111_fields import (
    OPTIONS,
    SCHEDULES,
    Asked,
    FromPicture,
    FromText,
    check_options,
    inverted,
)
from koala.serving.api.streams import cancelled, disconnected
from koala.serving.errors import Refusal
from koala.serving.image_request import Order
from koala.serving.jobs.delivery import deliver
from koala.serving.security import client_of
from koala.serving.service import Drawing, Event, Service
from koala.serving.uploads import open_upload

router = APIRouter(prefix="/sdapi/v1")
WATCHED = 5.0  # seconds after a look at the progress in which previews are made


@dataclass(eq=False)
class Work:
    """One request that is being drawn."""

    kind: str
    began: float = field(default_factory=time.time)
    drawing: Drawing | None = None
    interrupted: bool = False
    steps: int = 1  # of a picture
    done: dict[int, int] = field(default_factory=dict)  # steps by picture
    ended: int = 0  # pictures
    preview: Image.Image | None = None
    wanted: float = 0.0  # until when previews are made

    def note(self, event: Event) -> None:
        """On the engine's thread: how far a picture is."""
        self.steps = event.steps
        self.done[event.index] = event.done
        if event.kind in ("picture", "failed", "cancelled"):
            self.ended += 1
        if event.preview is not None and time.time() < self.wanted:
            self.preview = event.preview()

    def interrupt(self) -> None:
        """Ends it with the pictures that are done."""
        self.interrupted = True
        if self.drawing is not None:
            self.drawing.cancel()


class Desk:
    """The requests that are being drawn, by client, oldest first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._works: dict[str, list[Work]] = {}

    def add(self, client: str, work: Work) -> None:
        with self._lock:
            self._works.setdefault(client, []).append(work)

    def remove(self, client: str, work: Work) -> None:
        with self._lock:
            self._works[client].remove(work)
            if not self._works[client]:
                del self._works[client]

    def of(self, client: str) -> list[Work]:
        with self._lock:
            return list(self._works.get(client, ()))


# --- pictures -------------------------------------------------------------------------------


@router.post("/txt2img", summary="Draw pictures")
async def txt2img(asked: FromText, request: Request) -> dict[str, Any]:
    asked.check(request.app.state.service.pipeline.name)
    return await _answer(request, asked, asked.order(client_of(request)), "txt2img")


@router.post("/img2img", summary="Draw from a picture")
async def img2img(asked: FromPicture, request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    asked.check(service.pipeline.name)
    order = replace(asked.order(client_of(request)), **asked.given())
    if asked.inpainting_mask_invert and order.mask is not None:
        most = service.limits.upload_pixels
        mask = await asyncio.to_thread(_inverted, order.mask, most)
        order = replace(order, mask=mask)
    return await _answer(request, asked, order, "img2img")


def _inverted(mask: bytes, most_pixels: int) -> bytes:
    return _png(inverted(open_upload(mask, most_pixels, "mask")))


async def _answer(request: Request, asked: Asked, order: Order, kind: str) -> dict[str, Any]:
    service: Service = request.app.state.service
    desk: Desk = request.app.state.a1111
    work = Work(kind)
    desk.add(order.client, work)
    try:
        drawing = work.drawing = await asyncio.to_thread(service.submit, order, work.note)
        if work.interrupted:
            drawing.cancel()
        images = await _drawn(request, service, work, drawing)
    finally:
        desk.remove(order.client, work)
    pairs = [
        (each.settings, image)
        for each, image in zip(drawing.requests, images, strict=True)
        if image is not None
    ]
    said = asked.model_dump(exclude=set(asked.model_extra or ()))
    if isinstance(asked, FromPicture) and not asked.include_init_images:
        said |= {"init_images": None, "mask": None}
    kept = None if asked.do_not_save_samples else request.app.state.keeper
    texts = await asyncio.gather(*(_text(kept, *pair, order.client) for pair in pairs))
    first = drawing.requests[0].settings
    return {
        "images": [] if asked.send_images is False else texts,
        "parameters": said,
        "info": json.dumps(_info([settings for settings, _ in pairs], first, work, asked)),
    }


def _text(gallery: Any, settings: Settings, image: Image.Image, client: str) -> Awaitable[str]:
    def made() -> str:
        return base64.b64encode(deliver(gallery, image, settings, client)).decode()

    return asyncio.to_thread(made)


async def _drawn(
    request: Request, service: Service, work: Work, drawing: Drawing
) -> list[Image.Image | None]:
    """The pictures; None for those that were interrupted. All are if the client goes.

    Raises what the first that failed raised.
    """
    waits = map(asyncio.wrap_future, drawing.futures())
    pictures = asyncio.gather(*waits, return_exceptions=True)
    # What becomes of them when the client is gone is nobody's concern.
    pictures.add_done_callback(lambda done: done.cancelled() or done.exception())
    gone = asyncio.create_task(disconnected(request.receive))
    try:
        first: set[asyncio.Future[Any]] = {pictures, gone}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not pictures.done():
            raise Refusal(499, "the client is gone", "gone")
    finally:
        gone.cancel()
        drawing.cancel()
        pictures.cancel()
    images: list[Image.Image | None] = []
    for found in pictures.result():
        if isinstance(found, Image.Image):
            images.append(found)
        elif isinstance(found, asyncio.CancelledError) and work.interrupted:
            images.append(None)
        else:
            raise cancelled(service) if isinstance(found, asyncio.CancelledError) else found
    return images


def _info(drawn: list[Settings], first: Settings, work: Work, asked: Asked) -> dict[str, Any]:
    """What AUTOMATIC1111's tells of the pictures; `first` of those asked for."""
    seeds = [settings.seed for settings in drawn]
    return {
        "prompt": first.prompt,
        "all_prompts": [settings.prompt for settings in drawn],
        "negative_prompt": first.negative_prompt,
        "all_negative_prompts": [settings.negative_prompt for settings in drawn],
        "seed": first.seed,
        "all_seeds": seeds,
        "subseed": first.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": first.width,
        "height": first.height,
        "sampler_name": first.sampler,
        "cfg_scale": first.guidance,
        "steps": first.steps,
        "batch_size": asked.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": first.model,
        "sd_model_hash": "",
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": first.strength if first.image else None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [parameters(settings) for settings in drawn],
        "styles": [],
        "job_timestamp": _stamp(work.began),
        "clip_skip": 2,
        "is_using_inpainting_conditioning": False,
        "version": f"koala {__version__}",
    }


# --- progress -------------------------------------------------------------------------------


@router.get("/progress", summary="How far the client's oldest request is")
async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
    desk: Desk = request.app.state.a1111
    works = desk.of(client_of(request))
    work = works[0] if works else Work("")
    number = len(work.drawing.requests) if work.drawing else 0
    steps = list(work.done.values())
    done = sum(steps) / (work.steps * number) if number else 0.0
    left = (time.time() - work.began) * (1 - done) / done if done else 0.0
    image = None
    if not skip_current_image:
        work.wanted = time.time() + WATCHED
        if work.preview is not None:
            image = base64.b64encode(_png(work.preview)).decode()
    state = {
        "skipped": False,
        "interrupted": work.interrupted,
        "stopping_generation": False,
        "job": work.kind,
        "job_count": number,
        "job_timestamp": _stamp(work.began),
        "job_no": work.ended,
        "sampling_step": max((each for each in steps if each < work.steps), default=0),
        "sampling_steps": work.steps if number else 0,
    }
    return {
        "progress": done, "eta_relative": left, "state": state, "current_image": image,
        "textinfo": None,
    }  # fmt: skip


@router.post("/interrupt", summary="End the client's requests with the pictures that are done")
async def interrupt(request: Request) -> dict[str, Any]:
    desk: Desk = request.app.state.a1111
    for work in desk.of(client_of(request)):
        work.interrupt()
    return {}


# --- what there is --------------------------------------------------------------------------


@router.get("/sd-models", summary="The model")
async def models(request: Request) -> list[dict[str, Any]]:
    name = request.app.state.service.pipeline.name
    one = {"title": name, "model_name": name, "hash": None, "sha256": None}
    return [{**one, "filename": name, "config": None}]


@router.get("/samplers", summary="The samplers")
async def all_samplers() -> list[dict[str, Any]]:
    return [
        {"name": sampler.name, "aliases": [name], "options": {}}
        for name, sampler in samplers.SAMPLERS.items()
    ]


@router.get("/schedulers", summary="The schedules")
async def schedulers() -> list[dict[str, Any]]:
    return [
        {"name": label.lower().replace(" ", "_"), "label": label, "aliases": None,
         "default_rho": -1, "need_inner_model": False}
        for label in SCHEDULES
    ]  # fmt: skip


@router.get("/loras", summary="The LoRAs that prompts may name")
def loras(request: Request) -> list[dict[str, Any]]:
    service: Service = request.app.state.service
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in service.loras()]


@router.get("/options", summary="What is set")
async def options(request: Request) -> dict[str, Any]:
    told = {name: values[0] for name, values in OPTIONS.items()}
    return {"sd_model_checkpoint": request.app.state.service.pipeline.name, **told}


@router.post("/options", summary="Set what can be set: to what it is")
async def set_options(asked: dict[str, Any], request: Request) -> None:
    check_options(asked, request.app.state.service.pipeline.name)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _stamp(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(seconds))
