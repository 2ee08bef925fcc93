"""Converts architectures to diffusers' `UNet2DConditionModel` configs, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from koala.architectures.layout import inner_widths
from koala.architectures.table import (
    ARCHITECTURES,
    LATENT_CHANNELS,
    TIME_IDS,
    UNetArchitecture,
    mirrored,
)
from koala.errors import UserError

INNER = "inner_widths"  # key of the widths inside modules of a pruned U-Net


def unet_config(arch: UNetArchitecture) -> dict[str, Any]:
    """Keyword arguments of diffusers' `UNet2DConditionModel`; a pruned U-Net has one more."""
    mid = {None: None, 0: "UNetMidBlock2D"}.get(arch.mid, "UNetMidBlock2DCrossAttn")
    config: dict[str, Any] = {
        "sample_size": arch.sample,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in arch.depths],
        "mid_block_type": mid,
        "up_block_types": ["CrossAttnUpBlock2D" if any(d) else "UpBlock2D" for d in arch.up],
        "block_out_channels": list(arch.widths),
        "layers_per_block": arch.layers,
        # A stage without attention has the entry 1, as in the published SDXL configuration.
        "transformer_layers_per_block": [max(1, depth) for depth in arch.depths],
        "attention_head_dim": list(arch.heads),  # a misnomer of that class: number of heads
        "cross_attention_dim": arch.context,
        "norm_num_groups": arch.groups,
        "use_linear_projection": arch.linear,
    }
    if arch.up != mirrored(arch.depths, arch.layers):
        config["reverse_transformer_layers_per_block"] = [
            list(stage) if any(stage) else 1 for stage in arch.up
        ]
    if arch.inner:  # not diffusers': `koala.checkpoints.load.build_unet` reads it
        config[INNER] = dict(arch.inner)
    depth = config["transformer_layers_per_block"][-1]
    assert not arch.mid or arch.mid == depth, "diffusers' mid block is as deep as the last stage"
    if arch.pooled:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": arch.time_ids,
            "projection_class_embeddings_input_dim": arch.pooled + TIME_IDS * arch.time_ids,
        }
    return config


# Settings that change the computation and that no row expresses: they must be SDXL's.
_FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": (None, "UNet2DConditionModel"),
    "in_channels": (LATENT_CHANNELS,),
    "out_channels": (LATENT_CHANNELS,),
    "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None,),
    "encoder_hid_dim_type": (None,),
    "time_cond_proj_dim": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (None, False),
    "dual_cross_attention": (None, False),
    "conv_in_kernel": (None, 3),
    "conv_out_kernel": (None, 3),
    "resnet_time_scale_shift": (None, "default"),
    "attention_type": (None, "default"),
    "mid_block_type": (None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
}
_CLASS_DEFAULTS: dict[str, Any] = {  # diffusers' defaults for keys that a config may omit
    "in_channels": 4,
    "out_channels": 4,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "sample_size": 64,
}


def _per_stage(value: Any, stages: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * stages


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with diffusers' defaults; `UserError` for settings that no row expresses."""
    config = {**_CLASS_DEFAULTS, **config}
    for key, allowed in _FIXED.items():
        if config.get(key) not in allowed:
            names = " or ".join(repr(a) for a in allowed if a is not None) or "none"
            raise UserError(f"U-Net setting {key} is {config.get(key)!r}; it must be {names}")
    missing = [k for k in ("block_out_channels", "cross_attention_dim") if k not in config]
    if missing:
        raise UserError(f"U-Net config lacks {', '.join(missing)}")
    return config


def from_unet_config(config: Mapping[str, Any]) -> UNetArchitecture:
    """The architecture of a U-Net's `config.json`, with its name if it is a known one.

    Raises `UserError` naming the setting if it is not an SDXL-class U-Net.
    """
    config = _checked(config)
    widths = tuple(config["block_out_channels"])
    stages = len(widths)
    down_types = config.get("down_block_types") or ()
    up_types = config.get("up_block_types") or ()
    if len(down_types) != stages or len(up_types) != stages:
        raise UserError(f"U-Net config has {stages} widths but another number of blocks")
    strange = {*down_types, *up_types} - {
        "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
    }  # fmt: skip
    if strange:
        raise UserError(f"U-Net block type {min(strange)!r} is not one of SDXL's")
    layers, per_stage = config["layers_per_block"], config["transformer_layers_per_block"]
    heads = _per_stage(config.get("num_attention_heads") or config["attention_head_dim"], stages)
    per_stage = _per_stage(per_stage, stages)
    if not isinstance(layers, int) or not all(isinstance(d, int) for d in per_stage):
        raise UserError(
            "U-Net layers_per_block must be one number, and depths one number per stage"
        )
    reverse = config.get("reverse_transformer_layers_per_block") or per_stage[::-1]
    if not len(heads) == len(per_stage) == len(reverse) == stages:
        raise UserError(f"U-Net config has {stages} widths but another number of depths")
    has_attention = [kind.startswith("CrossAttn") for kind in down_types]
    up = tuple(
        tuple(_per_stage(depth, layers + 1))
        if kind.startswith("CrossAttn")
        else (0,) * (layers + 1)
        for kind, depth in zip(up_types, reverse, strict=True)
    )
    if any(len(stage) != layers + 1 for stage in up):
        raise UserError(f"U-Net up blocks have {layers + 1} layers but another number of depths")
    mid = {None: None, "UNetMidBlock2D": 0}.get(config["mid_block_type"], per_stage[-1])
    time_ids = config.get("addition_time_embed_dim") or 0
    has_addition = config.get("addition_embed_type") == "text_time"
    arch = UNetArchitecture(
        name="custom",
        sample=config["sample_size"],
        tokens=77,
        widths=widths,
        heads=tuple(heads),
        layers=layers,
        depths=tuple(d if a else 0 for d, a in zip(per_stage, has_attention, strict=True)),
        up=up,
        mid=mid,
        context=config["cross_attention_dim"],
        pooled=pooled_width(config) if has_addition else 0,
        time_ids=time_ids if has_addition else 0,
        groups=config["norm_num_groups"],
        linear=bool(config.get("use_linear_projection")),
    )
    if config.get(INNER):
        arch = replace(arch, inner=_inner(config[INNER], arch))
    return _named(arch)


def before_pruning(arch: UNetArchitecture) -> UNetArchitecture:
    """The architecture with every module as wide as the rule has it."""
    return _named(replace(arch, inner=()))


def _named(arch: UNetArchitecture) -> UNetArchitecture:
    """The known architecture that it is, or was before it was pruned, if there is one."""
    whole = replace(arch, inner=())
    if (known := next((a for a in ARCHITECTURES.values() if a == whole), None)) is None:
        return arch
    name = f"{known.name}, pruned" if arch.inner else known.name
    return replace(arch, name=name, tokens=known.tokens)


def _inner(stated: Any, arch: UNetArchitecture) -> tuple[tuple[str, int], ...]:
    """The widths inside modules that a config states, in the U-Net's order."""
    possible = inner_widths(arch)
    for path, width in stated.items() if isinstance(stated, Mapping) else [("", stated)]:
        inner = possible.get(path)
        # A resnet keeps at least one group; other modules may be their bias alone.
        least = inner.unit if inner and inner.kind == "resnet" else 0
        whole = type(width) is int and inner and least <= width < inner.width
        if not whole or not inner or width % inner.unit:
            raise UserError(f"U-Net setting {INNER} gives {path!r} the width {width!r}")
    return tuple((path, stated[path]) for path in possible if path in stated)


def pooled_width(config: Mapping[str, Any]) -> int:
    """Width of the pooled text embedding that an SDXL U-Net of this `config.json` takes."""
    added = config.get("projection_class_embeddings_input_dim") or 0
    return added - TIME_IDS * (config.get("addition_time_embed_dim") or 0)
