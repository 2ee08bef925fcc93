"""The original layout's names, held against diffusers' converters and models."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from koala.architectures.config import unet_config
from koala.architectures.layout import tensor_shapes
from koala.architectures.table import ARCHITECTURES, get
from koala.checkpoints import ldm_keys
from koala.checkpoints.ldm_keys import PREFIXES, Pair
from koala.checkpoints.tensors import Stored, View

NAMES = [name for name in ARCHITECTURES if name != "sdm-v2.0"]
SDXL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}


Shapes = dict[str, tuple[int, ...]]


def marked(pairs: list[Pair], shapes: Shapes, prefix: str) -> dict[str, torch.Tensor]:
    """The original layout, every tensor filled with the number of the one that it holds."""
    numbers = {name: float(i) for i, name in enumerate(shapes)}
    stored = {n: View((Stored(Path(n), "F16", shape, 0, 0),)) for n, shape in shapes.items()}
    tensors = {}
    for pair in pairs:
        shape = ldm_keys.join(pair, stored).shape
        rows = (shape[0] // len(pair.parts), *shape[1:])
        values = [torch.tensor(numbers[name]).expand(rows) for name in pair.parts]
        tensors[prefix + pair.single] = torch.cat(values) if len(values) > 1 else values[0]
    return tensors


def assert_each_is_in_its_place(read: dict[str, torch.Tensor], shapes: Shapes) -> None:
    assert shapes_of(read) == shapes
    for number, name in enumerate(shapes):
        axes = read[name].ndim
        assert read[name][(0,) * axes] == read[name][(-1,) * axes] == number, name


def shapes_of(state: dict[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("name", NAMES)
def test_unet_names_are_those_that_diffusers_reads(name):
    arch = get(name)
    config = unet_config(arch)
    with torch.device("meta"):
        expected = shapes_of(UNet2DConditionModel(**config).state_dict())
    pairs = ldm_keys.unet_pairs(arch)
    written = marked(pairs, expected, PREFIXES["unet"])
    assert len(written) == len(pairs) == len(expected)
    assert_each_is_in_its_place(convert_ldm_unet_checkpoint(written, config), expected)


def test_vae_names_are_those_that_diffusers_reads():
    with torch.device("meta"):
        vae = AutoencoderKL(**SDXL_VAE)
    expected = shapes_of(vae.state_dict())
    written = marked(ldm_keys.vae_pairs((128, 256, 512, 512), 2), expected, PREFIXES["vae"])
    assert written["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert len(written) == len(expected)
    assert_each_is_in_its_place(convert_ldm_vae_checkpoint(written, vae.config), expected)


@pytest.mark.parametrize(("width", "layers"), [(768, 12), (1280, 3)])
def test_text_encoder_names_are_those_that_diffusers_reads(width, layers):
    config = CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, projection_dim=width,
                            num_hidden_layers=layers, num_attention_heads=width // 64)  # fmt: skip
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(config)
    expected = shapes_of(model.state_dict())
    if width == 768:
        del expected["text_projection.weight"]
        written = marked(ldm_keys.clip_pairs(layers), expected, PREFIXES["text_encoder"])
        read = convert_ldm_clip_checkpoint(written)
    else:
        prefix = PREFIXES["text_encoder_2"]
        written = marked(ldm_keys.open_clip_pairs(layers), expected, prefix)
        assert written[f"{prefix}transformer.resblocks.0.attn.in_proj_weight"].shape == (3840, 1280)
        read = convert_open_clip_checkpoint(model, written, prefix=prefix)
    assert_each_is_in_its_place(read, expected)


def test_sdxl_names_as_published():
    """Spot checks by hand: SDXL's file has 1,680 U-Net tensors, with these among them."""
    names = {pair.single for pair in ldm_keys.unet_pairs(get("sdxl"))}
    assert len(names) == 1680
    assert names >= {
        "label_emb.0.2.bias",
        "input_blocks.3.0.op.weight",
        "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight",
        "middle_block.1.transformer_blocks.9.attn2.to_v.weight",
        "middle_block.2.out_layers.3.weight",
        "output_blocks.2.2.conv.weight",
        "output_blocks.5.2.conv.bias",
        "output_blocks.8.0.skip_connection.weight",
        "out.2.weight",
    }


def seen_by_others(name: str) -> dict[str, object]:
    """What a reader of the original layout sees: its blocks counted level by level.

    ComfyUI tells KOALA from SDXL by these numbers, and SD.Next and others have it from there.
    """
    arch = get(name)
    shapes = tensor_shapes(arch)
    found = {pair.single: shapes[pair.parts[0]] for pair in ldm_keys.unet_pairs(arch)}

    def depth(block: str) -> int:
        return len(
            {n.split(".")[4] for n in found if n.startswith(f"{block}.1.transformer_blocks.")}
        )

    first = found["input_blocks.0.0.weight"][0]
    seen: dict[str, list[int]] = {"num_res_blocks": [0], "depth": [], "channel_mult": [0]}
    blocks = len({n.split(".")[1] for n in found if n.startswith("input_blocks.")})
    for i in range(1, blocks):
        if f"input_blocks.{i}.0.op.weight" in found:  # a new level
            seen["num_res_blocks"].append(0)
            seen["channel_mult"].append(0)
        else:
            seen["num_res_blocks"][-1] += 1
            seen["channel_mult"][-1] = found[f"input_blocks.{i}.0.out_layers.3.weight"][0] // first
            seen["depth"].append(depth(f"input_blocks.{i}"))
    attends = next(n for n in found if n.endswith("transformer_blocks.0.attn2.to_k.weight"))
    return {
        **seen,
        "output_depth": [depth(f"output_blocks.{i}") for i in reversed(range(blocks))],
        "middle": [depth("middle_block"), any(n.startswith("middle_block.0") for n in found)],
        "context": found[attends][1],
        "adm": found["label_emb.0.0.weight"][1],
        "linear": len(found[attends.split("transformer_blocks")[0] + "proj_in.weight"]) == 2,
    }


@pytest.mark.parametrize(
    ("name", "depth", "middle"), [("koala-700m", 5, [0, False]), ("koala-1b", 6, [6, True])]
)
def test_koala_is_what_others_take_for_koala(name, depth, middle):
    assert seen_by_others(name) == {
        "num_res_blocks": [1, 1, 1],
        "channel_mult": [1, 2, 4],
        "depth": [0, 2, depth],
        "output_depth": [0, 0, 2, 2, depth, depth],
        "middle": middle,
        "context": 2048,
        "adm": 2816,
        "linear": True,
    }


def test_an_upsampler_comes_after_the_attention_if_there_is_one():
    upsampler = "up_blocks.0.upsamplers.0.conv"
    assert ldm_keys.unet_module(upsampler, 1, attends=True) == "output_blocks.1.2.conv"
    assert ldm_keys.unet_module(upsampler, 1, attends=False) == "output_blocks.1.1.conv"
    vega = ldm_keys.unet_modules(get("segmind-vega"))
    assert vega["mid_block.resnets.0.conv1"] == "middle_block.0.in_layers.2"
    assert not any(name.startswith("middle_block.1") for name in vega.values())
    koala = ldm_keys.unet_modules(get("koala-700m"))
    assert not any(name.startswith("middle_block") for name in koala.values())


@given(
    height=st.integers(1, 5), width=st.integers(1, 5), parts=st.integers(1, 3), kind=st.booleans()
)
def test_split_undoes_join(height, width, parts, kind):
    names = tuple("qkv"[:parts])
    pair = Pair("x", names, transposed=kind and parts == 1, pointwise=not kind and parts == 1)
    own = {
        name: View((Stored(Path("f"), "F16", (height, width), 2 * k * height * width,
                           2 * height * width),))
        for k, name in enumerate(names)
    }  # fmt: skip
    joined = ldm_keys.join(pair, own)
    whole = joined.parts[0]._replace(
        shape=(parts * height, *joined.parts[0].shape[1:]), size=2 * parts * height * width
    )
    assert {n: v.parts[0] for n, v in ldm_keys.split(pair, whole).items()} == {
        name: view.parts[0] for name, view in own.items()
    }
    expected = (width, height) if pair.transposed else (parts * height, width)
    assert joined.shape[:2] == expected
