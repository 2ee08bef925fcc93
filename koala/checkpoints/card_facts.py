"""What a model card says of a model, as records: its origin, its making, its evaluation.

`koala.checkpoints.model_card` reads and writes them, `koala.checkpoints.card_text` tells them.
"""

from dataclasses import dataclass, field
from typing import Any

from koala.utils.counted import counted


@dataclass(frozen=True)
class Licence:
    """A model's licence, in the Hub's terms."""

    identifier: str = "unknown"  # in the Hub's list; "other" with a name and a link
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Compressed:
    """How `koala compress` made the U-Net."""

    teacher: str
    teacher_architecture: str
    teacher_parameters: int
    architecture: str
    parameters: int
    inherited: int  # teacher tensors that the student inherits
    dropped: int  # teacher tensors that it does not inherit
    depth_rule: str
    predicts: str = "epsilon"  # "v" for v-prediction, with ", zero terminal SNR" if so


@dataclass(frozen=True)
class Pruned:
    """What `koala compress --prune` did to the U-Net."""

    model: str
    before: int  # parameters
    after: int
    prompts: int  # that it was calibrated on
    latents: int = 0  # prepared ones that it was calibrated on, in place of prompts


@dataclass(frozen=True)
class Quantised:
    """What `koala convert --weights` did to the U-Net."""

    model: str
    weights: str  # how they are stored
    prompts: int = 0  # that the rounding was calibrated on
    latents: int = 0  # prepared ones that it was calibrated on, in place of prompts


def calibrated_on(prompts: int, latents: int) -> str:
    """What was drawn or read for a calibration, in words; "" without one."""
    if latents:
        return counted(latents, "prepared latent")
    return counted(prompts, "prompt") if prompts else ""


@dataclass(frozen=True)
class Assembled:
    """What a model was put together from, `koala.lora.assembly`."""

    unet: str
    base: str | None  # of what the U-Net's file lacks
    vae: str | None
    loras: list[str]  # merged: name:scale


@dataclass(frozen=True)
class Trained:
    """What `koala distill` or `koala finetune` did."""

    recipe: str  # its name
    settings: dict[str, Any]  # the whole recipe
    samples: dict[str, int]  # what was trained -> samples it has seen
    data: dict[str, Any]  # "pictures" to train on, and what the prepared folder says of itself
    teacher: str | None  # of its VAE and text encoders; None: trained from scratch
    distilled: bool  # some loss compares with that teacher
    student: str | None = None  # whose U-Net it went on from; None: the teacher's, cut
    before: int = 0  # samples that student had seen, according to its card
    further: str | None = None  # whose U-Net a teacher went on from; None: a new one
    grown: bool = False  # that U-Net was a cut and was grown, `koala.checkpoints.grow`
    tuned: bool = False  # by `koala finetune`, from the U-Net of `teacher` itself


@dataclass(frozen=True)
class Evaluated:
    """What `koala evaluate` measured."""

    table: str  # Markdown: the real images' row and the model's
    settings: dict[str, Any]
    hardware: str


@dataclass(frozen=True)
class ModelCard:
    """All that is known of a model; None: unknown."""

    title: str
    licence: Licence = field(default_factory=Licence)
    base_model: str | None = None  # Hub id of the model that it derives from
    cut: Compressed | None = None
    trained: Trained | None = None
    evaluated: Evaluated | None = None
    ours: bool = True  # False: not written by koala
    assembled: Assembled | None = None
    pruned: Pruned | None = None
    quantised: Quantised | None = None


SECTIONS = {  # fields of `ModelCard` that are records of their own
    "cut": Compressed,
    "assembled": Assembled,
    "trained": Trained,
    "evaluated": Evaluated,
    "pruned": Pruned,
    "quantised": Quantised,
}
