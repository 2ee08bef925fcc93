"""Configurations of runs: frozen dataclasses, one per kind of run."""

from dataclasses import dataclass

from koala.distillation.settings import PLAIN, Hardware, Training
from koala.distillation.tasks import DistillationSettings
from koala.mini.settings import Autoencoder, Base, Tiny
from koala.recipes.previews import MINI_PROMPTS


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
    """A U-Net cut from the teacher's, then distilled."""

    cut: str
    training: Training
    settings: DistillationSettings
    mixture: Mixture
    hardware: Hardware = PLAIN
    teacher: str | None = None  # the default for --teacher
    of: str = "sdxl-mini"  # the teacher's architecture, for dry runs without the teacher
    pixels: int | None = None  # side of the square bucket; other data are rejected
    prompts: tuple[str, ...] = MINI_PROMPTS  # of previews


Recipe = Base | Autoencoder | Teacher | Student | Tiny
ALONE = (Base, Autoencoder, Tiny)  # train in one process, without `Hardware`
