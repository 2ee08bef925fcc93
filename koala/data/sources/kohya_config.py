"""A data-set configuration of kohya's scripts: a TOML file that lists folders of images.

Of each subset are used `image_dir`, `num_repeats`, `class_tokens` (the caption of images without
one), `caption_extension` and `metadata_file`, which may also stand above it. What else it says is
about training, and is named. Order: subsets as listed.
"""

import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from koala.data.items import FILE_NAME, Item, repeated
from koala.data.sources.folder import TEXTS, Folder
from koala.errors import UserError

_USED = frozenset(
    ("image_dir", "num_repeats", "class_tokens", "caption_extension", "metadata_file")
)


@dataclass(frozen=True)
class KohyaConfig:
    """The subsets of the TOML file at `root`; a part is a subset."""

    root: Path
    name = "folder"
    captions = ()

    @property
    def looked_in(self) -> str:
        """As of its folders."""
        return next(iter(subsets(self.root).values())).folder.looked_in

    def tell(self) -> None:
        """Names, on standard error, what of the configuration has no meaning here."""
        unused = {name for subset in subsets(self.root).values() for name in subset.unused}
        if unused:
            listed = ", ".join(sorted(unused))
            print(f"koala: {self.root.name}: not used here: {listed}", file=sys.stderr)

    def parts(self) -> dict[str, int]:
        """The subsets by number and folder, with digests. UserError if there are none."""
        return {
            part: subset.folder.parts()["."] + subset.repeats
            for part, subset in subsets(self.root).items()
        }

    def count(self, part: str) -> int:
        """As of its folder."""
        return subsets(self.root)[part].folder.count(".")

    def items(self, part: str, first: int, count: int) -> Iterator[Item]:
        """Those of the folder, repeated as the configuration says."""
        subset = subsets(self.root)[part]
        for item in subset.folder.items(".", first, count):
            captions = item.captions
            if subset.tokens and not {*captions} - {FILE_NAME}:
                captions = {"text": subset.tokens, **captions}
            kind = repeated(subset.repeats)
            yield replace(item, id=f"{part}/{item.id}", captions=captions, kind=kind)


@dataclass(frozen=True)
class _Subset:
    folder: Folder
    repeats: int
    tokens: str
    unused: frozenset[str]


@lru_cache(maxsize=2)
def subsets(config: Path) -> dict[str, _Subset]:
    """UserError if the file is no such configuration, or a folder is not there."""
    try:
        told = tomllib.loads(config.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{config} cannot be read as TOML: {error}") from None
    found: dict[str, _Subset] = {}
    for data_set in _tables(config, told, "datasets"):
        for own in _tables(config, data_set, "subsets"):
            outer = {name: value for name, value in data_set.items() if name != "subsets"}
            settings = {**_general(told), **outer, **own}
            number = len(found) + 1
            subset = _subset(config, number, settings)
            found[f"{number} {subset.folder.root.name}"] = subset
    return found


def _general(told: dict[str, Any]) -> dict[str, Any]:
    general = told.get("general")
    return general if isinstance(general, dict) else {}


def _tables(config: Path, told: dict[str, Any], name: str) -> list[dict[str, Any]]:
    tables = told.get(name)
    if isinstance(tables, list) and tables and all(isinstance(t, dict) for t in tables):
        return tables
    raise UserError(
        f"{config} lists no [[{name}]]: a data-set configuration of kohya's scripts has "
        "[[datasets]] with [[datasets.subsets]]"
    )


def _subset(config: Path, number: int, settings: dict[str, Any]) -> _Subset:
    where = f"{config}: subset {number}"
    given = settings.get("image_dir")
    if not isinstance(given, str):
        raise UserError(f"{where} has no image_dir: name the folder of its images")
    folder = _there(config, given, where)
    if not folder.is_dir():
        raise UserError(f"{where}: image_dir {given!r} is no folder")
    repeats = settings.get("num_repeats", 1)
    if not isinstance(repeats, int) or not 1 <= repeats <= 999:
        raise UserError(f"{where}: num_repeats {repeats!r} must be a whole number from 1 to 999")
    ending = settings.get("caption_extension", TEXTS[-1])
    if not isinstance(ending, str) or not ending.strip("."):
        raise UserError(f"{where}: caption_extension {ending!r} must be an ending, such as .txt")
    texts = tuple(dict.fromkeys((*TEXTS, f".{ending.lower().lstrip('.')}")))
    unused = frozenset(settings.keys() - _USED)
    table = settings.get("metadata_file")
    path = None if table is None else _there(config, str(table), where)
    tokens = str(settings.get("class_tokens", ""))
    return _Subset(Folder(folder, path, texts), repeats, tokens, unused)


def _there(config: Path, given: str, where: str) -> Path:
    """A path, from the current folder as kohya's scripts take it, or from the file's."""
    for path in (Path(given).expanduser(), config.parent / given):
        if path.exists():
            return path.absolute()
    raise UserError(f"{where}: {given!r} does not exist")
