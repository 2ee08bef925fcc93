"""The mini family's runs, sized for two CPU cores, from images to student in an afternoon.

Images are 128 x 128 pixels, so latents are 16 x 16; the set is `illustrations-small`. The VAE,
the text encoders and the teacher's first part are trained on the same set at 64 pixels, where a
sample costs a quarter: the look of an 8 x 8 patch and the meaning of words are much the same. Then
the VAE is trained further at 128.
"""

from dataclasses import replace

from koala.distillation.settings import DistillationSettings, StepSettings, Training
from koala.mini.settings import Autoencoder, Base, Tiny
from koala.recipes.recipe import Mixture, Student, Teacher

# Other captions than the short one keep the model from depending on one form of words.
CAPTIONS = {"short": 0.45, "subject": 0.15, "long": 0.15, "everyday": 0.25}

# What things look like is learnt from single drawings: 74 % of the samples are emoji, 7 % painted
# ones, 5 % icons, 14 % scenes.
SINGLE = Mixture(kinds={"emoji": 44, "painted": 1, "icon": 2, "scene": 1}, captions=CAPTIONS)

# Colours, numbers and places besides: 55 % emoji, 11 % painted ones, 12 % icons, 22 % scenes.
MIXTURE = Mixture(kinds={"emoji": 20, "painted": 1, "icon": 3, "scene": 1}, captions=CAPTIONS)

SHOWN = {"emoji": 6, "painted": 1, "icon": 1, "scene": 1}  # to the VAE; captions do not matter

SELF_ATTENTION = DistillationSettings(feature_weight=0.05, normalise=True, min_snr=1.0)


def mini_base() -> Base:
    """The VAE and the text encoders."""
    return Base(
        kinds=SHOWN,
        vae=Training(
            samples=112_000, batch=8, lr=1.5e-3, warmup=1_600, decay=True,
            ema_half_life=1_000, log_every=800, preview_every=16_000,
        ),
        decoder=Training(
            samples=44_000, batch=8, lr=1e-3, warmup=800, decay=True,
            ema_half_life=1_000, log_every=800, preview_every=16_000,
        ),
        text=Training(
            samples=64_000, batch=128, lr=1e-3, warmup=2_560, decay=True, weight_decay=0.0,
            ema_half_life=4_000, log_every=2_560,
        ),
    )  # fmt: skip


def mini_vae() -> Autoencoder:
    """The VAE, trained further at 128 pixels, with noisy latents like those of a U-Net.

    Noise alone turns the latents into a code that only this decoder understands: 40 % of their
    variance above 6 cycles per side (7 % before), and a U-Net learns them half as well. The colour
    term keeps three channels smooth (`docs/log.md`).
    """
    return Autoencoder(
        kinds=SHOWN,
        training=Training(
            samples=16_000, batch=8, lr=5e-4, warmup=400, decay=True, weight_decay=0.0,
            ema_half_life=400, log_every=400, preview_every=1_600,
        ),
        perceptual=1.0,
        drift=0.5,
        colour=0.5,
    )  # fmt: skip


def sdxl_mini_64() -> Teacher:
    """The teacher's first part, at 64 pixels: learns what things are at a quarter of the cost.

    Most single things that it draws there it draws at 128 pixels after 77,000 samples more. At 128
    pixels alone things new to it were still blobs after 128,000 (`docs/log.md`).

    min-SNR with gamma 1 limits the weight of clean timesteps: shapes are decided at the noisy half
    of the timesteps, which a plain mean weighs lightly.
    """
    return Teacher(
        architecture="sdxl-mini",
        training=Training(
            samples=512_000, batch=64, lr=1e-3, warmup=6_400,
            ema_half_life=20_000, preview_every=64_000, keep_every=128_000,
        ),
        caption_dropout=0.1,
        mixture=SINGLE,
        min_snr=1.0,
    )  # fmt: skip


def sdxl_mini_128() -> Teacher:
    """The teacher's second part, from `sdxl-mini-64`, at full size: most of its training.

    The learning rate is constant, so this part may be as long as time permits.
    """
    return _further(samples=2_560_000, decay=False, seed=1)


def sdxl_mini() -> Teacher:
    """The teacher, from `sdxl-mini-128`, with the learning rate decaying to zero."""
    return _further(samples=1_024_000, decay=True, seed=2)


def koala_mini_first() -> Student:
    """The student's first part: L_task + L_outKD + L_featKD on SA everywhere, LF at DW-1 and UP-3.

    Deviations from the paper: 592,000 samples with `koala-mini` (64 M there), each part at lr
    1.4e-3 decaying to zero (1e-5 constant), since the model has 4.8 M parameters and trains for
    minutes; min-SNR in L_task, as for its teacher. Each tap's error is divided by the teacher
    feature's mean square (LAPTOP-Diff), so that no tap dominates by its scale, and their sum is
    weighted to be about as large as L_outKD at the end: at full weight it dominated the loss and
    made results worse (`docs/log.md`). The paper's plain sum has not been tried here.
    """
    return _student(SELF_ATTENTION, samples=192_000, batch=64, lr=1.4e-3)


def koala_mini() -> Student:
    """The student, trained further from `koala-mini-first` (`--student`), with other noise."""
    first = koala_mini_first()
    training = replace(first.training, samples=400_000, preview_every=40_000, seed=4)
    return replace(first, training=training)


def koala_mini_guided() -> Student:
    """The student of a guided teacher, from `koala-mini` (`--student`): half the passes a step.

    L_outKD alone, weighted by min-SNR as L_task is in the rest of the family.
    """
    return _student(
        DistillationSettings(
            task_weight=0.0, feature_weight=0.0, taps=(), min_snr=1.0, min_snr_out=True,
            guidance=3.5, steps=4, caption_dropout=0.0,
        ),
        samples=96_000, batch=64, lr=7e-4,
    )  # fmt: skip


def sdxl_mini_lightning() -> Student:
    """The teacher, step-distilled: what the paper's third lesson takes for a teacher."""
    return _few_steps(samples=96_000)


def koala_mini_lightning() -> Student:
    """The student in few steps without guidance, its own teacher (`--teacher koala-mini`).

    `--student` is the `koala-mini-guided` of that teacher, which already draws without guidance.
    """
    return _few_steps(samples=192_000)


def koala_mini_sa() -> Student:
    """`koala-mini-first` with the controls' number of samples, to compare the losses."""
    return _student(SELF_ATTENTION)


def koala_mini_task() -> Student:
    """Control: the student of `koala-mini-sa`, L_task alone."""
    return _student(
        DistillationSettings(output_weight=0.0, feature_weight=0.0, taps=(), min_snr=1.0)
    )


def koala_mini_task_out() -> Student:
    """Control: the student of `koala-mini-sa`, L_task + L_outKD."""
    return _student(DistillationSettings(feature_weight=0.0, taps=(), min_snr=1.0))


def tiny_mini() -> Tiny:
    """The tiny autoencoder of any model's VAE: small batches, many steps."""
    return Tiny(
        kinds=MIXTURE.kinds,
        training=Training(
            samples=32_000, batch=8, lr=2e-3, warmup=400, decay=True, weight_decay=0.0,
            ema_half_life=1_000, log_every=800, preview_every=8_000,
        ),
    )  # fmt: skip


def _further(samples: int, decay: bool, seed: int) -> Teacher:
    return Teacher(
        architecture="sdxl-mini",
        training=Training(
            samples=samples, batch=64, lr=1e-3, warmup=6_400, decay=decay, seed=seed,
            ema_half_life=20_000, preview_every=64_000, keep_every=128_000,
        ),
        caption_dropout=0.1,
        mixture=MIXTURE,
        min_snr=1.0,
        further=True,
    )  # fmt: skip


def _few_steps(samples: int) -> Student:
    """A student of its own size, in four steps, each taught by three guided ones of the teacher.

    It keeps R@5, which guided distillation alone loses; ten minutes of DMD or MMD lost more
    (`docs/log.md`).
    """
    training = Training(
        samples=samples, batch=64, lr=5e-4, warmup=640, decay=True,
        ema_half_life=2_000, preview_every=9_600,
    )  # fmt: skip
    settings = StepSettings("progressive", steps=4, guidance=3.5, substeps=3)
    return Student(cut=None, training=training, settings=settings, mixture=MIXTURE)


def _student(
    settings: DistillationSettings, samples: int = 24_000, batch: int = 32, lr: float = 1e-3
) -> Student:
    training = Training(
        samples=samples, batch=batch, lr=lr, warmup=640, decay=True,
        ema_half_life=2_000, preview_every=8_000,
    )  # fmt: skip
    return Student(cut="koala-700m", training=training, settings=settings, mixture=MIXTURE)
