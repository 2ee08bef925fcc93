"""Students in few steps, at full size: KOALA's own weights taught to draw without guidance.

Every row trains a copy of the authors' published KOALA, its own teacher, by `StepSettings`: the
student draws in its few steps what the teacher draws in ten guided ones. `--teacher` takes any
other model; `--student` goes on from weights that are not the teacher's.

    koala-lightning-*-4step      four steps
    koala-lightning-700m-1step   one step; `--student` is best a model in four steps
    *-24gb                       one GPU with that much memory, fewer samples

KOALA has no such recipe. From the commands of DMD2's SDXL (2405.14867; github.com/tianweiy/DMD2)
are taken: five updates of the critic to one of the student, AdamW at 5e-7 for both, batches of 128,
and the number of the critic's updates, 19,000 for four steps and 24,000 for one. Ours are the
teacher's guidance of 3.5 (8 there), as KOALA is drawn, and no adversarial loss. None of these
recipes has been trained yet.

Importing this module is cheap.
"""

from __future__ import annotations

from typing import NamedTuple

from koala.distillation.settings import Hardware, StepSettings, Training
from koala.recipes.paper import PROMPTS
from koala.recipes.recipe import Mixture, Student

GUIDANCE = 3.5  # of the teacher, as KOALA is drawn
CRITIC_UPDATES = 5


class Preset(NamedTuple):
    """A row of the table."""

    of: str  # the architecture, teacher's and student's
    teacher: str
    steps: int
    updates: int  # of the critic; the student's follow every `CRITIC_UPDATES` of them
    batch: int
    hardware: Hardware
    optimizer: str = "adamw"  # of both networks


_8_BIT = "adamw-8bit"
_700M, _1B = "etri-vilab/koala-lightning-700m", "etri-vilab/koala-lightning-1b"
_IN_4, _IN_8 = (Hardware(accumulate=parts, compile="inductor") for parts in (4, 8))
_24_GB = Hardware(accumulate=16, checkpointing=True, ema_on_cpu=True)
# fmt: off
PRESETS = {
    # name                                        of     teacher steps updates batch hardware
    "koala-lightning-700m-4step":      Preset("koala-700m", _700M, 4, 19_000, 128, _IN_4),
    "koala-lightning-1b-4step":        Preset("koala-1b",   _1B,   4, 19_000, 128, _IN_8),
    "koala-lightning-700m-1step":      Preset("koala-700m", _700M, 1, 24_000, 128, _IN_4),
    "koala-lightning-700m-4step-24gb": Preset("koala-700m", _700M, 4, 20_000, 16, _24_GB, _8_BIT),
}
# fmt: on


def student(name: str) -> Student:
    """The recipe of a row of the table."""
    row = PRESETS[name]
    samples = row.updates // CRITIC_UPDATES * (CRITIC_UPDATES + 1) * row.batch
    return Student(
        cut=None,
        training=Training(
            samples=samples,
            batch=row.batch,
            lr=5e-7,
            critic_lr=5e-7,
            critic_updates=CRITIC_UPDATES,
            optimizer=row.optimizer,
            betas=(0.9, 0.999),
            ema_half_life=samples // 50,
            log_every=60 * row.batch,
            preview_every=samples // 100,
            save_every=1800.0,
            keep_every=samples // 5,
        ),
        settings=StepSettings("dmd", row.steps, GUIDANCE),
        mixture=Mixture(),
        hardware=row.hardware,
        teacher=row.teacher,
        of=row.of,
        pixels=1024,
        prompts=PROMPTS,
    )
