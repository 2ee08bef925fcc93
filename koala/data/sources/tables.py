"""Tables of captions in a folder of images: which they are, and which images they mean.

A table names its images in one of `NAMES`, relative to its own folder; if none of them is there,
relative to the source, or by their file names alone. Beside plain tables there are COCO's
annotations, the metadata of kohya's scripts, DiffusionDB's and Flickr's lists.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from koala.data.files import folded
from koala.data.items import IMAGE_NAMES as NAMES
from koala.errors import UserError
from koala.utils.records import TABLES, records

METADATA = ("metadata.jsonl", "metadata.csv", "captions.jsonl")  # the usual ones
DOWNLOAD = (
    "fetch them with img2dataset (`img2dataset --url_list TABLE --output_folder DIR`) and give DIR"
)
_TABLE = re.compile(rf"(?:metadata|captions)({'|'.join(map(re.escape, TABLES))})", re.IGNORECASE)
_PERHAPS = re.compile(
    r"metadata\.json|captions\.(?:json|txt)|captions_\w+\.json|meta_\w+\.json"
    r"|part-\d+\.json|results\.csv",
    re.IGNORECASE,
)  # COCO's, kohya's, DiffusionDB's and Flickr's; other files may be called so
_DIFFUSIONDB = frozenset(("p", "se", "c", "st", "sa"))


@dataclass
class Captions:
    """What tables say: a record by image, relative to the source, and the images not there."""

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # image -> where it is named
    unread: list[Path] = field(default_factory=list)  # tables of other names


def is_table(path: Path) -> bool:
    """Whether a file that is given as a source, or a parquet in it, is a table of captions."""
    if path.suffix.lower() == ".parquet":
        return bool(_TABLE.fullmatch(path.name))
    return path.suffix.lower() in TABLES or path.name.lower() == "captions.txt"


def tables_among(files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """The tables that are read, and other files that may be some."""
    read, other = [], []
    for path in files:
        if _TABLE.fullmatch(path.name) or _PERHAPS.fullmatch(path.name):
            read.append(path)
        elif path.suffix.lower() in TABLES:
            other.append(path)
    return read, other


def read_tables(root: Path, images: list[str], tables: list[Path], strict: bool) -> Captions:
    """What the tables say of images, which are paths relative to `root`.

    strict: each of them must name images, whatever it is called. UserError if one cannot be read,
    names no image, or none that is there, or if two of the usual names lie in one folder.
    """
    found, names = Captions(), _Names(root, images)
    usual: dict[Path, Path] = {}
    for table in tables:
        sure = strict or not _PERHAPS.fullmatch(table.name)
        if sure and (other := usual.setdefault(table.parent, table)) != table:
            both = " and ".join(sorted((other.name, table.name)))
            raise UserError(f"{table.parent} has both {both}: keep one")
        _read(root, table, names, sure, found)
    if found.missing and not found.records:
        first, where = next(iter(found.missing.items()))
        raise UserError(
            f"{root}: its metadata name {len(found.missing)} images, such as {first} ({where}), "
            "and none of them is there: names are relative to the table's folder"
        )
    return found


def _read(root: Path, table: Path, names: "_Names", sure: bool, found: Captions) -> None:
    rows: list[tuple[str, str, dict[str, Any]]] = []
    for where, record in _rows(table):
        named = _image_of(record)
        if named is None and not sure and not rows:
            return  # no table of images
        if named is None:
            raise UserError(_nameless(table, where, record))
        rows.append((where, named, record))
    place = Path(os.path.relpath(table.parent, root)).as_posix()
    how = names.way([name for _, name, _ in rows], place)
    for where, named, record in rows:
        image = names.find(named, place, how)
        if image is None:
            found.missing.setdefault(names.plain(named, place), f"named in {table.name}, {where}")
        else:
            found.records[image] = _merged(found.records.get(image, {}), record)


def _nameless(table: Path, where: str, record: Any) -> str:
    has = f" (it has {', '.join(map(str, record))[:100]})" if isinstance(record, dict) else ""
    if isinstance(record, dict) and any("url" in str(name).lower() for name in record):
        return f"{table} has the URLs of its images, and nothing is downloaded: {DOWNLOAD}"
    return f"{table}: {where} names no image in a column {', '.join(NAMES[:4])}{has}"


def _rows(table: Path) -> Iterator[tuple[str, Any]]:
    """The records of a table, in the layouts that they are known in."""
    if table.suffix.lower() == ".txt":
        yield from _flickr(table)
        return
    for where, record in records(table, "file_name"):
        if isinstance(record, dict) and {"images", "annotations"} <= record.keys():
            yield from _coco(table, record)
        elif isinstance(record, dict) and _DIFFUSIONDB & record.keys() and "p" in record:
            yield where, {"file_name": record.get("file_name"), "prompt": record["p"]}
        else:
            yield where, record


def _flickr(table: Path) -> Iterator[tuple[str, Any]]:
    """captions.txt of Flickr8k: a CSV. Any other is no table."""
    with table.open("rb") as file:
        first = file.readline(200).strip().lower()
    if first.replace(b" ", b"") == b"image,caption":
        yield from records(table, "file_name")


def _coco(table: Path, found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    try:
        names = {image["id"]: image["file_name"] for image in found["images"]}
        for number, one in enumerate(found["annotations"], 1):
            if "caption" in one:
                named = {"file_name": names[one["image_id"]], "caption": one["caption"]}
                yield f"annotation {number}", named
    except (LookupError, TypeError) as error:
        raise UserError(f"{table} is no list of captions in COCO's layout: {error!r}") from None


def _image_of(record: Any) -> str | None:
    if not isinstance(record, dict):
        return None
    plain = {re.sub(r"[\s-]+", "_", str(name).strip().lower()): name for name in record}
    named = (record[plain[name]] for name in NAMES if name in plain)
    return next((value for value in named if isinstance(value, str) and value.strip()), None)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Both records of an image; two texts of one name are a list."""
    both = old | new
    for name in old.keys() & new.keys():
        if isinstance(new[name], str) and old[name] != new[name] and old[name] is not None:
            both[name] = [*(old[name] if isinstance(old[name], list) else [old[name]]), new[name]]
    return both


class _Names:
    """Finds images by what tables call them."""

    def __init__(self, root: Path, images: list[str]):
        self.root, self.images, self.exact = root, images, frozenset(images)
        # Without case and ending, filled when needed; None where several are called so.
        self.loose: dict[str, str | None] = {}
        self.bare: dict[str, str | None] = {}  # by file name alone

    def plain(self, named: str, place: str) -> str:
        """The path that is meant, relative to the root, with slashes; `place` is the table's."""
        named = named.strip()
        if os.path.isabs(named) and Path(named).is_relative_to(self.root.absolute()):
            return Path(named).relative_to(self.root.absolute()).as_posix()
        if f"{place}/{named}".removeprefix("./") not in self.exact:
            named = named.replace("\\", "/")
        return os.path.normpath(f"{place}/{named}").replace(os.sep, "/")

    def way(self, names: list[str], place: str) -> str:
        """How a table names its images: by "place", from the source's "root", or "bare"."""
        for how in ("place", "root", "bare"):
            if any(self.find(name, place, how) for name in names):
                return how
        return "place"

    def find(self, named: str, place: str, how: str) -> str | None:
        """The image; None if there is none, or several may be meant."""
        plain = self.plain(named, "." if how == "root" else place)
        if how != "bare" and plain in self.exact:
            return plain
        self._fill()
        if how == "bare":
            return self.bare.get(folded(plain.rpartition("/")[2]))
        return self.loose.get(folded(plain))

    def _fill(self) -> None:
        if self.loose:
            return
        for image in self.images:
            for whole in {folded(image), folded(os.path.splitext(image)[0])}:
                _note(self.loose, whole, image)
                _note(self.bare, whole.rpartition("/")[2], image)


def _note(names: dict[str, str | None], name: str, image: str) -> None:
    names[name] = image if names.get(name, image) == image else None
