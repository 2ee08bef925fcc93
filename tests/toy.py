"""A complete SDXL pipeline at toy size, random and seeded, so that tests run real classes fast.

Everything a real folder holds is here: the U-Net's two topologies (SDXL's, and KOALA's cut of
it), an f8 VAE with latent statistics, two CLIP text encoders, byte-level CLIP tokenizers, and
a scheduler. Only the widths and the vocabulary are tiny.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

TOKENS = 32  # what the text encoders read, start and end tokens included
TEXT_WIDTHS = (16, 24)
TIME_EMBED = 8
START, END = "<|startoftext|>", "<|endoftext|>"


def toy_pipeline(folder: str | Path, seed: int = 0, architecture: str = "sdxl") -> Path:
    """Writes a random StableDiffusionXLPipeline folder (float32 safetensors) and returns its path.

    `architecture` is "sdxl" (two layers a block, depths [0, 1, 2], mid block) or "koala" (one
    layer, depths [0, 1, 1], no mid block: what cutting the first as KOALA-700M gives).
    Equal seeds give equal weights; text encoders and VAE do not depend on the architecture.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = toy_vae()
        text_encoder, text_encoder_2 = toy_text_encoders()
        unet = toy_unet(architecture)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=toy_tokenizer(pad=END),
        tokenizer_2=toy_tokenizer(pad="!"),
        unet=unet,
        scheduler=toy_scheduler(),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def toy_unet(architecture: str = "sdxl") -> UNet2DConditionModel:
    """A U-Net of SDXL's or KOALA's topology, initialised from torch's global generator."""
    layers, depths, mid = {
        "sdxl": (2, (1, 1, 2), "UNetMidBlock2DCrossAttn"),
        "koala": (1, (1, 1, 1), None),
    }[architecture]
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=mid,
        block_out_channels=(16, 32, 32),
        layers_per_block=layers,
        transformer_layers_per_block=depths,
        attention_head_dim=(1, 2, 2),
        norm_num_groups=8,
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_EMBED,
        projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + 6 * TIME_EMBED,
    ).eval()


def toy_vae() -> AutoencoderKL:
    """An f8 VAE with four latent channels and latent statistics in its config."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.8,
        latents_mean=(0.1, -0.2, 0.3, 0.0),
        latents_std=(1.2, 0.9, 1.1, 0.7),
        force_upcast=False,
    ).eval()


def toy_text_encoders() -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """CLIP text encoders of widths 16 and 24, two and three layers, for the toy vocabulary."""
    vocabulary = toy_vocabulary()
    first, second = (
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            hidden_act=activation,
            bos_token_id=vocabulary[START],
            eos_token_id=vocabulary[END],
            pad_token_id=pad,
        )
        for width, layers, activation, pad in (
            (TEXT_WIDTHS[0], 2, "quick_gelu", vocabulary[END]),
            (TEXT_WIDTHS[1], 3, "gelu", vocabulary["!"]),
        )
    )
    return CLIPTextModel(first).eval(), CLIPTextModelWithProjection(second).eval()


def toy_vocabulary() -> dict[str, int]:
    """CLIP's vocabulary without its merges: 256 byte tokens, the same ending a word, two marks."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in plain]  # shown as code points from 256 on
    letters = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(moved))]
    tokens = letters + [letter + "</w>" for letter in letters] + [START, END]
    return {token: i for i, token in enumerate(tokens)}


def toy_tokenizer(pad: str = END) -> CLIPTokenizer:
    """A CLIP tokenizer that spells every word byte by byte and reads 32 tokens."""
    return CLIPTokenizer(vocab=toy_vocabulary(), merges=[], pad_token=pad, model_max_length=TOKENS)


def toy_scheduler() -> EulerDiscreteScheduler:
    """SDXL's schedule with KOALA's spacing."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
    )


def toy_tiny(**changes) -> AutoencoderTiny:
    config = {
        "encoder_block_out_channels": (8,) * 4,
        "decoder_block_out_channels": (8,) * 4,
        "num_encoder_blocks": (1,) * 4,
        "num_decoder_blocks": (1,) * 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderTiny(**{**config, **changes}).eval().requires_grad_(False)


def seeded_unet() -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return toy_unet("koala").requires_grad_(False)


def toy_inputs(dtype=torch.float32):
    """What the toy U-Net takes, for two pictures."""
    draw = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=draw).to(dtype),
        "timestep": torch.tensor([999.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 32, 40, generator=draw).to(dtype),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2, 24, generator=draw).to(dtype),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2).to(dtype),
        },
    }
