"""The mini family's runs, sized for two CPU cores, from pictures to student in an afternoon.

Pictures are 128 x 128 pixels, so latents are 16 x 16; the set is `illustrations-small`. The VAE,
the text side and the teacher's first part learn from the same set at 64 pixels, where a sample
costs a quarter: what an 8 x 8 patch looks like and what words mean is much the same. Then the VAE
goes on at 128.
"""

from dataclasses import replace

from koala.distillation.settings import DistillationSettings, Training
from koala.mini.settings import Autoencoder, MiniBase, Tiny
from koala.recipes.recipe import Mixture, Student, Teacher

# Of the samples 42 % are emoji, 15 % painted ones, 12 % icons, 31 % scenes. Other captions than the
# short one keep the model from depending on one form of words.
MIXTURE = Mixture(
    kinds={"emoji": 11, "painted": 1, "icon": 2, "scene": 1},
    captions={"short": 0.45, "subject": 0.15, "long": 0.15, "everyday": 0.25},
)

SHOWN = {"emoji": 6, "painted": 1, "icon": 1, "scene": 1}  # to the VAE; captions do not matter

SELF_ATTENTION = DistillationSettings(feature_weight=0.05, normalise=True, min_snr=1.0)


def mini_base() -> MiniBase:
    """The VAE and the text side."""
    return MiniBase(
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
    """The VAE, going on at 128 pixels, with latents as rough as a U-Net draws them.

    Noise alone makes a code of the latents, which nothing but this decoder understands: 40 % of
    their variance at more than 6 cycles a side, 7 % before, and a U-Net learns them half as well.
    The pull towards colour keeps three channels smooth (`docs/log.md`).
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
    """The teacher's first part, on pictures of 64 pixels: what things are, at a third of the cost.

    SNR of at least 1 counts alike (min-SNR with gamma 1): shapes are decided at the noisy half
    of the timesteps, which a plain mean weighs lightly.
    """
    return Teacher(
        architecture="sdxl-mini",
        training=Training(
            samples=512_000, batch=64, lr=1e-3, warmup=6_400,
            ema_half_life=20_000, preview_every=64_000, keep_every=128_000,
        ),
        caption_dropout=0.1,
        mixture=MIXTURE,
        min_snr=1.0,
    )  # fmt: skip


def sdxl_mini_128() -> Teacher:
    """The teacher's second part, from `sdxl-mini-64` on, at its own size: most of what it learns.

    The rate is constant, so that the part may be as long as there is time for.
    """
    return _further(samples=2_560_000, decay=False, seed=1)


def sdxl_mini() -> Teacher:
    """The teacher, from `sdxl-mini-128` on, its rate falling to zero."""
    return _further(samples=1_024_000, decay=True, seed=2)


def koala_mini_first() -> Student:
    """The student's first part: L_task + L_outKD + L_featKD on SA everywhere, LF at DW-1 and UP-3.

    Deviations from the paper: 592,000 samples with `koala-mini` (64 M there), each part at lr
    1.4e-3 falling to zero (1e-5 constant), since the model has 4.8 M parameters and is given
    minutes; min-SNR in L_task, as its teacher learnt. Each tap's error is divided by the teacher
    feature's mean square (LAPTOP-Diff), so that no tap counts for more by its scale, and their sum
    is weighted so that it is about as large as L_outKD at the end: at full weight it led the loss
    and cost more than it brought (`docs/log.md`). The paper's plain sum has not been tried here.
    """
    return _student(SELF_ATTENTION, samples=192_000, batch=64, lr=1.4e-3)


def koala_mini() -> Student:
    """The student, going on from `koala-mini-first` (`--student`): other noise."""
    first = koala_mini_first()
    training = replace(first.training, samples=400_000, preview_every=40_000, seed=4)
    return replace(first, training=training)


def koala_mini_sa() -> Student:
    """`koala-mini-first` in as many samples as the controls: what the losses are compared by."""
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
    """The tiny autoencoder, from the VAE of any model of the family: small batches, many steps."""
    return Tiny(
        kinds=MIXTURE.kinds,
        training=Training(
            samples=8_000, batch=8, lr=2e-3, warmup=400, decay=True, weight_decay=0.0,
            ema_half_life=400, log_every=400, preview_every=2_000,
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


def _student(
    settings: DistillationSettings, samples: int = 24_000, batch: int = 32, lr: float = 1e-3
) -> Student:
    training = Training(
        samples=samples, batch=batch, lr=lr, warmup=640, decay=True,
        ema_half_life=2_000, preview_every=8_000,
    )  # fmt: skip
    return Student(cut="koala-700m", training=training, settings=settings, mixture=MIXTURE)
