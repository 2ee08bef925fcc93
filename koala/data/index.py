"""Reads a prepared folder, local or remote: its shard table at once, rows and tensors on demand.

Nothing here grows with the number of samples: the index stays on disk (memory-mapped), and the
shard table has a line for some hundred samples. A remote folder (any URL that fsspec knows, such
as s3://bucket/data) has its tables copied at the start, and its shards, whole, in the background
before they are wanted, and removed when they are told to be.
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
    GROUPS,
    INDEX,
    SHARDS,
    shard_name,
    shard_number,
    summary_of,
)
from koala.errors import Failure, UserError

FETCHERS = 8  # shards of a remote folder that are fetched at once


class Files:
    """A folder's files under local names; those of a remote one are fetched."""

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
        """Where one of the folder's tables lies here. FileNotFoundError where it has none."""
        return self._fetch(name) if self.remote else self._there(name)

    def shard(self, name: str) -> Path:
        """Where a shard lies here, fetched if need be. FileNotFoundError where it is gone.

        `Failure` where it cannot be fetched.
        """
        if not self.remote:
            return self._there(name)
        try:
            return self._coming(name).result()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise Failure(
                f"{self.folder}: {name} cannot be fetched ({error}); run again to go on"
            ) from error

    def foretell(self, names: Iterable[str]) -> None:
        """Says which shards will be wanted, in what order: remote ones are fetched meanwhile."""
        for name in names if self.remote else ():
            self._coming(name)

    def forget(self, name: str) -> None:
        """Removes what was fetched of a shard."""
        if (coming := self._fetched.pop(name, None)) is not None:
            coming.cancel()
            coming.add_done_callback(_remove)

    def names(self, folder: str) -> Iterable[str]:
        """Names of the files in one of its folders; none where it has no such folder."""
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
        """Stops fetching and removes what was fetched."""
        if self.remote:
            self._fetchers.shutdown(cancel_futures=True)
            self._scratch.cleanup()

    def _there(self, name: str) -> Path:
        path = Path(self._root, name)
        if not path.exists():
            raise FileNotFoundError(name)
        return path

    def _fetch(self, name: str) -> Path:
        # A name of its own, since an earlier copy may be about to be removed.
        there = Path(self._scratch.name, f"{next(self._numbers)}+{Path(name).name}")
        self._fs.get_file(f"{self._root}/{name}", str(there))
        return there

    def _coming(self, name: str) -> Future[Path]:
        """The fetching of a shard, begun if it is not there."""
        coming = self._fetched.get(name)
        if coming is None or (coming.done() and coming.exception()):
            coming = self._fetched[name] = self._fetchers.submit(self._fetch, name)
        return coming


def _remove(fetched: Future[Path]) -> None:
    if not fetched.cancelled() and fetched.exception() is None:
        fetched.result().unlink(missing_ok=True)


class Index:
    """The shards of a prepared folder and the rows of each."""

    def __init__(self, folder: str | Path):
        """UserError where the folder is not prepared to the end, or lacks a shard."""
        self.files = Files(folder)
        try:
            table = pa.ipc.open_file(pa.memory_map(str(self.files.table(SHARDS))))
            self._rows = pa.ipc.open_file(pa.memory_map(str(self.files.table(INDEX))))
            self.made_with: dict[str, Any] = json.loads(
                self.files.table("latents.json").read_text()
            )
        except FileNotFoundError as error:
            raise UserError(
                f"{folder}: not prepared to its end ({error.args[0]} is missing); run "
                f"`koala prepare ... --model M --out {folder}` to its end first"
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
        """int [n]: the shards of a split and, where it is given, of a kind."""
        chosen = pc.equal(self._table["split"], split)
        if kind is not None:
            chosen = pc.and_(chosen, pc.equal(self._table["kind"], kind))
        return np.flatnonzero(chosen.to_numpy())

    def bucket(self, shard: int) -> Size:
        """(height, width) in pixels of a shard's pictures."""
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
        """A sample's tensors as they are stored, without the shard's axis, read from its file.

        `Failure` where the shard is gone or its latents are not finite.
        """
        name, at = self.name(shard), self.fact(shard, row, "row")
        try:
            file = self.files.shard(name)
            found = {
                key: load_tensor(rows(stored._replace(file=file), at, at + 1))[0]
                for key, stored in self._headers(name).items()
            }
        except FileNotFoundError:
            raise Failure(f"{self.files.folder}: shard {name} is gone; prepare it again") from None
        if not all(torch.isfinite(tensor).all() for tensor in found.values()):
            id = self.fact(shard, row, "id")
            raise Failure(
                f"{self.files.folder}: {id} in {name} is not finite; remove that shard's unit "
                f"(units/{name[8:14]}.arrow) and {SHARDS}, and prepare again"
            )
        return found

    def _header(self, name: str) -> dict[str, Stored]:
        return read_header(self.files.shard(name))

    def _check_shards(self) -> None:
        """By one number a shard: there may be a million of them."""
        wanted = self.unit.astype(np.int64) * GROUPS + self.group
        found = (shard_number(name) for name in self.files.names("latents"))
        there = np.fromiter((number for number in found if number is not None), np.int64)
        missing = np.flatnonzero(~np.isin(wanted, there))
        if len(missing):
            raise UserError(
                f"{self.files.folder}: {len(missing)} shards are missing, first "
                f"{self.name(int(missing[0]))}; bring them back, or prepare into another folder"
            )
