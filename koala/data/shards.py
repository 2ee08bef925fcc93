"""The files of a prepared folder, and how they are written: shards, units, and their index.

    latents.json                   what the latents were made with (see `koala.data.prepare`)
    latents/UUUUUU-GGG.safetensors a shard: group G of unit U, samples of one split, kind and bucket
    units/UUUUUU.arrow             a finished unit U: its rows, its groups, dropped items
    index.arrow                    one row per sample, one record batch per unit, ordered by group
    shards.arrow                   one row per shard: its place in the index; written last
    report.jsonl                   one line per dropped item, with the reason

Tensors of a shard, bfloat16, n samples of h x w pixels: `mean` and `deviation` (the standard
deviation) of the VAE's posterior, or one `draw`, each [n, 4, h/8, w/8] and normalised for the
U-Net. If requested, `mirrored_mean` and so on for the mirrored images, and the embeddings `text`
[n, t, d] and `pooled` [n, p]. Instead of latents there may be `pixels`: uint8 [n, 3, h, w].
"""

import json
import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from koala.checkpoints import tensors
from koala.data.buckets import Size
from koala.data.preprocess import Dropped
from koala.utils.atomic import new_file

if TYPE_CHECKING:
    from koala.data.encoding import EncodedSample

INDEX, SHARDS, REPORT = "index.arrow", "shards.arrow", "report.jsonl"
CLAIM = "latents.json"
GROUPS = 1 << 16  # above the number of groups in any unit
_SHARD_FILE = re.compile(r"(\d+)-(\d+)\.safetensors")
CAPTION = "caption "  # prefix of the index's caption columns
_FACTS: list[tuple[str, pa.DataType]] = [
    ("id", pa.string()),
    ("row", pa.int32()),  # in the shard
    ("digest", pa.uint64()),
    ("height", pa.int32()),  # of the image before resizing
    ("width", pa.int32()),
    ("top", pa.int32()),  # of the crop
    ("left", pa.int32()),
]
_SHARD = pa.schema(
    [
        ("unit", pa.int32()),  # and record batch of the index
        ("group", pa.int16()),
        ("first", pa.int32()),  # row of the record batch
        ("rows", pa.int32()),
        ("height", pa.int16()),
        ("width", pa.int16()),
        ("split", pa.string()),
        ("kind", pa.string()),
    ]
)


def shard_name(unit: int, group: int) -> str:
    """A shard's path in the folder."""
    return f"latents/{unit:06d}-{group:03d}.safetensors"


def shard_number(file: str) -> int | None:
    """unit * GROUPS + group of a shard's file name, without its folder; None for other files."""
    found = _SHARD_FILE.fullmatch(file)
    return int(found[1]) * GROUPS + int(found[2]) if found else None


def unit_file(out: Path, unit: int) -> Path:
    """The file that marks a unit as finished."""
    return out / "units" / f"{unit:06d}.arrow"


@dataclass(frozen=True)
class Summary:
    """The result of preparing a source; all numbers count images."""

    samples: dict[str, int] = field(default_factory=dict)  # by split and kind: "train picture"
    buckets: dict[str, int] = field(default_factory=dict)  # by "WIDTHxHEIGHT"
    dropped: dict[str, int] = field(default_factory=dict)  # by reason
    long: dict[str, int] = field(default_factory=dict)  # by caption name: too long for the encoders
    animated: int = 0  # of each only the first frame is read
    units_left: int = 0  # for the other processes of this run

    @property
    def kept(self) -> int:
        """All images in the index."""
        return sum(self.samples.values())

    def lines(self, out: Path) -> list[str]:
        """For the terminal."""
        if self.units_left:
            return [f"{out}: {self.units_left} units are left for the other processes"]
        many = f"{len(self.buckets)} buckets" if len(self.buckets) > 1 else "one bucket"
        return [
            f"latents of {self.kept:,} images in {many} in {out}",
            *(f"{n:7,} {what}" for what, n in sorted(self.samples.items())),
            *(f"{n:7,} dropped: {why}" for why, n in sorted(self.dropped.items())),
            *(
                f"{n:7,} captions {what!r} exceed the text encoders' limit: shown in parts"
                for what, n in sorted(self.long.items())
                if n
            ),
            *(
                [f"{self.animated:7,} animated or of several pages: only the first frame is read"]
                if self.animated
                else []
            ),
        ]


# --- units ----------------------------------------------------------------------------------


def write_unit(
    out: Path, unit: int, encoded: "Sequence[EncodedSample]", dropped: Sequence[Dropped],
    long: Mapping[str, int],
) -> None:  # fmt: skip
    """Writes a unit's shards and then its file, each atomically.

    long: names of the samples' captions, and how many of each are too long for the encoders.
    `Failure` if the disk is full.
    """
    groups: dict[tuple[str, str, Size], list[EncodedSample]] = {}
    for one in encoded:
        groups.setdefault(one.group, []).append(one)
    ordered = sorted(groups.items())
    for number, (_, rows) in enumerate(ordered):
        _write_shard(out / shard_name(unit, number), rows)
    columns: dict[str, list[Any]] = {name: [] for name, _ in _FACTS}
    columns |= {CAPTION + name: [] for name in long}
    for _, rows in ordered:
        for row, sample in enumerate(one.sample for one in rows):
            facts = (sample.id, row, sample.digest, *sample.original, *sample.crop)
            for column, value in zip(columns.values(), (*facts, *sample.captions), strict=True):
                column.append(value)
    about = {
        "groups": [[*key[:2], *key[2], len(rows)] for key, rows in ordered],
        "dropped": [[d.id, d.reason, d.detail] for d in dropped],
        "long": dict(long),
        "animated": sum(one.sample.animated for one in encoded),
    }
    schema = index_schema([*long]).with_metadata({"unit": json.dumps(about)})
    with new_file(unit_file(out, unit)) as part, part.open("wb") as stream:
        _write_batches(stream, schema, iter([pa.RecordBatch.from_pydict(columns, schema)]))


def index_schema(captions: Sequence[str]) -> pa.Schema:
    """The index's columns."""
    return pa.schema([*_FACTS, *((CAPTION + name, pa.string()) for name in captions)])


def remove_parts(out: Path, units: Container[int]) -> None:
    """Removes partial files of these units, left by killed processes."""
    for part in (*out.glob("latents/.*.part"), *out.glob("units/.*.part")):
        if int(part.name[1:7]) in units:
            part.unlink()


def _write_shard(path: Path, rows: list["EncodedSample"]) -> None:
    import torch

    def stacked(name: str) -> bytes:
        whole = torch.stack([row.tensors[name] for row in rows])
        return whole.view(torch.uint8).numpy().tobytes()

    shapes = {
        name: ("U8" if name == "pixels" else "BF16", (len(rows), *tensor.shape))
        for name, tensor in rows[0].tensors.items()
    }
    tensors.write(path, shapes, stacked)


def _write_batches(stream: IO[bytes], schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    with pa.ipc.new_file(stream, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def read_unit(out: Path, unit: int) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """A unit's rows, memory-mapped, and its other facts."""
    reader = pa.ipc.open_file(pa.memory_map(str(unit_file(out, unit))))
    return reader.get_batch(0), json.loads(reader.schema.metadata[b"unit"])


# --- the index ------------------------------------------------------------------------------


def merge(out: Path, units: int, keep_duplicates: bool) -> Summary:
    """Writes report, index and shard table of finished units; returns the summary.

    Of files with identical bytes, the first in the source's order is kept.
    """
    first = _first_of_each(out, units, keep_duplicates)
    samples, buckets, dropped, long = (Counter[str]() for _ in range(4))
    animated = 0
    table: dict[str, list[Any]] = {name: [] for name in _SHARD.names}
    schema = read_unit(out, 0)[0].schema.remove_metadata()
    with (
        new_file(out / REPORT) as text,
        text.open("w", encoding="utf-8") as report,
        new_file(out / INDEX) as part,
        part.open("wb") as stream,
        pa.ipc.new_file(stream, schema) as index,
    ):
        start = 0
        for unit in range(units):
            rows, about = read_unit(out, unit)
            kept = first[start : start + len(rows)]
            start += len(rows)
            index.write_batch(rows.filter(pa.array(kept)).replace_schema_metadata(None))
            gone = rows.filter(pa.array(~kept))["id"].to_pylist()
            for id, reason, detail in [*about["dropped"], *([i, "duplicate", ""] for i in gone)]:
                line = {"id": id, "reason": reason, **({"detail": detail} if detail else {})}
                report.write(json.dumps(line, ensure_ascii=False) + "\n")
                dropped[reason] += 1
            long.update(about["long"])
            animated += about.get("animated", 0)  # not of units before 0.2.0
            for shard in _shards(unit, about["groups"], kept):
                for name, value in shard.items():
                    table[name].append(value)
                samples[f"{shard['split']} {shard['kind']}"] += shard["rows"]
                buckets[f"{shard['width']}x{shard['height']}"] += shard["rows"]
    summary = Summary(dict(samples), dict(buckets), dict(dropped), dict(long), animated)
    write_table(out, table, summary)
    return summary


def write_table(out: Path, table: dict[str, list[Any]], summary: Summary) -> None:
    """Writes the shard table, which completes the folder."""
    schema = _SHARD.with_metadata({"summary": json.dumps(asdict(summary))})
    with new_file(out / SHARDS) as part, part.open("wb") as stream:
        _write_batches(stream, schema, iter([pa.RecordBatch.from_pydict(table, schema)]))


def read_summary(out: Path) -> Summary | None:
    """The summary of a complete folder; None for an incomplete one."""
    if not (out / SHARDS).exists():
        return None
    return summary_of(pa.ipc.open_file(pa.memory_map(str(out / SHARDS))).schema)


def summary_of(table: pa.Schema) -> Summary:
    """The summary that a shard table carries."""
    return Summary(**json.loads(table.metadata[b"summary"]))


def _first_of_each(out: Path, units: int, keep_duplicates: bool) -> np.ndarray:
    """bool [all rows]: whether no row before it has the same digest."""
    digests = np.concatenate([read_unit(out, u)[0]["digest"].to_numpy() for u in range(units)])
    kept = np.full(len(digests), keep_duplicates)
    kept[np.unique(digests, return_index=True)[1]] = True
    return kept


def _shards(unit: int, groups: list[list[Any]], kept: np.ndarray) -> Iterator[dict[str, Any]]:
    """Rows of the shard table; shards without kept samples are skipped."""
    start = first = 0
    for number, (split, kind, height, width, count) in enumerate(groups):
        rows = int(kept[start : start + count].sum())
        start += count
        if rows:
            yield {
                "unit": unit, "group": number, "first": first, "rows": rows, "height": height,
                "width": width, "split": split, "kind": kind,
            }  # fmt: skip
        first += rows
