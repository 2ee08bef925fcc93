"""The rows of a report: models and folders of pictures, and whether they can be compared.

Importing this does not load torch, so that mistakes are reported at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from PIL import Image

from koala.architectures.table import FACTOR
from koala.checkpoints.resolve import resolve_model
from koala.checkpoints.run_folder import is_run
from koala.checkpoints.sampling import USUAL, Sampling
from koala.checkpoints.validate import unet_architecture
from koala.errors import UserError, unknown
from koala.generation import validation
from koala.generation.form import is_form
from koala.generation.png import IMAGES
from koala.generation.requests import Known

REAL = "real pictures"  # the report's first row, where there are any
T = TypeVar("T")
Size = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True)
class Run:
    """One training of a row: a model that draws, or a folder of pictures that another program drew.

    name: its folder's name in the report.
    """

    name: str
    model: str
    pictures: Path | None

    @property
    def size(self) -> Size:
        """Of what the model draws, or of the first picture."""
        if self.pictures is not None:
            with Image.open(image_files(self.pictures)[0]) as image:
                return image.size
        side = unet_architecture(resolve_model(self.model)).sample * FACTOR
        return side, side

    @property
    def sampling(self) -> Sampling:
        """What the model is made for; of pictures it has no meaning."""
        return USUAL if self.pictures is not None else Known.of(self.model).sampling


@dataclass(frozen=True)
class Row:
    """A line of the report: one model, or several trainings of one."""

    name: str
    runs: tuple[Run, ...]


Named: TypeAlias = tuple[str, Sequence[str]]  # a row's name, and its runs


def rows_of(given: Sequence[str | Named]) -> list[Row]:
    """Rows by name, and those that a command line gives: MODEL, FOLDER or NAME=RUN,RUN,...

    UserError for equal names, several runs without a name, and names that are no file names.
    """
    rows: dict[str, Row] = {}
    for one_row in given:
        name, places = _parsed(one_row) if isinstance(one_row, str) else one_row
        if name in rows:
            raise UserError(f"two models are named {name!r}: rename one with NAME=MODEL")
        rows[name] = Row(name, tuple(_run(name, one, i) for i, one in enumerate(places)))
    if not rows or REAL in rows:
        raise UserError(f"models {list(rows)}: give at least one, and call none {REAL!r}")
    folders = [run.name for row in rows.values() for run in row.runs]
    if doubled := next((name for name in folders if folders.count(name) > 1), None):
        raise UserError(f"two models would be kept as {doubled!r}: rename one with NAME=MODEL")
    return [*rows.values()]


def _parsed(text: str) -> Named:
    name, _, place = text.rpartition("=")
    places = place.split(",")
    if not name and len(places) > 1:
        raise UserError(f"{text!r} names several runs: call their row, NAME={text}")
    return name or place, places


def _run(row: str, place: str, number: int) -> Run:
    if not place:
        raise UserError(f"{row!r} has an empty run: write NAME=RUN,RUN without spaces")
    name = "".join(c if c.isalnum() or c in "-_.+" else "-" for c in row).strip(".-") or "model"
    path = Path(place).expanduser()
    is_model = (path / "model_index.json").is_file() or is_form(path) or is_run(path)
    pictures = path if path.is_dir() and not is_model else None
    return Run(f"{name}-{number + 1}" if number else name, place, pictures)


def image_files(folder: Path) -> list[Path]:
    """All pictures in a folder and those below, by name. UserError if there is none."""
    found = [
        Path(root, name)
        for root, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(IMAGES) and not name.startswith(".")
    ]
    if not found:
        raise UserError(
            f"{folder} is neither a model (it has no model_index.json) nor has it pictures"
        )
    return sorted(found)


def common_size(rows: Sequence[Row], asked: str | None) -> Size:
    """The (width, height) at which all rows are compared.

    asked: WIDTHxHEIGHT at which models draw, and to which larger pictures are scaled down.
    UserError for rows of different sizes where none is asked for, and for unknown models.
    """
    sizes = {row.name: run.size for row in rows for run in row.runs}  # finds what is missing
    if asked is not None:
        return validation.size(asked)
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {named(size)}" for name, size in sizes.items())
        raise UserError(
            f"the models have different sizes ({found}): evaluate each size separately, or give "
            "the --size to compare them at"
        )
    return next(iter(sizes.values()))


def named(size: Size) -> str:
    """A size as WIDTHxHEIGHT."""
    return f"{size[0]}x{size[1]}"


def per_row(
    what: str,
    given: Sequence[str],
    rows: Sequence[Row],
    read: Callable[[str], T],
    made_for: Callable[[Sampling], T],
) -> dict[str, T]:
    """A value for each row, from VALUE for all and NAME=VALUE for some: `--steps 10 sdxl=25`.

    Where nothing is said of a row, its model's own, by its first run.

    UserError for a name that no row has, and for two values for one.
    """
    every: dict[str, T] = {}
    own: dict[str, T] = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        if equals and name not in {row.name for row in rows}:
            raise unknown(f"row of --{what}", name, [row.name for row in rows])
        if equals and all(run.pictures for row in rows if row.name == name for run in row.runs):
            raise UserError(f"--{what} {text}: {name} is a folder of pictures, which are not drawn")
        try:
            number = read(value)
        except ValueError:
            raise UserError(f"--{what} {text}: {value!r} is no number") from None
        chosen = {name: number} if equals else {row.name: number for row in rows}
        into = own if equals else every
        if set(chosen) & set(into):
            raise UserError(f"--{what} {' '.join(given)}: give one value for all, or one for each")
        into |= chosen
    named = every | own
    return {
        row.name: named[row.name] if row.name in named else made_for(row.runs[0].sampling)
        for row in rows
    }


def check_seeds(seeds: Sequence[int]) -> None:
    """UserError unless they are different whole numbers from 0."""
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds {list(seeds)}: give different whole numbers from 0, such as 0 1 2")


def check_sampling(steps: Mapping[str, int], guidance: Mapping[str, float]) -> None:
    """UserError unless every row's steps and guidance are in range."""
    for name in steps:
        validation.numbers(steps[name], guidance[name])
