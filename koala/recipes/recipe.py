"""What a run's configuration is: frozen dataclasses, one a kind of run."""

from dataclasses import dataclass

from koala.distillation.settings import PLAIN, Hardware, Training
from koala.distillation.tasks import DistillationSettings
from koala.mini.settings import Autoencoder, MiniBase, Tiny
from koala.recipes.previews import MINI_PROMPTS


@dataclass(frozen=True)
class Mixture:
    """What a U-Net is shown: copies of each kind in an epoch, weights of the caption columns.

    None: everything once; the only column there is.
    """

    kinds: dict[str, int] | None = None
    captions: dict[str, float] | None = None


@dataclass(frozen=True)
class Teacher:
    """A U-Net by L_task: from nothing, or `further` from the U-Net of the model given."""

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
    teacher: str | None = None  # the model to learn from where --teacher names none
    of: str = "sdxl-mini"  # architecture of a teacher that is not here, for a dry run
    pixels: int | None = None  # side of the square bucket; data of another size are refused
    prompts: tuple[str, ...] = MINI_PROMPTS  # of previews


Recipe = MiniBase | Autoencoder | Teacher | Student | Tiny
ALONE = (MiniBase, Autoencoder, Tiny)  # train in one process, without settings of hardware
