"""Reads a prepared folder, local or remote: its shard table at once, rows and tensors on demand.

Nothing here grows with the number of samples: the index stays on disk (memory-mapped), and the
shard table has a line for some hundred samples. A remote folder (any URL that fsspec knows, such
as s3://bucket/data) has its tables copied at the start, and its shards, whole, when they are
wanted; the latest stay on disk.
"""

import json
import tempfile
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from koala import weights
from koala.data.buckets import Size
from koala.data.shards import CAPTION, INDEX, SHARDS, shard_name, summary_of
from koala.errors import Failure, UserError


class Files:
    """A folder's files under local names; those of a remote one are fetched, the latest kept."""

    def __init__(self, folder: str | Path, keep: int):
        """keep: how many fetched shards stay on disk."""
        self.folder = str(folder).rstrip("/")
        self._fs, self._root = fsspec.url_to_fs(self.folder)
        self._keep = keep
        self._fetched: OrderedDict[str, Path] = OrderedDict()
        self._scratch = None
        if not isinstance(self._fs, LocalFileSystem):
            self._scratch = tempfile.TemporaryDirectory(prefix="koala-data-")

    def local(self, name: str, forget: bool = False) -> Path:
        """Where a file of the folder lies. forget: it may go when `keep` others were wanted since.

        FileNotFoundError where the folder does not have it.
        """
        if self._scratch is None:
            path = Path(self._root, name)
            if not path.exists():
                raise FileNotFoundError(name)
            return path
        if (there := self._fetched.pop(name, None)) is None:
            there = Path(self._scratch.name, name.replace("/", "+"))
            self._fs.get_file(f"{self._root}/{name}", str(there))
        if not forget:
            return there
        self._fetched[name] = there
        while len(self._fetched) > self._keep:
            self._fetched.popitem(last=False)[1].unlink()
        return there

    def names(self, folder: str) -> set[str]:
        """Names of the files in one of its folders."""
        try:
            listed = self._fs.ls(f"{self._root}/{folder}", detail=False)
        except FileNotFoundError:
            return set()
        return {f"{folder}/{path.rstrip('/').rpartition('/')[2]}" for path in listed}


class Index:
    """The shards of a prepared folder and the rows of each."""

    def __init__(self, folder: str | Path, keep: int = 1024):
        """keep: how many fetched shards of a remote folder stay on disk.

        UserError where the folder is not prepared to the end, or lacks a shard.
        """
        self.files = Files(folder, keep)
        try:
            table = pa.ipc.open_file(pa.memory_map(str(self.files.local(SHARDS))))
            self._rows = pa.ipc.open_file(pa.memory_map(str(self.files.local(INDEX))))
            self.made_with: dict[str, Any] = json.loads(
                self.files.local("latents.json").read_text()
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

    def fact(self, shard: int, row: int, name: str) -> Any:
        """A column's value for the row-th kept sample of a shard."""
        batch = self._batches(int(self.unit[shard]))
        return batch[name][int(self.first[shard]) + row].as_py()

    def caption(self, shard: int, row: int, name: str) -> str:
        """A caption of a sample."""
        return self.fact(shard, row, CAPTION + name)

    def tensors(self, shard: int, row: int) -> dict[str, Tensor]:
        """A sample's tensors, bfloat16, without the shard's axis, read from the shard's file.

        `Failure` where the shard is gone or its latents are not finite.
        """
        name = shard_name(int(self.unit[shard]), int(self.group[shard]))
        at = self.fact(shard, row, "row")
        try:
            self.files.local(name, forget=True)
            found = {
                key: weights.load_tensor(weights.rows(stored, at, at + 1))[0]
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

    def _header(self, name: str) -> dict[str, weights.Stored]:
        return weights.read_header(self.files.local(name, forget=True))

    def _check_shards(self) -> None:
        there = self.files.names("latents")
        pairs = zip(self.unit.tolist(), self.group.tolist(), strict=True)
        missing = [name for pair in pairs if (name := shard_name(*pair)) not in there]
        if missing:
            raise UserError(
                f"{self.files.folder}: {len(missing)} shards are missing, first {missing[0]}; "
                "bring them back, or prepare into another folder"
            )
