"""What a run's configuration is: frozen dataclasses, one a kind of run. Loads nothing heavy."""

from dataclasses import asdict, dataclass
from typing import Any

from koala.distillation.settings import (
    PLAIN,
    DistillationSettings,
    Hardware,
    StepSettings,
    Training,
)
from koala.mini.settings import Autoencoder, Base, Tiny

MINI_PROMPTS = (  # of previews
    "a red apple, noto style",
    "a fox, flat twemoji style",
    "a rocket, 3d fluent style",
    "a dog, flat fluent style",
    "a blue bicycle, solid icon",
    "a sunflower, noto style",
    "a cat on a pale yellow background, flat twemoji style",
    "two green apples on a light blue background, noto style",
    "a car, flat twemoji style",
    "a steam train, noto style",
    "a whale to the left of a crab on a white background, flat fluent style",
    "three frogs on a mint green background, flat twemoji style",
    "a scarlet rabbit, solid icon",
    "a puppy",
    "a strawberry, flat fluent style",
    "a guitar, 3d fluent style",
)


@dataclass(frozen=True)
class Mixture:
    """A U-Net's training data: copies of each kind in an epoch, weights of the caption columns.

    None: everything once; the only column.
    """

    kinds: dict[str, int] | None = None
    captions: dict[str, float] | None = None


@dataclass(frozen=True)
class Teacher:
    """A U-Net trained by L_task: from scratch, or `further` from the given model's U-Net."""

    architecture: str
    training: Training
    caption_dropout: float
    mixture: Mixture
    min_snr: float | None = None  # as in `koala.distillation.tasks.Denoising`
    further: bool = False
    hardware: Hardware = PLAIN


@dataclass(frozen=True)
class Student:
    """A U-Net cut from the teacher's, then distilled; or a student taught to draw in few steps."""

    cut: str | None  # None: the teacher's own U-Net
    training: Training
    settings: DistillationSettings | StepSettings
    mixture: Mixture
    hardware: Hardware = PLAIN
    teacher: str | None = None  # the default for --teacher
    of: str = "sdxl-mini"  # the teacher's architecture, for dry runs without the teacher
    pixels: int | None = None  # side of the square bucket; other data are rejected
    prompts: tuple[str, ...] = MINI_PROMPTS  # of previews


Recipe = Base | Autoencoder | Teacher | Student | Tiny
ALONE = (Base, Autoencoder, Tiny)  # train in one process, without `Hardware`


def described(recipe: Recipe) -> dict[str, Any]:
    """The configuration under its kind's name, for JSON."""
    return {type(recipe).__name__.lower(): asdict(recipe)}
