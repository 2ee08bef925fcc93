"""CLIP in open_clip's format, as transformers names and shapes it.

open_clip joins query, key and value, and keeps its two projections transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from koala.errors import UserError

HEAD = 64  # the width of an attention head of every published text model
_TOWERS = {"visual.": "vision_model.", "": "text_model."}
_LAYERS = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
_REST = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
}
_BLOCK = re.compile(r"(visual\.|)transformer\.resblocks\.(\d+)\.(.+?)\.?(weight|bias|in_proj_.*)")


def shape_of(tensors: Mapping[str, Tensor], file: str) -> dict[str, Any]:
    """The configuration of transformers' CLIPModel that fits. UserError for another model."""
    try:
        conv, tokens = tensors["visual.conv1.weight"], tensors["token_embedding.weight"]
        places = len(tensors["visual.positional_embedding"]) - 1
        of_text, of_vision = tokens.shape[1], conv.shape[0]
        blocks = [m for m in map(_BLOCK.fullmatch, tensors) if m]
        layers = {
            prefix: 1 + max(int(m[2]) for m in blocks if m[1] == prefix)
            for prefix in ("visual.", "")
        }
        mlp = {
            prefix: len(tensors[f"{prefix}transformer.resblocks.0.mlp.c_fc.bias"])
            for prefix in layers
        }
        common = {"hidden_act": "gelu", "projection_dim": tensors["text_projection"].shape[1]}
        return {
            "projection_dim": common["projection_dim"],
            "text_config": {
                **common,
                "vocab_size": len(tokens),
                "hidden_size": of_text,
                "intermediate_size": mlp[""],
                "num_hidden_layers": layers[""],
                "num_attention_heads": max(1, of_text // HEAD),
                "max_position_embeddings": len(tensors["positional_embedding"]),
                "bos_token_id": len(tokens) - 2,
                "eos_token_id": len(tokens) - 1,
            },
            "vision_config": {
                **common,
                "hidden_size": of_vision,
                "intermediate_size": mlp["visual."],
                "num_hidden_layers": layers["visual."],
                "num_attention_heads": _heads(of_vision),
                "patch_size": conv.shape[-1],
                "image_size": conv.shape[-1] * round(places**0.5),
            },
        }
    except (KeyError, ValueError, IndexError):
        raise UserError(
            f"{file} is no CLIP in open_clip's format: give the published file"
        ) from None


def _heads(width: int) -> int:
    """open_clip's ViT-H-14 has heads of width 80, other models' are 64 wide."""
    return 16 if width == 1280 else max(1, width // HEAD)


def converted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by transformers' names; what it computes itself is left out."""
    found: dict[str, Tensor] = {"logit_scale": tensors["logit_scale"].float()}
    found["visual_projection.weight"] = tensors["visual.proj"].float().T.contiguous()
    found["text_projection.weight"] = tensors["text_projection"].float().T.contiguous()
    for name, stored in tensors.items():
        tensor = stored.float()
        if block := _BLOCK.fullmatch(name):
            prefix = f"{_TOWERS[block[1]]}encoder.layers.{block[2]}."
            if block[4].startswith("in_proj_"):
                kind = block[4].removeprefix("in_proj_")
                for which, part in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"{prefix}self_attn.{which}_proj.{kind}"] = part.contiguous()
            else:
                found[f"{prefix}{_LAYERS[block[3]]}.{block[4]}"] = tensor
        elif name in _REST:
            found[_REST[name]] = tensor
        elif (stem := name.rpartition(".")[0]) in _REST:
            found[f"{_REST[stem]}.{name.rpartition('.')[2]}"] = tensor
    return found
