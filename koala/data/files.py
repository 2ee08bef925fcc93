"""Files of a folder as people leave them: hidden ones, links, names in other spellings."""

import os
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from koala.errors import UserError

IMAGES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".avif", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".tga",
)  # fmt: skip
NOT_READ = (".svg", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".xcf")
ARCHIVES = (".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst", ".tbz2", ".txz")  # tars apart
_OF_SYSTEMS = frozenset(("__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin"))


def files_below(root: Path) -> list[Path]:
    """Every file below `root`, by path; links lead to more, broken ones are there too.

    Left out are hidden files and folders, and those that systems make (`__MACOSX`, `Thumbs.db`).
    UserError for a folder that cannot be listed.
    """
    seen: set[str] = set()
    found: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=_refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        found += [Path(folder, name) for name in names if not is_hidden(name)]
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed: {error.strerror}")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is none of the user's."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def folded(name: str) -> str:
    """A name as systems without case, or with decomposed accents, know it."""
    return unicodedata.normalize("NFC", name).casefold()


def shown(name: str) -> str:
    r"""A path as text: bytes that are no UTF-8 are written as `\udce9`."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


@lru_cache(maxsize=4)
def listing(folder: Path) -> dict[str, str]:
    """The names in a folder by themselves, and by their folded spelling."""
    names = sorted(os.listdir(folder), reverse=True)
    return {folded(name): name for name in names} | {name: name for name in names}


def beside(image: Path, suffixes: Iterable[str]) -> list[Path]:
    """The files NAME.suffix or NAME.jpg.suffix beside NAME.jpg, in the order of the suffixes."""
    there = listing(image.parent)
    wanted = [f"{name}{suffix}" for suffix in suffixes for name in (image.stem, image.name)]
    found = [there.get(name) or there.get(folded(name)) for name in wanted]
    return [image.parent / name for name in dict.fromkeys(found) if name]
