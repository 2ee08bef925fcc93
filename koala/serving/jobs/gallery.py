"""The gallery: finished pictures on disk, with their settings, through restarts and crashes.

A picture is a PNG file and a row. The file is whole and on disk before the row is; what a crash
left without a row is removed when the gallery is opened. So every row has its picture, and no
file is there for nothing. The oldest go when they are too many bytes or too old.
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
from koala.serving.jobs.database import Store, is_id

THUMBNAIL = 256  # pixels of its longer side
_FILE = re.compile(r"(\.?)([0-9a-f]{32})\.(png|part)", re.ASCII)
_COLUMNS = "id, client, created, bytes, settings"


@dataclass(frozen=True)
class Picture:
    """A picture of the gallery."""

    id: str
    client: str  # who asked for it
    created: float  # Unix seconds
    bytes: int  # what it takes on disk
    settings: dict[str, Any]  # the fields of `koala.generation.Settings`, as JSON has them


class Gallery:
    """Finished pictures, bounded. Every method may be called from any thread.

    most_bytes: of files and thumbnails together; the newest picture stays even if it alone takes
    more. most_seconds: how old a picture may become. clock: Unix seconds.
    Where `owner` is given, only that client's pictures are there.
    """

    def __init__(
        self,
        store: Store,
        most_bytes: int,
        most_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store, self.most_bytes, self.most_seconds = store, most_bytes, most_seconds
        self.clock = clock
        self.folder = store.folder / "pictures"
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
    ) -> Picture:
        """Keeps a picture; when this returns it is on disk. `png`: its file, where it is made.

        `also(db, id)` belongs to the same transaction: if it raises, there is no picture.
        Failure if the disk is full.
        """
        thumbnail = _thumbnail(image)
        id = self.store.new_id()
        size = self._write(id, image, settings, png) + len(thumbnail)
        values = json.dumps(asdict(settings))
        picture = Picture(id, client, self.clock(), size, json.loads(values))
        try:
            with self.store.transaction() as db:
                db.execute(
                    f"INSERT INTO pictures ({_COLUMNS}, thumbnail) VALUES (?, ?, ?, ?, ?, ?)",
                    (id, client, picture.created, size, values, thumbnail),
                )
                if also is not None:
                    also(db, id)
                gone = self._let_go(db)
        except BaseException:
            self._unlink(id)
            raise
        self._unlink(*gone)
        return picture

    def get(self, id: str, owner: str | None = None) -> Picture | None:
        """The picture of an id; None if there is none."""
        if not is_id(id):
            return None
        rows = self.store.rows(
            f"SELECT {_COLUMNS} FROM pictures WHERE id = ? AND client = ifnull(?, client)",
            id,
            owner,
        )
        return _picture(rows[0]) if rows else None

    def page(
        self, limit: int, before: str | None = None, owner: str | None = None
    ) -> list[Picture]:
        """At most `limit` pictures, newest first; those older than `before` if it is given."""
        mine, values = ("", ()) if owner is None else ("AND client = ?", (owner,))
        rows = self.store.rows(
            f"SELECT {_COLUMNS} FROM pictures WHERE id < ? {mine} ORDER BY id DESC LIMIT ?",
            before or "g",  # after every hexadecimal digit
            *values,
            limit,
        )
        return [_picture(row) for row in rows]

    def png(self, id: str, owner: str | None = None) -> bytes | None:
        """The file of a picture, settings inside; None if there is none."""
        if self.get(id, owner) is None:
            return None
        try:
            return self._path(id).read_bytes()
        except FileNotFoundError:  # removed since
            return None

    def thumbnail(self, id: str, owner: str | None = None) -> bytes | None:
        """A small WebP of a picture; None if there is none."""
        if not is_id(id):
            return None
        rows = self.store.rows(
            "SELECT thumbnail FROM pictures WHERE id = ? AND client = ifnull(?, client)", id, owner
        )
        return rows[0]["thumbnail"] if rows else None

    def remove(self, id: str, owner: str | None = None) -> bool:
        """Removes a picture for good. False if there is none."""
        if not is_id(id):
            return False
        with self.store.transaction() as db:
            found = db.execute(
                "DELETE FROM pictures WHERE id = ? AND client = ifnull(?, client)", (id, owner)
            ).rowcount
        if found:
            self._unlink(id)
        return bool(found)

    def size(self) -> int:
        """What all pictures take on disk."""
        return self.store.rows("SELECT bytes FROM total")[0]["bytes"]

    def tidy(self) -> None:
        """Removes what is over the bounds."""
        with self.store.transaction() as db:
            gone = self._let_go(db)
        self._unlink(*gone)

    # --- on disk ----------------------------------------------------------------------------

    def _let_go(self, db: Connection) -> list[str]:
        """Deletes the rows that are over the bounds, oldest first, and returns their ids."""
        total = db.execute("SELECT bytes FROM total").fetchone()["bytes"]
        newest = db.execute("SELECT max(id) AS id FROM pictures").fetchone()["id"]
        eldest, gone = self.clock() - self.most_seconds, []
        for row in db.execute("SELECT id, bytes, created FROM pictures ORDER BY id"):
            too_many = total > self.most_bytes and row["id"] != newest
            if not too_many and row["created"] >= eldest:
                break
            total -= row["bytes"]
            gone.append(row["id"])
        if gone:
            db.execute("DELETE FROM pictures WHERE id <= ?", (gone[-1],))
        return gone

    def _write(self, id: str, image: Image.Image, settings: Settings, png: bytes | None) -> int:
        """Writes the file, and the name into its folder, through to the disk; its bytes."""
        part = self.folder / f".{id}.part"
        with _explained():
            try:
                with open(part, "xb") as file:
                    if png is None:
                        write_png(image, settings, file)
                    else:
                        file.write(png)
                    file.flush()
                    os.fsync(file.fileno())
                    size = file.tell()
                os.replace(part, self._path(id))
                _sync(self.folder)
            except BaseException:
                part.unlink(missing_ok=True)
                self._unlink(id)
                raise
        return size

    def _sweep(self) -> None:
        """Removes files without a row, and rows whose file somebody took away."""
        known = {row["id"] for row in self.store.rows("SELECT id FROM pictures")}
        there = set()
        for entry in os.scandir(self.folder):
            match = _FILE.fullmatch(entry.name)
            if match is None:
                continue  # not ours
            if match[1] == "" and match[3] == "png" and match[2] in known:
                there.add(match[2])
            else:
                os.unlink(entry)
        with self.store.transaction() as db:
            db.executemany("DELETE FROM pictures WHERE id = ?", [(id,) for id in known - there])

    def _path(self, id: str) -> Path:
        assert is_id(id)  # ids come from the table, never from a request
        return self.folder / f"{id}.png"

    def _unlink(self, *ids: str) -> None:
        """Removes files of pictures that have no row; what cannot be goes at the next opening."""
        for id in ids:
            with contextlib.suppress(OSError):
                os.unlink(self._path(id))


def _picture(row: Row) -> Picture:
    return Picture(
        row["id"], row["client"], row["created"], row["bytes"], json.loads(row["settings"])
    )


def _thumbnail(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80)
    return file.getvalue()


def _sync(folder: Path) -> None:
    """Waits until the names in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Says in one line, which names no path, what kept the disk from taking a picture."""
    try:
        yield
    except OSError as error:
        raise Failure(f"cannot keep pictures: {error.strerror}") from error
