"""Sources of captioned images: one small class per kind, recognised from the files.

To add one, write a class with the interface of `koala.data.items.Source` in its own module, and add
it to `_KINDS` and `_found`.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from koala.data.files import ARCHIVES, IMAGES, files_below, listing
from koala.data.items import KINDS, Source
from koala.data.sources.folder import Folder, contents, digest
from koala.data.sources.hub import HubData, hub_data
from koala.data.sources.kohya_config import KohyaConfig, subsets
from koala.data.sources.parquet import Parquet
from koala.data.sources.saved import is_saved, saved
from koala.data.sources.tables import DOWNLOAD, is_table
from koala.data.sources.webdataset import WebDataset, is_tar
from koala.data.sources.yepop import YePop, chunk_files
from koala.errors import UserError, unknown
from koala.utils.records import TABLES

_KINDS: dict[str, Callable[[Path], Source | HubData]] = dict(
    zip(KINDS, (Folder, WebDataset, Parquet, saved, HubData, YePop), strict=True)
)


def recognise(place: str | Path, kind: str | None = None) -> Source | HubData:
    """The source at `place`: a folder, a tar, a table, or a data set's name on the Hub.

    kind: one of KINDS, if the place holds several. UserError if there is no known kind, or several
    and none is named.
    """
    root = Path(place).expanduser()
    for kept in (listing, contents, digest, subsets):
        kept.cache_clear()  # files may have changed since
    if kind is not None and kind not in _KINDS:
        raise unknown("kind of source", kind, KINDS)
    if address := _ADDRESS.match(str(place)):
        raise UserError(_of_url(str(place), address))
    if data := hub_data(str(root), kind):
        return data
    if not root.exists():
        raise UserError(
            f"source {str(place)!r} does not exist; give a path of one of the kinds "
            f"{', '.join(KINDS)}, a data set of the Hub as ORG/NAME, or illustrations or "
            "illustrations-small"
        )
    if root.is_file() and kind in (None, "folder"):
        if root.suffix.lower() == ".toml":
            config = KohyaConfig(root)
            config.tell()
            return config
        if root.suffix.lower() != ".parquet" and is_table(root):
            return Folder(root.absolute().parent, root.absolute())
    found = [kind] if kind else _found(root)
    if not found:
        raise UserError(f"source {root} {_lacks(root)}")
    if len(found) > 1:
        what = f"may be {' or '.join(found)}"
        raise UserError(f"source {root} {what}: give its own folder, or choose with --as KIND")
    return _KINDS[found[0]](root)


_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://+(?:huggingface\.co/datasets/([^/]+/[^/?#]+))?")


def _of_url(place: str, address: re.Match[str]) -> str:
    if address[2]:
        return f"source {place} is a data set of the Hub: give its name, {address[2]}"
    return f"source {place} is a URL, and nothing is downloaded: get it, and give its path"


def _found(root: Path) -> list[str]:
    """The kinds found at `root`. A parquet beside a tar or folder of its name is img2dataset's."""
    if root.is_file():
        return ["webdataset"] if is_tar(root) else ["parquet"] if _is_parquet(root) else []
    if chunk_files(root):
        return ["ye-pop"]
    if is_saved(root):
        return ["saved"]
    files = [p for p in files_below(root) if p.is_file()]
    tars = {p.with_name(p.name.split(".tar")[0].split(".tgz")[0]) for p in files if is_tar(p)}
    logs = {*tars, *(p.parent for p in files)}  # beside which img2dataset leaves a parquet each
    tables = [p for p in files if _is_parquet(p) and not is_table(p)]
    there = {
        "webdataset": bool(tars),
        "parquet": any(p.with_suffix("") not in logs for p in tables),
        "folder": any(p.suffix.lower() in IMAGES for p in files),
    }
    return [kind for kind, found in there.items() if found]


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _lacks(root: Path) -> str:
    """What is at a place that is no source, and what to do."""
    if root.suffix.lower() in IMAGES and root.is_file():
        return f"is one image: give the folder it is in, {root.parent}"
    if root.suffix.lower() in ARCHIVES and root.is_file():
        return "is an archive: unpack it, and give the folder"
    if root.is_file():
        return f"is none of {', '.join(KINDS)}: give a folder, a tar, or one of {', '.join(TABLES)}"
    files = files_below(root)
    if not files:
        return "is empty: give a folder of images, tars or parquet files"
    if archives := [path for path in files if path.suffix.lower() in ARCHIVES]:
        return f"holds {archives[0].name}, an archive: unpack it, and give its folder"
    if tables := [path for path in files if path.suffix.lower() in TABLES]:
        return f"holds {tables[0].name}, but no images: {DOWNLOAD}"
    endings = Counter(path.suffix.lower() or path.name for path in files)
    listed = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(3))
    return f"holds none of {', '.join(KINDS)}, but {listed}: give a folder of images"
