"""Small collections of captioned pictures in every layout that `koala prepare` reads.

Picture n is a noisy gradient of its own, at `sizes[n % len(sizes)]`, so no two are the same file.
Its caption is `caption(n)`.
"""

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from koala.cli import main

SIZES = ((80, 80), (120, 70), (64, 100))  # width, height
WORDS = ("fox", "owl", "car", "rose", "boat", "drum", "pear")


def caption(n: int) -> str:
    return f"{WORDS[n % len(WORDS)]} no {n}"


def image(n: int, size: tuple[int, int] = (80, 80), format: str = "JPEG") -> bytes:
    """A picture's file."""
    rng = np.random.default_rng(n)
    width, height = size
    ramp = np.linspace(0, 200, width)[None, :, None] * rng.random(3)
    pixels = (ramp + rng.integers(0, 55, (height, width, 3))).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def images(number: int, sizes: Sequence[tuple[int, int]] = SIZES) -> list[bytes]:
    return [image(n, sizes[n % len(sizes)]) for n in range(number)]


def write_folder(root: Path, files: Sequence[bytes], metadata: str = "txt") -> Path:
    """metadata: "jsonl", "csv", "captions.jsonl", or the suffix of a file beside each image."""
    root.mkdir(parents=True)
    for n, data in enumerate(files):
        (root / f"{n:04d}.jpg").write_bytes(data)
        if metadata in ("txt", "caption"):
            (root / f"{n:04d}.{metadata}").write_text(caption(n))
        if metadata == "json":
            about = {"text": caption(n), "nsfw": str(n / 10), "LANGUAGE": "en", "width": 80}
            (root / f"{n:04d}.json").write_text(json.dumps(about))
    rows = [
        {"file_name": f"{n:04d}.jpg", "text": caption(n), "nsfw": n / 10} for n in range(len(files))
    ]
    if metadata == "captions.jsonl":
        lines = "".join(
            json.dumps({"image": r["file_name"], "text": r["text"]}) + "\n" for r in rows
        )
        (root / metadata).write_text(lines, encoding="utf-8-sig")
    if metadata == "jsonl":
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / "metadata.jsonl").write_text(lines)
    if metadata == "csv":
        with (root / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text", "nsfw"])
            writer.writeheader()
            writer.writerows(rows)
    return root


def write_nested(root: Path, files: Sequence[bytes]) -> Path:
    """An imagefolder whose two folders have a table each."""
    for name, numbers in (("a", range(10)), ("b", range(10, len(files)))):
        (root / name / "images").mkdir(parents=True)
        rows = []
        for n in numbers:
            (root / name / "images" / f"{n:04d}.jpg").write_bytes(files[n])
            rows.append({"file_name": f"images/{n:04d}.jpg", "text": caption(n)})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / name / "metadata.jsonl").write_text(lines)
    return root


def write_saved(root: Path, files: Sequence[bytes], splits: dict[str, int] | None = None) -> Path:
    """What `datasets` leaves with `save_to_disk`. splits: their numbers of images."""
    if splits is not None:
        root.mkdir()
        (root / "dataset_dict.json").write_text(json.dumps({"splits": [*splits]}))
    first = 0
    for split, count in (splits or {"": len(files)}).items():
        folder, numbers = root / split, range(first, first + count)
        folder.mkdir(parents=True)
        first += count
        table = pa.table(
            {
                "image": [{"bytes": files[n], "path": None} for n in numbers],
                "text": [caption(n) for n in numbers],
            }
        )
        with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=8)
        (folder / "cache-1234.arrow").write_bytes(b"what `map` left")
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text("{}")
    return root


def write_tars(root: Path, files: Sequence[bytes], each: int = 10, ending: str = "tar") -> Path:
    """Tars as img2dataset makes them, and the parquet that it leaves beside each."""
    root.mkdir(parents=True)
    for first in range(0, len(files), each):
        name = f"{first // each:05d}"
        with tarfile.open(root / f"{name}.{ending}", "w:gz" if "gz" in ending else "w") as tar:
            for n in range(first, min(first + each, len(files))):
                about = {"caption": caption(n), "key": f"{n:09d}", "punsafe": n / 10}
                about |= {"LANGUAGE": "en", "status": "success", "width": 80}
                for suffix, data in (
                    ("jpg", files[n]),
                    ("txt", caption(n).encode()),
                    ("json", json.dumps(about).encode()),
                ):
                    member = tarfile.TarInfo(f"{n:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        pq.write_table(pa.table({"url": ["http://x"]}), root / f"{name}.parquet")
    return root


def write_parquet(root: Path, files: Sequence[bytes], embedded: bool = True) -> Path:
    """Two files of two row groups each."""
    root.mkdir(parents=True)
    half = -(-len(files) // 2)
    for name, numbers in (("a", range(half)), ("b", range(half, len(files)))):
        if embedded:
            column = {"image": [{"bytes": files[n], "path": None} for n in numbers]}
        else:
            column = {"path": [f"files/{n}.jpg" for n in numbers]}
            (root / "files").mkdir(exist_ok=True)
            for n in numbers:
                (root / "files" / f"{n}.jpg").write_bytes(files[n])
        texts = {"text": [caption(n) for n in numbers], "similarity": [n / 10 for n in numbers]}
        table = pa.table({**column, **texts})
        pq.write_table(table, root / f"{name}.parquet", row_group_size=max(1, half // 2))
    return root


def write_yepop(root: Path, files: Sequence[bytes], each: int = 10, zipped: bool = True) -> Path:
    for first in range(0, len(files), each):
        chunk = f"chunk_{first // each}"
        place = root / "images" / chunk
        place.mkdir(parents=True)
        numbers = range(first, min(first + each, len(files)))
        records = {
            f"{n:07d}": {
                "filename": f"{n:07d}.jpg", "url": "http://x", "alt_txt": f"alt {n}",
                "cogvlm_caption": caption(n), "llava_caption": f"llava {n}",
                "alt_txt_similarity": 0.3, "nsfw_prediction": n / 10, "width": 80, "height": 80,
            }
            for n in numbers
        }  # fmt: skip
        (place / f"{chunk}.0.json").write_text(json.dumps(records))
        named = {f"{chunk}/{n:07d}.jpg": files[n] for n in numbers}
        if zipped:
            with zipfile.ZipFile(place / f"{chunk}.zip", "w") as archive:
                for name, data in named.items():
                    archive.writestr(name, data)
        else:
            (place / chunk).mkdir()
            for name, data in named.items():
                (place / name).write_bytes(data)
    return root


LAYOUTS = {
    "folder of txt": lambda root, files: write_folder(root, files),
    "folder of jsonl": lambda root, files: write_folder(root, files, "jsonl"),
    "folder of csv": lambda root, files: write_folder(root, files, "csv"),
    "folder of caption": lambda root, files: write_folder(root, files, "caption"),
    "folder of json": lambda root, files: write_folder(root, files, "json"),
    "folder of captions.jsonl": lambda root, files: write_folder(root, files, "captions.jsonl"),
    "folder of folders": write_nested,
    "webdataset": write_tars,
    "webdataset compressed": lambda root, files: write_tars(root, files, ending="tar.gz"),
    "saved": write_saved,
    "parquet of bytes": write_parquet,
    "parquet of paths": lambda root, files: write_parquet(root, files, embedded=False),
    "ye-pop zipped": write_yepop,
    "ye-pop unpacked": lambda root, files: write_yepop(root, files, zipped=False),
}


def prepared(source: Path, model: Path, out: Path, *options: str) -> Path:
    """Latents of 64 pixels that `koala prepare` made."""
    given = ["--model", str(model), "--out", str(out), "--size", "64", "--workers", "1", *options]
    assert main(["prepare", str(source), *given]) == 0
    return out
