"""What `datasets` writes with `save_to_disk`: Arrow files beside a `state.json` that lists them.

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


def is_saved(root: Path) -> bool:
    """Whether `root` is such a folder, of one split or several."""
    return (root / SPLITS).is_file() or all((root / name).is_file() for name in (STATE, INFO))


@dataclass(frozen=True)
class Saved:
    """The data set saved in `root`; a part is an Arrow file."""

    root: Path
    name = "saved"
    captions = ()
    looked_in = "columns of text, of lists of texts and of structures with texts"

    def parts(self) -> dict[str, int]:
        """Paths of the files relative to `root`, with their sizes. UserError if one is missing."""
        found: dict[str, int] = {}
        for folder in self._folders():
            try:
                listed = json.loads((folder / STATE).read_text("utf-8"))["_data_files"]
                files = [folder / file["filename"] for file in listed]
                found |= {p.relative_to(self.root).as_posix(): p.stat().st_size for p in files}
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise UserError(f"{folder} is not a whole saved data set: {error}") from None
        return found

    def _folders(self) -> list[Path]:
        if not (self.root / SPLITS).is_file():
            return [self.root]
        try:
            splits = json.loads((self.root / SPLITS).read_text("utf-8"))["splits"]
            return [self.root / split for split in splits]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{self.root / SPLITS} cannot be read: {error}") from None

    def count(self, part: str) -> int:
        """Number of rows; one for a file that is cut off."""
        try:
            table = _table(self.root / part)
        except (pa.ArrowException, OSError):
            return 1
        image_column(self.root / part, table.column_names)
        return table.num_rows

    def items(self, part: str, first: int, count: int) -> Iterator[Item]:
        """Rows as of a parquet file."""
        path, split = self.root / part, "test" if part in held_out(self.parts()) else None
        try:
            table = _table(path)
        except (pa.ArrowException, OSError) as error:
            yield damaged(part, f"not a complete Arrow file ({error})")
            return
        column = image_column(path, table.column_names)
        for number, record in enumerate(table.slice(first, count).to_pylist(), first):
            yield item_of(path.parent, f"{part}/{number}", record, column, split)


@lru_cache(maxsize=2)
def _table(path: Path) -> pa.Table:
    """Memory-mapped; nothing is read yet."""
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
