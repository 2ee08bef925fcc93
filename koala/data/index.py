"""Reads a prepared folder, local or remote: the shard table at once, rows and tensors on demand.

Memory does not grow with the number of samples: the index stays on disk (memory-mapped), and the
shard table has one row per few hundred samples. The tables of a remote folder (any fsspec URL,
such as s3://bucket/data) are downloaded at the start, its shards in the background before they
are needed; they are removed on request.
"""

import json
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from koala.checkpoints.tensors import Stored, load_tensor, read_header, rows
from koala.data.buckets import Size
from koala.data.shards import (
    CAPTION,
    CLAIM,
    GROUPS,
    INDEX,
    SHARDS,
    shard_name,
    shard_number,
    summary_of,
)
from koala.errors import Failure, UserError

FETCHERS = 8  # concurrent downloads of shards


class Files:
    """A folder's files under local paths; those of a remote folder are downloaded."""

    def __init__(self, folder: str | Path):
        self.folder = str(folder).rstrip("/")
        self._fs, self._root = fsspec.url_to_fs(self.folder)
        self._fetched: dict[str, Future[Path]] = {}
        self.remote = not isinstance(self._fs, LocalFileSystem)
        if self.remote:
            self._scratch = tempfile.TemporaryDirectory(prefix="koala-data-")
            self._fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="shards")
            self._numbers = count()

    def table(self, name: str) -> Path:
        """The local path of one of the folder's tables. FileNotFoundError if it is missing."""
        return self._fetch(name) if self.remote else self._there(name)

    def holds(self, name: str) -> bool:
        """Whether the folder has a table of that name."""
        try:
            self.table(name)
        except FileNotFoundError:
            return False
        return True

    def shard(self, name: str) -> Path:
        """The local path of a shard, downloaded if necessary. FileNotFoundError if it is missing.

        `Failure` if it cannot be downloaded.
        """
        if not self.remote:
            return self._there(name)
        try:
            return self._coming(name).result()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise Failure(
                f"{self.folder}: cannot download {name} ({error}); run again to continue"
            ) from error

    def prefetch(self, names: Iterable[str]) -> None:
        """Starts downloading the shards that will be needed, in this order."""
        for name in names if self.remote else ():
            self._coming(name)

    def forget(self, name: str) -> None:
        """Removes a downloaded shard."""
        if (coming := self._fetched.pop(name, None)) is not None:
            coming.cancel()
            coming.add_done_callback(_remove)

    def names(self, folder: str) -> Iterable[str]:
        """Names of the files in one of its folders; none if there is no such folder."""
        if self.remote:
            try:
                listed = self._fs.ls(f"{self._root}/{folder}", detail=False)
            except FileNotFoundError:
                return
            yield from (path.rstrip("/").rpartition("/")[2] for path in listed)
        elif (there := Path(self._root, folder)).is_dir():
            with os.scandir(there) as entries:
                yield from (entry.name for entry in entries)

    def close(self) -> None:
        """Stops downloads and removes downloaded files."""
        if self.remote:
            self._fetchers.shutdown(cancel_futures=True)
            self._scratch.cleanup()

    def _there(self, name: str) -> Path:
        path = Path(self._root, name)
        if not path.exists():
            raise FileNotFoundError(name)
        return path

    def _fetch(self, name: str) -> Path:
        # A unique name: an earlier copy may be about to be removed.
        there = Path(self._scratch.name, f"{next(self._numbers)}+{Path(name).name}")
        self._fs.get_file(f"{self._root}/{name}", str(there))
        return there

    def _coming(self, name: str) -> Future[Path]:
        """The download of a shard, started if necessary."""
        coming = self._fetched.get(name)
        if coming is None or (coming.done() and coming.exception()):
            coming = self._fetched[name] = self._fetchers.submit(self._fetch, name)
        return coming


def _remove(fetched: Future[Path]) -> None:
    if not fetched.cancelled() and fetched.exception() is None:
        fetched.result().unlink(missing_ok=True)


class Index:
    """The shards of a prepared folder and their rows."""

    def __init__(self, folder: str | Path):
        """UserError if the folder is not completely prepared, or a shard is missing."""
        self.files = Files(folder)
        try:
            table = pa.ipc.open_file(pa.memory_map(str(self.files.table(SHARDS))))
            self._rows = pa.ipc.open_file(pa.memory_map(str(self.files.table(INDEX))))
            self.made_with: dict[str, Any] = json.loads(self.files.table(CLAIM).read_text("utf-8"))
        except FileNotFoundError as error:
            if not any(map(self.files.holds, (CLAIM, "set.json"))):  # latents' and illustrations'
                raise UserError(
                    f"{folder} is no folder that koala prepare made: koala prepare IMAGES --model "
                    "MODEL --out DATA makes one of captioned images"
                ) from None
            raise UserError(
                f"{folder} is not completely prepared ({error.args[0]} is missing); run "
                f"`koala prepare ... --model M --out {folder}` until it finishes"
            ) from None
        self.summary = summary_of(table.schema)
        self._table = table.read_all()
        self.unit, self.group, self.first, self.rows, self.height, self.width = (
            self._table[name].to_numpy()
            for name in ("unit", "group", "first", "rows", "height", "width")
        )
        self.captions = [
            n[len(CAPTION) :] for n in self._rows.schema.names if n.startswith(CAPTION)
        ]
        self._headers = lru_cache(maxsize=4096)(self._header)
        self._batches = lru_cache(maxsize=1024)(self._rows.get_batch)
        self._check_shards()

    def __len__(self) -> int:
        """The number of shards."""
        return len(self.rows)

    def select(self, split: str, kind: str | None = None) -> np.ndarray:
        """int [n]: the shards of a split, and of a kind if given."""
        chosen = pc.equal(self._table["split"], split)
        if kind is not None:
            chosen = pc.and_(chosen, pc.equal(self._table["kind"], kind))
        return np.flatnonzero(chosen.to_numpy())

    def kinds(self, split: str) -> list[str]:
        """The kinds of a split's images."""
        return sorted(
            self._table.filter(pc.equal(self._table["split"], split))["kind"].unique().to_pylist()
        )

    def bucket(self, shard: int) -> Size:
        """(height, width) in pixels of a shard's images."""
        return int(self.height[shard]), int(self.width[shard])

    def name(self, shard: int) -> str:
        """A shard's path in the folder."""
        return shard_name(int(self.unit[shard]), int(self.group[shard]))

    def fact(self, shard: int, row: int, name: str) -> Any:
        """A column's value for the row-th kept sample of a shard."""
        batch = self._batches(int(self.unit[shard]))
        return batch[name][int(self.first[shard]) + row].as_py()

    def caption(self, shard: int, row: int, name: str) -> str:
        """A caption of a sample."""
        return self.fact(shard, row, CAPTION + name)

    def tensors(self, shard: int, row: int) -> dict[str, Tensor]:
        """A sample's tensors as stored, without the batch axis.

        `Failure` if the shard is missing or its latents are not finite.
        """
        name, at = self.name(shard), self.fact(shard, row, "row")
        try:
            file = self.files.shard(name)
            found = {
                key: load_tensor(rows(stored._replace(file=file), at, at + 1))[0]
                for key, stored in self._headers(name).items()
            }
        except FileNotFoundError:
            raise Failure(
                f"{self.files.folder}: shard {name} is missing; prepare it again"
            ) from None
        if not all(torch.isfinite(tensor).all() for tensor in found.values()):
            id = self.fact(shard, row, "id")
            raise Failure(
                f"{self.files.folder}: {id} in {name} has NaN or infinite values; remove its unit "
                f"(units/{name[8:14]}.arrow) and {SHARDS}, and prepare again"
            )
        return found

    def _header(self, name: str) -> dict[str, Stored]:
        return read_header(self.files.shard(name))

    def _check_shards(self) -> None:
        """Raises UserError for missing shards; vectorised, as there may be a million of them."""
        wanted = self.unit.astype(np.int64) * GROUPS + self.group
        found = (shard_number(name) for name in self.files.names("latents"))
        there = np.fromiter((number for number in found if number is not None), np.int64)
        missing = np.flatnonzero(~np.isin(wanted, there))
        if len(missing):
            raise UserError(
                f"{self.files.folder}: {len(missing)} shards are missing, the first is "
                f"{self.name(int(missing[0]))}; restore them, or prepare into another folder"
            )
