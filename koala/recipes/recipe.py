"""What a run's configuration is: frozen dataclasses, one a kind of run. Loads nothing heavy."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from koala.distillation.settings import (
    PLAIN,
    DistillationSettings,
    Hardware,
    StepSettings,
    Training,
)
from koala.lora.training import LoraSettings
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
    """A U-Net's training data."""

    kinds: dict[str, int] | None = None  # copies of each kind in an epoch; none: everything once
    captions: dict[str, float] | None = None  # weights of the caption columns; none: the only one


@dataclass(frozen=True)
class Teacher:
    """A U-Net trained by L_task: from scratch, or `further` from the given model's U-Net."""

    architecture: str  # `koala architectures` lists them
    training: Training
    caption_dropout: float  # share of samples without a caption, for guidance
    mixture: Mixture
    min_snr: float | None  # gamma of min-SNR weights; none: timesteps are equal
    further: bool = False  # go on from the given model's U-Net, grown if it is a cut
    hardware: Hardware = PLAIN


@dataclass(frozen=True)
class Student:
    """A U-Net cut from the teacher's, then distilled; or a student taught to draw in few steps."""

    cut: str | None  # koala-700m, koala-1b, bk-sdxl, depths as 0,2,4,no-mid; none: as the teacher
    training: Training
    settings: DistillationSettings | StepSettings
    mixture: Mixture
    hardware: Hardware = PLAIN
    teacher: str | None = None  # the default for --teacher
    of: str = "sdxl-mini"  # the teacher's architecture, for dry runs without the teacher
    pixels: int | None = None  # side of the square bucket; other data are rejected
    prompts: tuple[str, ...] = MINI_PROMPTS  # of previews


@dataclass(frozen=True)
class Finetune:
    """A model's U-Net trained further by L_task: whole, or as a LoRA."""

    training: Training
    lora: LoraSettings | None  # None: the whole U-Net
    caption_dropout: float = 0.1  # share of samples without a caption, for guidance
    min_snr: float | None = None  # gamma of min-SNR weights; none: timesteps are equal
    mixture: Mixture = Mixture()
    hardware: Hardware = PLAIN
    pixels: int | None = None  # side of the square bucket; other data are rejected
    prompts: tuple[str, ...] = ()  # of previews; (): captions of the data


@dataclass(frozen=True)
class Custom:
    """A recipe with parts of one's own in the place of koala's; docs/own.md has one of each.

    task: a subclass of `koala.distillation.tasks.Distillation`.
    optimizer: (parameters, `Training`) -> torch's optimiser; its state must be tensors. The loop
      sets the learning rate before each step.
    data: (the folder given as --data, the teacher's folder, the recipe) -> a stream of batches,
      `koala.distillation.loop.Data`; there is no validation then.
    """

    recipe: Student
    task: type | None = None
    optimizer: Callable[[list[Any], Training], Any] | None = None
    data: Callable[[str, Path, Student], Any] | None = None
    file: Path | None = None  # that it was read from

    def described(self) -> dict[str, Any]:
        """What a run's folder keeps of it."""
        parts = {name: getattr(self, name) for name in ("task", "optimizer", "data")}
        names = {name: part.__qualname__ for name, part in parts.items() if part is not None}
        digest = {} if self.file is None else {"file": sha256(self.file.read_bytes()).hexdigest()}
        return {**names, **digest}


Recipe = Base | Autoencoder | Teacher | Student | Finetune | Tiny
ALONE = (Base, Autoencoder, Tiny)  # train in one process, without `Hardware`


def described(recipe: Recipe) -> dict[str, Any]:
    """The configuration under its kind's name, for JSON."""
    return {type(recipe).__name__.lower(): asdict(recipe)}
