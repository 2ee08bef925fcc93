"""Parquet files: images embedded as bytes or named by path, captions in the text columns.

The image is the column `image` (bytes, or Hugging Face's {bytes, path}), `jpg`, `png`, `webp` or
`bytes`; else the path in `path`, `file_name` or `image_path`, relative to the file's folder. Order:
files by name, rows as they come. A row group is read at once, so groups of a few hundred rows
are best. The illustration set is stored in such files, with its own splits and kinds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from koala.data.items import Item, captions_of, scores_of
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

    def parts(self) -> dict[str, int]:
        """Paths of the files relative to `root`, with their sizes. UserError if there are none."""
        found = [self.root] if self.root.is_file() else sorted(self.root.rglob(self.pattern))
        if not found:
            raise UserError(f"{self.root} has no {self.pattern}")
        return {p.relative_to(self.root).as_posix(): p.stat().st_size for p in found}

    def count(self, part: str) -> int:
        """Number of rows, from the file's footer."""
        file = _file(self.root / part)
        _image_column(self.root / part, file.schema_arrow.names)
        return file.metadata.num_rows

    def items(self, part: str, first: int, count: int) -> Iterator[Item]:
        """The id is the column `id` or `key`, else file name and row number."""
        path = self.root / part
        column = _image_column(path, _file(path).schema_arrow.names)
        for number, record in _records(path, first, count):
            id = record.get("id") or record.get("key") or f"{path.stem}/{number}"
            read = partial(_read, path, record[column])
            captions, scores = captions_of(record), scores_of(record)
            kind = record.get("kind") or "picture"
            yield Item(str(id), read, captions, scores, record.get("split"), kind)


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
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is not a complete parquet file ({error}): download it again"
        ) from None


@lru_cache(maxsize=1)
def _group(path: Path, group: int) -> pa.Table:
    return _file(path).read_row_group(group)


def _image_column(path: Path, names: list[str]) -> str:
    for name in (*EMBEDDED, *PATHS):
        if name in names:
            return name
    raise UserError(
        f"{path} has no image column: {', '.join(EMBEDDED)} for bytes, or "
        f"{', '.join(PATHS)} for paths; it has {', '.join(names)}"
    )


def _read(path: Path, image: Any) -> bytes:
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if not image:
        raise OSError("no image in this row")
    return (path.parent / image).read_bytes()
