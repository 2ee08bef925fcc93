"""A ControlNet for the toy SDXL, random, whose residuals are not zero as a new one's are."""

from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel


def toy_controlnet(unet: UNet2DConditionModel, seed: int = 0) -> ControlNetModel:
    """Made of a U-Net, as for training; every residual is as strong as what it is added to."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 8))
        last = (net.controlnet_cond_embedding.conv_out, net.controlnet_mid_block)
        for layer in (*last, *net.controlnet_down_blocks):
            torch.nn.init.normal_(layer.weight, std=0.3)
    return net.eval()


def saved(net: ControlNetModel, folder: Path) -> Path:
    net.save_pretrained(folder)
    return folder
