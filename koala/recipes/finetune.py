"""Fine-tuning: recipes of `koala finetune`, which trains any model's U-Net by L_task alone.

    full         the whole U-Net, on a data set
    lora         a LoRA, on a data set: a style, many subjects
    dreambooth   a LoRA, on about ten pictures of one subject (Ruiz et al., arXiv 2208.12242)

Learning rates, batches and ranks are those that diffusers' scripts for SDXL use; none has been
tuned for KOALA. Class images, DreamBooth's prior preservation, are more images in the data: with
as many of them as of the subject, in an epoch, their loss has the paper's weight of 1.

Importing this module is cheap.
"""

from koala.distillation.settings import Hardware, Training
from koala.lora.training import LoraSettings
from koala.recipes.recipe import Finetune

_ONE_AT_ONCE = Hardware(accumulate=4, checkpointing=True)


def full() -> Finetune:
    """The whole U-Net: 2,000 steps of 16."""
    training = Training(
        samples=32_000, batch=16, lr=1e-5, betas=(0.9, 0.999),
        ema_half_life=1_600, log_every=160, preview_every=1_600, save_every=1_800.0, keep=1,
    )  # fmt: skip
    hardware = Hardware(accumulate=16, checkpointing=True, ema_on_cpu=True)
    return Finetune(training, lora=None, hardware=hardware)


def lora() -> Finetune:
    """A LoRA of rank 16 in the transformers: 2,000 steps of 4."""
    training = Training(
        samples=8_000, batch=4, lr=1e-4, betas=(0.9, 0.999),
        ema_half_life=400, log_every=40, preview_every=800, save_every=120.0, keep=1,
    )  # fmt: skip
    return Finetune(training, LoraSettings(), hardware=_ONE_AT_ONCE)


def dreambooth() -> Finetune:
    """A LoRA of one subject: 300 steps of 4, the caption never dropped."""
    training = Training(
        samples=1_200, batch=4, lr=1e-4, betas=(0.9, 0.999),
        ema_half_life=60, log_every=40, preview_every=200, save_every=120.0, keep=1,
    )  # fmt: skip
    return Finetune(training, LoraSettings(), caption_dropout=0.0, hardware=_ONE_AT_ONCE)
