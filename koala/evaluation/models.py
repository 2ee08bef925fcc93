"""The models of a report: their names, and whether they can be compared.

Importing this does not load torch, so that mistakes are reported at once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from koala.architectures.table import FACTOR
from koala.checkpoints.resolve import resolve_model
from koala.checkpoints.validate import unet_architecture
from koala.errors import UserError
from koala.generation import validation

REAL = "real pictures"  # the report's first row


def by_name(given: Sequence[str]) -> dict[str, str]:
    """Parses MODEL or NAME=MODEL into name -> model. UserError for duplicate names."""
    models: dict[str, str] = {}
    for text in given:
        name, _, model = text.rpartition("=")
        if (name or model) in models:
            raise UserError(f"two models are named {name or model!r}: rename one with NAME=MODEL")
        models[name or model] = model
    return models


def check(
    models: Mapping[str, str | Path],
    images: str | Path,
    prompts: int,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    judge: str | Path | None,
) -> tuple[int, int]:
    """Checks the arguments of `evaluate`; returns the models' (width, height) in pixels.

    UserError for an unknown model, different sizes, a folder without prepared images, and so on.
    """
    from koala.data.illustrations.images import shards_at

    if not models or REAL in models:
        raise UserError(f"models {list(models)}: give at least one, and call none {REAL!r}")
    if prompts < 2:
        raise UserError(f"prompts {prompts}: a distance needs at least 2")
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds {list(seeds)}: give different whole numbers from 0, such as 0 1 2")
    validation.numbers(steps, guidance)
    if judge is not None and not Path(judge).is_file():
        raise UserError(f"the judge {judge} does not exist: leave it out to train one")
    shards_at(images)
    sizes = {}
    for name, model in models.items():
        side = unet_architecture(resolve_model(model)).sample * FACTOR
        sizes[name] = (side, side)
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {named(size)}" for name, size in sizes.items())
        raise UserError(f"the models have different sizes ({found}): evaluate each size separately")
    return next(iter(sizes.values()))


def named(size: tuple[int, int]) -> str:
    """A size as WIDTHxHEIGHT."""
    return f"{size[0]}x{size[1]}"
