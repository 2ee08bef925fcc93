"""Pictures from strangers: their size is looked at before their pixels, and few formats are read.

Decoding takes time: it belongs on a thread of its own, never on the event loop's.
"""

import base64
import io
import warnings

from PIL import Image

from koala.errors import UserError
from koala.generation.image_files import open_picture

FORMATS = ("PNG", "JPEG", "WEBP")
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError)


def open_upload(data: bytes, most_pixels: int, what: str = "image") -> Image.Image:
    """The picture in an upload, upright, its first frame where it has several.

    UserError that calls it `what` for data that are no PNG, JPEG or WebP, are cut short, or hold
    more than `most_pixels`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > most_pixels:
                    raise _too_large(what, f"{image.width}x{image.height}", most_pixels)
                return open_picture(image)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(what, "huge", most_pixels) from None
    except _UNREADABLE:
        raise UserError(
            f"{what} cannot be read as a picture: allowed are whole {', '.join(FORMATS)} files"
        ) from None


def _too_large(what: str, size: str, most_pixels: int) -> UserError:
    return UserError(f"{what} is {size}: allowed are {most_pixels:,} pixels; make it smaller")


def mask_of_transparency(data: bytes, most_pixels: int) -> bytes:
    """OpenAI's mask, painted anew where it is transparent, as ours: a PNG, light there.

    UserError for what is no picture, or has no transparency at all.
    """
    image = open_upload(data, most_pixels, "mask")
    if not image.has_transparency_data:
        raise UserError("mask has no transparency: make transparent what is to be painted anew")
    alpha = image.convert("RGBA").getchannel("A")
    file = io.BytesIO()
    alpha.point(lambda opacity: 255 if opacity < 128 else 0).save(file, format="PNG")
    return file.getvalue()


def from_text(text: str, what: str) -> bytes:
    """The bytes of base64, as it is or in a data: URL. UserError that calls it `what`."""
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise UserError(f"{what} is a data: URL without base64: encode it so")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise UserError(f"{what} is no base64 of a picture") from None
