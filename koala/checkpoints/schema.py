"""What the small files of a model folder may say: a table for each config that koala reads.

They are untrusted: a value of the wrong kind would end in a traceback somewhere below, and a huge
one in no end. Settings that are not in a table are not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from koala.architectures.config import INNER
from koala.errors import UserError


@dataclass(frozen=True)
class Allowed:
    """The values that a setting may have."""

    says: str
    fits: Callable[[Any], bool]

    def __or__(self, other: Allowed) -> Allowed:
        return Allowed(
            f"{self.says}, or {other.says}", lambda value: self.fits(value) or other.fits(value)
        )


def _whole(low: int, high: int) -> Allowed:
    return Allowed(
        f"a whole number from {low:,} to {high:,}", lambda v: type(v) is int and low <= v <= high
    )


def _number(low: float, high: float) -> Allowed:
    return Allowed(
        f"a number from {low:g} to {high:g}",
        lambda v: type(v) in (int, float) and math.isfinite(v) and low <= v <= high,
    )


def _list(of: Allowed, most: int, least: int = 1) -> Allowed:
    return Allowed(
        f"a list of {least} to {most:,}, each {of.says}",
        lambda v: isinstance(v, list | tuple) and least <= len(v) <= most and all(map(of.fits, v)),
    )


def _one_of(*values: Any) -> Allowed:
    """By type too: 1 is neither 1.0 nor True."""
    return Allowed(
        " or ".join(map(repr, values)),
        lambda v: any(type(v) is type(one) and v == one for one in values),
    )


_NONE = _one_of(None)
_TEXT = Allowed("text", lambda v: isinstance(v, str) and len(v) < 10_000)
_FLAG = _one_of(True, False)
_STAGES = 8  # most of them
_WIDTH, _DEPTH, _HEADS, _LAYERS = _whole(1, 2**15), _whole(0, 100), _whole(1, 1024), _whole(1, 16)
_GROUPS, _SAMPLE = _whole(1, 1024), _whole(1, 4096)

_UNET = {
    "_class_name": _TEXT | _NONE,
    "act_fn": _one_of("silu", "swish"),
    "addition_embed_type": _TEXT | _NONE,
    "addition_time_embed_dim": _whole(2, 2**12) | _NONE,
    "attention_head_dim": _HEADS | _list(_HEADS, _STAGES),
    "block_out_channels": _list(_WIDTH, _STAGES),
    "center_input_sample": _one_of(False),
    "cross_attention_dim": _WIDTH,
    "down_block_types": _list(_TEXT, _STAGES),
    "downsample_padding": _one_of(1),
    "dropout": _one_of(0, 0.0),
    "flip_sin_to_cos": _one_of(True),
    "freq_shift": _one_of(0),
    "in_channels": _whole(1, 2**10),
    "layers_per_block": _LAYERS | _list(_LAYERS, _STAGES),
    "mid_block_scale_factor": _one_of(1, 1.0),
    "mid_block_type": _TEXT | _NONE,
    "norm_eps": _number(1e-9, 1e-3),
    "norm_num_groups": _GROUPS,
    "num_attention_heads": _HEADS | _list(_HEADS, _STAGES) | _NONE,
    "out_channels": _whole(1, 2**10),
    "projection_class_embeddings_input_dim": _whole(1, 2**16) | _NONE,
    "reverse_transformer_layers_per_block": (
        _list(_DEPTH | _list(_DEPTH, 17), _STAGES) | _NONE
    ),
    "sample_size": _SAMPLE,
    "time_embedding_type": _one_of("positional", None),
    "transformer_layers_per_block": _DEPTH | _list(_DEPTH | _list(_DEPTH, 17), _STAGES),
    "up_block_types": _list(_TEXT, _STAGES),
    "upcast_attention": _FLAG | _NONE,
    "use_linear_projection": _FLAG | _NONE,
}  # fmt: skip
# Settings of diffusers' class that change the network and that no SDXL U-Net has, with the values
# at which they do not. `koala.architectures.config` looks at more of them.
_UNET |= {
    "addition_embed_type_num_heads": _one_of(64),
    "class_embeddings_concat": _one_of(False),
    "cross_attention_norm": _NONE,
    "encoder_hid_dim": _NONE,
    "mid_block_only_cross_attention": _one_of(None, False),
    "resnet_out_scale_factor": _one_of(1.0, 1),
    "resnet_skip_time_act": _one_of(False),
    "time_embedding_act_fn": _NONE,
    "time_embedding_dim": _NONE,
    "timestep_post_act": _NONE,
}
_UNET["quantised"] = _one_of("int4")
_UNET[INNER] = Allowed(  # of a pruned one; whether they fit is for `koala.architectures.config`
    "whole numbers by the paths of modules",
    lambda v: (
        isinstance(v, dict)
        and len(v) < 10_000
        and all(isinstance(k, str) and type(v[k]) is int and v[k] >= 0 for k in v)
    ),
)
_NORM = _number(-1e4, 1e4)
_VAE = {
    "_class_name": _TEXT | _NONE,
    "act_fn": _one_of("silu", "swish"),
    "block_out_channels": _list(_WIDTH, _STAGES),
    "down_block_types": _list(_one_of("DownEncoderBlock2D"), _STAGES),
    "force_upcast": _FLAG | _whole(0, 1),
    "in_channels": _one_of(3),
    "latent_channels": _whole(1, 128),
    "latents_mean": _list(_NORM, 128) | _NONE,
    "latents_std": _list(_number(1e-6, 1e4), 128) | _NONE,
    "layers_per_block": _LAYERS,
    "mid_block_add_attention": _FLAG,
    "norm_num_groups": _GROUPS,
    "out_channels": _one_of(3),
    "sample_size": _whole(1, 2**16) | _list(_whole(1, 2**16), 2),
    "scaling_factor": _number(1e-4, 1e4),
    "shift_factor": _one_of(None, 0, 0.0),
    "up_block_types": _list(_one_of("UpDecoderBlock2D"), _STAGES),
    "use_post_quant_conv": _FLAG,
    "use_quant_conv": _FLAG,
}
_TINY = {
    "_class_name": _TEXT | _NONE,
    "act_fn": _one_of("relu", "silu", "swish"),
    "decoder_block_out_channels": _list(_WIDTH, _STAGES),
    "encoder_block_out_channels": _list(_WIDTH, _STAGES),
    "force_upcast": _FLAG,
    "in_channels": _one_of(3),
    "latent_channels": _whole(1, 128),
    "latent_magnitude": _NORM,
    "latent_shift": _NORM,
    "num_decoder_blocks": _list(_LAYERS, _STAGES),
    "num_encoder_blocks": _list(_LAYERS, _STAGES),
    "out_channels": _one_of(3),
    "scaling_factor": _number(1e-4, 1e4),
    "shift_factor": _NORM,
    "upsample_fn": _one_of("nearest", "bilinear", "bicubic"),
    "upsampling_scaling_factor": _whole(1, 8),
}
_ID = _whole(-1, 2**20)
_TEXT_ENCODER = {
    "attention_dropout": _number(0, 1),
    "bos_token_id": _ID | _NONE,
    "eos_token_id": _ID,
    "hidden_act": _one_of("quick_gelu", "gelu"),
    "hidden_size": _WIDTH,
    "intermediate_size": _whole(1, 2**17),
    "layer_norm_eps": _number(1e-9, 1e-3),
    "max_position_embeddings": _whole(3, 2**12),
    "num_attention_heads": _HEADS,
    "num_hidden_layers": _whole(1, 128),
    "pad_token_id": _ID | _NONE,
    "projection_dim": _WIDTH,
    "vocab_size": _whole(3, 2**20),
    "_attn_implementation": _one_of(None, "eager", "sdpa"),
    "attn_implementation": _one_of(None, "eager", "sdpa"),
    "quantization_config": _NONE,
}
_IMAGE_ENCODER = {
    "attention_dropout": _number(0, 1),
    "hidden_act": _one_of("quick_gelu", "gelu"),
    "hidden_size": _WIDTH,
    "image_size": _whole(1, 2**11),
    "intermediate_size": _whole(1, 2**17),
    "layer_norm_eps": _number(1e-9, 1e-3),
    "num_attention_heads": _HEADS,
    "num_channels": _one_of(3),
    "num_hidden_layers": _whole(1, 128),
    "patch_size": _whole(1, 2**11),
    "projection_dim": _WIDTH,
    "quantization_config": _NONE,
}
_SAMPLING = {"steps": _whole(1, 1000), "guidance": _number(0, 100), "scheduler": _TEXT}
_SCHEDULER = {
    "_class_name": _TEXT | _NONE,
    "_koala_sampling": Allowed(
        "steps, guidance and scheduler, or left out",
        lambda v: (
            isinstance(v, dict) and all(k in _SAMPLING and _SAMPLING[k].fits(v[k]) for k in v)
        ),
    ),
    "beta_end": _number(1e-6, 0.5) | _NONE,
    "beta_schedule": _TEXT | _NONE,
    "beta_start": _number(1e-6, 0.5) | _NONE,
    "num_train_timesteps": _whole(50, 10_000) | _NONE,
    "prediction_type": _TEXT | _NONE,
    "rescale_betas_zero_snr": _FLAG | _NONE,
}
SCHEMAS: dict[str, dict[str, Allowed]] = {  # by the file's path in a model folder
    "model_index.json": {
        "_class_name": _TEXT | _NONE,
        "force_zeros_for_empty_prompt": _FLAG,
    },
    "scheduler/scheduler_config.json": _SCHEDULER,
    "text_encoder/config.json": _TEXT_ENCODER,
    "text_encoder_2/config.json": _TEXT_ENCODER,
    "tokenizer/tokenizer_config.json": {"model_max_length": _number(3, 1e40) | _NONE},
    "tokenizer_2/tokenizer_config.json": {"model_max_length": _number(3, 1e40) | _NONE},
    "unet/config.json": _UNET,
    "vae/config.json": _VAE,
    "vae_tiny/config.json": _TINY,
    "words.json": dict.fromkeys(
        ("backgrounds", "colours", "looks", "numbers", "places", "things"),
        _list(_TEXT, 100_000, least=0),
    ),
}
IMAGE_ENCODER = "image_encoder/config.json"  # of an IP-Adapter's, which is in no model's folder
_TABLES = {**SCHEMAS, IMAGE_ENCODER: _IMAGE_ENCODER}
# Checked, but not passed to a network's class: a repository as implementation would be code to
# download, and weights are plain floats.
ABOUT = ("attn_implementation", "quantization_config")


def checked(path: str, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of the file `path`, a key of `SCHEMAS` or `IMAGE_ENCODER`, that koala reads.

    where: the file as an error names it. Raises `UserError` for a value that is not allowed, and
    for widths that do not go together.
    """
    table = _TABLES[path]
    found = {key: value for key, value in config.items() if key in table}
    for key, value in found.items():
        if not table[key].fits(value):
            raise UserError(f"{where}: {key} is {_short(value)}; it must be {table[key].says}")
    heads, width = found.get("num_attention_heads"), found.get("hidden_size")
    if width and heads and width % heads:
        raise UserError(f"{where}: {heads} heads do not divide hidden_size {width}")
    for end in ("encoder", "decoder"):  # of a tiny autoencoder
        widths, blocks = f"{end}_block_out_channels", f"num_{end}_blocks"
        if len(found.get(widths, ())) != len(found.get(blocks, ())):
            raise UserError(f"{where}: {widths} and {blocks} must have a number for each stage")
    groups = found.get("norm_num_groups", 32)
    for width in found.get("block_out_channels", ()):
        if width % groups:
            raise UserError(f"{where}: {groups} groups do not divide {width} channels")
    return found


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
