"""Tensor names of SDXL's original single-file layout ("LDM keys") and of diffusers' layout.

A1111, ComfyUI and others read a single file with the names of Stability's code. diffusers names
the same tensors differently, splits one of them in three, and stores two kinds in another shape.
The mapping is a list of `Pair`s computed from a component's architecture and is used in both
directions. Names here have no prefix; `PREFIXES` lists the prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from koala.architectures.layout import modules
from koala.architectures.table import UNetArchitecture
from koala.checkpoints.tensors import Stored, View, rows

PREFIXES = {  # of a component's tensors in a single file
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}


class Pair(NamedTuple):
    """One tensor of the original layout and the diffusers tensors that it holds."""

    single: str  # name in the original layout
    parts: tuple[str, ...]  # names in diffusers', joined along axis 0
    transposed: bool = False  # two-dimensional, and the other way round
    pointwise: bool = False  # a linear layer in diffusers, a 1x1 convolution in the original


def join(pair: Pair, tensors: Mapping[str, View]) -> View:
    """The original layout's tensor, built from diffusers' by name."""
    views = [tensors[name] for name in pair.parts]
    stored = tuple(part for view in views for part in view.parts)
    if pair.pointwise:
        stored = tuple(part._replace(shape=(*part.shape, 1, 1)) for part in stored)
    return View(stored, transposed=views[0].transposed != pair.transposed)


def fits(pair: Pair, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of that shape in the original layout can be split by the pair."""
    if pair.pointwise:
        return len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))
    if pair.transposed:
        return len(shape) == 2
    return len(pair.parts) == 1 or (len(shape) > 0 and shape[0] % len(pair.parts) == 0)


def split(pair: Pair, stored: Stored) -> dict[str, View]:
    """Diffusers' tensors by name, from the original layout's, whose shape `fits`."""
    if pair.pointwise:  # some writers save it as the matrix that it is
        stored = stored._replace(shape=stored.shape[:2])
    count = len(pair.parts)
    if count == 1:
        return {pair.parts[0]: View((stored,), pair.transposed)}
    step = stored.shape[0] // count
    return {
        name: View((rows(stored, k * step, (k + 1) * step),)) for k, name in enumerate(pair.parts)
    }


def _both(single: str, part: str, pointwise: bool = False) -> Iterator[Pair]:
    """Weight and bias of one module."""
    yield Pair(f"{single}.weight", (f"{part}.weight",), pointwise=pointwise)
    yield Pair(f"{single}.bias", (f"{part}.bias",))


# --- U-Net ----------------------------------------------------------------------------------

_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(\w+?)s\.(\d+)\.(.+)")


def unet_module(path: str, layers: int, attends: bool = True) -> str:
    """The original layout's path of a U-Net module.

    path: in diffusers, as `layout.modules` yields it. layers: resnets of a down block.
    attends: whether the last layer of the module's up block has attention, which precedes an
    upsampler.
    """
    if path in _ENDS:
        return _ENDS[path]
    match = _BLOCK.fullmatch(path)
    assert match, path
    side, stage, kind, index, leaf = match.groups()
    i, j = int(stage or 0), int(index)
    leaf = _RESNET[leaf] if kind == "resnet" else leaf
    place = 1 if kind == "attention" else 0
    if side == "mid":  # resnet, transformer, resnet
        return f"middle_block.{place or 2 * j}.{leaf}"
    first = i * (layers + 1)
    if kind == "downsampler":
        return f"input_blocks.{first + layers + 1}.0.op"
    if kind == "upsampler":
        return f"output_blocks.{first + layers}.{2 if attends else 1}.conv"
    if side == "down":
        return f"input_blocks.{first + j + 1}.{place}.{leaf}"
    return f"output_blocks.{first + j}.{place}.{leaf}"


def unet_modules(arch: UNetArchitecture) -> dict[str, str]:
    """Diffusers' path -> the original layout's path, for every module with tensors."""
    paths = {}
    for module in modules(arch):
        if not module.attends:
            parts = module.path.split(".")
            attends = parts[0] == "up_blocks" and arch.up[int(parts[1])][-1] > 0
            paths[module.path] = unet_module(module.path, arch.layers, attends)
    return paths


def unet_pairs(arch: UNetArchitecture) -> list[Pair]:
    """Every tensor of the U-Net."""
    paths, pairs = unet_modules(arch), []
    for module in modules(arch):
        if not module.attends:
            both = _both(paths[module.path], module.path)
            pairs += list(both) if module.bias else [next(both)]
    return pairs


# --- VAE ------------------------------------------------------------------------------------


def vae_pairs(widths: Sequence[int], layers: int) -> list[Pair]:
    """Every tensor of an `AutoencoderKL`.

    widths: channels of each level, the highest resolution first (`block_out_channels`);
    layers: resnets of an encoder level (`layers_per_block`); a decoder level has one more.
    """
    pairs = [*_both("quant_conv", "quant_conv"), *_both("post_quant_conv", "post_quant_conv")]
    last = len(widths) - 1
    for side in ("encoder", "decoder"):
        for end, theirs in (("conv_in",) * 2, ("conv_norm_out", "norm_out"), ("conv_out",) * 2):
            pairs += _both(f"{side}.{theirs}", f"{side}.{end}")
        for j in (0, 1):
            pairs += _vae_resnet(f"{side}.mid.block_{j + 1}", f"{side}.mid_block.resnets.{j}")
        single, part = f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0"
        pairs += _both(f"{single}.norm", f"{part}.group_norm")
        for theirs, own in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            pairs += _both(f"{single}.{theirs}", f"{part}.{own}", pointwise=True)
    for i in range(len(widths)):
        single, part = f"encoder.down.{i}", f"encoder.down_blocks.{i}"
        for j in range(layers):
            changes = j == 0 and widths[max(0, i - 1)] != widths[i]
            pairs += _vae_resnet(f"{single}.block.{j}", f"{part}.resnets.{j}", changes)
        if i < last:
            pairs += _both(f"{single}.downsample.conv", f"{part}.downsamplers.0.conv")
        single, part = f"decoder.up.{i}", f"decoder.up_blocks.{last - i}"
        for j in range(layers + 1):
            changes = j == 0 and widths[min(last, i + 1)] != widths[i]
            pairs += _vae_resnet(f"{single}.block.{j}", f"{part}.resnets.{j}", changes)
        if i:
            pairs += _both(f"{single}.upsample.conv", f"{part}.upsamplers.0.conv")
    return pairs


def _vae_resnet(single: str, part: str, changes_width: bool = False) -> Iterator[Pair]:
    for leaf in ("norm1", "conv1", "norm2", "conv2"):
        yield from _both(f"{single}.{leaf}", f"{part}.{leaf}")
    if changes_width:
        yield from _both(f"{single}.nin_shortcut", f"{part}.conv_shortcut")


# --- text encoders --------------------------------------------------------------------------


def clip_pairs(layers: int) -> list[Pair]:
    """Every tensor of the first text encoder, CLIP-L; both layouts use transformers' names."""
    names = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
    leaves = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
    attention = tuple(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out"))
    paths = [f"encoder.layers.{k}.{leaf}" for k in range(layers) for leaf in leaves + attention]
    names += [f"{path}.{x}" for path in [*paths, "final_layer_norm"] for x in ("weight", "bias")]
    return [Pair(f"text_model.{name}", (f"text_model.{name}",)) for name in names]


def open_clip_pairs(layers: int) -> list[Pair]:
    """Every tensor of the second text encoder, OpenCLIP bigG, which fuses query, key and value."""
    model = "text_model"
    pairs = [
        Pair("token_embedding.weight", (f"{model}.embeddings.token_embedding.weight",)),
        Pair("positional_embedding", (f"{model}.embeddings.position_embedding.weight",)),
        *_both("ln_final", f"{model}.final_layer_norm"),
        Pair("text_projection", ("text_projection.weight",), transposed=True),
    ]
    for k in range(layers):
        single, part = f"transformer.resblocks.{k}", f"{model}.encoder.layers.{k}"
        for kind in ("weight", "bias"):
            joined = tuple(f"{part}.self_attn.{x}_proj.{kind}" for x in ("q", "k", "v"))
            pairs.append(Pair(f"{single}.attn.in_proj_{kind}", joined))
        for theirs, own in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ):
            pairs += _both(f"{single}.{theirs}", f"{part}.{own}")
    return pairs
