"""ye-pop chunks: chunk_N.zip with images, and chunk_N.0.json with their records by id.

Fields of a record: filename, url, cogvlm_caption, llava_caption, alt_txt, alt_txt_similarity,
nsfw_prediction, width, height, ... An unpacked zip works too: its images beside the JSON or in
a folder chunk_N. Order: chunks by number, records as they come.
"""

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from koala.data.items import Item, captions_of, scores_of
from koala.errors import UserError

_JSON = re.compile(r"(chunk_(\d+))\.\d+\.json")


@dataclass(frozen=True)
class YePop:
    """The chunks below `root`; a part is a JSON file.

    The default caption is a synthetic one appended to the original, as in the paper's data study.
    """

    root: Path
    name = "ye-pop"
    captions = ("alt_txt+cogvlm_caption",)
    looked_in = "the text fields of chunk_N.0.json"

    def parts(self) -> dict[str, int]:
        """Paths of the JSON files relative to `root`, with their sizes. UserError if none."""
        if not (found := chunk_files(self.root)):
            raise UserError(f"{self.root} has no chunk_N.0.json")
        return {p.relative_to(self.root).as_posix(): p.stat().st_size for p in found}

    def count(self, part: str) -> int:
        """The number of records."""
        return len(_records(self.root / part))

    def items(self, part: str, first: int, count: int) -> Iterator[Item]:
        """A record's `filename` names its image."""
        path = self.root / part
        chunk = path.name.split(".")[0]
        for id, record in _records(path)[first : first + count]:
            read = partial(_read, path, str(record.get("filename") or ""))
            yield Item(f"{chunk}/{id}", read, captions_of(record), scores_of(record))


def chunk_files(root: Path) -> list[Path]:
    """The JSON files of the chunks below `root`, by the chunk's number."""
    found = [(m, p) for p in root.rglob("*.json") if (m := _JSON.fullmatch(p.name))]
    return [p for _, p in sorted(found, key=lambda f: (int(f[0][2]), f[1]))]


@lru_cache(maxsize=1)
def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        records = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): download it again") from None
    if not isinstance(records, dict) or not all(isinstance(r, dict) for r in records.values()):
        raise UserError(f"{path} must be a JSON object of records by id")
    return list(records.items())


@lru_cache(maxsize=1)
def _zip(path: Path) -> tuple[zipfile.ZipFile, dict[str, str]]:
    """The open zip, and its members by base name."""
    archive = zipfile.ZipFile(path)
    return archive, {name.rpartition("/")[2]: name for name in archive.namelist()}


def _read(path: Path, filename: str) -> bytes:
    bare = filename.rpartition("/")[2]
    if not bare:
        raise OSError("the record names no image")
    chunk = path.name.split(".")[0]
    for place in (path.parent / bare, path.parent / chunk / bare):
        if place.is_file():
            return place.read_bytes()
    try:
        archive, members = _zip(path.parent / f"{chunk}.zip")
        return archive.read(members[bare])
    except KeyError:
        raise OSError(f"{bare} is not in {chunk}.zip") from None
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise OSError(str(error)) from None
