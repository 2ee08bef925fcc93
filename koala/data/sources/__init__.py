"""Sources of captioned images: one small class per kind, recognised from the files.

To add one, write a class with the interface of `koala.data.items.Source` in its own module, and add
it to `_KINDS` and `_found`.
"""

from collections.abc import Callable
from pathlib import Path

from koala.data.items import KINDS, Source
from koala.data.sources.folder import SUFFIXES, Folder
from koala.data.sources.hub import HubData, hub_data
from koala.data.sources.parquet import Parquet
from koala.data.sources.saved import is_saved, saved
from koala.data.sources.webdataset import WebDataset, is_tar
from koala.data.sources.yepop import YePop, chunk_files
from koala.errors import UserError, unknown

_KINDS: dict[str, Callable[[Path], Source | HubData]] = dict(
    zip(KINDS, (Folder, WebDataset, Parquet, saved, HubData, YePop), strict=True)
)


def recognise(place: str | Path, kind: str | None = None) -> Source | HubData:
    """The source at `place`: a folder, a tar, a parquet file, or a data set's name on the Hub.

    kind: one of KINDS, if the place holds several. UserError if there is no known kind, or several
    and none is named.
    """
    root = Path(place).expanduser()
    if kind is not None and kind not in _KINDS:
        raise unknown("kind of source", kind, KINDS)
    if data := hub_data(str(root), kind):
        return data
    if not root.exists():
        raise UserError(
            f"source {str(place)!r} does not exist; give a path of one of the kinds "
            f"{', '.join(KINDS)}, a data set of the Hub as ORG/NAME, or illustrations or "
            "illustrations-small"
        )
    found = [kind] if kind else _found(root)
    if len(found) != 1:
        what = f"may be {' or '.join(found)}" if found else f"holds none of {', '.join(KINDS)}"
        raise UserError(f"source {root} {what}: give its own folder, or choose with --as KIND")
    return _KINDS[found[0]](root)


def _found(root: Path) -> list[str]:
    """The kinds found at `root`. A parquet beside a tar of its name is img2dataset's log."""
    if root.is_file():
        return ["webdataset"] if is_tar(root) else ["parquet"] if root.suffix == ".parquet" else []
    if chunk_files(root):
        return ["ye-pop"]
    if is_saved(root):
        return ["saved"]
    files = [p for p in root.rglob("*") if p.is_file()]
    tars = {p.with_name(p.name.split(".tar")[0].split(".tgz")[0]) for p in files if is_tar(p)}
    tables = [p for p in files if p.suffix == ".parquet" and p.with_suffix("") not in tars]
    there = {
        "webdataset": bool(tars),
        "parquet": bool(tables),
        "folder": any(p.suffix.lower() in SUFFIXES for p in files),
    }
    return [kind for kind, found in there.items() if found]
