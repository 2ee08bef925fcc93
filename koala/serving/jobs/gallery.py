"""The gallery: finished images on disk with their settings, safe through restarts and crashes.

An image is a PNG file and a database row. The file is complete and on disk before the row is
committed, and files that a crash left without a row are removed when the gallery opens. The oldest
images are deleted when the gallery grows too large or they too old.
"""

import contextlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from sqlite3 import Connection, Row
from typing import Any

from PIL import Image

from koala.errors import Failure
from koala.generation.png import write_png
from koala.generation.requests import Settings
from koala.serving.fit import shown
from koala.serving.jobs.database import Database, is_id
from koala.utils.atomic import to_disk

THUMBNAIL = 256  # pixels of its longer side
_FILE = re.compile(r"(\.?)([0-9a-f]{32})\.(png|part)", re.ASCII)
_COLUMNS = "id, client, created, bytes, settings"


@dataclass(frozen=True)
class GalleryImage:
    """An image in the gallery."""

    id: str
    client: str  # whose request it was
    created: float  # Unix seconds
    bytes: int  # of the file and the thumbnail
    settings: dict[str, Any]  # of `koala.generation.Settings`, as JSON


class Gallery:
    """A bounded set of finished images. Thread-safe.

    most_bytes: of files and thumbnails together; the newest image stays even if it is larger.
    most_seconds: age at which an image is deleted. clock: Unix seconds. owner, in methods: only
    that client's images are visible. sign: of a file and its format, the same signed.
    """

    def __init__(
        self,
        database: Database,
        most_bytes: int,
        most_seconds: float,
        clock: Callable[[], float] = time.time,
        sign: Callable[[bytes, str], bytes] | None = None,
    ) -> None:
        self.database, self.most_bytes, self.most_seconds = database, most_bytes, most_seconds
        self.clock, self._sign = clock, sign
        self.folder = database.folder / "pictures"
        with _explained():
            self.folder.mkdir(exist_ok=True)
            self._sweep()
        self.tidy()

    def add(
        self,
        image: Image.Image,
        settings: Settings,
        client: str,
        also: Callable[[Connection, str], None] | None = None,
        png: bytes | None = None,
    ) -> GalleryImage:
        """Stores an image; it is on disk when this returns. png: the encoded file, if any.

        `also(db, id)` runs in the same transaction; if it raises, the image is not stored.
        Failure if the disk is full.
        """
        image = shown(image, settings)
        thumbnail = _thumbnail(image)
        id = self.database.new_id()
        size = self._write(id, image, settings, png) + len(thumbnail)
        values = json.dumps(asdict(settings))
        stored = GalleryImage(id, client, self.clock(), size, json.loads(values))
        try:
            with self.database.transaction() as db:
                db.execute(
                    f"INSERT INTO pictures ({_COLUMNS}, thumbnail) VALUES (?, ?, ?, ?, ?, ?)",
                    (id, client, stored.created, size, values, thumbnail),
                )
                if also is not None:
                    also(db, id)
                gone = self._evict(db)
        except BaseException:
            self._unlink(id)
            raise
        self._unlink(*gone)
        return stored

    def signed(self, data: bytes, format: str) -> bytes:
        """A file of an image (png, jpeg or webp), signed if images are to be."""
        return data if self._sign is None else self._sign(data, format)

    def get(self, id: str, owner: str | None = None) -> GalleryImage | None:
        """The image with an id, or None."""
        if not is_id(id):
            return None
        rows = self.database.rows(
            f"SELECT {_COLUMNS} FROM pictures WHERE id = ? AND client = ifnull(?, client)",
            id,
            owner,
        )
        return _gallery_image(rows[0]) if rows else None

    def page(
        self,
        limit: int,
        before: str | None = None,
        owner: str | None = None,
        search: str | None = None,
    ) -> list[GalleryImage]:
        """Up to `limit` images, newest first, older than `before`; of a prompt with `search`."""
        chosen, values = ["id < ?"], [before or "g"]  # sorts after every hexadecimal digit
        if owner is not None:
            chosen.append("client = ?")
            values.append(owner)
        if search:
            chosen.append("instr(lower(json_extract(settings, '$.prompt')), lower(?))")
            values.append(search)
        rows = self.database.rows(
            f"SELECT {_COLUMNS} FROM pictures WHERE {' AND '.join(chosen)} "
            "ORDER BY id DESC LIMIT ?",
            *values,
            limit,
        )
        return [_gallery_image(row) for row in rows]

    def png(self, id: str, owner: str | None = None) -> bytes | None:
        """The PNG file with the settings, or None."""
        if self.get(id, owner) is None:
            return None
        try:
            return self._path(id).read_bytes()
        except FileNotFoundError:  # deleted meanwhile
            return None

    def thumbnail(self, id: str, owner: str | None = None) -> bytes | None:
        """The WebP thumbnail, or None."""
        if not is_id(id):
            return None
        rows = self.database.rows(
            "SELECT thumbnail FROM pictures WHERE id = ? AND client = ifnull(?, client)", id, owner
        )
        return rows[0]["thumbnail"] if rows else None

    def remove(self, id: str, owner: str | None = None) -> bool:
        """Deletes an image. False if there is none."""
        if not is_id(id):
            return False
        query = "DELETE FROM pictures WHERE id = ? AND client = ifnull(?, client)"
        found = self.database.make_room(lambda db: db.execute(query, (id, owner)).rowcount)
        if found:
            self._unlink(id)
        return bool(found)

    def size(self) -> int:
        """Bytes of all images."""
        return self.database.rows("SELECT bytes FROM total")[0]["bytes"]

    def tidy(self) -> None:
        """Deletes images beyond the bounds."""
        self._unlink(*self.database.make_room(self._evict))

    # --- on disk ----------------------------------------------------------------------------

    def _evict(self, db: Connection) -> list[str]:
        """Deletes rows beyond the bounds, oldest first, and returns their ids."""
        total = db.execute("SELECT bytes FROM total").fetchone()["bytes"]
        newest = db.execute("SELECT max(id) AS id FROM pictures").fetchone()["id"]
        oldest, gone = self.clock() - self.most_seconds, []
        for row in db.execute("SELECT id, bytes, created FROM pictures ORDER BY id"):
            too_many = total > self.most_bytes and row["id"] != newest
            if not too_many and row["created"] >= oldest:
                break
            total -= row["bytes"]
            gone.append(row["id"])
        if gone:
            db.execute("DELETE FROM pictures WHERE id <= ?", (gone[-1],))
        return gone

    def _write(self, id: str, image: Image.Image, settings: Settings, png: bytes | None) -> int:
        """Writes the file and syncs it and its folder to disk; returns its size."""
        part = self.folder / f".{id}.part"
        if png is None:
            encoded = io.BytesIO()
            write_png(image, settings, encoded)
            png = self.signed(encoded.getvalue(), "png")
        with _explained():
            try:
                with open(part, "xb") as file:
                    file.write(png)
                    file.flush()
                    os.fsync(file.fileno())
                    size = file.tell()
                os.replace(part, self._path(id))
                to_disk(self.folder)
            except BaseException:
                part.unlink(missing_ok=True)
                self._unlink(id)
                raise
        return size

    def _sweep(self) -> None:
        """Removes files without a row, and rows without a file."""
        known = {row["id"] for row in self.database.rows("SELECT id FROM pictures")}
        present = set()
        for entry in os.scandir(self.folder):
            match = _FILE.fullmatch(entry.name)
            if match is None:
                continue  # not ours
            if match[1] == "" and match[3] == "png" and match[2] in known:
                present.add(match[2])
            else:
                os.unlink(entry)
        with self.database.transaction() as db:
            db.executemany("DELETE FROM pictures WHERE id = ?", [(id,) for id in known - present])

    def _path(self, id: str) -> Path:
        assert is_id(id)  # callers pass ids of the table only
        return self.folder / f"{id}.png"

    def _unlink(self, *ids: str) -> None:
        """Removes files without a row; failures are retried when the gallery opens."""
        for id in ids:
            with contextlib.suppress(OSError):
                os.unlink(self._path(id))


def _gallery_image(row: Row) -> GalleryImage:
    return GalleryImage(
        row["id"], row["client"], row["created"], row["bytes"], json.loads(row["settings"])
    )


def _thumbnail(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80)
    return file.getvalue()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns OSError into a one-line Failure that names no path."""
    try:
        yield
    except OSError as error:
        raise Failure(f"cannot store images: {error.strerror}") from error
