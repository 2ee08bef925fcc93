"""Builds what a recipe of a U-Net trains: models, text encoders, task, validation samples."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from koala.architectures.config import unet_config
from koala.architectures.table import FACTOR, get
from koala.checkpoints.grow import grow
from koala.checkpoints.load import load_scheduler_config, load_unet
from koala.checkpoints.sampling import USUAL
from koala.checkpoints.validate import unet_architecture
from koala.data.latents import LatentSet
from koala.distillation.forward_process import NoiseSchedule
from koala.distillation.tasks import Denoising, Distillation, Encode
from koala.errors import UserError
from koala.generation.prompt_syntax import escaped
from koala.lora.training import add_lora
from koala.recipes.previews import drawing
from koala.recipes.recipe import MINI_PROMPTS, Finetune, Student, Teacher
from koala.recipes.tasks import student_task
from koala.text_conditioning import TextConditioner
from koala.utils.device import compute_dtype

GROUP = 8  # captions encoded at once; one by one each takes three times as long
CAPTION_CACHE = 2**31  # bytes of embeddings cached by a training on the CPU: the whole mini set's
VALIDATION_SAMPLES = 128
VALIDATION_SPLITS = ("test", "test-pair")  # the first one present
PREVIEWS = 8  # captions of the data that are drawn, if the recipe has no prompts

UNet = Teacher | Student | Finetune  # recipes of U-Nets


def validation_of(latents: LatentSet, recipe: UNet, model: Path) -> list[dict[str, Any]]:
    """Batches of held-out samples, a fixed choice from all buckets."""
    folder, captions = latents.index.files.folder, recipe.mixture.captions
    for split in VALIDATION_SPLITS:
        if len(latents.index.select(split)):
            there = LatentSet(folder, model, None, captions, recipe.training.seed, split=split)
            batches = there.stratified(VALIDATION_SAMPLES)
            there.close()
            return batches
    raise UserError(
        f"{folder} holds out no images for validation: prepare with a larger --held-out, or train "
        "without (--set training.validate_every=0)"
    )


def task_of(
    recipe: UNet,
    source: Path,
    start: Path,
    conditioner: TextConditioner,
    device: torch.device,
    encode: Encode | None,
    latents: LatentSet,
    kind: type[Distillation] = Distillation,
) -> Denoising:
    """The recipe's task.

    source: the folder of the teacher, or of the model that is fine-tuned. start: that of the
    student before distillation. encode: the VAE, if the data hold images. kind: of task, for a
    student.
    """
    if isinstance(recipe, Student):
        return student_task(
            recipe.settings,
            load_unet(start).to(device),
            load_unet(source),  # the task casts it and moves it to the device
            conditioner,
            load_scheduler_config(source),
            start,
            kind,
            draw=drawing(source, conditioner, device, recipe.settings.sampling or USUAL),
            prompts=recipe.prompts,
            encode=encode,
        )
    prompts: Sequence[str] = MINI_PROMPTS
    if isinstance(recipe, Teacher):
        unet = _teacher(recipe, source, latents.index.made_with["size"])
    else:
        unet = _finetuned(recipe, source, device)
        captions = dict.fromkeys(latents.batch(0, PREVIEWS)["captions"])
        prompts = recipe.prompts or tuple(map(escaped, captions))
    return Denoising(
        unet.to(device),
        conditioner,
        NoiseSchedule(load_scheduler_config(source)),
        source,
        caption_dropout=recipe.caption_dropout,
        min_snr=recipe.min_snr,
        draw=drawing(source, conditioner, device),
        prompts=prompts,
        encode=encode,
    )


def conditioner_of(model: Path, device: torch.device, latents: LatentSet) -> TextConditioner:
    """The text encoders: on the device, or on the CPU if only previews need them."""
    if latents.index.made_with["text"] or device.type == "cpu":
        arch = unet_architecture(model)
        return TextConditioner.from_folder(
            model, cache_size=CAPTION_CACHE // (4 * arch.tokens * arch.context), group=GROUP
        )
    # On a GPU encoding is faster than a cache, and few captions are repeated.
    return TextConditioner.from_folder(model, torch.float16, device, cache_size=0)


def _teacher(recipe: Teacher, base: Path, pixels: int) -> UNet2DConditionModel:
    """A new U-Net, or that of `base`, grown if it is a cut.

    pixels: of the data, and so of the images that it is made to draw.
    """
    torch.manual_seed(recipe.training.seed)
    arch = replace(get(recipe.architecture), sample=pixels // FACTOR)
    if not recipe.further:
        return UNet2DConditionModel(**unet_config(arch))
    found, unet = unet_architecture(base), load_unet(base)
    if found == arch:
        unet.register_to_config(sample_size=arch.sample)
        return unet
    try:
        return grow(unet, arch)
    except UserError:
        raise UserError(
            f"{base} has the U-Net {found.name}, but this recipe continues {arch.name}: "
            "give the model made by the recipe before it, or a cut of it"
        ) from None


def _finetuned(recipe: Finetune, base: Path, device: torch.device) -> UNet2DConditionModel:
    """Without a LoRA's matrices the U-Net rests, and does so in the dtype of a teacher."""
    resting = torch.float16 if recipe.hardware.fp16 else compute_dtype(device)
    unet = load_unet(base, resting if recipe.lora else None)
    if recipe.lora:
        torch.manual_seed(recipe.training.seed)
        add_lora(unet, recipe.lora)
    return unet
