"""A folder of images: captions in a `.txt` beside each, or in one metadata.jsonl or .csv.

The metadata's column `file_name` names the image, relative to the folder; its text columns are
captions. Order: by path.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from koala.data.items import SCORES, Item, captions_of, scores_of
from koala.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Folder:
    """Images below `root`, as one part."""

    root: Path
    name = "folder"
    captions = ()

    def parts(self) -> dict[str, int]:
        """One: the folder itself, with its number of images. UserError if there are none."""
        if not (images := _images(self.root)):
            raise UserError(f"{self.root} has no images ({', '.join(SUFFIXES)})")
        return {".": len(images)}

    def count(self, part: str) -> int:
        """Number of images."""
        return len(_images(self.root))

    def items(self, part: str, first: int, count: int) -> Iterator[Item]:
        """Images that the metadata does not name have only the caption in their .txt."""
        metadata = _metadata(self.root)
        for path in _images(self.root)[first : first + count]:
            id = path.relative_to(self.root).as_posix()
            record = dict(metadata.get(id, {}))
            beside = path.with_suffix(".txt")
            if beside.is_file():
                record["text"] = beside.read_text(encoding="utf-8", errors="replace")
            yield Item(id, partial(Path.read_bytes, path), captions_of(record), scores_of(record))


@lru_cache(maxsize=2)
def _images(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


@lru_cache(maxsize=2)
def _metadata(root: Path) -> dict[str, dict[str, Any]]:
    """Records by file name; UserError if a line cannot be read."""
    found = [root / name for name in METADATA if (root / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{root} has both {' and '.join(METADATA)}: keep one")
    if not found:
        return {}
    (path,) = found
    records = {}
    for number, record in enumerate(_records(path), 1):
        if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
            raise UserError(f"{path}: record {number} has no file_name")
        records[Path(record["file_name"]).as_posix()] = record
    return records


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            for row in csv.DictReader(file):
                yield {k: _number(v) if k in _NUMBERS else v for k, v in row.items()}
            return
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number} is not valid JSON ({error})") from None


_NUMBERS = {name for names in SCORES.values() for name in names}


def _number(text: str | None) -> float | None:
    """A score in a csv cell; None if it is not a number."""
    try:
        return float(text or "")
    except ValueError:
        return None
