"""/sdapi/v1: the part of AUTOMATIC1111's API that other programs call.

https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/API. There, progress and interrupt
concern the server's only running image; here, the requests of the calling client.
"""

import asyncio
import base64
import io
import json
import threading
import time
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
    A1111Request,
    Img2ImgRequest,
    Txt2ImgRequest,
    check_options,
    inverted,
)
from koala.serving.api.streams import cancelled_error, wait_for_images
from koala.serving.image_request import ImageRequest
from koala.serving.jobs.gallery_writer import encode_and_store
from koala.serving.security import client_of
from koala.serving.service import Event, Service, Submission
from koala.serving.uploads import open_upload

router = APIRouter(prefix="/sdapi/v1")
PREVIEW_SECONDS = 5.0  # previews are decoded for so long after a progress call


@dataclass(eq=False)
class ActiveRequest:
    """A running request."""

    kind: str
    started: float = field(default_factory=time.time)
    submission: Submission | None = None
    interrupted: bool = False
    steps: int = 1  # of an image
    done: dict[int, int] = field(default_factory=dict)  # steps by image
    ended: int = 0  # images
    preview: Image.Image | None = None
    preview_until: float = 0.0  # Unix seconds

    def on_event(self, event: Event) -> None:
        """Records an image's progress; called on the engine's thread."""
        self.steps = event.steps
        self.done[event.index] = event.done
        if event.kind in ("picture", "failed", "cancelled"):
            self.ended += 1
        if event.preview is not None and time.time() < self.preview_until:
            self.preview = event.preview()

    def interrupt(self) -> None:
        """Ends the request with the images that are finished."""
        self.interrupted = True
        if self.submission is not None:
            self.submission.cancel()


class ActiveRequests:
    """The running requests of each client, oldest first. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_client: dict[str, list[ActiveRequest]] = {}

    def add(self, client: str, active: ActiveRequest) -> None:
        with self._lock:
            self._by_client.setdefault(client, []).append(active)

    def remove(self, client: str, active: ActiveRequest) -> None:
        with self._lock:
            self._by_client[client].remove(active)
            if not self._by_client[client]:
                del self._by_client[client]

    def for_client(self, client: str) -> list[ActiveRequest]:
        with self._lock:
            return list(self._by_client.get(client, ()))


# --- images ---------------------------------------------------------------------------------


@router.post("/txt2img", summary="Generate images")
async def txt2img(body: Txt2ImgRequest, request: Request) -> dict[str, Any]:
    body.check(request.app.state.service.pipeline.name)
    return await _respond(request, body, body.to_image_request(client_of(request)), "txt2img")


@router.post("/img2img", summary="Generate from an image")
async def img2img(body: Img2ImgRequest, request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    body.check(service.pipeline.name)
    spec = replace(body.to_image_request(client_of(request)), **body.images())
    if body.inpainting_mask_invert and spec.mask is not None:
        most = service.limits.upload_pixels
        mask = await asyncio.to_thread(_inverted, spec.mask, most)
        spec = replace(spec, mask=mask)
    return await _respond(request, body, spec, "img2img")


def _inverted(mask: bytes, most_pixels: int) -> bytes:
    return _png(inverted(open_upload(mask, most_pixels, "mask")))


async def _respond(
    request: Request, body: A1111Request, spec: ImageRequest, kind: str
) -> dict[str, Any]:
    service: Service = request.app.state.service
    active_requests: ActiveRequests = request.app.state.a1111
    active = ActiveRequest(kind)
    active_requests.add(spec.client, active)
    try:
        submission = await asyncio.to_thread(service.submit, spec, active.on_event)
        active.submission = submission
        if active.interrupted:
            submission.cancel()
        outcomes = await wait_for_images(request, service, submission, return_exceptions=True)
        images = [_image_or_none(outcome, active, service) for outcome in outcomes]
    finally:
        active_requests.remove(spec.client, active)
    pairs = [
        (each.settings, image)
        for each, image in zip(submission.requests, images, strict=True)
        if image is not None
    ]
    echo = body.model_dump(exclude=set(body.model_extra or ()))
    if isinstance(body, Img2ImgRequest) and not body.include_init_images:
        echo |= {"init_images": None, "mask": None}
    writer = None if body.do_not_save_samples else request.app.state.gallery_writer
    pngs = await asyncio.gather(
        *(
            asyncio.to_thread(encode_and_store, writer, image, settings, spec.client)
            for settings, image in pairs
        )
    )
    texts = [base64.b64encode(png).decode() for png in pngs]
    first = submission.requests[0].settings
    return {
        "images": [] if body.send_images is False else texts,
        "parameters": echo,
        "info": json.dumps(_info([settings for settings, _ in pairs], first, active, body)),
    }


def _image_or_none(outcome: Any, active: ActiveRequest, service: Service) -> Image.Image | None:
    """The image; None if the client interrupted it. Raises any other error."""
    if isinstance(outcome, asyncio.CancelledError):
        if active.interrupted:
            return None
        raise cancelled_error(service)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _info(
    finished: list[Settings], first: Settings, active: ActiveRequest, body: A1111Request
) -> dict[str, Any]:
    """AUTOMATIC1111's `info`. `first`: settings of the first image requested."""
    seeds = [settings.seed for settings in finished]
    return {
        "prompt": first.prompt,
        "all_prompts": [settings.prompt for settings in finished],
        "negative_prompt": first.negative_prompt,
        "all_negative_prompts": [settings.negative_prompt for settings in finished],
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
        "batch_size": body.batch_size,
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
        "infotexts": [parameters(settings) for settings in finished],
        "styles": [],
        "job_timestamp": _stamp(active.started),
        "clip_skip": 2,
        "is_using_inpainting_conditioning": False,
        "version": f"koala {__version__}",
    }


# --- progress -------------------------------------------------------------------------------


@router.get("/progress", summary="Progress of the client's oldest request")
async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
    active_requests: ActiveRequests = request.app.state.a1111
    running = active_requests.for_client(client_of(request))
    active = running[0] if running else ActiveRequest("")
    number = len(active.submission.requests) if active.submission else 0
    steps = list(active.done.values())
    done = sum(steps) / (active.steps * number) if number else 0.0
    left = (time.time() - active.started) * (1 - done) / done if done else 0.0
    image = None
    if not skip_current_image:
        active.preview_until = time.time() + PREVIEW_SECONDS
        if active.preview is not None:
            image = base64.b64encode(_png(active.preview)).decode()
    state = {
        "skipped": False,
        "interrupted": active.interrupted,
        "stopping_generation": False,
        "job": active.kind,
        "job_count": number,
        "job_timestamp": _stamp(active.started),
        "job_no": active.ended,
        "sampling_step": max((each for each in steps if each < active.steps), default=0),
        "sampling_steps": active.steps if number else 0,
    }
    return {
        "progress": done, "eta_relative": left, "state": state, "current_image": image,
        "textinfo": None,
    }  # fmt: skip


@router.post("/interrupt", summary="End the client's requests with their finished images")
async def interrupt(request: Request) -> dict[str, Any]:
    active_requests: ActiveRequests = request.app.state.a1111
    for active in active_requests.for_client(client_of(request)):
        active.interrupt()
    return {}


# --- models and options ---------------------------------------------------------------------


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


@router.get("/loras", summary="The LoRAs a prompt may name")
def loras(request: Request) -> list[dict[str, Any]]:
    service: Service = request.app.state.service
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in service.loras()]


@router.get("/options", summary="Options")
async def options(request: Request) -> dict[str, Any]:
    current = {name: values[0] for name, values in OPTIONS.items()}
    return {"sd_model_checkpoint": request.app.state.service.pipeline.name, **current}


@router.post("/options", summary="Confirm options; other values are rejected")
async def set_options(body: dict[str, Any], request: Request) -> None:
    check_options(body, request.app.state.service.pipeline.name)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _stamp(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(seconds))
