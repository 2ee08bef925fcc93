"""Arrow files as `datasets` writes them: into a folder with `save_to_disk`, or into its cache.

Columns are read as in `koala.data.sources.parquet`. A folder of several splits has a
`dataset_dict.json`; those called `test`, `validation` and the like are held out, if there are
others. Order: splits as listed, files as listed, rows as they come.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from koala.data.items import Item, damaged, held_out
from koala.data.sources.parquet import image_column, item_of
from koala.errors import UserError

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


@dataclass(frozen=True)
class Arrow:
    """A data set in Arrow files; a part is a file, called SPLIT/NAME."""

    name: str
    files: tuple[tuple[str, Path], ...]  # parts, with their paths
    captions = ()
    looked_in = "columns of text, of lists of texts and of structures with texts"

    def parts(self) -> dict[str, int]:
        """The parts, with the sizes of their files."""
        return {part: path.stat().st_size for part, path in self.files}

    def count(self, part: str) -> int:
        """Number of rows; one for a file that is cut off."""
        path = dict(self.files)[part]
        try:
            table = _table(path)
        except (pa.ArrowException, OSError):
            return 1
        image_column(path, table.schema)
        return table.num_rows

    def items(self, part: str, first: int, count: int) -> Iterator[Item]:
        """Rows as of a parquet file."""
        files = dict(self.files)
        path, split = files[part], "test" if part in held_out(files) else None
        try:
            table = _table(path)
        except (pa.ArrowException, OSError) as error:
            yield damaged(part, f"not a complete Arrow file ({error})")
            return
        column = image_column(path, table.schema)
        for number, record in enumerate(table.slice(first, count).to_pylist(), first):
            yield item_of(path.parent, f"{part}/{number}", record, column, split)


@lru_cache(maxsize=2)
def _table(path: Path) -> pa.Table:
    """Memory-mapped; nothing is read yet."""
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def is_saved(root: Path) -> bool:
    """Whether `save_to_disk` made the folder, of one split or several."""
    return (root / SPLITS).is_file() or all((root / name).is_file() for name in (STATE, INFO))


def saved(root: Path) -> Arrow:
    """The data set in such a folder. UserError if a file is missing."""
    found: list[tuple[str, Path]] = []
    for folder in _folders(root):
        try:
            listed = json.loads((folder / STATE).read_text("utf-8"))["_data_files"]
            files = [folder / file["filename"] for file in listed]
            for path in files:
                path.stat()
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{folder} is not a whole saved data set: {error}") from None
        found += [(path.relative_to(root).as_posix(), path) for path in files]
    return Arrow("saved", tuple(found))


def _folders(root: Path) -> list[Path]:
    """Of the splits."""
    if not (root / SPLITS).is_file():
        return [root]
    try:
        splits = json.loads((root / SPLITS).read_text("utf-8"))["splits"]
        return [root / split for split in splits]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{root / SPLITS} cannot be read: {error}") from None
