"""A folder of images: captions in a file beside each, or in tables of metadata.

Beside `fox.jpg`: `fox.txt`, `fox.caption`, or `fox.json`, whose text fields are captions, or the
same as `fox.jpg.txt`. Tables are described in `koala.data.sources.tables`. Hidden files are left
out. Order: by path, and then the images that a table names and that are not there.

Folders named as kohya's scripts name them, `10_a fox`, repeat their images ten times in an epoch;
an image without a caption of its own gets the rest of that name. Images in folders named `test`,
`validation` and the like are held out, if there are others. The caption `file_name` is the name of
the image's file, for those who write their captions there; it is used only if it is asked for.
"""

import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from koala.data.files import IMAGES, NOT_READ, beside, files_below, shown
from koala.data.items import FILE_NAME, HELD_OUT, Item, captions_of, repeated, scores_of
from koala.data.sources.tables import METADATA, Captions, read_tables, tables_among
from koala.errors import UserError
from koala.utils.records import decoded

TEXTS = (".txt", ".caption")  # of files beside an image
_KOHYA = re.compile(r"([1-9]\d{0,2}|0)_(.*\D.*)")  # not 2024_05, 001_cats
_COUNTER = re.compile(r"(?:[\s_-]*\(\d+\)|[\s_-]+\d+)+$")  # of files: `fox_001`, `fox (2)`


@dataclass(frozen=True)
class Folder:
    """Images below `root`, as one part.

    table: the only one that is read; then the images are those that it names. texts: endings of
    caption files.
    """

    root: Path
    table: Path | None = None
    texts: tuple[str, ...] = TEXTS
    name = "folder"
    captions = ()

    @property
    def looked_in(self) -> str:
        """Captions' places, and what was passed over."""
        usual = f"NAME{', NAME'.join(self.texts)}, NAME.json beside NAME.jpg, and "
        usual += ", ".join(METADATA)
        unread = [path for path in contents(self).unread if path.parent == self.root]
        if unread:
            usual += f"; {unread[0].name} is no such table: to read it, give it as the source"
        return f"{usual}; --caption {FILE_NAME} takes the names of the files"

    def parts(self) -> dict[str, int]:
        """One: the folder itself, with a digest of its files' names and sizes.

        UserError if it has no images.
        """
        found = contents(self)
        if not found.images and not found.missing:
            raise UserError(f"{self.root} has no images ({', '.join(IMAGES)})")
        return {".": digest(self)}

    def count(self, part: str) -> int:
        """Number of images, and of those that are missing."""
        found = contents(self)
        return len(found.images) + len(found.missing)

    def items(self, part: str, first: int, count: int) -> Iterator[Item]:
        """A file beside an image adds to what the metadata say of it."""
        found = contents(self)
        for path in found.images[first : first + count]:
            yield self._item(path, found)
        after = max(0, first - len(found.images))
        upto = max(0, first + count - len(found.images))
        for id, why in [*found.missing.items()][after:upto]:
            yield Item(shown(id), bytes, {}, no_image=why)

    def _item(self, path: Path, found: "_Contents") -> Item:
        image = path.relative_to(self.root)
        id = shown(image.as_posix())
        try:
            record = found.records.get(image.as_posix(), {}) | _beside(path, self.texts)
        except (OSError, ValueError) as error:
            return Item(id, bytes, {}, damage=str(error))
        kohya = _kohya(image)
        captions = captions_of(record)
        if kohya and not captions:
            captions = {"text": kohya[2]}
        kind = repeated(int(kohya[1])) if kohya else "picture"
        split = "test" if image.parts[0] in found.held_out else None
        captions[FILE_NAME] = _said_by(path.stem)
        return Item(id, path.read_bytes, captions, scores_of(record), split, kind)


def _beside(image: Path, texts: tuple[str, ...]) -> dict[str, Any]:
    """The fields of the files beside an image; ValueError if one cannot be read."""
    record: dict[str, Any] = {}
    for path in beside(image, (".json", *texts)):
        try:
            text = decoded(path.read_bytes())
            found = json.loads(text) if path.suffix.lower() == ".json" else text
        except (ValueError, RecursionError) as error:
            what = " is not valid JSON" if isinstance(error, json.JSONDecodeError) else ""
            raise ValueError(f"{path.name}{what} ({error})") from None
        record |= found if isinstance(found, dict) else {"text": found}
    return record


def _said_by(stem: str) -> str:
    """The caption in a file's name: without a counter at its end, `_` for spaces."""
    return " ".join((_COUNTER.sub("", shown(stem)) or shown(stem)).replace("_", " ").split())


def _kohya(image: Path) -> re.Match[str] | None:
    """The match of the innermost folder `REPEATS_NAME`."""
    found = [match for part in image.parts[:-1] if (match := _KOHYA.fullmatch(part))]
    if found and int(found[-1][1]) < 1:
        raise UserError(f"{image.parent}: 0 repeats show nothing; rename or remove the folder")
    return found[-1] if found else None


@dataclass(frozen=True)
class _Contents:
    images: list[Path]
    texts: list[Path]  # files that may hold captions
    records: dict[str, dict[str, Any]]  # of tables, by the image's path relative to the root
    missing: dict[str, str]  # images that cannot be had, and why
    held_out: frozenset[str]  # the folders in the root with held-out images
    unread: list[Path]


@lru_cache(maxsize=16)
def contents(source: Folder) -> _Contents:
    """UserError if a table cannot be read, or names no image."""
    root = source.root
    files = files_below(root)
    images = [path for path in files if path.suffix.lower() in IMAGES]
    given = [] if source.table is None else [source.table]
    tables, unread = (given, []) if given else tables_among(files)
    told: Captions = read_tables(
        root, [path.relative_to(root).as_posix() for path in images], tables, bool(given)
    )
    if given:
        images = [path for path in images if path.relative_to(root).as_posix() in told.records]
    missing = {image: f"{where}, but not there" for image, where in told.missing.items()}
    if not given:
        other = [path for path in files if path.suffix.lower() in NOT_READ]
        why = "its format is not read here: convert it to PNG, WebP or JPEG"
        missing |= {path.relative_to(root).as_posix(): why for path in other}
    stems = {path.stem for path in images} | {path.name for path in images}
    texts = [p for p in files if p.suffix.lower() in (".json", *source.texts) and p.stem in stems]
    tops = {path.relative_to(root).parts[0] for path in images}
    apart = frozenset(top for top in tops if top.lower() in HELD_OUT)
    return _Contents(
        images, [*tables, *texts], told.records, missing,
        frozenset() if apart == tops else apart, [p for p in unread if p.stem not in stems],
    )  # fmt: skip


@lru_cache(maxsize=16)
def digest(source: Folder) -> int:
    """Of the names and sizes of images, and of what may hold their captions."""
    found, value = contents(source), 0
    for path in (*found.images, *found.texts):
        try:
            size = path.stat().st_size
        except OSError:  # a broken link
            size = -1
        line = f"{os.path.relpath(path, source.root)} {size}\n"
        value = zlib.crc32(line.encode("utf-8", "surrogateescape"), value)
    return value
