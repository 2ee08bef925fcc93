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
    sdxl-mini-lightning  the teacher in four steps                    sdxl-mini, latents
    koala-mini-lightning the student in four steps                    koala-mini, koala-mini-guided
    koala-mini-sa        koala-mini in 24,000 samples                   (for comparison)
    koala-mini-task      the same, L_task alone                       (a control)
    koala-mini-task-out  the same, L_task + L_outKD                   (a control)
    tiny-mini            a tiny autoencoder beside the VAE            any of them, latents

and at full size the paper's runs, one row each in `koala.recipes.paper`, and students in few steps,
one row each in `koala.recipes.few_steps`.

Importing this package is cheap; `koala.recipes.train` does the work.
"""

from collections.abc import Callable, Sequence

from koala.errors import unknown
from koala.recipes import few_steps, mini, paper
from koala.recipes.overrides import overridden
from koala.recipes.recipe import Recipe

MINI = (
    "mini-base",
    "mini-vae",
    "sdxl-mini-64",
    "sdxl-mini-128",
    "sdxl-mini",
    "koala-mini-first",
    "koala-mini",
    "koala-mini-guided",
    "sdxl-mini-lightning",
    "koala-mini-lightning",
    "koala-mini-sa",
    "koala-mini-task",
    "koala-mini-task-out",
    "tiny-mini",
)
NAMES = (*MINI, *paper.PRESETS, *few_steps.PRESETS)


def get(name: str) -> Recipe:
    """The recipe of that name; `UserError` lists the names."""
    if name not in NAMES:
        raise unknown("recipe", name, NAMES)
    if name in paper.PRESETS:
        return paper.student(name)
    if name in few_steps.PRESETS:
        return few_steps.student(name)
    recipe: Callable[[], Recipe] = getattr(mini, name.replace("-", "_"))
    return recipe()


def configured(recipe: str | Recipe, settings: Sequence[str] = ()) -> Recipe:
    """The recipe, its settings replaced by those given as "name=value"; UserError as there."""
    return overridden(get(recipe) if isinstance(recipe, str) else recipe, settings)
