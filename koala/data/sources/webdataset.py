"""Webdataset tars in img2dataset's layout: KEY.jpg, KEY.txt (the caption) and KEY.json.

Images are read in place. Each process scans a tar's headers once, which takes a second or two for
ten thousand images. Order: tars by name, keys as they come.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from koala.data.items import Item, captions_of, scores_of
from koala.data.sources.folder import SUFFIXES
from koala.errors import UserError

Place = tuple[int, int]  # offset and bytes in the tar


@dataclass(frozen=True)
class WebDataset:
    """The tars below `root`, or `root` itself; a part is a tar."""

    root: Path
    name = "webdataset"
    captions = ()

    def parts(self) -> dict[str, int]:
        """Paths of the tars relative to `root`, with their sizes. UserError if there are none."""
        found = [self.root] if self.root.is_file() else sorted(self.root.rglob("*.tar"))
        if not found:
            raise UserError(f"{self.root} has no .tar (decompress compressed ones first)")
        return {p.relative_to(self.root).as_posix(): p.stat().st_size for p in found}

    def count(self, part: str) -> int:
        """The number of keys."""
        return len(_contents(self.root / part))

    def items(self, part: str, first: int, count: int) -> Iterator[Item]:
        """Captions: `text` of KEY.txt, and the text fields of KEY.json."""
        path = self.root / part
        for key, files in _contents(path)[first : first + count]:
            read = partial(_read, path, next((files[s] for s in SUFFIXES if s in files), None))
            try:
                record = json.loads(_read(path, files[".json"])) if ".json" in files else {}
            except ValueError:
                record, read = {}, partial(_refuse, f"{key}.json is not valid JSON")
            if ".txt" in files:
                record["text"] = _read(path, files[".txt"]).decode("utf-8", errors="replace")
            yield Item(f"{path.stem}/{key}", read, captions_of(record), scores_of(record))


@lru_cache(maxsize=2)
def _contents(path: Path) -> list[tuple[str, dict[str, Place]]]:
    """Keys in the order of their first file, each with its files by suffix."""
    keys: dict[str, dict[str, Place]] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    stem, dot, suffix = name.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    place = (member.offset_data, member.size)
                    keys.setdefault(key, {})[(dot + suffix).lower()] = place
        if _read(path, (end, tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end marker")  # tarfile accepts that
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path} is not a complete tar ({error}): download it again or remove it"
        ) from None
    return list(keys.items())


def _refuse(why: str) -> bytes:
    raise OSError(why)


def _read(path: Path, place: Place | None) -> bytes:
    if place is None:
        raise OSError("no image under this key")
    with path.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1])
