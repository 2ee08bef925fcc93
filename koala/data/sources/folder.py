"""A folder of images: captions in a file beside each, or in tables of metadata.

Beside `fox.jpg`: `fox.txt`, `fox.caption`, or `fox.json`, whose text fields are captions. Tables
are `metadata.jsonl`, `metadata.csv` or `captions.jsonl`, in any folder; `file_name` (or another of
`NAMES`) names the image relative to the table's folder, and the text columns are captions. Order:
by path.

Folders named as kohya's scripts name them, `10_a fox`, repeat their images ten times in an epoch;
an image without a caption of its own gets the rest of that name. Images in folders named `test`,
`validation` and the like are held out, if there are others.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from koala.data.items import HELD_OUT, Item, captions_of, repeated, scores_of
from koala.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TEXTS = (".txt", ".caption")  # of files beside an image
METADATA = ("metadata.jsonl", "metadata.csv", "captions.jsonl")
NAMES = ("file_name", "filename", "image", "path", "image_path", "file")  # columns with the image
TEXT = "utf-8-sig"  # UTF-8, with a byte order mark or without
_KOHYA = re.compile(r"([1-9]\d{0,2}|0)_(.*\D.*)")  # not 2024_05, 001_cats


@dataclass(frozen=True)
class Folder:
    """Images below `root`, as one part."""

    root: Path
    name = "folder"
    captions = ()
    looked_in = f"NAME{', NAME'.join(TEXTS)}, NAME.json beside NAME.jpg, and {', '.join(METADATA)}"

    def parts(self) -> dict[str, int]:
        """One: the folder itself, with its number of images. UserError if there are none."""
        if not (images := _images(self.root)):
            raise UserError(f"{self.root} has no images ({', '.join(SUFFIXES)})")
        return {".": len(images)}

    def count(self, part: str) -> int:
        """Number of images."""
        return len(_images(self.root))

    def items(self, part: str, first: int, count: int) -> Iterator[Item]:
        """A file beside an image adds to what the metadata say of it."""
        metadata, apart = _metadata(self.root), _held_out(self.root)
        for path in _images(self.root)[first : first + count]:
            id = path.relative_to(self.root).as_posix()
            read = partial(Path.read_bytes, path)
            try:
                record = metadata.get(id, {}) | _beside(path)
            except ValueError as error:
                record, read = metadata.get(id, {}), partial(_refuse, str(error))
            kohya = _kohya(path.relative_to(self.root))
            captions = captions_of(record)
            if kohya and not captions:
                captions = {"text": kohya[2]}
            kind = repeated(int(kohya[1])) if kohya else "picture"
            split = "test" if path.relative_to(self.root).parts[0] in apart else None
            yield Item(id, read, captions, scores_of(record), split, kind)


def _beside(image: Path) -> dict[str, Any]:
    """The fields of the files beside an image; ValueError if its JSON cannot be read."""
    record: dict[str, Any] = {}
    if (sidecar := image.with_suffix(".json")).is_file():
        try:
            found = json.loads(sidecar.read_bytes().decode(TEXT))
        except ValueError as error:
            raise ValueError(f"{sidecar.name} is not valid JSON ({error})") from None
        record = found if isinstance(found, dict) else {"text": found}
    for suffix in TEXTS:
        if (text := image.with_suffix(suffix)).is_file():
            record["text"] = text.read_text(encoding=TEXT, errors="replace")
    return record


def _refuse(why: str) -> bytes:
    raise OSError(why)


def _kohya(image: Path) -> re.Match[str] | None:
    """The match of the innermost folder `REPEATS_NAME`."""
    found = [match for part in image.parts[:-1] if (match := _KOHYA.fullmatch(part))]
    if found and int(found[-1][1]) < 1:
        raise UserError(f"{image.parent}: 0 repeats show nothing; rename or remove the folder")
    return found[-1] if found else None


@lru_cache(maxsize=2)
def _images(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


@lru_cache(maxsize=2)
def _held_out(root: Path) -> frozenset[str]:
    """The folders in `root` with held-out images."""
    tops = {path.relative_to(root).parts[0] for path in _images(root)}
    found = frozenset(top for top in tops if top.lower() in HELD_OUT)
    return frozenset() if found == tops else found


@lru_cache(maxsize=2)
def _metadata(root: Path) -> dict[str, dict[str, Any]]:
    """Records by path of the image; UserError if a line cannot be read, or none has an image."""
    records: dict[str, dict[str, Any]] = {}
    for folder in sorted({root, *(p.parent for name in METADATA for p in root.rglob(name))}):
        found = [folder / name for name in METADATA if (folder / name).is_file()]
        if len(found) > 1:
            raise UserError(f"{folder} has both {' and '.join(p.name for p in found)}: keep one")
        for number, record in enumerate(_records(found[0]) if found else (), 1):
            named = _image_of(record)
            if named is None:
                raise UserError(f"{found[0]}: record {number} names no image ({', '.join(NAMES)})")
            image = Path(folder.relative_to(root), named).as_posix()
            records[image] = records.get(image, {}) | record
    images = {path.relative_to(root).as_posix() for path in _images(root)}
    if records and images.isdisjoint(records):
        raise UserError(
            f"{root}: its metadata name {len(records)} images, such as {next(iter(records))}, and "
            "none of them is there: names are relative to the table's folder"
        )
    return records


def _image_of(record: Any) -> str | None:
    if not isinstance(record, dict):
        return None
    return next((record[name] for name in NAMES if isinstance(record.get(name), str)), None)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding=TEXT, newline="") as file:
        if path.suffix == ".csv":
            yield from csv.DictReader(file)
            return
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number} is not valid JSON ({error})") from None
