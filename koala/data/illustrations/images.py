"""Renders captioned images into parquet shards, once and on all cores, and reads them.

A folder holds `set.json` (what it was made with) and `pictures-NNNNN.parquet`, one row per image:
PNG bytes in the column `image` and the text columns of `scenes.PlannedImage`. Shards are
written atomically, so the same command resumes a killed run.
"""

import io
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from koala.data.illustrations import art
from koala.data.illustrations.colours import BACKGROUNDS, INKS, repainted
from koala.data.illustrations.scenes import Illustrations, Layer, PlannedImage, plan
from koala.data.workers import own_cores
from koala.errors import UserError
from koala.utils.atomic import check_claim, claim, new_file, write_text
from koala.utils.extras import require
from koala.utils.progress import progress

SHARD = 256  # images: about five seconds of one core
TEXT_COLUMNS = (
    "id", "kind", "concept", "style", "split", "subject", "short", "long", "everyday",
)  # fmt: skip
NOTICE = "NOTICE.txt"


def render(row: PlannedImage, size: int) -> Image.Image:
    """Renders a planned image as RGB, size x size pixels."""
    canvas = Image.new("RGBA", (size, size), BACKGROUNDS[row.background])
    for layer in row.layers:
        left, top, side = (round(size * share) for share in layer.box)
        canvas.alpha_composite(_drawn(layer, side), (left, top))
    return canvas.convert("RGB")


def _drawn(layer: Layer, side: int) -> Image.Image:
    """A layer's drawing as RGBA, in its ink if it has one."""
    if layer.ink is None:
        return art.drawing(layer.art, layer.name, side)
    if art.ART_SETS[layer.art].kind == "icon":
        return art.drawing(layer.art, layer.name, side, INKS[layer.ink])
    return repainted(art.drawing(layer.art, layer.name, side), layer.ink)


def prepare_images(settings: Illustrations, out: Path, workers: int | None = None) -> int:
    """Renders the set described by `settings` into `out`; returns the number of images.

    The same call resumes an interrupted run; UserError for a folder made with other settings.
    """
    check_images(settings, out)
    claim(out / "set.json", _made_with(settings))
    rows = plan(settings)
    shards = [rows[i : i + SHARD] for i in range(0, len(rows), SHARD)]
    paths = [out / f"pictures-{i:05d}.parquet" for i in range(len(shards))]
    todo = [(s, p) for s, p in zip(shards, paths, strict=True) if not p.exists()]
    done = len(rows) - sum(len(s) for s, _ in todo)
    drawn = sorted({layer.art for row in rows for layer in row.layers})
    for name in drawn:
        art.package(art.ART_SETS[name].package)  # downloaded before the workers need it
    with (
        progress("rendering", len(rows), "pictures", done) as advance,
        ProcessPoolExecutor(workers or own_cores()) as pool,
    ):
        jobs = {pool.submit(_write_shard, s, p, settings.size): len(s) for s, p in todo}
        for job in as_completed(jobs):
            job.result()
            advance(jobs[job])
    write_text(out / NOTICE, art.notice(drawn))
    return len(rows)


def check_images(settings: Illustrations, out: Path) -> None:
    """UserError if the set cannot be rendered into `out`, which may be made with other settings."""
    require("illustrations", "family", "inflect", "resvg_py")
    check_claim(out / "set.json", _made_with(settings))


def _made_with(settings: Illustrations) -> dict:
    return {"source": "illustrations", **asdict(settings)}


def _write_shard(rows: list[PlannedImage], path: Path, size: int) -> None:
    images = []
    for row in rows:
        buffer = io.BytesIO()
        render(row, size).save(buffer, "PNG", optimize=True)
        images.append({"bytes": buffer.getvalue(), "path": f"{row.id}.png"})
    columns: dict[str, list] = {name: [getattr(r, name) for r in rows] for name in TEXT_COLUMNS}
    with new_file(path) as part:
        pq.write_table(pa.table({"image": images, **columns}), part)


def settings_of(folder: Path) -> dict:
    """The source and settings that a prepared folder was made with."""
    return json.loads((folder / "set.json").read_text("utf-8"))


def shards_of(folder: Path) -> list[Path]:
    """The image shards of a prepared folder, in order."""
    return sorted(folder.glob("pictures-*.parquet"))


def shards_at(place: str | Path) -> list[Path]:
    """The shards of a folder, or the shard itself. UserError if there are none."""
    shards = [Path(place)] if Path(place).is_file() else shards_of(Path(place))
    if not shards:
        raise UserError(
            f"{place} has no prepared images (pictures-*.parquet); "
            "make them with `koala prepare illustrations --out DIR`"
        )
    return shards


class ImageSet:
    """Reads a folder of image shards, or one shard; images are decoded on access."""

    def __init__(self, folder: str | Path):
        """Raises UserError if there are no prepared images."""
        self.folder = Path(folder)
        table = pa.concat_tables(pq.read_table(s) for s in shards_at(self.folder))
        self._images = table.column("image")
        self.rows: list[dict] = table.select(list(TEXT_COLUMNS)).to_pylist()

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int) -> Image.Image:
        """Image i, RGB."""
        return Image.open(io.BytesIO(self._images[i].as_py()["bytes"])).convert("RGB")

    def select(
        self, split: str | Sequence[str] | None = None, kind: str | Sequence[str] | None = None
    ) -> list[int]:
        """Indices of the rows of these splits and kinds."""

        def fits(value: str, wanted: str | Sequence[str] | None) -> bool:
            return wanted is None or value in ([wanted] if isinstance(wanted, str) else wanted)

        return [
            i for i, r in enumerate(self.rows) if fits(r["split"], split) and fits(r["kind"], kind)
        ]
