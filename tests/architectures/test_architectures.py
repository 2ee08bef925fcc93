"""Architectures: the computed numbers against the published ones and against the real classes."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from koala.architectures.block_map import block_map
from koala.architectures.config import from_unet_config, unet_config
from koala.architectures.flops import flops, format_table, table
from koala.architectures.layout import parameters, tensor_shapes
from koala.architectures.table import ARCHITECTURES, UNetArchitecture, get, student_of
from koala.errors import UserError

TOTALS = {
    "sdm-v2.0": 865_910_724,
    "sdxl": 2_567_463_684,
    "bk-sdxl": 1_717_277_764,
    "koala-1b": 1_161_184_324,
    "koala-700m": 782_822_724,
    "ssd-1b": 1_331_334_404,
    "segmind-vega": 745_225_604,
}
TFLOP = {"sdxl": (6.76, 1.59), "koala-1b": (3.43, 0.80), "koala-700m": (2.70, 0.62)}
TINY = replace(
    get("sdxl"), widths=(8, 16, 32), heads=(1, 2, 4), depths=(0, 1, 3), mid=3,
    context=20, up=((3, 3, 3), (1, 1, 1), (0, 0, 0)), pooled=12, time_ids=4, groups=4, sample=8,
)  # fmt: skip


def on_meta(arch: UNetArchitecture) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**unet_config(arch))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensors_and_config_are_those_of_the_real_class(name):
    arch = get(name)
    unet = on_meta(arch)
    real = {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}
    assert tensor_shapes(arch) == real
    assert parameters(arch) == unet.num_parameters()
    found = [from_unet_config(config) for config in (unet.config, unet_config(arch))]
    assert found == [arch, arch]
    assert {row.name for row in found} == {name}


@pytest.mark.parametrize("name", TOTALS)
def test_published_totals_to_the_unit(name):
    assert parameters(get(name)) == TOTALS[name]


@pytest.mark.parametrize("name", TFLOP)
def test_published_cost(name):
    tflop = [round(flops(get(name), side, side, 77) / 1e12, 2) for side in (1024, 512)]
    assert tuple(tflop) == TFLOP[name]


@pytest.mark.parametrize("arch", [TINY, student_of(TINY, "koala-700m"), get("sdxl-mini")])
@pytest.mark.parametrize("size", [(64, 64), (72, 40)])
def test_cost_is_what_torch_counts(arch, size):
    """Exactly, on the plain attention kernel, whose two products torch counts as such."""
    unet = UNet2DConditionModel(**unet_config(arch)).eval()
    height, width = size
    text, added = torch.zeros(1, 7, arch.context), torch.zeros(1, arch.pooled)
    conditions = {"text_embeds": added, "time_ids": torch.zeros(1, 6)}
    latents = torch.zeros(1, 4, height // 8, width // 8)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        unet(latents, 1, text, added_cond_kwargs=conditions)
    assert counter.get_total_flops() == flops(arch, height, width, 7)


def test_one_rule_cuts_every_size():
    for cut, big, small in [
        ("koala-700m", "koala-700m", "koala-mini"),
        ("koala-1b", "koala-1b", "koala-mini-1b"),
    ]:
        assert student_of(get("sdxl"), cut).name == big
        assert student_of(get("sdxl-mini"), cut).name == small
    assert get("koala-700m").depths == (0, 2, 5)
    assert get("koala-700m").mid is None
    assert get("koala-1b").depths == (0, 2, 6)
    assert get("koala-1b").mid == 6
    assert get("koala-mini").depths == (0, 1, 1)
    assert get("koala-mini").mid is None
    assert student_of(TINY, "koala-700m").name == "koala-700m of sdxl"


def test_labels_do_not_change_identity():
    assert from_unet_config({**unet_config(get("sdxl")), "sample_size": 64}).name == "sdxl"
    assert from_unet_config(unet_config(TINY)).name == "custom"
    mini = from_unet_config(unet_config(get("sdxl-mini")))
    assert (mini.name, mini.tokens, mini.sample) == ("sdxl-mini", 32, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 9}, "in_channels is 9"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"up_block_types": ["UpBlock2D"]}, "another number of blocks"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "'AttnDownBlock2D'"),
        ({"attention_head_dim": [5, 10]}, "another number of depths"),
        ({"reverse_transformer_layers_per_block": [[1], 1, 1]}, "up blocks have 3 layers"),
        ({"layers_per_block": [1, 2, 2]}, "layers_per_block must be one number"),
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name is 'FluxTransformer2DModel'"),
        ({"block_out_channels": None}, "lacks block_out_channels"),
    ],
)
def test_strange_configurations_are_refused(change, message):
    config = {k: v for k, v in {**unet_config(get("sdxl")), **change}.items() if v is not None}
    with pytest.raises(UserError, match=message):
        from_unet_config(config)


def test_wrong_names_and_teachers_are_refused():
    with pytest.raises(UserError, match=r"'sdxxl'.*koala-700m"):
        get("sdxxl")
    with pytest.raises(UserError, match=r"'koala-2b'.*koala-1b"):
        student_of(get("sdxl"), "koala-2b")
    for name, fault in [
        ("segmind-vega", "cut to koala-700m, .*: it has a mid block without .*; give depths, at"),
        ("ssd-1b", "cut to koala-700m, .*: it has a mid block without .*; has up blocks"),
        ("sdm-v2.0", "the teacher: has no addition embedding"),
    ]:
        with pytest.raises(UserError, match=f"{name} cannot be {fault}"):
            student_of(get(name), "koala-700m")


@pytest.mark.parametrize(
    ("teacher", "to", "student"),
    [
        ("koala-1b", "koala-700m", "koala-700m"),
        ("koala-mini-1b", "koala-700m", "koala-mini"),
        ("bk-sdxl", "koala-1b", "koala-1b"),
        ("koala-700m", "koala-700m", "koala-700m"),
        ("koala-1b", "0,2,5,no-mid", "koala-700m"),
        ("segmind-vega", "0,1,2,no-mid", "custom"),
    ],
)
def test_a_teacher_may_be_a_student(teacher, to, student):
    found = student_of(get(teacher), to)
    assert found.name == student
    assert block_map(get(teacher), found)["conv_in"] == "conv_in"


@pytest.mark.parametrize(
    ("teacher", "to"),
    [("koala-700m", "koala-1b"), ("ssd-1b", "0,2,4,no-mid"), ("koala-1b", "bk-sdxl")],
)
def test_what_the_teacher_has_not_cannot_be_inherited(teacher, to):
    with pytest.raises(UserError, match=f"cannot inherit from {teacher}"):
        block_map(get(teacher), student_of(get(teacher), to))


def test_table_and_its_text():
    rows = table()
    assert [row["name"] for row in rows] == list(ARCHITECTURES)
    koala = next(row for row in rows if row["name"] == "koala-700m")
    assert koala["parameters"] == TOTALS["koala-700m"]
    assert koala["depths"] == [0, 2, 5]
    assert round(koala["fp32_checkpoint_gb"], 2) == 3.13
    assert round(koala["tflop"], 2) == 2.70
    text = format_table(rows).splitlines()
    assert len(text) == len(rows) + 1
    assert max(map(len, text)) <= 100
    line = next(line for line in text if line.startswith("koala-700m"))
    assert line.split() == ["koala-700m", "782,822,724", "3.13", "[0,2,5]", "none", "1024", "2.70"]


def test_needs_no_torch():
    code = (
        "import sys; from koala.architectures.flops import format_table, table; "
        "format_table(table()); assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
