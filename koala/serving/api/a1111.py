"""/sdapi/v1: the part of AUTOMATIC1111's API that other programs call.

https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/API. There, progress and interrupt
concern the server's only running image; here, the requests of the calling client.
"""

import asyncio
import base64
import contextlib
import io
import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image

from koala import __version__
from koala.errors import UserError
from koala.generation import Settings, validation
from koala.generation.image_files import as_grey
from koala.generation.png import parameters
from koala.serving.api.a1111_fields import (
    A1111Request,
    Img2ImgRequest,
    Txt2ImgRequest,
    framed,
    inverted,
)
from koala.serving.api.a1111_only_masked import MaskedPart
from koala.serving.api.a1111_second_pass import SecondPass
from koala.serving.api.streams import cancelled_error, submit, wait_for_images
from koala.serving.fit import note, shown_size
from koala.serving.image_request import ImageRequest
from koala.serving.jobs.gallery_writer import GalleryWriter, encode_and_store
from koala.serving.json_bodies import JsonRoute
from koala.serving.security import client_of
from koala.serving.service import Event, Service, Submission
from koala.serving.upload_thread import UploadThread
from koala.serving.uploads import open_upload

router = APIRouter(route_class=JsonRoute)
queue_router = APIRouter()  # what the web UI itself has at the root
_ITS_WORDS = {
    "n": "batch_size times n_iter", "guidance": "cfg_scale", "strength": "denoising_strength",
}  # fmt: skip
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
    finished: int = 0  # images
    unfinished: Image.Image | None = None  # how far the first image had come at an interrupt

    def on_event(self, event: Event) -> None:
        """Records an image's progress; called on the engine's thread."""
        self.steps = event.steps
        self.done[event.index] = event.done
        if event.kind in ("picture", "failed", "cancelled"):
            self.ended += 1
        self.finished += event.kind == "picture"
        if event.preview is not None and time.time() < self.preview_until:
            self.preview = event.preview()
        if self.interrupted and event.preview is not None and self.submission is not None:
            self.unfinished = self.unfinished or event.preview()
            self.submission.cancel()

    def interrupt(self) -> None:
        """Ends the request with the images that are finished, or else with an unfinished one.

        That one is taken after the step in progress.
        """
        self.interrupted = True
        if self.submission is not None and (self.finished or not self.done):
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
    service: Service = request.app.state.service
    ignored = body.check(service.pipeline.name)
    with _in_its_words():
        spec = _without_unheard(body.to_image_request(client_of(request)), service, ignored)
        return await _respond(request, body, spec, "txt2img", ignored, body.second_pass())


@router.post("/img2img", summary="Generate from an image")
async def img2img(body: Img2ImgRequest, request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    ignored = body.check(service.pipeline.name)
    with _in_its_words():
        given = await asyncio.to_thread(body.images)
        spec = replace(body.to_image_request(client_of(request)), **given)
        spec = _with_a_step(_without_unheard(spec, service, ignored), service)
        thread: UploadThread = request.app.state.upload_thread
        most = service.limits.upload_pixels
        if body.only_masked:
            spec, part = await thread.run(_only_masked, spec, body, most)
            return await _respond(request, body, spec, "img2img", ignored, part=part)
        spec = await thread.run(_as_asked, spec, body, most)
        return await _respond(request, body, spec, "img2img", ignored)


@contextlib.contextmanager
def _in_its_words() -> Iterator[None]:
    """Names fields as AUTOMATIC1111 does in what is said of their values."""
    try:
        yield
    except UserError as error:
        ours, of, rest = str(error).partition(" is ")
        raise UserError(f"{_ITS_WORDS.get(ours, ours)}{of}{rest}") from None


def _without_unheard(spec: ImageRequest, service: Service, ignored: list[str]) -> ImageRequest:
    """The request without a negative prompt where there is no guidance, which `ignored` names.

    Tools send theirs with every request.
    """
    usual = service.pipeline.known.sampling.guidance
    if not spec.negative_prompt or (usual if spec.guidance is None else spec.guidance) > 1:
        return spec
    ignored.append("negative_prompt")
    return replace(spec, negative_prompt="")


def _with_a_step(spec: ImageRequest, service: Service) -> ImageRequest:
    """The request with a strength that does one step, where it has a lower one: as in the web UI.

    Tools that enlarge an image ask for almost none.
    """
    steps = service.pipeline.known.sampling.steps if spec.steps is None else spec.steps
    if spec.strength is None or not 0 <= spec.strength * steps < 1:
        return spec
    return replace(spec, strength=math.ceil(10_000 / steps) / 10_000)


def _only_masked(
    spec: ImageRequest, body: Img2ImgRequest, most_pixels: int
) -> tuple[ImageRequest, MaskedPart]:
    """The request for the masked part alone, and the part. UserError."""
    assert spec.image is not None and spec.mask is not None
    image = open_upload(spec.image, most_pixels)
    mask = open_upload(spec.mask, most_pixels, "mask")
    mask = inverted(mask) if body.inpainting_mask_invert else mask
    shape = validation.size(spec.size, 1) if spec.size else None
    part = MaskedPart.of(image, mask, body.inpaint_full_res_padding or 0, shape)
    return replace(spec, image=_png(part.image), mask=_png(part.mask)), part


def _as_asked(spec: ImageRequest, body: Img2ImgRequest, most_pixels: int) -> ImageRequest:
    """The request with its image and mask framed and inverted as the fields say. UserError."""
    mode = body.resize_mode or 0
    size = validation.size(spec.size, 1) if mode and spec.size else None
    changed: dict[str, bytes] = {}
    if size is not None:
        assert spec.image is not None
        changed["image"] = _png(framed(open_upload(spec.image, most_pixels), size, mode))
    if spec.mask is not None and (size is not None or body.inpainting_mask_invert):
        mask = as_grey(open_upload(spec.mask, most_pixels, "mask"))
        mask = inverted(mask) if body.inpainting_mask_invert else mask
        changed["mask"] = _png(mask if size is None else framed(mask, size, mode))
    return replace(spec, **changed)  # type: ignore[arg-type]


async def _respond(
    request: Request, body: A1111Request, spec: ImageRequest, kind: str, ignored: list[str],
    second: SecondPass | None = None, part: MaskedPart | None = None,
) -> dict[str, Any]:  # fmt: skip
    active_requests: ActiveRequests = request.app.state.a1111
    active = ActiveRequest(kind)
    active_requests.add(spec.client, active)
    try:
        pairs = await _draw(request, spec, active)
        if second is not None:
            pairs = await _draw_again(request, spec, active, pairs, second)
    finally:
        active_requests.remove(spec.client, active)
    assert active.submission is not None
    first = active.submission.requests[0].settings
    if part is not None:
        first = part.settings(first)
        pairs = [
            (part.settings(settings), image and await asyncio.to_thread(part.put_back, image))
            for settings, image in pairs
        ]
    writer: GalleryWriter = request.app.state.gallery_writer
    store = not body.do_not_save_samples
    pngs = await asyncio.gather(
        *(
            asyncio.to_thread(encode_and_store, writer, image, settings, spec.client, store=store)
            for settings, image in pairs
            if image is not None
        )
    )
    finished = [settings for settings, image in pairs if image is not None]
    if not finished:  # AUTOMATIC1111 answers an interrupt with the image as far as it is
        finished, pngs = [first], [_png(_unfinished(active, first))]
    told = {
        "ignored_fields": ignored,
        "note": note(first, request.app.state.service.pipeline.known),
    }
    info = _info(finished, first, active, body) | told
    echo = body.model_dump(exclude=set(body.model_extra or ()))
    if isinstance(body, Img2ImgRequest) and not body.include_init_images:
        echo |= {"init_images": None, "mask": None}
    texts = [base64.b64encode(png).decode() for png in pngs]
    return {
        "images": [] if body.send_images is False else texts,
        "parameters": echo,
        "info": json.dumps(info),
    }


async def _draw(
    request: Request, spec: ImageRequest, active: ActiveRequest
) -> list[tuple[Settings, Image.Image | None]]:
    """The images with their settings; None for those that the client interrupted."""
    service: Service = request.app.state.service
    active.submission = submission = await submit(request, spec, active.on_event)
    if active.interrupted:
        submission.cancel()
    outcomes = await wait_for_images(request, service, submission, return_exceptions=True)
    images = [_image_or_none(outcome, active, service) for outcome in outcomes]
    return [(each.settings, image) for each, image in zip(submission.requests, images, strict=True)]


async def _draw_again(
    request: Request, spec: ImageRequest, active: ActiveRequest,
    pairs: list[tuple[Settings, Image.Image | None]], second: SecondPass,
) -> list[tuple[Settings, Image.Image | None]]:  # fmt: skip
    """The images after a second pass, one by one; an interrupt leaves the others as they are."""
    thread: UploadThread = request.app.state.upload_thread
    drawn = []
    for settings, image in pairs:
        if image is not None and not active.interrupted:
            larger = await thread.run(second.request, spec, image, settings)
            active.done.clear()
            ((again, repeated),) = await _draw(request, larger, active)
            if repeated is not None:
                settings, image = again, repeated
        drawn.append((settings, image))
    return drawn


def _unfinished(active: ActiveRequest, settings: Settings) -> Image.Image:
    """The image as far as it was drawn; black if no step was done."""
    size = shown_size(settings)
    if active.unfinished is None:
        return Image.new("RGB", size)
    return active.unfinished.resize(size, Image.Resampling.BICUBIC)


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
        "width": shown_size(first)[0],
        "height": shown_size(first)[1],
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


@router.post("/interrupt", summary="End the client's requests with what is drawn")
@router.post("/skip", summary="The same")
async def interrupt(request: Request) -> dict[str, Any]:
    active_requests: ActiveRequests = request.app.state.a1111
    for active in active_requests.for_client(client_of(request)):
        active.interrupt()
    return {}


@router.get("/queue/status", summary="The client's requests")
@queue_router.get("/queue/status", summary="The client's requests")
async def queue_status(request: Request) -> dict[str, Any]:
    active_requests: ActiveRequests = request.app.state.a1111
    number = len(active_requests.for_client(client_of(request)))
    return {
        "msg": "estimation", "rank": None, "queue_size": number, "avg_event_process_time": None,
        "avg_event_concurrent_process_time": None, "rank_eta": None, "queue_eta": 0,
    }  # fmt: skip


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _stamp(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(seconds))
