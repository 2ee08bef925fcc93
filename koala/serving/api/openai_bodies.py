"""The bodies of edits and variations: a form with files, or JSON with images as text."""

import re
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from koala.serving import json_bodies
from koala.serving.errors import ApiError
from koala.serving.json_bodies import MOST_FIELDS, MOST_FILES
from koala.serving.uploads import decode_base64

IMAGES = ("image", "mask")


async def fields_and_images(request: Request) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The fields, and the image and mask, of a request. ApiError, UserError."""
    if json_bodies.kind_of(request) not in json_bodies.FORMS:
        fields = await json_bodies.fields(request)
        return fields, await run_in_threadpool(_taken_out, fields)
    return await _of_form(request)


def _taken_out(fields: dict[str, Any]) -> dict[str, bytes]:
    """The images of JSON fields, which are removed there.

    `image` and `mask` are base64, data: URLs, or objects with such an `image_url`; `images` is a
    list of these.
    """
    found: dict[str, bytes] = {}
    for name in ("images", *IMAGES):
        given = fields.pop(name, None)
        for one in given if isinstance(given, list) else [given]:
            if one is not None:
                _put(found, name.removesuffix("s"), _bytes_of(one, name))
    return found


def _bytes_of(given: object, name: str) -> bytes:
    match given:
        case str(text) | {"image_url": str(text)} | {"image_url": {"url": str(text)}}:
            return decode_base64(text, name)
        case {"file_id": _}:
            raise _wrong(name, "no files are kept here: give image_url as a data: URL")
    raise _wrong(name, 'give base64, a data: URL, or {"image_url": "data:..."}')


async def _of_form(request: Request) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A form's fields and images. ApiError for duplicates and wrong kinds."""
    fields: dict[str, Any] = {}
    images: dict[str, bytes] = {}
    async with request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS) as form:
        for name, value in form.multi_items():
            key = re.sub(r"\[\d*\]$", "", name)  # "image[]" and "image[0]" are lists of one
            if key in IMAGES:
                _put(images, key, await _of_part(value, key))
            elif isinstance(value, UploadFile):
                raise _wrong(key, "it must be text")
            elif name in ("lora[][name]", "lora[][scale]"):
                fields.setdefault(name, []).append(value)
            elif key in fields:
                raise _wrong(key, "it is given twice: give one")
            elif value != "":
                fields[key] = value
    return _with_loras(fields), images


async def _of_part(value: UploadFile | str, name: str) -> bytes:
    """The bytes of a file, or of a data: URL."""
    if isinstance(value, UploadFile):
        return await value.read()
    if not value.startswith("data:"):
        raise _wrong(name, "it must be a file, or a data: URL")
    return decode_base64(value, name)


def _put(images: dict[str, bytes], name: str, data: bytes) -> None:
    if name in images:
        raise _wrong(name, "it is given twice: give one")
    images[name] = data


def _with_loras(fields: dict[str, Any]) -> dict[str, Any]:
    """Parses `lora`: JSON, or item by item as OpenAI's client sends it."""
    names, scales = (fields.pop(f"lora[][{part}]", []) for part in ("name", "scale"))
    if names or scales:
        if scales and len(scales) != len(names):
            raise _wrong("lora", "give every LoRA a scale, or none")
        pairs = zip(names, scales or ["1"] * len(names), strict=True)
        fields["lora"] = [{"name": name, "scale": scale} for name, scale in pairs]
    elif "lora" in fields:
        fields["lora"] = json_bodies.parse(fields["lora"], "lora")
    return fields


def _wrong(name: str, why: str) -> ApiError:
    return ApiError(400, f"{name}: {why}", "invalid_value", name)
