"""What the data side can do: start-up with a million rows and more, the loader, reading pictures.

`python -m benchmarks.data index 1000000` makes a folder of so many samples (an index as `koala
prepare` writes it; the shards are tiny and shared by hard links) and opens it in a process of its
own. `loader` reads batches of latents of full size as fast as it can; `reading` decodes, resizes
and crops photographs' worth of noise on one core. Each prints its figures as JSON;
`benchmarks/data.json` keeps them.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from koala import weights
from koala.data.buckets import buckets
from koala.data.encoding import encoder_hash
from koala.data.items import Item
from koala.data.latents import LatentSet
from koala.data.samples import Preparation, Sample, sample_of
from koala.data.shards import INDEX, Summary, index_schema, shard_name, write_table
from koala.formats import BUNDLED

MODEL = BUNDLED / "koala-mini"  # whose VAE the folders name
UNIT = 4096
CAPTION = "a photograph of a fox that stands in the snow between two birches"
BATCH = 128  # the paper's
LINKS = 30_000  # of one file, at most: file systems have a limit


def make(folder: Path, rows: int, size: int, latent: tuple[int, int, int] | None) -> None:
    """A whole folder. latent: shape of the stored latents; None for those of the buckets."""
    sizes = buckets(size)
    each = [len(part) for part in np.array_split(np.arange(UNIT), len(sizes))]
    (folder / "latents").mkdir(parents=True)
    made_with = {"encoder": encoder_hash(MODEL), "size": size}
    (folder / "latents.json").write_text(json.dumps(made_with))
    units = -(-rows // UNIT)
    facts = {
        "id": [f"{n:09d}" for n in range(UNIT)],
        "row": [row for n in each for row in range(n)],
        "digest": np.arange(UNIT, dtype=np.uint64),
        "height": [1457] * UNIT, "width": [1274] * UNIT, "top": [0] * UNIT, "left": [0] * UNIT,
        "caption text": [CAPTION] * UNIT,
    }  # fmt: skip
    schema = index_schema(["text"])
    batch = pa.RecordBatch.from_pydict(facts, schema)
    with (folder / INDEX).open("wb") as stream, pa.ipc.new_file(stream, schema) as index:
        for _ in range(units):
            index.write_batch(batch)
    table: dict[str, list] = {n: [] for n in ("unit", "group", "first", "rows", "height", "width")}
    starts = np.cumsum([0, *each[:-1]]).tolist()
    for unit in range(units):
        for group, (height, width) in enumerate(sizes):
            values = (unit, group, starts[group], each[group], height, width)
            for column, value in zip(table.values(), values, strict=True):
                column.append(value)
            path = folder / shard_name(unit, group)
            if unit % LINKS == 0:
                _shard(path, each[group], latent or (4, height // 8, width // 8))
            else:
                os.link(folder / shard_name(unit // LINKS * LINKS, group), path)
    names = {"split": ["train"] * len(table["unit"]), "kind": ["picture"] * len(table["unit"])}
    write_table(folder, table | names, Summary(samples={"train picture": units * UNIT}))


def _shard(path: Path, rows: int, shape: tuple[int, int, int]) -> None:
    noise = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    content = noise.view(torch.uint8).numpy().tobytes()
    weights.write(
        path, dict.fromkeys(("mean", "deviation"), ("BF16", noise.shape)), lambda _: content
    )


def _resident() -> float:
    """MiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def opened(folder: Path) -> dict[str, float]:
    """Start-up of a training's data, from imports done to the first batch in hand."""
    before, start, busy = _resident(), time.perf_counter(), time.process_time()
    data = LatentSet(folder, MODEL)
    ready, used = time.perf_counter(), time.process_time() - busy
    data.order.batch(0, BATCH)
    ordered = time.perf_counter()
    places = [data.order.batch(n, BATCH) for n in range(1, 201)]
    later = (time.perf_counter() - ordered) / 200
    data.batch(0, BATCH)
    units = np.array([[data.index.unit[shard] for shard, _ in batch] for batch in places])
    return {
        "samples": data.epoch_length,
        "shards": len(data.index),
        "open_s": round(ready - start, 3),
        "open_core_s": round(used, 3),
        "order_of_first_batch_s": round(ordered - ready, 3),
        "order_of_a_later_batch_s": round(later, 5),
        "memory_before_mib": round(before),
        "memory_added_mib": round(_resident() - before),
        # Of 128 samples drawn at random from all units, and of a batch:
        "units_in_a_random_batch": round(_distinct(len({*data.index.unit.tolist()}), BATCH), 1),
        "units_in_a_batch": round(float(np.mean([len({*row}) for row in units.tolist()])), 1),
        # How far neighbours in the stream lie apart in the source; 1/3 for a random order.
        "distance_of_neighbours": round(
            float(np.abs(np.diff(units, axis=1)).mean() / max(1, data.index.unit.max())), 3
        ),
    }


def _distinct(kinds: int, drawn: int) -> float:
    """Expected number of different kinds among so many drawn with replacement."""
    return kinds * (1 - (1 - 1 / kinds) ** drawn)


def index(rows: int) -> dict[str, float]:
    """Figures of `opened` in a fresh process, on a folder of so many rows."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data"
        make(folder, rows, 512, (4, 8, 8))
        code = f"from benchmarks.data import *; print(json.dumps(opened(Path({str(folder)!r}))))"
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        size = (folder / INDEX).stat().st_size
        return {**json.loads(done.stdout), "index_mib": round(size / 2**20)}


def loader(batches: int = 60) -> dict[str, float]:
    """Samples a second of 1024-pixel latents (256 KiB each) from files that are in memory."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data"
        make(folder, UNIT, 1024, None)
        data = LatentSet(folder, MODEL)
        data.batch(0, BATCH)
        start, busy = time.perf_counter(), time.process_time()
        for n in range(1, batches + 1):
            data.batch(n * BATCH, BATCH)
        seconds, used = time.perf_counter() - start, time.process_time() - busy
        samples = batches * BATCH  # and those that the thread has read ahead, which are not counted
        return {
            "samples_per_s": round(samples / seconds),
            "samples_per_core_s": round(samples / used),
            "mib_per_core_s": round(samples * 0.25 / used),
        }


def reading(pictures: int = 40) -> dict[str, float]:
    """Pictures a second that one core decodes, resizes and crops for 1024 pixels."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (46, 40, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((1274, 1457), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    item = Item("one", buffer.getvalue, {"text": CAPTION})
    preparation = Preparation(captions=("text",))
    start = time.process_time()
    for _ in range(pictures):
        assert isinstance(sample_of(item, preparation), Sample)
    seconds = time.process_time() - start
    return {"pictures_per_core_s": round(pictures / seconds, 1), "bytes": buffer.tell()}


def main() -> None:
    from koala.evaluation.report import hardware

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("index", "loader", "reading"))
    parser.add_argument("rows", type=int, nargs="?", default=1_000_000, help="of the index")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/data.json"))
    options = parser.parse_args()
    name = f"index {options.rows}" if options.what == "index" else options.what
    measured = {"index": lambda: index(options.rows), "loader": loader, "reading": reading}
    figures = {
        "command": f"python -m benchmarks.data {name}",
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        **measured[options.what](),
    }
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    options.out.write_text(json.dumps({**kept, name: figures}, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
