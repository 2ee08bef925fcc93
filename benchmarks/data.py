"""What the data side can do: start-up with a hundred million rows, the loader, reading pictures.

`python -m benchmarks.data index 1000000` makes a folder of so many samples (an index as `koala
prepare` writes it; the shards are tiny and shared by hard links) and opens it in a process of its
own, which loads nothing else. `loader` reads batches of latents of full size as fast as it can;
`remote` takes batches at the pace of eight GPUs from a folder behind a slow link (simulated, five
times as fast as it would be); `reading` decodes, resizes and crops photographs' worth of noise on
one core, and `encoding` encodes one by SDXL's VAE. Each prints its figures as JSON;
`benchmarks/data.json` keeps them.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import torch
from fsspec.spec import AbstractFileSystem
from PIL import Image

from benchmarks.memory_use import resident
from benchmarks.record import keep_as
from koala.checkpoints import tensors
from koala.checkpoints.bundled import BUNDLED
from koala.data import shard_cache
from koala.data.buckets import buckets
from koala.data.encoding import encoder_hash
from koala.data.items import Item
from koala.data.latents import LatentSet
from koala.data.preprocess import Preparation, Sample, sample_of
from koala.data.shards import INDEX, Summary, index_schema, shard_name, write_table

MODEL = BUNDLED / "koala-mini"  # whose VAE the folders name
UNIT = 4096
CAPTION = "a fox in the snow"  # a longer one would load tokenizers, which a training has anyway
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
    tensors.write(
        path, dict.fromkeys(("mean", "deviation"), ("BF16", noise.shape)), lambda _: content
    )


def opened(folder: Path) -> dict[str, float]:
    """Start-up of a training's data, from imports done to the first batch in hand."""
    before, start, busy = round(resident()), time.perf_counter(), time.process_time()
    data = LatentSet(folder, MODEL)
    ready, used, open_mib = time.perf_counter(), time.process_time() - busy, round(resident())
    data.order.batch(0, BATCH)
    ordered = time.perf_counter()
    places = [data.order.batch(n, BATCH) for n in range(1, 201)]
    later = (time.perf_counter() - ordered) / 200
    data.batch(0, BATCH)
    return {
        "samples": data.epoch_length,
        "shards": len(data.index),
        "open_s": round(ready - start, 3),
        "open_core_s": round(used, 3),
        "order_of_first_batch_s": round(ordered - ready, 3),
        "order_of_a_later_batch_s": round(later, 5),
        "process_mib_with_libraries": before,
        "process_mib_opened": open_mib,
        "process_mib_with_first_batch": round(resident()),
        **shuffled(data, places),
    }


def shuffled(data: LatentSet, places: list[list[tuple[int, int]]]) -> dict[str, float]:
    """How well the stream is mixed; places: of batches one after the other."""
    unit = data.index.unit
    units = np.array([[unit[shard] for shard, _ in batch] for batch in places])
    last = data.epoch_length // BATCH
    far = np.linspace(0, last - 1, 200).astype(int)  # batches over the whole epoch
    means = [np.mean([unit[shard] for shard, _ in data.order.batch(int(n), BATCH)]) for n in far]
    rng = np.random.default_rng(0)
    return {
        # Of 128 samples drawn at random from all units, and of a batch:
        "units_in_a_random_batch": round(_distinct(len({*unit.tolist()}), BATCH), 1),
        "units_in_a_batch": round(float(np.mean([len({*row}) for row in units.tolist()])), 1),
        # How far neighbours in the stream lie apart in the source; 1/3 for a random order.
        "distance_of_neighbours": round(
            float(np.abs(np.diff(rng.permuted(units, axis=1), axis=1)).mean() / unit.max()), 3
        ),
        # Of a batch's place in the epoch with its mean place in the source: 0 but for chance, which
        # gives 0.07 where an epoch has hundreds of windows, and more where it has a few.
        "correlation_with_the_source": round(float(np.corrcoef(far, means)[0, 1]), 3),
    }


def _distinct(kinds: int, drawn: int) -> float:
    """Expected number of different kinds among so many drawn with replacement."""
    return kinds * (1 - (1 - 1 / kinds) ** drawn)


def index(rows: int, size: int) -> dict[str, float]:
    """Figures of `opened` in a fresh process, on a folder of so many rows in buckets of a size."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data"
        make(folder, rows, size, (4, 8, 8))
        code = f"from benchmarks.data import *; print(json.dumps(opened(Path({str(folder)!r}))))"
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        table = (folder / INDEX).stat().st_size
        return {**json.loads(done.stdout), "buckets_of": size, "index_mib": round(table / 2**20)}


def loader(batches: int = 60, size: int = 1024) -> dict[str, float]:
    """Samples a second of 1024-pixel latents (256 KiB each) from files that are in memory."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data"
        make(folder, UNIT, size, None)
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


class SlowFiles(AbstractFileSystem):
    """A folder of this machine, reached as over a network: so long a file, whatever its size."""

    protocol = "slow"
    seconds = 0.0  # of one file
    fetched = 0

    def ls(self, path: str, detail: bool = True, **_: Any) -> list:
        return [f"{path}/{name}" for name in os.listdir(self._strip_protocol(path))]

    def get_file(self, rpath: str, lpath: str, *_: Any, **__: Any) -> None:
        if rpath.endswith(".safetensors"):
            time.sleep(self.seconds)
            type(self).fetched += 1
        shutil.copyfile(self._strip_protocol(rpath), lpath)


def remote(batches: int = 1200, faster: float = 2.0) -> dict[str, Any]:
    """What eight GPUs that want 800 samples/s wait for a folder behind a link of 8 x 50 MB/s.

    Shards of 512 pixels take 24 MB; here they are tiny and come after the time that those would
    take. Everything runs `faster` than it would, and windows are of 16 shards, to see some pass.
    """
    fsspec.register_implementation("slow", SlowFiles, clobber=True)
    SlowFiles.seconds = (0.05 + 24 / 50) / faster
    pace, first = BATCH / 800 / faster, batches // 4  # windows of all buckets begin at once there
    figures: dict[str, Any] = {"faster": faster, "batches": batches, "wanted_per_s": 800}
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch) / "data", 64 * UNIT, 512, (4, 8, 8))
        for way, ahead in (("64 batches ahead", shard_cache.FAR_AHEAD), ("when they are read", 1)):
            shard_cache.FAR_AHEAD = ahead
            data, waits = LatentSet(f"slow://{scratch}/data", MODEL, window=16), []
            SlowFiles.fetched = 0
            for n in range(batches):
                start = time.perf_counter()
                data.batch(n * BATCH, BATCH)
                waits.append((time.perf_counter() - start) * faster)
                time.sleep(pace)
            steady = waits[first:]
            figures[way] = {
                "first_quarter_waited_s": round(sum(waits[:first]), 1),
                "then_waited_of_all_time": round(
                    sum(steady) / (sum(steady) + len(steady) * pace * faster), 3
                ),
                "then_longest_wait_s": round(max(steady), 2),
                "shards_fetched": SlowFiles.fetched,
            }
            data.close()
    return figures


def reading(images: int = 40) -> dict[str, float]:
    """Pictures a second that one core decodes, resizes and crops for 1024 pixels."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (46, 40, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((1274, 1457), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    item = Item("one", buffer.getvalue, {"text": CAPTION})
    preparation = Preparation(captions=("text",))
    start = time.process_time()
    for _ in range(images):
        assert isinstance(sample_of(item, preparation), Sample)
    seconds = time.process_time() - start
    return {"pictures_per_core_s": round(images / seconds, 1), "bytes": buffer.tell()}


def encoding() -> dict[str, float]:
    """Pictures a second that one core encodes by SDXL's VAE (random weights, fp32)."""
    from koala.benchmark.models import new_vae

    torch.set_num_threads(1)
    vae = new_vae(torch.device("cpu"), torch.float32)
    image = torch.zeros(1, 3, 512, 512).to(memory_format=torch.channels_last)
    start = time.process_time()
    with torch.inference_mode():
        vae.encode(image)
    seconds = time.process_time() - start
    return {"pixels": 512, "pictures_per_core_s": float(f"{1 / seconds:.3g}")}


def main() -> None:
    from koala.utils.device import hardware

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("index", "loader", "remote", "reading", "encoding"))
    parser.add_argument("rows", type=int, nargs="?", default=1_000_000, help="of the index")
    parser.add_argument("--size", type=int, default=512, help="of the index's buckets")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/data.json"))
    options = parser.parse_args()
    name = options.what
    if name == "index":
        name += f" {options.rows}" + (f" --size {options.size}" if options.size != 512 else "")
    measured = {
        "index": lambda: index(options.rows, options.size),
        "loader": loader, "remote": remote, "reading": reading, "encoding": encoding,
    }  # fmt: skip
    figures = {
        "command": f"python -m benchmarks.data {name}",
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        **measured[options.what](),
    }
    keep_as(name, options.out, figures)


if __name__ == "__main__":
    main()
