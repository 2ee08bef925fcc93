"""Draws the prompts of an evaluation, once: what is there already is not drawn again.

    OUT/drawn/SET/RUN/settings.json   what they were drawn with
    OUT/drawn/SET/RUN/S/NNNNN.png     evaluation seed S, prompt N; the settings are inside too

The work is cut into units, which the processes of torchrun share. Picture N of evaluation seed S
has the seed (number of prompts) S + N, the same for every model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import koala
from koala.checkpoints.resolve import resolve_model
from koala.evaluation.models import Run
from koala.evaluation.plan import Part, Plan
from koala.generation import load
from koala.generation.png import write_png
from koala.utils.atomic import claim, new_file
from koala.utils.progress import progress

UNIT = 32  # pictures that one process draws, and later scores, together
EDGE = 1 << 16  # bytes of a weights file, at either end, that tell it from others


def share(units: int) -> range:
    """The units that are this process's, of those that torchrun started."""
    rank, world = (int(os.environ.get(n, d)) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    return range(rank, units, world)


def folder_of(plan: Plan, part: Part, run: Run) -> Path:
    return plan.out / "drawn" / part.prompts.name / run.name


def files_of(plan: Plan, part: Part, run: Run) -> list[Path]:
    """The run's pictures, seed by seed: [seeds x prompts]."""
    prompts = range(len(part.prompts.prompts))
    if run.name in part.pictures:
        given = part.pictures[run.name]
        return [given[i][s] for s in range(len(part.seeds)) for i in prompts]
    folder = folder_of(plan, part, run)
    return [folder / str(seed) / f"{i:05d}.png" for seed in part.seeds for i in prompts]


def draw(plan: Plan, row: str, run: Run, device: str | None, first: bool) -> None:
    """Draws what is missing of a run's pictures, of all prompt sets.

    device: see `koala.load`. first: whether this is the process that shows its progress.
    UserError if the pictures that are there were drawn otherwise.
    """
    if run.pictures is not None:
        return
    todo: list[tuple[Part, list[Path], list[int]]] = []
    for part in plan.parts:
        claim(folder_of(plan, part, run) / "settings.json", _settings(plan, part, row, run))
        files = files_of(plan, part, run)
        for unit in share(-(-len(files) // UNIT)):
            indices = range(unit * UNIT, min(len(files), (unit + 1) * UNIT))
            if missing := [i for i in indices if not files[i].exists()]:
                todo.append((part, files, missing))
    if not todo:
        return
    pipeline = load(run.model, device)
    total = sum(len(missing) for _, _, missing in todo)
    with progress(f"drawing with {run.name}", total, "images", silent=not first) as advance:
        for part, files, missing in todo:
            _draw_unit(plan, part, row, files, missing, pipeline)
            advance(len(missing))


def _draw_unit(
    plan: Plan,
    part: Part,
    row: str,
    files: Sequence[Path],
    missing: Sequence[int],
    pipeline: koala.Pipeline,
) -> None:
    prompts = part.prompts.prompts
    requests = []
    for i in missing:
        seed, prompt = part.seeds[i // len(prompts)], i % len(prompts)
        requests += pipeline.requests(
            prompts[prompt].literal,
            steps=plan.steps[row],
            guidance=plan.guidance[row],
            size=plan.size,
            seed=seed * len(prompts) + prompt,
        )
    result = pipeline.draw(requests)
    for i, image, settings in zip(missing, result.images, result.settings, strict=True):
        with new_file(files[i]) as new, new.open("wb") as file:
            write_png(image, settings, file)


def _settings(plan: Plan, part: Part, row: str, run: Run) -> dict[str, object]:
    return {
        "model": fingerprint(resolve_model(run.model)),
        "prompts": part.prompts.digest,
        "count": len(part.prompts.prompts),
        "steps": plan.steps[row],
        "guidance": plan.guidance[row],
        "size": list(plan.size),
    }


def fingerprint(folder: Path) -> str:
    """Tells a model from others: of its configurations, and of both ends of every weights file.

    Parts may be links, as those of a bundled model that shares them.
    """
    found = hashlib.sha256()
    files = [Path(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in names]
    for file in sorted(files):
        if file.suffix not in (".json", ".safetensors"):
            continue
        found.update(f"{file.relative_to(folder)} {file.stat().st_size}".encode())
        with file.open("rb") as stream:
            found.update(stream.read(EDGE))
            stream.seek(-min(EDGE, file.stat().st_size), os.SEEK_END)
            found.update(stream.read(EDGE))
    return found.hexdigest()[:16]
