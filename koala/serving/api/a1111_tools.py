"""/sdapi/v1: what AUTOMATIC1111's tools do with finished images."""

import base64
import io
from typing import Annotated, Any

from fastapi import APIRouter, Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from koala.serving.api.a1111_lists import UPSCALERS
from koala.serving.errors import ApiError
from koala.serving.json_bodies import JsonRoute
from koala.serving.service import Service
from koala.serving.upload_thread import UploadThread
from koala.serving.uploads import decode_base64, open_upload

router = APIRouter(route_class=JsonRoute)
KERNELS = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
MOST_TEXT = 100_000  # characters of an image's texts that are answered


class PngInfoRequest(BaseModel):
    """The fields of png-info."""

    image: str


class EnlargeRequest(BaseModel):
    """The fields of extra-single-image and extra-batch-images that have an effect."""

    model_config = ConfigDict(extra="allow")
    resize_mode: int = 0  # 0: by `upscaling_resize`; 1: to the width and height
    upscaling_resize: float = 2.0
    upscaling_resize_w: int = 512
    upscaling_resize_h: int = 512
    upscaling_crop: bool = True
    upscaler_1: str = "None"
    gfpgan_visibility: float = 0.0
    codeformer_visibility: float = 0.0


class ExtrasRequest(EnlargeRequest):
    """The fields of extra-single-image."""

    image: str


class NamedImage(BaseModel):
    """An image of a batch; its name is for the client."""

    data: str
    name: str = ""


class ExtrasBatchRequest(EnlargeRequest):
    """The fields of extra-batch-images."""

    images: Annotated[list[NamedImage], Field(alias="imageList", min_length=1, max_length=16)]


class InterrogateRequest(BaseModel):
    """The fields of interrogate, none of which is looked at."""

    model_config = ConfigDict(extra="allow")


@router.post("/png-info", summary="The settings in an image")
async def png_info(body: PngInfoRequest, request: Request) -> dict[str, Any]:
    thread: UploadThread = request.app.state.upload_thread
    service: Service = request.app.state.service
    return await thread.run(_png_info, body.image, service.limits.upload_pixels)


def _png_info(text: str, most_pixels: int) -> dict[str, Any]:
    image = open_upload(decode_base64(text, "image"), most_pixels)
    items = {
        str(name): value[:MOST_TEXT] for name, value in image.info.items() if isinstance(value, str)
    }
    return {"info": items.get("parameters", ""), "items": items, "parameters": {}}


@router.post("/extra-single-image", summary="Enlarge an image")
async def enlarge(body: ExtrasRequest, request: Request) -> dict[str, Any]:
    told, (image,) = await _enlarge(body, [body.image], request)
    return {"html_info": told, "image": image}


@router.post("/extra-batch-images", summary="Enlarge images")
async def enlarge_all(body: ExtrasBatchRequest, request: Request) -> dict[str, Any]:
    told, images = await _enlarge(body, [one.data for one in body.images], request)
    return {"html_info": told, "images": images}


async def _enlarge(
    body: EnlargeRequest, given: list[str], request: Request
) -> tuple[str, list[str]]:
    """What was ignored, in words, and the images as base64 PNGs."""
    for name in ("gfpgan_visibility", "codeformer_visibility"):
        if getattr(body, name):
            raise ApiError(
                400, f"{name}: this server restores no faces; leave it out", "invalid_value", name
            )
    names = {name.lower(): name for name in UPSCALERS}
    wanted = names.get(body.upscaler_1.lower())
    if wanted is None:
        raise ApiError(
            400, f"unknown upscaler {body.upscaler_1!r}: allowed are {', '.join(UPSCALERS)}",
            "invalid_value", "upscaler_1",
        )  # fmt: skip
    thread: UploadThread = request.app.state.upload_thread
    service: Service = request.app.state.service
    most = service.limits.upload_pixels
    made = [await thread.run(_enlarged, body, image, wanted, most) for image in given]
    info = f"{wanted}: {', '.join(sorted(body.model_extra or ()))} ignored"
    told = "" if not body.model_extra else info
    return told, [base64.b64encode(png).decode() for png in made]


def _enlarged(body: EnlargeRequest, text: str, upscaler: str, most_pixels: int) -> bytes:
    image = open_upload(decode_base64(text, "image"), most_pixels)
    size = _target(body, image.size)
    if min(size) < 1 or size[0] * size[1] > most_pixels:
        raise ApiError(
            400, f"{size[0]}x{size[1]}: allowed are {most_pixels:,} pixels; enlarge it less",
            "invalid_value", "upscaling_resize",
        )  # fmt: skip
    if upscaler != "None":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image = image.resize(size, KERNELS[upscaler])
        if body.resize_mode == 1 and body.upscaling_crop:
            width, height = body.upscaling_resize_w, body.upscaling_resize_h
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _target(body: EnlargeRequest, size: tuple[int, int]) -> tuple[int, int]:
    """The size to enlarge to, with the image's shape; to be cropped in resize mode 1."""
    if body.resize_mode != 1:
        scale = min(max(body.upscaling_resize, 0.0), 1e6)
        return int(size[0] * scale), int(size[1] * scale)
    width, height = (min(max(side, 0), 10**6) for side in
                     (body.upscaling_resize_w, body.upscaling_resize_h))  # fmt: skip
    scales = (width / size[0], height / size[1])
    scale = max(scales) if body.upscaling_crop else min(scales)
    return max(width if body.upscaling_crop else 1, round(size[0] * scale)), max(
        height if body.upscaling_crop else 1, round(size[1] * scale)
    )


@router.post("/unload-checkpoint", summary="Not here", status_code=501)
async def unload() -> None:
    raise ApiError(501, "this server keeps its model in memory: stop it instead", "not_here")


@router.post("/interrogate", summary="Not here", status_code=501)
async def interrogate(body: InterrogateRequest) -> None:
    raise ApiError(
        501, "this server has no model that describes images: use another for that", "not_here"
    )
