"""Finished pictures as bytes, and into the gallery. All of it takes time: off the event loop."""

import io
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from koala.errors import Failure
from koala.generation.png import write_png
from koala.generation.requests import Settings
from koala.serving.jobs.gallery import Gallery

USUAL_QUALITY = 90  # of WebP and JPEG
_MOST_WAITING = 32  # pictures that wait for the disk

_log = logging.getLogger(__name__)


class Keeper:
    """Puts pictures into the gallery while their clients already have them: disks are slow."""

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery
        self._thread = ThreadPoolExecutor(1, "koala-keeper")
        self._room = threading.Semaphore(_MOST_WAITING)

    def keep(self, image: Image.Image, settings: Settings, client: str, png: bytes | None) -> None:
        """Has it kept soon. Waits where many others do. `png`: its file, where it is made."""
        self._room.acquire()
        self._thread.submit(self._keep, image, settings, client, png)

    def wait(self) -> None:
        """Returns when all that came before is kept."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """The same, and takes no more."""
        self._thread.shutdown()

    def _keep(self, image: Image.Image, settings: Settings, client: str, png: bytes | None) -> None:
        try:
            self.gallery.add(image, settings, client, png=png)
        except Failure as error:  # the client has its picture all the same
            _log.error("a picture is not in the gallery: %s", error)
        finally:
            self._room.release()


def deliver(
    keeper: Keeper | None,
    image: Image.Image,
    settings: Settings,
    client: str,
    format: str = "png",
    quality: int | None = None,
) -> bytes:
    """The picture in the format that the client wants; the keeper gets it, too."""
    data = encoded(image, settings, format, quality)
    if keeper is not None:
        keeper.keep(image, settings, client, data if format == "png" else None)
    return data


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
