"""Encodes finished images and stores them. All of it is slow: call it off the event loop."""

import io
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from koala.errors import Failure
from koala.generation.png import write_png
from koala.generation.provenance import PNG_KEY, XMP
from koala.generation.requests import Settings
from koala.serving.fit import shown
from koala.serving.jobs.gallery import Gallery

DEFAULT_QUALITY = 90  # of WebP and JPEG
_MOST_WAITING = 32  # images that wait for the disk

_log = logging.getLogger(__name__)


class GalleryWriter:
    """Stores images in the gallery in the background, after the response."""

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery
        self._thread = ThreadPoolExecutor(1, "koala-gallery-writer")
        self._room = threading.Semaphore(_MOST_WAITING)

    def write(self, image: Image.Image, settings: Settings, client: str, png: bytes | None) -> None:
        """Queues an image; blocks while the queue is full. png: the encoded file, if any."""
        self._room.acquire()
        self._thread.submit(self._write, image, settings, client, png)

    def flush(self) -> None:
        """Waits until everything queued so far is stored."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Flushes and stops."""
        self._thread.shutdown()

    def _write(
        self, image: Image.Image, settings: Settings, client: str, png: bytes | None
    ) -> None:
        try:
            self.gallery.add(image, settings, client, png=png)
        except Failure as error:  # the client has its image anyway
            _log.error("image not stored in the gallery: %s", error)
        finally:
            self._room.release()


def encode_and_store(
    writer: GalleryWriter,
    image: Image.Image,
    settings: Settings,
    client: str,
    format: str = "png",
    quality: int | None = None,
    store: bool = True,
) -> bytes:
    """Encodes an image for the client, and passes it to the writer if it is to be stored."""
    image = shown(image, settings)
    data = writer.gallery.signed(encode(image, settings, format, quality), format)
    if store:
        writer.write(image, settings, client, data if format == "png" else None)
    return data


def encode(
    image: Image.Image, settings: Settings | None, format: str = "png", quality: int | None = None
) -> bytes:
    """The image as png, webp or jpeg, marked as made; a PNG holds the settings, if given."""
    file = io.BytesIO()
    if format == "png" and settings is not None:
        write_png(image, settings, file)
    elif format == "png":
        info = PngInfo()
        info.add_itxt(PNG_KEY, XMP)
        image.save(file, "PNG", pnginfo=info)
    else:
        image.save(
            file, format.upper(), xmp=XMP.encode(),
            quality=DEFAULT_QUALITY if quality is None else quality,
        )  # fmt: skip
    return file.getvalue()
