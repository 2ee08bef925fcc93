"""Weights in 8 and 4 bits: how far off, how small, and that layers stay what they are."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from koala.errors import UserError
from koala.generation.quantise import (
    GROUP,
    LARGEST,
    QuantisedConv2d,
    QuantisedLinear,
    quantise,
)
from koala.lora.adapters import Attached, merge, modules_of
from koala.lora.reading import read
from toy import seeded_unet, toy_inputs, toy_text_encoders
from toy_lora import toy_base, toy_lora

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(1e-2, 1e3),
    seed=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(sorted(LARGEST)),
)
def test_the_error_of_a_weight_is_within_its_bound(scale, seed, dtype, kind):
    draw = torch.Generator().manual_seed(seed)
    layer = nn.Linear(9, 5).requires_grad_(False).to(dtype)
    layer.weight.copy_(torch.randn(5, 9, generator=draw) * scale)
    layer.weight[0] = 0
    before = layer.weight.float()
    quantise(layer, kind)
    error = (layer.weight.float() - before).abs()
    step = layer.scale.float()
    # Besides its kind's own error, a weight is rounded to its dtype once in each of two places.
    rounding = 2 * torch.finfo(dtype).eps * LARGEST[kind] * step
    own = step / 2 if kind == "int8" else before.abs() / 16 + step * 2**-9
    if kind == "int4":  # in groups, the largest weights of which may be clipped
        step = step[:, 0]
        rounding = 2 * torch.finfo(dtype).eps * LARGEST[kind] * step
        own = torch.maximum(step / 2, before.abs().amax(1, keepdim=True) - LARGEST[kind] * step)
    assert (error <= own + rounding).all()
    assert layer.weight.dtype == dtype and (layer.weight[0] == 0).all()


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("fp8", 0.08), ("int4", 0.2)])
def test_a_quantised_u_net_predicts_nearly_the_same(kind, bound):
    unet, packed = seeded_unet(), seeded_unet()
    quantise(packed, kind)
    kinds = {type(m) for m in packed.modules()}
    assert {QuantisedLinear, QuantisedConv2d} <= kinds
    assert not {nn.Linear, nn.Conv2d} & kinds
    with torch.inference_mode():
        one, other = unet(**toy_inputs()).sample, packed(**toy_inputs()).sample
    assert 0 < (one - other).norm() / one.norm() < bound


def test_it_takes_a_byte_a_weight_and_little_else():
    for model in (seeded_unet().half(), *(e.half() for e in toy_text_encoders())):
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        numbers = sum(m.weight.numel() for m in layers)
        scales = sum(len(m.weight) for m in layers)
        before = size(model)
        quantise(model, "int8")
        assert size(model) == before - 2 * numbers + numbers + 2 * scales


def test_4_bits_take_half_a_byte_a_weight_and_a_scale_a_group():
    layer = nn.Linear(640, 320).half()
    layer.requires_grad_(False)
    quantise(layer, "int4")
    numbers = 640 * 320
    assert size(layer) == numbers // 2 + 2 * numbers // GROUP + 2 * 320
    assert layer.weight.shape == (320, 640)


def test_the_best_of_several_scales_is_taken():
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(GROUP, 64, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.randn(64, GROUP, generator=draw))
    before = layer.weight.clone()
    scale = before.abs().amax(1, keepdim=True) / LARGEST["int4"]
    plain = (before / scale).round().mul(scale).sub(before).square().sum()
    quantise(layer, "int4")
    assert (layer.weight - before).square().sum() < 0.9 * plain


def test_the_ends_of_a_u_net_stay_in_8_bits():
    unet = seeded_unet()
    quantise(unet, "int4")
    kinds = {name: m.kind for name, m in unet.named_modules() if hasattr(m, "kind")}
    ends = {name for name, kind in kinds.items() if kind == "int8"}
    parts = {re.match(r"[a-z]+_blocks\.\d|\w+", name)[0] for name in ends}
    assert parts == {
        "conv_in", "conv_out", "time_embedding", "add_embedding", "down_blocks.0", "up_blocks.2"
    }  # fmt: skip


def size(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("kind", sorted(LARGEST))
def test_dtype_layout_and_hooks_stay(kind):
    unet = seeded_unet().half().to(memory_format=torch.channels_last)
    seen = []
    unet.conv_in.register_forward_hook(lambda *_: seen.append(1))
    quantise(unet, kind)
    assert unet.dtype == torch.float16 and unet.device.type == "cpu"
    if kind != "int4":
        kernel = unet.down_blocks[0].resnets[0].conv1.values
        assert kernel.is_contiguous(memory_format=torch.channels_last)
    once = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    quantise(unet, kind)  # a second time changes nothing
    assert all(torch.equal(tensor, once[name]) for name, tensor in unet.state_dict().items())
    half = unet.conv_in.weight
    unet.float()  # another dtype to compute in, the same 8 bits
    assert torch.equal(unet.conv_in.weight.half(), half)
    with torch.inference_mode():
        unet(**toy_inputs())
    assert seen == [1]


def test_a_lora_works_beside_8_bits_and_is_not_lost_in_them(tmp_path):
    unet, encoders = seeded_unet(), toy_text_encoders()
    lora = read(toy_lora(tmp_path / "style.safetensors", toy_base(unet)), toy_base(unet))
    for model in (unet, *encoders):
        quantise(model, "int8")
    modules = modules_of(unet, *encoders)
    with pytest.raises(UserError, match=r"style\.safetensors cannot be merged"):
        merge(modules, lora)
    with torch.inference_mode():
        plain = unet(**toy_inputs()).sample
        attached = Attached(modules, lora)
        assert not torch.equal(unet(**toy_inputs()).sample, plain)
        attached.remove()
        assert torch.equal(unet(**toy_inputs()).sample, plain)
