"""Parquet files: images embedded as bytes or named by path, captions in the text columns.

The image is the column `image` (bytes, or Hugging Face's {bytes, path}), `jpg`, `png`, `webp` or
`bytes`, or the first that `datasets` has marked as images; else the path in `path`, `file_name` or
`image_path`, relative to the file's folder. Order:
files by name, rows as they come. A row group is read at once, so groups of a few hundred rows
are best. Files named `test-...` or `validation-...`, as on the Hub, are held out, if there are
others. The illustration set is stored in such files, with its own splits and kinds.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from koala.data.items import Item, captions_of, damaged, held_out, scores_of
from koala.errors import UserError

EMBEDDED = ("image", "jpg", "png", "webp", "bytes")
PATHS = ("path", "file_name", "image_path")


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
        found = [self.root] if self.root.is_file() else sorted(self.root.rglob(self.pattern))
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
    read = partial(_read, folder, record[column])
    kind, split = record.get("kind") or "picture", record.get("split") or split
    return Item(id, read, captions_of(record), scores_of(record), split, kind)


def _records(path: Path, first: int, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with their numbers, from the row groups that hold them."""
    metadata, start = _file(path).metadata, 0
    for group in range(metadata.num_row_groups):
        end = start + metadata.row_group(group).num_rows
        low, high = max(first, start), min(first + count, end)
        if low < high:
            rows = _group(path, group).slice(low - start, high - low).to_pylist()
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
    for name in (*EMBEDDED, *_declared(schema), *PATHS):
        if name in schema.names:
            return name
    raise UserError(
        f"{path} has no image column: {', '.join(EMBEDDED)} for bytes, or "
        f"{', '.join(PATHS)} for paths; it has {', '.join(schema.names)}"
    )


def _declared(schema: pa.Schema) -> list[str]:
    """The columns that are images by the description that `datasets` writes into its files."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [name for name, feature in features.items() if feature.get("_type") == "Image"]
    except (ValueError, LookupError, TypeError, AttributeError):
        return []


def _read(folder: Path, image: Any) -> bytes:
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if not image:
        raise OSError("no image in this row")
    return (folder / image).read_bytes()
