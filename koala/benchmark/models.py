"""Builds the models to measure: real ones, or published architectures with random weights.

Speed and memory do not depend on the weights' values, so the comparison needs no download; every
report marks rows with random weights. Random pipelines are built directly on the device, in the
requested precision, with the published configurations of the text encoders and the VAE.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from koala.architectures.config import unet_config
from koala.architectures.table import UNetArchitecture, get
from koala.benchmark.cases import Subject
from koala.checkpoints.bundled import BUNDLED
from koala.checkpoints.pipeline_files import BETAS, SCALING_FACTOR
from koala.generation.loader import load
from koala.generation.pipeline import Pipeline
from koala.text_conditioning import TextConditioner
from koala.utils.networks import (
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    UNet2DConditionModel,
)
from koala.utils.quiet import quiet_transformers

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

Model = TypeVar("Model", bound=nn.Module)

CLIP: dict[str, Any] = {
    "vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
CLIP_L: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "hidden_act": "quick_gelu", "projection_dim": 768,
}  # fmt: skip
BIG_G: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280,
}  # fmt: skip
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": SCALING_FACTOR,
    "force_upcast": False,  # as in the fp16-safe VAE that KOALA uses
}


def build(chosen: Subject, device: torch.device, dtype: torch.dtype) -> Pipeline:
    """Our pipeline of the model, on the device, run by PyTorch."""
    if chosen.folder is not None:
        return load(chosen.folder, device, dtype=dtype, backend="torch")
    from diffusers import EulerDiscreteScheduler

    arch = get(chosen.case.architecture)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        unet = new_unet(arch, device, dtype)
        vae = new_vae(device, dtype)
        conditioner = new_conditioner(device, dtype)
    return Pipeline(
        name=f"{chosen.case.name} (random weights)",
        unet=unet.to(memory_format=torch.channels_last),
        vae=vae,
        conditioner=conditioner,
        scheduler_config=dict(EulerDiscreteScheduler(**BETAS).config),
    )


def new_vae(device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """SDXL's VAE with random weights."""
    return _random(lambda: AutoencoderKL(**VAE), device, dtype)


def new_conditioner(
    device: torch.device, dtype: torch.dtype, cache_size: int = 1024
) -> TextConditioner:
    """SDXL's text encoders with random weights; `cache_size` as in `TextConditioner`."""
    text = _random(lambda: CLIPTextModel(CLIPTextConfig(**CLIP, **CLIP_L)), device, dtype)
    text_2 = _random(
        lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP, **BIG_G)), device, dtype
    )
    return TextConditioner(_tokenizer(), _tokenizer(), text, text_2, cache_size)


def new_unet(
    arch: UNetArchitecture, device: torch.device, dtype: torch.dtype
) -> UNet2DConditionModel:
    """A U-Net with random weights."""
    return _random(lambda: _unet(arch), device, dtype)


def stock(pipeline: Pipeline) -> "StableDiffusionXLPipeline":
    """The same components in diffusers' pipeline, built like the model card's snippet.

    The pipeline is imported here: the processes that draw our ways never load it.
    """
    with quiet_transformers():  # of image processors, of which a pipeline from text makes none
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    first, second = pipeline.conditioner.tokenizers
    encoder, encoder_2 = pipeline.conditioner.encoders
    scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler_config, timestep_spacing="trailing"
    )
    pipe = StableDiffusionXLPipeline(
        vae=pipeline.vae,
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        tokenizer=first,
        tokenizer_2=second,
        unet=pipeline.unet.to(memory_format=torch.contiguous_format),
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet(arch: UNetArchitecture) -> UNet2DConditionModel:
    model = UNet2DConditionModel.from_config(unet_config(arch))
    assert isinstance(model, UNet2DConditionModel)
    return model


def _random(make: Callable[[], Model], device: torch.device, dtype: torch.dtype) -> Model:
    """The model with its default initialisation, created on the device in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = make()
    finally:
        torch.set_default_dtype(before)
    return model.to(dtype).eval().requires_grad_(False)


def _tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, from the bundled model, with the published length."""
    tokenizer = CLIPTokenizer.from_pretrained(
        BUNDLED / "koala-mini" / "tokenizer", local_files_only=True
    )
    tokenizer.model_max_length = CLIP["max_position_embeddings"]
    return tokenizer
