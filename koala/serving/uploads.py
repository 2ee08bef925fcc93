"""Untrusted image uploads: few formats, and the size is checked before the pixels are decoded.

Decoding is slow: call these functions off the event loop.
"""

import base64
import io
import re
import warnings

from PIL import Image

from koala.errors import UserError
from koala.generation.image_files import open_image

FORMATS = ("PNG", "JPEG", "WEBP")
JPEG = b"\xff\xd8"  # begins so
MOST_SCANS, MOST_SEGMENTS = 100, 5_000  # of a JPEG
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # others belong to a scan's data
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
OPAQUE = 128  # of 255: what is less is a hole
_URL_SAFE = str.maketrans("-_", "+/")


def open_upload(data: bytes, most_pixels: int, what: str = "image") -> Image.Image:
    """Decodes an uploaded PNG, JPEG or WebP: the first frame, rotated upright.

    UserError, which names the upload `what`, for other formats, truncated files and images of
    more than `most_pixels`.
    """
    if data.startswith(JPEG):
        _check_jpeg(data, what)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large sizes, for which our limit is lower; of EXIF
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > most_pixels:
                    raise _too_large(what, f"{image.width}x{image.height}", most_pixels)
                return open_image(image)
    except (UserError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise _too_large(what, "huge", most_pixels) from None
    except Exception:  # damaged metadata raises anything from struct.error to KeyError
        raise UserError(
            f"{what} cannot be read as an image: allowed are complete {', '.join(FORMATS)} files"
        ) from None


def _check_jpeg(data: bytes, what: str) -> None:
    """UserError for a JPEG of so many scans or segments that reading it would take minutes.

    Each scan of some fifty bytes goes over all pixels again; a progressive JPEG has about ten.
    """
    position, scans, segments = 2, 0, 0
    while (marker := _MARKER.search(data, position)) and marker[0] != _END:
        length = int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        position = marker.end() + max(length, 2)
        scans, segments = scans + (marker[0] == _SCAN), segments + 1
        if scans > MOST_SCANS or segments > MOST_SEGMENTS:
            raise UserError(
                f"{what} is a JPEG of too many scans or segments: allowed are {MOST_SCANS} and "
                f"{MOST_SEGMENTS:,}; save it again"
            )


def _too_large(what: str, size: str, most_pixels: int) -> UserError:
    return UserError(f"{what} is {size}: allowed are {most_pixels:,} pixels; make it smaller")


def mask_of_transparency(data: bytes, most_pixels: int) -> bytes:
    """Converts OpenAI's mask (transparent: repaint) to ours (white: repaint), as PNG bytes.

    UserError for what is not an image or has no transparency.
    """
    image = open_upload(data, most_pixels, "mask")
    if not image.has_transparency_data:
        raise UserError("mask has no transparency: make the part to repaint transparent")
    file = io.BytesIO()
    _holes(image).save(file, format="PNG")
    return file.getvalue()


def _holes(image: Image.Image) -> Image.Image:
    """White where the image is transparent, else black."""
    alpha = image.convert("RGBA").getchannel("A")
    return alpha.point(lambda opacity: 255 if opacity < OPAQUE else 0)


def with_hole(data: bytes, most_pixels: int) -> bytes | None:
    """The upload itself if a pixel of it is transparent: then it is its own mask, as in dall-e-2.

    None for others, also for what is not an image: `open_upload` refuses that.
    """
    if data.startswith(JPEG):
        return None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if not image.has_transparency_data:
                return None
    except Exception:
        return None
    return data if _holes(open_upload(data, most_pixels)).getbbox() else None


def decode_base64(text: str, what: str) -> bytes:
    """The bytes of base64 text or a base64 data: URL. UserError, which names it `what`.

    As some clients write it: with line breaks, without padding at its end, or in the alphabet for
    addresses.
    """
    start = text[:8].lower()
    if start.startswith(("http://", "https://")):
        raise UserError(f"{what} is an address: nothing is fetched here; send the image as base64")
    if start.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise UserError(f"{what} is a data: URL without base64: encode it as base64")
    text = "".join(text.split()).rstrip("=").translate(_URL_SAFE)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise UserError(f"{what} is not valid base64") from None
