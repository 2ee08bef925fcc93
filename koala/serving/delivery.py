"""Finished pictures as bytes, and into the gallery. All of it takes time: off the event loop."""

import io

from PIL import Image

from koala.errors import Failure
from koala.generation.pictures import write_png
from koala.generation.requests import Settings
from koala.serving.gallery import Gallery

USUAL_QUALITY = 90  # of WebP and JPEG


def deliver(
    gallery: Gallery | None,
    image: Image.Image,
    settings: Settings,
    client: str,
    format: str = "png",
    quality: int | None = None,
) -> bytes:
    """Keeps the picture in the gallery, and returns it in the format that the client wants.

    Where the gallery cannot keep it, the client gets it all the same.
    """
    png = None
    if gallery is not None:
        try:
            kept = gallery.add(image, settings, client)
        except Failure:
            pass
        else:
            png = gallery.png(kept.id) if format == "png" else None
    return png or encoded(image, settings, format, quality)


def encoded(
    image: Image.Image, settings: Settings | None, format: str = "png", quality: int | None = None
) -> bytes:
    """The picture as png, webp or jpeg; a PNG carries its settings, if any are given."""
    file = io.BytesIO()
    if format == "png" and settings is not None:
        write_png(image, settings, file)
    elif format == "png":
        image.save(file, "PNG")
    else:
        image.save(file, format.upper(), quality=USUAL_QUALITY if quality is None else quality)
    return file.getvalue()
