"""SDXL's single files as published, by names and shapes alone."""

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from koala.architectures.layout import tensor_shapes
from koala.architectures.table import get
from koala.checkpoints import ldm_keys


def published(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a full-size single file, as Stability's and its fine-tunes' are."""
    arch = get(name)
    shapes = tensor_shapes(arch)
    tensors = {
        ldm_keys.PREFIXES["unet"] + p.single: shapes[p.parts[0]] for p in ldm_keys.unet_pairs(arch)
    }
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        texts = [
            CLIPTextModelWithProjection(CLIPTextConfig(
                vocab_size=49408, hidden_size=width, intermediate_size=4 * width,
                projection_dim=width, num_hidden_layers=layers, num_attention_heads=width // 64,
            ))
            for width, layers in ((768, 12), (1280, 32))
        ]  # fmt: skip
    for component, pairs, model in (
        ("vae", ldm_keys.vae_pairs((128, 256, 512, 512), 2), vae),
        ("text_encoder", ldm_keys.clip_pairs(12), texts[0]),
        ("text_encoder_2", ldm_keys.open_clip_pairs(32), texts[1]),
    ):
        state = model.state_dict()
        for pair in pairs:
            first = tuple(state[pair.parts[0]].shape)
            shape = (len(pair.parts) * first[0], *first[1:], *((1, 1) if pair.pointwise else ()))
            tensors[ldm_keys.PREFIXES[component] + pair.single] = shape
    return tensors
