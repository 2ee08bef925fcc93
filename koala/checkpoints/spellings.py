"""Other writers' names for the tensors of a single file, told as SDXL's original names.

Programs disagree on the prefixes of text encoders and VAE, and on whether the parts keep the names
of Stability's code or have transformers' and diffusers'. Eight-bit files carry a scale beside each
weight. What a training wraps a network in (DDP's `module.`, torch.compile's `_orig_mod.`) is no
part of a name. After `canonical` every component has its prefix of `ldm_keys.PREFIXES`.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection, Mapping

from koala.checkpoints.ldm_keys import PREFIXES
from koala.checkpoints.tensors import FP8, Stored, read
from koala.errors import UserError

_PREFIXES = (  # other writers', the longer of two that fit first
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_l.", "text_encoder"),
    ("clip_l.transformer.", "text_encoder"),
    ("text_encoder.", "text_encoder"),
    ("conditioner.embedders.1.transformer.", "text_encoder_2"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("text_encoders.clip_g.model.", "text_encoder_2"),
    ("text_encoders.clip_g.", "text_encoder_2"),
    ("clip_g.transformer.", "text_encoder_2"),
    ("text_encoder_2.", "text_encoder_2"),
    ("vae.", "vae"),
)
_SCALES = (".scale_weight", ".weight_scale")  # a number beside X.weight, in X
_OF_SCALING = (*_SCALES, ".scale_input", ".input_scale", ".comfy_quant")  # not needed to read it
_SCALED = "scaled_fp8"  # ends the name of an empty tensor beside a network's, prefix and all
_WRAPPED = re.compile(r"^(?:state_dict\.)?(?:(?:module|_orig_mod)\.)*|(?<=\.)_orig_mod\.")
_AVERAGE = re.compile(r"model_ema\.diffusion_model(.+)")
_WORDS = re.compile(  # of the U-Net's names in SDXL's original layout
    r"(?:input|output|transformer)_blocks|middle_block|time_embed|label_emb|(?:in|out|emb)_layers|"
    r"skip_connection|proj_in|proj_out|attn\d|to_[qkv]|to_out|norm\d|norm|proj|conv|out|op|ff|net|"
    r"weight|bias|\d+"
)
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION = re.compile(
    r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn|to_[qkv]|to_out\.0)\.(.*)"
)


def canonical(header: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of a file by SDXL's original prefixes, fp8 ones with their scales.

    An average of the U-Net (EMA) that lies in the file alone takes the U-Net's place.

    Raises `UserError` if two tensors have one name then, or a scale is not a single number.
    """
    named: dict[str, Stored] = {}
    averaged = average(header) == "read"
    for name, stored in header.items():
        if name.rpartition(".")[2] == _SCALED or name.endswith(_OF_SCALING):
            continue
        own = _of_average(name) if averaged else _canonical(name)
        if own in named:
            raise UserError(f"{stored.file} holds {own} twice, under two names")
        named[own] = stored
    for name, scale in header.items():
        if ending := next((end for end in _SCALES if name.endswith(end)), None):
            weight = _canonical(name.removesuffix(ending) + ".weight")
            if weight in named and named[weight].dtype in FP8:
                named[weight] = named[weight]._replace(scale=_number(name, scale))
    return named


def average(names: Collection[str]) -> str | None:
    """Whether a file's average of the U-Net (EMA) is "read", lying there alone, or "left out"."""
    if not any(map(_AVERAGE.fullmatch, names)):
        return None
    return "left out" if any(name.startswith(PREFIXES["unet"]) for name in names) else "read"


def _canonical(name: str) -> str:
    name = unwrapped(name)
    for prefix, component in _PREFIXES:
        if name.startswith(prefix):
            return PREFIXES[component] + name.removeprefix(prefix)
    return name


def unwrapped(name: str) -> str:
    """A tensor's name without what DDP, torch.compile or a Lightning checkpoint put around it."""
    return _WRAPPED.sub("", name)


def _of_average(name: str) -> str:
    """The name of a tensor that belongs to an average of the U-Net, without which it is kept.

    Such names have lost their dots: model_ema.diffusion_modelinput_blocks10in_layers0weight.
    """
    found = _AVERAGE.fullmatch(name)
    if not found:
        return _canonical(name)
    if found[1].startswith("."):
        return PREFIXES["unet"] + found[1].removeprefix(".")
    numbered = re.sub(r"((?:input|output)_blocks\d+|label_emb\d)(\d)", r"\1.\2", found[1])
    return PREFIXES["unet"] + ".".join(_WORDS.findall(numbered))


def _number(name: str, stored: Stored) -> float:
    if math.prod(stored.shape) != 1 or stored.dtype != "F32":
        raise UserError(
            f"{stored.file}: {name} is {stored.dtype} {list(stored.shape)}, not one F32 number; "
            "only fp8 with one scale for each weight can be read: take the fp16 file"
        )
    value: float = struct.unpack("<f", read(stored))[0]
    return value


def current(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """A component's tensors by diffusers' names of today: attention had others until 2023.

    An attention's weights that were saved as 1x1 convolutions become matrices.
    """
    named = {}
    for name, stored in tensors.items():
        name = unwrapped(name)
        if found := _ATTENTION.fullmatch(name):
            path, kind, leaf = found.groups()
            name = f"{path}.{_OLD_ATTENTION.get(kind, kind)}.{leaf}"
            if len(stored.shape) == 4 and stored.shape[2:] == (1, 1):
                stored = stored._replace(shape=stored.shape[:2])
        named[name] = stored
    return named
