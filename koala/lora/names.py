"""Names of a LoRA's tensors, in every spelling that SDXL's LoRAs use.

Kohya's names replace dots by underscores, so they cannot be parsed. Instead, each name is looked up
in a table computed from the model's list of modules, one per spelling. The inverted tables name
the tensors of a converted file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from koala.architectures.config import from_unet_config, unet_config
from koala.architectures.layout import modules
from koala.architectures.table import ARCHITECTURES, UNetArchitecture
from koala.checkpoints import ldm_keys
from koala.checkpoints.bundled import bundled_names
from koala.checkpoints.resolve import resolve_model, single_file_path
from koala.checkpoints.single_file import open_file
from koala.checkpoints.spellings import unwrapped
from koala.checkpoints.validate import parse_object, read_json
from koala.errors import UserError

PARTS = ("unet", "text_encoder", "text_encoder_2")
ROLES = {  # suffix of a tensor's name -> its role
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",  # the kernel of a Tucker-decomposed convolution (LyCORIS)
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".alpha": "alpha",
    ".scalar": "scalar",  # LyCORIS' trained factor, where it is not multiplied in
    **{f".{role}": role for role in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
        "dora_scale", "diff",
    )},
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
# PEFT's modules may hold several adapters, each with a name: ".lora_A.default.weight".
_NAMED = re.compile(
    r"(?P<stem>.+)(?P<role>\.(?:lora_(?:A|B|down|up|magnitude_vector)|hada_\w+|lokr_\w+))"
    r"\.(?P<name>[^.]+)(?P<weight>\.weight)?"
)
_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


_UNET_PREFIXES = (  # of OneTrainer's, ComfyUI's and PEFT's dotted names
    "unet.", "diffusion_model.", "model.diffusion_model.", "unet.base_model.model.",
    "base_model.model.unet.", "base_model.model.", "lora_unet.", "transformer.", "",
)  # fmt: skip
_TEXT_PREFIXES = (
    ("te1.", "te2."),
    ("lora_te1.", "lora_te2."),
    ("clip_l.", "clip_g."),
    ("clip_l.transformer.", "clip_g.transformer."),
    ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."),
    ("text_encoder.base_model.model.", "text_encoder_2.base_model.model."),
    ("base_model.model.text_encoder.", "base_model.model.text_encoder_2."),
)


class Target(NamedTuple):
    """A module that a LoRA changes."""

    part: str  # one of PARTS
    path: str  # as diffusers names it; in a text encoder with "text_model." before "encoder."


@dataclass(frozen=True)
class TextEncoder:
    """The sizes of a CLIP text encoder that a LoRA's names and shapes depend on."""

    layers: int
    width: int
    inner: int  # width between the two layers of its MLP
    projection: int  # width of its projected output; 0: none

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight shape of every linear module, by path."""
        shapes: dict[str, tuple[int, ...]] = {}
        for n in range(self.layers):
            layer = f"text_model.encoder.layers.{n}"
            for projection in _PROJECTIONS.values():
                shapes[f"{layer}.self_attn.{projection}"] = (self.width, self.width)
            shapes[f"{layer}.mlp.fc1"] = (self.inner, self.width)
            shapes[f"{layer}.mlp.fc2"] = (self.width, self.inner)
        if self.projection:
            shapes["text_projection"] = (self.projection, self.width)
        return shapes


SDXL_TEXT = (  # CLIP ViT-L and OpenCLIP ViT-bigG (arXiv 2307.01952, table 1)
    TextEncoder(layers=12, width=768, inner=3072, projection=0),
    TextEncoder(layers=32, width=1280, inner=5120, projection=1280),
)


@dataclass(frozen=True)
class BaseModel:
    """The networks that a LoRA is made for or applied to, as far as names and shapes go."""

    unet: UNetArchitecture
    text_encoders: tuple[TextEncoder, TextEncoder]

    @classmethod
    def from_configs(
        cls, unet: Mapping[str, Any], text: Mapping[str, Any], text_2: Mapping[str, Any]
    ) -> BaseModel:
        """From the three `config.json`. Raises `UserError` unless the U-Net is SDXL-class."""
        first, second = (
            TextEncoder(c["num_hidden_layers"], c["hidden_size"], c["intermediate_size"], p)
            for c, p in ((text, 0), (text_2, text_2["projection_dim"]))
        )
        return cls(from_unet_config(unet), (first, second))


@lru_cache(maxsize=8)
def shapes(base: BaseModel) -> dict[Target, tuple[int, ...]]:
    """Weight shape of every linear and convolutional module of the base."""
    found = {
        Target("unet", module.path): module.weight
        for module in modules(base.unet)
        if len(module.weight) > 1
    }
    for part, encoder in zip(PARTS[1:], base.text_encoders, strict=True):
        found |= {Target(part, path): shape for path, shape in encoder.shapes().items()}
    return found


@lru_cache(maxsize=8)
def spellings(base: BaseModel) -> dict[str, dict[Target, str]]:
    """Spelling -> target -> the tensor's name without its suffix, a key of `ROLES`.

    The U-Net and the text encoders have separate spellings, which files combine.
    """
    original = ldm_keys.unet_modules(base.unet)
    unet = [target for target in shapes(base) if target.part == "unet"]
    text = [target for target in shapes(base) if target.part != "unet"]
    kohya = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    dotted = {
        f"{prefix} {form}": {t: prefix + paths[t] for t in unet}
        for form, paths in (
            ("original names", {t: original[t.path] for t in unet}),
            ("diffusers names", {t: t.path for t in unet}),
        )
        for prefix in _UNET_PREFIXES
    }
    dotted |= {
        f"{first} text": {t: (first if t.part == "text_encoder" else second) + t.path for t in text}
        for first, second in _TEXT_PREFIXES
    }
    return dotted | {
        "kohya, original names": {t: "lora_unet_" + _flat(original[t.path]) for t in unet},
        "kohya, diffusers names": {t: "lora_unet_" + _flat(t.path) for t in unet},
        "LyCORIS": {t: "lycoris_" + _flat(t.path) for t in unet},
        "kohya, text": {t: kohya[t.part] + _flat(t.path) for t in text},
        "diffusers": {t: f"unet.{t.path}" for t in unet},
        "diffusers, processors": {
            t: f"unet.{_processor(t.path)}" for t in unet if ".attn" in t.path
        },
        "diffusers, processors alone": {t: _processor(t.path) for t in unet if ".attn" in t.path},
        "diffusers, text": {t: f"{t.part}.{t.path}" for t in text},
        # Since transformers 5 the first encoder's modules lack "text_model.".
        "diffusers, short text": {
            t: f"{t.part}.{short}"
            for t in text
            if (short := t.path.removeprefix("text_model.")) != t.path
        },
        "diffusers, old text": {
            t: f"{t.part}.{old}" for t in text if (old := _old_text(t.path)) != t.path
        },
        "PEFT": {t: f"base_model.model.{t.path}" for t in unet},
    }


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _processor(path: str) -> str:
    """`...attn1.to_out.0` -> `...attn1.processor.to_out`, with the suffix `_lora.down.weight`."""
    block, _, projection = path.removesuffix(".0").rpartition(".")
    return f"{block}.processor.{projection}"


def _old_text(path: str) -> str:
    """`...self_attn.q_proj` -> `...self_attn.to_q`, with the suffix `_lora.down.weight`."""
    for old, new in _PROJECTIONS.items():
        if path.endswith(f".self_attn.{new}"):
            return path.removesuffix(new) + old
    return path


@lru_cache(maxsize=8)
def targets(base: BaseModel) -> dict[str, tuple[str, Target]]:
    """Name without its suffix -> (spelling, target): the tables of `spellings`, inverted."""
    return {
        stem: (spelling, target)
        for spelling, stems in spellings(base).items()
        for target, stem in stems.items()
    }


def split(key: str) -> tuple[str, str, str] | None:
    """A tensor's name as (stem, suffix, adapter's name); None if it has no suffix of `ROLES`.

    The adapter's name is "" where the tensor's has none.
    """
    key = unwrapped(key)
    for ending in ROLES:
        if key.endswith(ending):
            return key.removesuffix(ending), ending, ""
    if found := _NAMED.fullmatch(key):
        ending = found["role"] + (found["weight"] or "")
        if ending in ROLES:
            return found["stem"], ending, found["name"]
    return None


def base_named(name: str) -> BaseModel:
    """The base model called `name`: an architecture with SDXL's text encoders, or a model.

    A model is a bundled name, a folder, a Hub id or a single file, of which only the header is
    read. Raises `UserError` if it is none of these.
    """
    row = ARCHITECTURES.get(name)
    if row and row.context == sum(encoder.width for encoder in SDXL_TEXT):
        return BaseModel(row, SDXL_TEXT)
    if row and name not in bundled_names():
        raise UserError(
            f"{name} is an architecture whose text encoders vary; give the folder of a model"
        )
    if file := single_file_path(name):
        return base_of_file(file)
    return base_of(resolve_model(name))


def base_of_file(file: Path) -> BaseModel:
    """What a LoRA for the model of a single file is for, from its header alone."""
    opened = open_file(file)
    configs = [opened.files.get(f"{part}/config.json") for part in PARTS[1:]]
    if not all(configs):
        return BaseModel(opened.found.architecture, SDXL_TEXT)
    unet = unet_config(opened.found.architecture)
    text, text_2 = (parse_object(config or b"", f"{file}: a config") for config in configs)
    return BaseModel.from_configs(unet, text, text_2)


def base_of(folder: Path) -> BaseModel:
    """What a LoRA for the model of a checked folder is for."""
    unet, text, text_2 = (read_json(folder / part / "config.json") for part in PARTS)
    return BaseModel.from_configs(unet, text, text_2)
