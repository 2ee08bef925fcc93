"""ImageReward: BLIP reads the prompt before the picture, and a head says how much people like it.

It is published in the format of BLIP's authors, and converted to transformers' BLIP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, CLIPImageProcessorPil
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from koala.errors import UserError
from koala.evaluation.metrics.loading import read_pickled
from koala.evaluation.metrics.metric import BATCH, Metric
from koala.evaluation.prompts import Prompt

TOKENS = 35  # of a prompt; what is longer is cut off
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the rewards, by the authors
HEAD = 64  # the width of an attention head of every BLIP
_VISION, _TEXT, _REWARD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
_BLOCK = {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
_REST = {
    "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding", "norm": "post_layernorm",
}  # fmt: skip


class ImageReward(Metric):
    """The reward, standardised as by the authors: about 0 for what their users rated average."""

    vision: BlipVisionModel
    text: BlipTextModel
    reward: nn.Sequential
    tokenizer: BertTokenizer
    pixels: CLIPImageProcessorPil

    def prepare(self, weights: Mapping[str, Path], device: torch.device) -> None:
        super().prepare(weights, device)
        file = weights["imagereward"]
        tensors = read_pickled(file)
        try:
            vision, text = (_part(tensors, prefix) for prefix in (_VISION, _TEXT))
            text.pop("embeddings.position_ids", None)  # 0, 1, 2, ...
            self.vision = BlipVisionModel(_vision_config(vision))
            self.vision.load_state_dict({_renamed(name): t for name, t in vision.items()})
            self.text = BlipTextModel(_text_config(text), add_pooling_layer=False)
            self.text.load_state_dict(text)
            self.reward = _linear_layers(_part(tensors, _REWARD))
            side = _side(vision)
        except (KeyError, IndexError, RuntimeError):
            raise UserError(
                f"{file} is no ImageReward: give the published ImageReward.pt"
            ) from None
        for part in (self.vision, self.text, self.reward):
            part.requires_grad_(False).eval().to(device)
        self.tokenizer = BertTokenizer(str(weights["bert-vocabulary"]))
        self.pixels = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        parts = []
        for start in range(0, len(pictures), BATCH):
            some = list(pictures[start : start + BATCH])
            said = [prompt.text for prompt in prompts[start : start + BATCH]]
            parts.append(self._rewards(some, said))
        return (torch.cat(parts) - MEAN) / DEVIATION

    def _rewards(self, pictures: list[Image.Image], texts: list[str]) -> Tensor:
        pixels = self.pixels(pictures, return_tensors="pt")["pixel_values"].to(self.device)
        seen = self.vision(pixels).last_hidden_state
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        read = self.text(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen, encoder_attention_mask=seen.new_ones(seen.shape[:2]),
        )  # fmt: skip
        return self.reward(read.last_hidden_state[:, 0].float())


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t.float() for n, t in tensors.items() if n.startswith(prefix)}


def _renamed(name: str) -> str:
    """The name in transformers of a tensor of BLIP's vision model."""
    if block := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
        return f"encoder.layers.{block[1]}.{_BLOCK[block[2]]}.{block[3]}"
    stem, _, kind = name.rpartition(".")
    return _REST[name] if name in _REST else f"{_REST[stem]}.{kind}"


def _side(tensors: Mapping[str, Tensor]) -> int:
    """Pixels of a picture that the vision model looks at."""
    places = tensors["pos_embed"].shape[1] - 1
    return tensors["patch_embed.proj.weight"].shape[-1] * round(places**0.5)


def _vision_config(tensors: Mapping[str, Tensor]) -> BlipVisionConfig:
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["blocks.0.mlp.fc1.bias"]),
        num_hidden_layers=_layers(tensors, "blocks."),
        num_attention_heads=max(1, width // HEAD),
        patch_size=patch,
        image_size=_side(tensors),
        layer_norm_eps=1e-6,
    )


def _text_config(tensors: Mapping[str, Tensor]) -> BlipTextConfig:
    words, width = tensors["embeddings.word_embeddings.weight"].shape
    layer = "encoder.layer.0."
    return BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=tensors[f"{layer}crossattention.self.key.weight"].shape[1],
        intermediate_size=len(tensors[f"{layer}intermediate.dense.bias"]),
        num_hidden_layers=_layers(tensors, "encoder.layer."),
        num_attention_heads=max(1, width // HEAD),
        max_position_embeddings=len(tensors["embeddings.position_embeddings.weight"]),
    )


def _layers(tensors: Mapping[str, Any], prefix: str) -> int:
    numbers = (n.removeprefix(prefix).split(".")[0] for n in tensors if n.startswith(prefix))
    return 1 + max(map(int, numbers), default=-1)


def _linear_layers(tensors: Mapping[str, Tensor]) -> nn.Sequential:
    """Of `layers.N.weight` and `.bias`, without activations between, as the authors have it."""
    numbers = sorted({int(name.split(".")[1]) for name in tensors})
    layers = []
    for n in numbers:
        weight, bias = tensors[f"layers.{n}.weight"], tensors[f"layers.{n}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers)
