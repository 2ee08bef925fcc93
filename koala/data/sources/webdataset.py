"""Webdataset tars in img2dataset's layout: KEY.jpg, KEY.txt (the caption) and KEY.json.

`KEY.NAME.txt` is a caption by that name. Images are read in place; of a compressed tar each process
reads on from where it is. Each process scans a tar's headers once, which takes a second or two for
ten thousand images. Order: tars by name, keys as they come. Tars named `test-...`, `validation-...`
are held out, if there are others.
"""

import gzip
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from koala.data.files import IMAGES, files_below, is_hidden, shown
from koala.data.items import Item, captions_of, damaged, held_out, scores_of
from koala.data.sources.folder import TEXTS
from koala.errors import UserError
from koala.utils.records import decoded

Place = tuple[int, int]  # offset and bytes in the tar, decompressed
TARS = (".tar", ".tar.gz", ".tgz")


def is_tar(path: Path) -> bool:
    """Whether it is a tar, by its name."""
    return path.name.lower().endswith(TARS)


@dataclass(frozen=True)
class WebDataset:
    """The tars below `root`, or `root` itself; a part is a tar."""

    root: Path
    name = "webdataset"
    captions = ()
    looked_in = f"KEY{', KEY'.join(TEXTS)}, KEY.NAME.txt and KEY.json beside KEY.jpg"

    def parts(self) -> dict[str, int]:
        """Paths of the tars relative to `root`, with their sizes. UserError if there are none."""
        there = [self.root] if self.root.is_file() else files_below(self.root)
        found = [path for path in there if is_tar(path) and path.is_file()]
        if not found:
            raise UserError(f"{self.root} has none of {', '.join(TARS)}")
        return {p.relative_to(self.root).as_posix(): p.stat().st_size for p in found}

    def count(self, part: str) -> int:
        """The number of keys, and one for the rest of a tar that is cut off."""
        keys, damage = _contents(self.root / part)
        return len(keys) + bool(damage)

    def items(self, part: str, first: int, count: int) -> Iterator[Item]:
        """Captions: `text` of KEY.txt, `NAME` of KEY.NAME.txt, and the text fields of KEY.json."""
        path, split = self.root / part, "test" if part in _held_out(self) else None
        keys, damage = _contents(path)
        for key, files in keys[first : first + count]:
            id = shown(f"{path.name.split('.')[0]}/{key}")
            if (image := _image(files)) is None:
                there = ", ".join(shown(key + suffix) for suffix in [*files][:4])
                why = f"no image of its own among {there}: a key ends at the first dot of a name"
                yield Item(id, bytes, {}, no_image=why)
                continue
            try:
                record = _record(path, files)
            except ValueError as error:
                yield Item(id, bytes, {}, damage=f"{key}{error}")
                continue
            read = partial(_read, path, image)
            yield Item(id, read, captions_of(record), scores_of(record), split)
        if damage and first + count > len(keys):
            yield damaged(part, damage)


def _image(files: dict[str, Place]) -> Place | None:
    """The image of a key: `.jpg` and the like, or the only one called `.NAME.jpg`."""
    if plain := [files[suffix] for suffix in IMAGES if suffix in files]:
        return plain[0]
    named = [place for suffix, place in files.items() if suffix.endswith(IMAGES)]
    return named[0] if len(named) == 1 else None


def _record(path: Path, files: dict[str, Place]) -> dict[str, Any]:
    """The fields of a key; ValueError if one of its files cannot be read."""
    record: dict[str, Any] = {}
    for suffix, place in sorted(files.items(), key=lambda file: file[0] != ".json"):
        try:
            if suffix == ".json":
                found = json.loads(decoded(_read(path, place)))
                record |= found if isinstance(found, dict) else {"text": found}
            elif suffix.endswith(TEXTS):
                name = suffix.rpartition(".")[0].removeprefix(".") or "text"
                record[name] = decoded(_read(path, place))
        except (ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
            what = " is not valid JSON" if isinstance(error, json.JSONDecodeError) else ""
            raise ValueError(f"{suffix}{what} ({error})") from None
    return record


@lru_cache(maxsize=2)
def _held_out(source: WebDataset) -> frozenset[str]:
    return held_out(source.parts())


@lru_cache(maxsize=2)
def _contents(path: Path) -> tuple[list[tuple[str, dict[str, Place]]], str]:
    """Keys in the order of their first file, each with its files by suffix; and what is damaged.

    Of a tar that is cut off, the files before the cut.
    """
    keys: dict[str, dict[str, Place]] = {}
    end, damage = 0, ""
    try:
        with tarfile.open(path, "r:gz" if _compressed(path) else "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isfile() and not any(map(is_hidden, _folders(member.name))):
                    folder, _, name = member.name.rpartition("/")
                    stem, dot, suffix = name.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    place = (member.offset_data, member.size)
                    keys.setdefault(key, {})[(dot + suffix).lower()] = place
        if _read(path, (end, tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end marker")  # tarfile accepts that
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        damage = f"not a complete tar ({error}), of which {len(keys)} images are read"
        if keys:
            keys.popitem()  # perhaps not all of its files are there
    return list(keys.items()), damage


def _folders(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in (".", "..")]


@lru_cache(maxsize=64)
def _compressed(path: Path) -> bool:
    """By its first bytes, whatever it is called."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


@lru_cache(maxsize=1)
def _decompressed(path: Path) -> gzip.GzipFile:
    """Kept open: a step back would start from the beginning."""
    return gzip.open(path)


def _read(path: Path, place: Place) -> bytes:
    if _compressed(path):
        stream = _decompressed(path)
        stream.seek(place[0])
        return stream.read(place[1])
    with path.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1])
