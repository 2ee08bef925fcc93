"""An IP-Adapter and its image encoder at toy size, random, in the form of their authors."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

READS = 12  # width of the image embedding
SIDE = 16  # of the images that the encoder reads


def toy_ip_adapter(unet: UNet2DConditionModel, file: Path, seed: int = 0) -> Path:
    """Writes an adapter for a U-Net whose layers change as much as the text does."""
    draws = torch.Generator().manual_seed(seed)
    context = unet.config.cross_attention_dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draws)

    tensors = {
        "image_proj.proj.weight": normal(4 * context, READS),
        "image_proj.proj.bias": normal(4 * context),
        "image_proj.norm.weight": 1 + 0.1 * normal(context),
        "image_proj.norm.bias": 0.1 * normal(context),
    }
    for n, name in enumerate(unet.attn_processors):
        if ".attn2." in name:
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in "kv":
                weight = normal(width, context) / context**0.5
                tensors[f"ip_adapter.{n}.to_{part}_ip.weight"] = weight
    save_file(tensors, file)
    return file


def toy_image_encoder(folder: Path, **changes: int) -> Path:
    settings = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": SIDE, "patch_size": 4, "projection_dim": READS,
        "hidden_act": "gelu",
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**settings, **changes}))
        for parameter in encoder.parameters():  # those of a new one are almost 0
            torch.nn.init.normal_(parameter, std=0.3)
    encoder.save_pretrained(folder)
    return folder
