"""Previews of a U-Net's training: contact sheets drawn with the current weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import nn

from koala.checkpoints.load import load_scheduler_config, load_vae
from koala.distillation.tasks import Draw
from koala.generation.pipeline import Pipeline
from koala.text_conditioning import TextConditioner
from koala.utils.contact_sheet import contact_sheet

SMALL = 128  # pixels: images up to this size are enlarged twice
LARGEST = 512  # pixels: larger images are reduced to this size
MINI_PROMPTS = (
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


def drawing(model: Path, conditioner: TextConditioner, device: torch.device | str) -> Draw:
    """A function that draws with any U-Net and the VAE of `model`, on `device` in fp32.

    conditioner: the training's own, so the text encoders are not loaded twice.
    """
    vae = load_vae(model).to(device).eval()
    schedule = load_scheduler_config(model)

    def draw(unet: nn.Module, prompts: Sequence[str], seed: int) -> Image.Image:
        assert isinstance(unet, UNet2DConditionModel)
        pipeline = Pipeline("preview", unet, vae, conditioner, schedule)
        images = pipeline(list(prompts), seed=seed).images
        if images[0].width <= SMALL:
            return contact_sheet(images, list(prompts), columns=8, scale=2)
        for image in images:
            image.thumbnail((LARGEST, LARGEST))
        return contact_sheet(images, list(prompts), columns=4)

    return draw
