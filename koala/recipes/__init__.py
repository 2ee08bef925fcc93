"""Recipes: functions that return the full configuration of a run. `koala distill NAME` runs one.

    name                 makes                                        of
    mini-base            VAE and text encoders of the mini family     prepared images
    mini-vae             the VAE, continued at 128 pixels             mini-base, images
    sdxl-mini-64         its SDXL U-Net, from scratch, at 64 pixels   mini-vae, latents
    sdxl-mini-128        the same, continued at 128 pixels            sdxl-mini-64, latents
    sdxl-mini            the same, completed                          sdxl-mini-128, latents
    koala-mini-first     the student, by self-attention distillation  sdxl-mini, latents
    koala-mini           the same, completed                          sdxl-mini, koala-mini-first
    koala-mini-guided    the same, drawn without guidance             sdxl-mini, koala-mini
    koala-mini-sa        koala-mini in 24,000 samples                   (for comparison)
    koala-mini-task      the same, L_task alone                       (a control)
    koala-mini-task-out  the same, L_task + L_outKD                   (a control)
    tiny-mini            a tiny autoencoder beside the VAE            any of them, latents

and the paper's runs at full size, one row each in `koala.recipes.paper`. Those of `koala finetune`
are in `koala.recipes.finetune`.

Importing this package is cheap; `koala.recipes.train` does the work.
"""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from koala.errors import UserError, unknown
from koala.recipes import finetune, mini, paper
from koala.recipes.overrides import overridden
from koala.recipes.recipe import Custom, Recipe, Student

MINI = (
    "mini-base",
    "mini-vae",
    "sdxl-mini-64",
    "sdxl-mini-128",
    "sdxl-mini",
    "koala-mini-first",
    "koala-mini",
    "koala-mini-guided",
    "koala-mini-sa",
    "koala-mini-task",
    "koala-mini-task-out",
    "tiny-mini",
)
NAMES = (*MINI, *paper.PRESETS)  # of `koala distill`
FINETUNES = ("full", "lora", "dreambooth")  # of `koala finetune`


def get(name: str, names: Sequence[str] = NAMES) -> Recipe:
    """The recipe of that name; `UserError` lists the `names`."""
    if name not in names:
        raise unknown("recipe", name, names)
    if name in paper.PRESETS:
        return paper.student(name)
    module = finetune if name in FINETUNES else mini
    recipe: Callable[[], Recipe] = getattr(module, name.replace("-", "_"))
    return recipe()


def configured(
    recipe: str | Recipe, settings: Sequence[str] = (), names: Sequence[str] = NAMES
) -> Recipe:
    """The recipe, its settings replaced by those given as "name=value"; UserError as there."""
    return overridden(get(recipe, names) if isinstance(recipe, str) else recipe, settings)


def from_file(file: Path) -> Custom:
    """The recipe that a Python file's function `recipe` returns; the file is run.

    UserError if there is no such file or function, it fails, or returns something else.
    """
    if not file.is_file():
        raise UserError(f"--recipe {file} does not exist: give a Python file with a recipe()")
    spec = spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"--recipe {file}: it must be a Python file, NAME.py")
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "recipe", None)):
            raise UserError("it must define recipe(), which returns a Student or a Custom")
        made = module.recipe()
    except Exception as error:
        where = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        line = f", line {where[-1].lineno}" if where else ""
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"--recipe {file}{line}: {kind}{error}") from error
    made = Custom(made) if isinstance(made, Student) else made
    if not (isinstance(made, Custom) and isinstance(made.recipe, Student)):
        raise UserError(
            f"--recipe {file}: recipe() returned {type(made).__name__}; it must be a Student, or a "
            "Custom with one"
        )
    return replace(made, file=file)
