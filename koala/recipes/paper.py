"""The paper's runs, one row each, and versions of them for one smaller GPU.

Every row trains a student cut out of an SDXL by L_task + L_outKD + L_featKD (weights 1/1/1) with
AdamW at a constant 1e-5 (KOALA, appendix A). Which row makes which table of the paper:

    koala-turbo-*, koala-lightning-*   the final models
    koala-1b, koala-700m               the first models (25 steps); the teacher study's SDXL-Base;
                                       the data study: --data chooses the set
    study-turbo, study-lightning       the teacher study's other teachers
    ablation-*                         location, stage and depth rule of the features, at equal cost
    bk-sdxl-sa                         self-attention distillation on BK-SDXL's student
    *-24gb, *-12gb, *-8gb              one GPU with that much memory, fewer samples; *-8gb a
                                       smaller student: the state of 700M alone takes 7.3 GiB

Where the paper is silent, or we deviate:

- EMA: none is mentioned. Here the exported weights are an average whose half-life is a fiftieth of
  the run. Caption dropout: none is mentioned. Here 0.1, for classifier-free guidance.
- Loss weights: none are stated; 1/1/1 is our reading of the formula.
- The paper trains in fp16, we under bf16 autocast, whose range no feature exceeds.
- Prompts beyond 77 tokens, as most of LAION-POP's are: the paper does not say; here a
  random selection of whole sentences that fit is shown (`koala.data.captions`).
- The students of ablations and of the teacher study are not taken from the paper: KOALA-1B for the
  ablations, since it alone has a mid block, KOALA-700M for the teachers. Neither are the samples
  of the first models: they are the studies'.
- Betas, weight decay and clipping are those of diffusers' SDXL fine-tuning script, which the
  authors built on; no warm-up, as there.
- *-24gb, *-12gb and *-8gb see 3.2 M samples, not 64 M: what one GPU does in weeks, not a year.

Importing this module is cheap.
"""

from __future__ import annotations

from typing import NamedTuple

from koala.distillation.settings import DistillationSettings, Hardware, Training
from koala.recipes.overrides import taps_of
from koala.recipes.recipe import Mixture, Student


class Preset(NamedTuple):
    """A row of the table."""

    cut: str
    teacher: str  # key of TEACHERS
    pixels: int  # side of the square bucket
    steps: int  # thousands
    batch: int
    taps: str  # as `koala.recipes.overrides.taps_of` reads them; "" is L_task alone
    hardware: str  # key of HARDWARE
    depth_rule: str = "bottom"


TEACHERS = {  # of SDXL's own architecture, all
    "base": "stabilityai/stable-diffusion-xl-base-1.0",
    "turbo": "stabilityai/sdxl-turbo",
    "lightning": "ByteDance/SDXL-Lightning/sdxl_lightning_4step.safetensors",
}
# How a process's share of the batch is divided: on the cards that the paper had (four A100 of 80 GB
# for the long runs, one for the ablations), or on one smaller card. `--dry-run` says what fits on
# other cards and other numbers of them.
HARDWARE = {
    "at once": Hardware(compile="inductor"),
    "in 2": Hardware(accumulate=2, compile="inductor"),
    "in 4": Hardware(accumulate=4, compile="inductor"),
    "in 8": Hardware(accumulate=8, compile="inductor"),
    "24 GB": Hardware(accumulate=8, checkpointing=True, ema_on_cpu=True),
    "12 GB": Hardware(
        accumulate=32, checkpointing=True, ema_on_cpu=True, teacher="offloaded", stored_text=True
    ),
}
HARDWARE["8 GB"] = HARDWARE["12 GB"]  # for a smaller student
EIGHT_BIT = ("24 GB", "12 GB", "8 GB")  # with AdamW's moments in 8 bits
SMALLER = "0,1,2,no-mid"  # depths of a student that 8 GB can train: 440 M parameters

_BEST = "sa+lf@DW-1,UP-3"
_SPREAD, _UPPER = ("sa", "in 4", "interleave"), ("sa", "in 4", "up")  # depth rules of their own
_DW, _UP = "sa@DW-2,DW-3", "sa@UP-1,UP-2"
# fmt: off
_ROWS: tuple[tuple, ...] = (
    # name                       cut           teacher        px    K  batch taps       hardware
    ("koala-turbo-1b",            "koala-1b",   "turbo",      512, 500, 128, _BEST,      "in 2"),
    ("koala-turbo-700m",          "koala-700m", "turbo",      512, 500, 128, _BEST,      "at once"),
    ("koala-lightning-1b",        "koala-1b",   "lightning", 1024, 500, 128, _BEST,      "in 4"),
    ("koala-lightning-700m",      "koala-700m", "lightning", 1024, 500, 128, _BEST,      "in 4"),
    ("koala-1b",                  "koala-1b",   "base",      1024, 100, 128, _BEST,      "in 4"),
    ("koala-700m",                "koala-700m", "base",      1024, 100, 128, _BEST,      "in 4"),
    ("study-turbo",               "koala-700m", "turbo",      512, 100, 128, _BEST,      "at once"),
    ("study-lightning",           "koala-700m", "lightning", 1024, 100, 128, _BEST,      "in 4"),
    ("bk-sdxl-sa",                "bk-sdxl",    "base",      1024,  30,  32, _BEST,      "in 8"),
    ("ablation-task",             "koala-1b",   "base",      1024,  30,  32, "",         "in 4"),
    ("ablation-sa",               "koala-1b",   "base",      1024,  30,  32, "sa",       "in 4"),
    ("ablation-ca",               "koala-1b",   "base",      1024,  30,  32, "ca",       "in 4"),
    ("ablation-ffn",              "koala-1b",   "base",      1024,  30,  32, "ffn",      "in 4"),
    ("ablation-residual",         "koala-1b",   "base",      1024,  30,  32, "residual", "in 4"),
    ("ablation-lf",               "koala-1b",   "base",      1024,  30,  32, "lf",       "in 4"),
    ("ablation-sa-lf",            "koala-1b",   "base",      1024,  30,  32, _BEST,      "in 4"),
    ("ablation-sa-lf-all",        "koala-1b",   "base",      1024,  30,  32, "sa+lf",    "in 4"),
    ("ablation-sa-dw",            "koala-1b",   "base",      1024,  30,  32, _DW,        "in 4"),
    ("ablation-sa-mid",           "koala-1b",   "base",      1024,  30,  32, "sa@Mid",   "in 4"),
    ("ablation-sa-up",            "koala-1b",   "base",      1024,  30,  32, _UP,        "in 4"),
    ("ablation-interleave",       "koala-1b",   "base",      1024,  30,  32, *_SPREAD),
    ("ablation-upper",            "koala-1b",   "base",      1024,  30,  32, *_UPPER),
    ("koala-lightning-700m-24gb", "koala-700m", "lightning", 1024, 100,  32, _BEST,      "24 GB"),
    ("koala-lightning-700m-12gb", "koala-700m", "lightning", 1024, 100,  32, _BEST,      "12 GB"),
    ("koala-turbo-700m-12gb",     "koala-700m", "turbo",      512, 100,  32, _BEST,      "12 GB"),
    ("koala-lightning-440m-8gb",  SMALLER,      "lightning", 1024, 100,  32, _BEST,      "8 GB"),
    ("koala-turbo-440m-8gb",      SMALLER,      "turbo",      512, 100,  32, _BEST,      "8 GB"),
)
# fmt: on
PRESETS = {name: Preset(*row) for name, *row in _ROWS}
PROMPTS = (  # of previews: some that the paper calls hard for such models, some easy
    "a portrait photo of a golden retriever",
    "a bowl of ramen on a wooden table, steam rising, soft window light",
    "an old lighthouse on a cliff, storm clouds, oil painting",
    "a red cube on top of a blue sphere",
    "a street market at night, neon signs, rain on the ground",
    "a hand holding a pencil, close-up",
    "a watercolour of a fox asleep in autumn leaves",
    'a shop window with the word "koala" painted on it',
)


def student(name: str) -> Student:
    """The recipe of a row of the table."""
    row = PRESETS[name]
    samples = 1000 * row.steps * row.batch
    weight = 1.0 if row.taps else 0.0  # of both terms that need the teacher
    return Student(
        cut=row.cut,
        training=Training(
            samples=samples,
            batch=row.batch,
            lr=1e-5,
            optimizer="adamw-8bit" if row.hardware in EIGHT_BIT else "adamw",
            betas=(0.9, 0.999),
            ema_half_life=samples // 50,
            log_every=100 * row.batch,
            validate_every=samples // 100,
            preview_every=samples // 100,
            save_every=1800.0,
            keep_every=samples // 5,
        ),
        settings=DistillationSettings(
            output_weight=weight,
            feature_weight=weight,
            taps=taps_of(row.taps),
            depth_rule=row.depth_rule,
        ),
        mixture=Mixture(),
        hardware=HARDWARE[row.hardware],
        teacher=TEACHERS[row.teacher],
        of="sdxl",
        pixels=row.pixels,
        prompts=PROMPTS,
    )
