"""Parquet files: images embedded as bytes or named by path, captions in the text columns.

The image is the column `image` (bytes, Hugging Face's {bytes, path}, or base64), `jpg`, `png`,
`webp` or `bytes`, or the first that `datasets` has marked as images, or the only column of bytes
that is called so (`img_bytes`); else the path in `path`, `file_name` or `image_path`, relative to
the file's folder; else the only column of bytes. Case does not matter, and URLs are not followed.
Order: files by name, rows as they come. A row group is read at once, so groups of a few hundred
rows are best. Files named `test-...` or `validation-...`, as on the Hub, are held out, if there
are others. The illustration set is stored in such files, with its own splits and kinds.
"""

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from koala.data.files import files_below
from koala.data.items import IMAGE_NAMES, Item, captions_of, damaged, held_out, scores_of
from koala.data.sources.tables import DOWNLOAD
from koala.errors import UserError

EMBEDDED = ("image", "jpg", "jpeg", "png", "webp", "bytes")
PATHS = ("path", "file_name", "image_path", *IMAGE_NAMES)
_IMAGE = re.compile("im(?:a)?g|pic|photo|bytes|jpe?g|png", re.IGNORECASE)  # of bytes, in its name
_BASE64 = ("/9j/", "iVBORw0KGgo", "UklGR")  # how JPEG, PNG and WebP begin in it


@dataclass(frozen=True)
class Parquet:
    """The parquet files below `root` that match `pattern`; a part is a file."""

    root: Path
    captions: tuple[str, ...] = ()
    pattern: str = "*.parquet"
    name = "parquet"
    looked_in = "columns of text, of lists of texts and of structures with texts"

    def parts(self) -> dict[str, int]:
        """Paths of the files relative to `root`, with their sizes. UserError if there are none."""
        found = [self.root] if self.root.is_file() else files_below(self.root)
        if self.root.is_dir():
            found = [p for p in found if fnmatch(p.name.lower(), self.pattern) and p.is_file()]
        if not found:
            raise UserError(f"{self.root} has no {self.pattern}")
        return {p.relative_to(self.root).as_posix(): p.stat().st_size for p in found}

    def count(self, part: str) -> int:
        """Number of rows, from the file's footer; one for a file that is cut off."""
        try:
            file = _file(self.root / part)
        except (pa.ArrowException, OSError):
            return 1
        image_column(self.root / part, file.schema_arrow)
        return file.metadata.num_rows

    def items(self, part: str, first: int, count: int) -> Iterator[Item]:
        """The id is the column `id` or `key`, else file name and row number."""
        path, split = self.root / part, "test" if part in _held_out(self) else None
        try:
            schema = _file(path).schema_arrow
        except (pa.ArrowException, OSError) as error:
            yield damaged(part, f"not a complete parquet file ({error})")
            return
        column = image_column(path, schema)
        for number, record in _records(path, first, count):
            if isinstance(record, str):
                yield damaged(f"{path.stem}/{number}", record)
                continue
            yield item_of(path.parent, f"{path.stem}/{number}", record, column, split)


@lru_cache(maxsize=2)
def _held_out(source: Parquet) -> frozenset[str]:
    return held_out(source.parts())


def item_of(folder: Path, id: str, record: dict[str, Any], column: str, split: str | None) -> Item:
    """The item of a table's row.

    folder: of the images that are named by path. id, split: if the row has none of its own.
    column: with the image.
    """
    id = str(record.get("id") or record.get("key") or id)
    image = record[column]
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if why := _lacking(folder, image):
        return Item(id, bytes, {}, no_image=why)
    read = partial(_read, folder, image)
    kind, split = record.get("kind") or "picture", record.get("split") or split
    return Item(id, read, captions_of(record), scores_of(record), split, kind)


def _records(path: Path, first: int, count: int) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Rows with their numbers, from the row groups that hold them; or why they cannot be read."""
    metadata, start = _file(path).metadata, 0
    for group in range(metadata.num_row_groups):
        end = start + metadata.row_group(group).num_rows
        low, high = max(first, start), min(first + count, end)
        if low < high:
            rows: list[dict[str, Any]] | list[str]
            try:
                rows = _group(path, group).slice(low - start, high - low).to_pylist()
            except (pa.ArrowException, OSError) as error:
                rows = [f"row group {group} is damaged ({error})"] * (high - low)
            yield from zip(range(low, high), rows, strict=True)
        start = end


@lru_cache(maxsize=2)
def _file(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path)


@lru_cache(maxsize=1)
def _group(path: Path, group: int) -> pa.Table:
    return _file(path).read_row_group(group)


def image_column(path: Path, schema: pa.Schema) -> str:
    """The column with the images; UserError if there is none."""
    plain = {name.lower(): name for name in reversed(schema.names)}
    embedded = [field.name for field in schema if _embeds(field.type)]
    likely = [name for name in embedded if _IMAGE.search(name)]
    for name in (*EMBEDDED, *_declared(schema), *(likely if len(likely) == 1 else ()), *PATHS):
        found = plain.get(name.lower())
        if found and not pa.types.is_list(schema.field(found).type):
            return found
    if len(embedded) == 1:
        return embedded[0]
    if any("url" in name for name in plain):
        raise UserError(f"{path} has the URLs of its images, and nothing is downloaded: {DOWNLOAD}")
    raise UserError(
        f"{path} has no image column: {', '.join(EMBEDDED)} for bytes, or "
        f"{', '.join(PATHS[:3])} for paths; it has {', '.join(schema.names)}"
    )


def _embeds(type: pa.DataType) -> bool:
    if pa.types.is_struct(type):
        return any(field.name == "bytes" and _embeds(field.type) for field in type)
    return pa.types.is_binary(type) or pa.types.is_large_binary(type)


def _declared(schema: pa.Schema) -> list[str]:
    """The columns that are images by the description that `datasets` writes into its files."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [name for name, feature in features.items() if feature.get("_type") == "Image"]
    except (ValueError, LookupError, TypeError, AttributeError):
        return []


def _lacking(folder: Path, image: Any) -> str:
    """Why a row has no image; "" if it has one."""
    if not image:
        return "no image in this row"
    if not isinstance(image, str):
        return "" if isinstance(image, bytes) else f"{image!r:.40} is neither bytes nor a path"
    if "://" in image[:10]:
        return f"{image:.80} is a URL, and nothing is downloaded: {DOWNLOAD}"
    if image.startswith(_BASE64) or (folder / image).is_file():
        return ""
    return f"{image:.80} is not in {folder}"


def _read(folder: Path, image: str | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    if image.startswith(_BASE64) and len(image) > 100:
        return base64.b64decode(image)
    return (folder / image).read_bytes()
