"""What is known of SDXL: the small files of a model that carries none, in its tensors' sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from koala.architectures.config import unet_config
from koala.architectures.table import UNetArchitecture
from koala.checkpoints.bundled import BUNDLED
from koala.checkpoints.detect import GROUPS
from koala.checkpoints.pipeline_files import (
    BETAS,
    SCALING_FACTOR,
    SCHEDULER,
    Tensors,
    as_file,
    pipeline_index,
)
from koala.checkpoints.prediction import Prediction
from koala.checkpoints.validate import read_json
from koala.errors import UserError

VOCABULARY = 49408  # tokens of CLIP; its tokenizer files are bundled, so single files omit them
TOKENIZERS = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
EMBEDDING = "text_model.embeddings.token_embedding.weight"


def known_files(
    arch: UNetArchitecture, tensors: Mapping[str, Tensors], prediction: Prediction | None
) -> dict[str, bytes]:
    """The configs of a file that carries none: SDXL's, in the sizes that its shapes show.

    prediction: as the file states it; None: SDXL's. Raises `ValueError` or `LookupError` if the
    VAE or a text encoder is not SDXL's.
    """
    predicts = prediction or Prediction()
    schedule: dict[str, Any] = {
        "_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000, **BETAS,
        **predicts.config, "timestep_spacing": "trailing",
    }  # fmt: skip
    configs = {
        "model_index.json": pipeline_index(),
        SCHEDULER: schedule,
        "unet/config.json": unet_config(arch),
        "vae/config.json": vae_config(tensors["vae"]),
        "text_encoder/config.json": _text_config(tensors["text_encoder"], "quick_gelu", 49407),
        "text_encoder_2/config.json": _text_config(tensors["text_encoder_2"], "gelu", 0),
    }
    for component, encoder in TOKENIZERS.items():
        bundled = read_json(_bundled(component) / "tokenizer_config.json")
        positions = tensors[encoder]["text_model.embeddings.position_embedding.weight"].shape[0]
        configs[f"{component}/tokenizer_config.json"] = {**bundled, "model_max_length": positions}
    return {path: as_file(config) for path, config in configs.items()}


def _bundled(tokenizer: str) -> Path:
    """The folder of a tokenizer of the bundled model; its vocabulary is CLIP's."""
    return BUNDLED / "koala-mini" / tokenizer


def vae_config(tensors: Tensors) -> dict[str, Any]:
    """The config of a VAE of SDXL's kind, from its tensors' shapes. ValueError for other widths."""
    widths: list[int] = []
    while view := tensors.get(f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight"):
        widths.append(view.shape[0])
    if any(width % GROUPS for width in widths):
        raise ValueError(f"the VAE has widths {widths}; they must be multiples of {GROUPS}")
    layers = sum(
        f"encoder.down_blocks.0.resnets.{j}.conv1.weight" in tensors for j in range(len(tensors))
    )
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "force_upcast": True,  # its activations are too large for fp16
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": tensors["post_quant_conv.weight"].shape[0],
        "layers_per_block": layers,
        "norm_num_groups": GROUPS,
        "sample_size": 1024,
        "scaling_factor": SCALING_FACTOR,
    }


def _text_config(tensors: Tensors, activation: str, pad: int) -> dict[str, Any]:
    """The config of CLIP-L or OpenCLIP bigG, whose heads are 64 wide."""
    tokens, width = tensors[EMBEDDING].shape
    if width not in (768, 1280):
        raise ValueError(f"a text encoder is {width} wide; SDXL's are 768 and 1280 wide")
    positions = tensors["text_model.embeddings.position_embedding.weight"].shape[0]
    projection = tensors.get("text_projection.weight")
    layers = 0
    while f"text_model.encoder.layers.{layers}.mlp.fc1.weight" in tensors:
        layers += 1
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
        "hidden_act": activation,
        "hidden_size": width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": positions,
        "model_type": "clip_text_model",
        "num_attention_heads": max(1, width // 64),
        "num_hidden_layers": layers,
        "pad_token_id": pad,
        "projection_dim": projection.shape[0] if projection else width,
        "vocab_size": tokens,
    }


def vocabularies(
    file: Path, files: Mapping[str, bytes], tensors: Mapping[str, Tensors]
) -> dict[str, bytes]:
    """CLIP's vocabulary for tokenizers that the file does not carry."""
    added = {}
    for component, encoder in TOKENIZERS.items():
        names = {path.rpartition("/")[2] for path in files if path.startswith(f"{component}/")}
        if names - {"tokenizer_config.json"}:
            continue
        if (tokens := tensors[encoder][EMBEDDING].shape[0]) != VOCABULARY:
            raise UserError(
                f"{file}: {encoder} has {tokens:,} tokens, CLIP has {VOCABULARY:,}; the file does "
                "not say which: use the folder that it was made from"
            )
        added[f"{component}/tokenizer.json"] = (_bundled(component) / "tokenizer.json").read_bytes()
    return added
