"""Previews of a U-Net's training: contact sheets drawn with the current weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import nn

from koala.checkpoints.load import load_scheduler_config, load_vae
from koala.checkpoints.sampling import USUAL, Sampling
from koala.distillation.tasks import Draw
from koala.generation.pipeline import Pipeline
from koala.text_conditioning import TextConditioner
from koala.utils.contact_sheet import contact_sheet

SMALL = 128  # pixels: images up to this size are enlarged twice
LARGEST = 512  # pixels: larger images are reduced to this size


def drawing(
    model: Path,
    conditioner: TextConditioner,
    device: torch.device | str,
    sampling: Sampling = USUAL,
) -> Draw:
    """A function that draws with any U-Net and the VAE of `model`, on `device` in fp32.

    conditioner: the training's own, so the text encoders are not loaded twice. sampling: the steps
    and guidance that the U-Net is trained for.
    """
    vae = load_vae(model).to(device).eval()
    schedule = load_scheduler_config(model)

    def draw(unet: nn.Module, prompts: Sequence[str], seed: int) -> Image.Image:
        assert isinstance(unet, UNet2DConditionModel)
        pipeline = Pipeline("preview", unet, vae, conditioner, schedule)
        images = pipeline(
            list(prompts), seed=seed, steps=sampling.steps, guidance=sampling.guidance
        ).images
        if images[0].width <= SMALL:
            return contact_sheet(images, list(prompts), columns=8, scale=2)
        for image in images:
            image.thumbnail((LARGEST, LARGEST))
        return contact_sheet(images, list(prompts), columns=4)

    return draw
