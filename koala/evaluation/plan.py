"""What an evaluation will do, checked before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

from koala.errors import UserError
from koala.evaluation.metrics import weights as weight_files
from koala.evaluation.metrics.catalogue import (
    OFFLINE,
    MetricInfo,
    check_packages,
    infos,
    weights_of,
)
from koala.evaluation.models import (
    Named,
    Row,
    Size,
    check_sampling,
    check_seeds,
    common_size,
    per_row,
    rows_of,
)
from koala.evaluation.pictures import RealPictures, matched, real_folder
from koala.evaluation.prompt_sets import ILLUSTRATIONS, is_prepared, read_prompts
from koala.evaluation.prompts import PromptSet
from koala.utils.atomic import new_file
from koala.utils.device import check_device
from koala.utils.extras import require

ILLUSTRATION_SEEDS = (0, 1, 2)
FEWEST = 3  # prompts: a distance without one of them still has a covariance


@dataclass(frozen=True)
class Part:
    """One prompt set of an evaluation, with what is measured on it.

    pictures: of each run that is a folder, the files of each prompt, by the run's name. real: with
    what drawn pictures are compared. train: rows of the illustrations that a judge learns from.
    """

    prompts: PromptSet
    metrics: tuple[MetricInfo, ...]
    seeds: tuple[int, ...]
    pictures: dict[str, list[list[Path]]]
    real: RealPictures | None = None
    train: tuple[int, ...] = ()

    @property
    def strata(self) -> list[int] | None:
        """The category of each prompt as a number, where the metric is a mean over categories."""
        if not (self.prompts.by_category and self.prompts.categories):
            return None
        return [self.prompts.categories.index(p.category) for p in self.prompts.prompts]


@dataclass(frozen=True)
class Plan:
    """An evaluation, checked."""

    rows: list[Row]
    parts: list[Part]
    size: Size
    steps: dict[str, int]  # by row
    guidance: dict[str, float]
    out: Path
    weights: dict[str, Path]
    judge: Path | None
    device: str | None
    notes: dict[str, str]
    images: Path | None  # the illustrations, if they are compared with


def plan(
    models: Sequence[str | Named],
    out: str | Path,
    prompts: Sequence[str] = (),
    pictures: str | Path | None = None,
    *,
    metrics: Sequence[str] = (),
    count: int | None = None,
    seeds: Sequence[int] | None = None,
    steps: Sequence[str] = (),
    guidance: Sequence[str] = (),
    size: str | None = None,
    weights: Sequence[str] = (),
    judge: str | Path | None = None,
    device: str | None = None,
    notes: Mapping[str, str] | None = None,
    measured: bool = True,
) -> Plan:
    """Checks the arguments of `koala.evaluate`. UserError as stated there.

    measured: whether anything is where no metrics are named; else pictures are only drawn.
    """
    rows = rows_of(models)
    chosen = infos(metrics)
    if count is not None and count < FEWEST:
        raise UserError(f"count {count}: an evaluation needs at least {FEWEST} prompts")
    if seeds is not None:
        check_seeds(seeds)
    by_row_steps = per_row("steps", steps, rows, int, attrgetter("steps"))
    by_row_guidance = per_row("guidance", guidance, rows, float, attrgetter("guidance"))
    check_sampling(by_row_steps, by_row_guidance)
    check_device(device)
    if device is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--device: torchrun gives every process its own device; leave it out")
    if unknown := set(notes or {}) - {row.name for row in rows}:
        raise UserError(f"notes on {sorted(unknown)}: allowed are {[row.name for row in rows]}")
    if judge is not None and not Path(judge).is_file():
        raise UserError(f"the judge {judge} does not exist: leave it out to train one")
    parts = _parts(rows, prompts, pictures, chosen, count, seeds, judge)
    if not measured:
        parts = [replace(part, metrics=()) for part in parts]
    asked = [metric for part in parts for metric in part.metrics]
    for metric in asked:
        check_packages(metric)
    given = weights_of(asked, weights)
    common = common_size(rows, size)
    found = weight_files.find([name for metric in asked for name in metric.models], given)
    _check_writable(Path(out))
    return Plan(
        rows, parts, common, by_row_steps, by_row_guidance, Path(out), found,
        judge=Path(judge) if judge is not None else None, device=device,
        notes=dict(notes or {}), images=_illustrations(pictures),
    )  # fmt: skip


def _parts(
    rows: Sequence[Row],
    prompts: Sequence[str],
    pictures: str | Path | None,
    chosen: Sequence[MetricInfo],
    count: int | None,
    seeds: Sequence[int] | None,
    judge: str | Path | None,
) -> list[Part]:
    images = _illustrations(pictures)
    parts = [_illustration_part(rows, images, chosen, count, seeds)] if images else []
    if images and prompts:
        raise UserError(
            f"{images} brings its own prompts, its held-out captions: leave out --prompts, or give "
            "--pictures another folder"
        )
    if not images and not prompts:
        raise UserError(
            "no prompts: give --prompts a file or a published set, or --pictures a folder that "
            "koala prepare made of the illustrations"
        )
    for given in prompts:
        chosen_prompts = read_prompts(given).first(count)
        if any(part.prompts.name == chosen_prompts.name for part in parts):
            raise UserError(f"two prompt sets are called {chosen_prompts.name}: rename a file")
        folder = None if pictures is None else Path(pictures)
        parts.append(_part(rows, chosen_prompts, folder, chosen, seeds, judge))
    measured = {metric.name for part in parts for metric in part.metrics}
    if left := [metric.name for metric in chosen if metric.name not in measured]:
        raise UserError(
            f"--metrics {left[0]}: no prompt set tells what it asks for "
            f"({', '.join(infos(left)[0].facts)})"
        )
    return parts


def _part(
    rows: Sequence[Row],
    prompts: PromptSet,
    folder: Path | None,
    chosen: Sequence[MetricInfo],
    seeds: Sequence[int] | None,
    judge: str | Path | None,
) -> Part:
    if len(prompts.prompts) < FEWEST:
        raise UserError(
            f"{prompts.name} has {len(prompts.prompts)} prompts: give at least {FEWEST}"
        )
    if folder is not None and not folder.is_dir():
        raise UserError(f"--pictures {folder}: there is no such folder")
    if folder is not None and is_prepared(folder):
        raise UserError(
            f"--pictures {folder}: it holds latents; give the folder of the images they are made of"
        )
    wanted = list(chosen) or infos(_default(prompts, folder, judge))
    known = {fact for prompt in prompts.prompts for fact in prompt.facts}
    fitting = tuple(metric for metric in wanted if known.issuperset(metric.facts))
    for metric in fitting:
        if metric.real and folder is None:
            raise UserError(
                f"{metric.name} compares with real pictures: give their folder to --pictures"
            )
        if metric.home.endswith("Retrieval") and judge is None:
            raise UserError(
                f"{metric.name} asks a judge: give --judge the judge.safetensors of a report on "
                "illustrations"
            )
    real = real_folder(folder, prompts.prompts) if folder is not None else None
    pictures, every = _of_folders(rows, prompts, seeds)
    return Part(prompts, fitting, every, pictures, real)


def _default(prompts: PromptSet, folder: Path | None, judge: str | Path | None) -> list[str]:
    """What is measured where nothing is asked for."""
    names = [name for name in prompts.metrics if folder is not None or not infos([name])[0].real]
    if not names:
        names = list(OFFLINE[:2]) if folder is not None else []
        names += OFFLINE[2:] if judge is not None else []
    return names or ["clip-score"]


def _of_folders(
    rows: Sequence[Row], prompts: PromptSet, seeds: Sequence[int] | None
) -> tuple[dict[str, list[list[Path]]], tuple[int, ...]]:
    """The pictures of the runs that are folders, and the evaluation seeds.

    UserError for a folder with another number of pictures of a prompt than the others.
    """
    found = {
        run.name: matched(run.pictures, prompts)
        for row in rows
        for run in row.runs
        if run.pictures is not None
    }
    counts = {name: len(files[0]) for name, files in found.items()}
    if seeds is None:
        seeds = range(min(counts.values(), default=prompts.images))
    for name, there in counts.items():
        if there != len(seeds):
            raise UserError(
                f"{name} has {there} pictures of each prompt, asked are {len(seeds)}: give as many "
                "--seeds as every folder has pictures of a prompt"
            )
    return found, tuple(seeds)


def _illustrations(pictures: str | Path | None) -> Path | None:
    """The folder or shard, if it is of the illustrations."""
    if pictures is None:
        return None
    path = Path(pictures)
    shards = path.glob("pictures-*.parquet") if path.is_dir() else iter([path])
    return path if any(shard.suffix == ".parquet" and shard.is_file() for shard in shards) else None


def _illustration_part(
    rows: Sequence[Row],
    images: Path,
    chosen: Sequence[MetricInfo],
    count: int | None,
    seeds: Sequence[int] | None,
) -> Part:
    require("illustrations", "evaluate", "pyarrow")
    from koala.evaluation.illustrations import held_out_prompts

    prompts, real, train = held_out_prompts(images, ILLUSTRATIONS if count is None else count)
    wanted = list(chosen) or infos(OFFLINE)
    fitting = tuple(metric for metric in wanted if not metric.facts)
    asked = ILLUSTRATION_SEEDS if seeds is None else seeds
    pictures, every = _of_folders(rows, prompts, asked)
    return Part(prompts, fitting, every, pictures, real, train)


def _check_writable(out: Path) -> None:
    """UserError before the long work if the folder cannot be written."""
    created = not out.exists()
    with new_file(out / ".probe") as part:
        part.touch()
    (out / ".probe").unlink()
    if created and not any(out.iterdir()):
        out.rmdir()
