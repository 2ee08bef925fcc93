"""DoRA, LoHa and LoKr: merged and apart, as PEFT itself merges them, and carried to a student."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from koala.checkpoints.inspect import inspect
from koala.lora import kinds
from koala.lora.adapters import Attached, merge
from koala.lora.conversion import write_converted
from koala.lora.names import Target, shapes
from koala.lora.reading import read
from toy import toy_unet
from toy_lora import toy_base

MODULES = ["to_q", "to_out.0", "conv1", "proj_in", "conv_shortcut", "time_emb_proj"]
SHARED = {"target_modules": MODULES}
CONFIGS = {
    "DoRA": LoraConfig(r=3, lora_alpha=5, use_dora=True, init_lora_weights=False, **SHARED),
    "LoHa": LoHaConfig(r=3, alpha=5, init_weights=False, **SHARED),
    "LoHa, Tucker": LoHaConfig(
        r=3, alpha=5, init_weights=False, use_effective_conv2d=True, **SHARED
    ),
    "LoKr": LoKrConfig(r=3, alpha=5, init_weights=False, **SHARED),
    "LoKr, Tucker": LoKrConfig(
        r=2, alpha=5, init_weights=False, use_effective_conv2d=True, **SHARED
    ),
    "LoKr, both factored": LoKrConfig(
        r=1, alpha=5, init_weights=False, decompose_both=True, decompose_factor=4, **SHARED
    ),
    "LoKr, whole": LoKrConfig(r=64, alpha=32, init_weights=False, **SHARED),
}


def seeded(architecture: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return toy_unet(architecture).requires_grad_(False)


SDXL, KOALA = toy_base(seeded("sdxl", 1)), toy_base(seeded("koala", 2))
TEACHER = SDXL.unet


def modules_of(unet: nn.Module) -> dict[Target, nn.Module]:
    linear = (nn.Linear, nn.Conv2d)
    return {Target("unet", n): m for n, m in unet.named_modules() if isinstance(m, linear)}


@pytest.fixture(params=CONFIGS)
def trained(request, tmp_path) -> tuple[str, Path]:
    """A random adapter that PEFT itself has written, of a toy SDXL."""
    torch.manual_seed(0)
    model = get_peft_model(seeded("sdxl", 1), copy.deepcopy(CONFIGS[request.param]))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:  # as training moves them
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
        elif any(mark in name for mark in ("lora_", "hada_", "lokr_")):
            parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "peft")
    return request.param, tmp_path / "peft" / "adapter_model.safetensors"


def weights(unet: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in unet.state_dict().items()}


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def test_merged_equals_pefts_own_merge(trained):
    name, file = trained
    plain = weights(seeded("sdxl", 1))
    theirs = PeftModel.from_pretrained(seeded("sdxl", 1), file.parent).merge_and_unload()
    ours = seeded("sdxl", 1)
    lora = read(file, SDXL)
    assert lora.report.kinds == [name.split(",")[0]] and not lora.report.left_out
    merge(modules_of(ours), lora)
    assert difference(weights(ours), weights(theirs)) < 1e-5
    assert difference(weights(ours), plain) > 1e-2


def test_apart_is_as_merged_at_any_scale(trained):
    _, file = trained
    lora, x = read(file, SDXL), torch.Generator().manual_seed(0)
    for scale in (1.0, -0.4):
        apart, merged = seeded("sdxl", 1), seeded("sdxl", 1)
        attached = Attached(modules_of(apart), lora, scale)
        merge(modules_of(merged), lora, scale)
        for target, module in modules_of(apart).items():
            if target in lora.adapters:
                inner = module.weight.shape[1]
                ends = (6, 6) if isinstance(module, nn.Conv2d) else ()
                given_x = torch.randn((2, inner, *ends), generator=x)
                expected = modules_of(merged)[target](given_x)
                torch.testing.assert_close(module(given_x), expected, atol=1e-4, rtol=1e-4)
        attached.remove()
        assert difference(weights(apart), weights(seeded("sdxl", 1))) == 0


def test_it_is_carried_to_the_student_by_the_block_map(trained, tmp_path):
    """Each student's block takes what the teacher's block that it inherits from was given."""
    _, file = trained
    lora = read(file, KOALA, TEACHER)
    assert lora.report.dropped and lora.made_for == SDXL
    student, teacher = seeded("koala", 2), seeded("sdxl", 1)
    sources = {target: source for source, target in lora.moves.items()}
    of_student, of_teacher = modules_of(student), modules_of(teacher)
    for target in lora.adapters:  # the weights that a cut student begins with
        of_student[target].weight.copy_(of_teacher[sources[target]].weight)
    merge(of_student, lora)
    merge(of_teacher, read(file, SDXL))
    for target in lora.adapters:
        assert torch.equal(of_student[target].weight, of_teacher[sources[target]].weight)


def test_in_kohyas_spelling_it_is_the_same(trained, tmp_path):
    name, file = trained
    lora = read(file, KOALA, TEACHER)
    out = tmp_path / "kohya.safetensors"
    write_converted(lora, out)
    assert all(stem.startswith("lora_unet_") for stem in load_file(out))
    again = read(out, KOALA, TEACHER)
    assert again.made_for == KOALA and again.report.kinds == lora.report.kinds
    ours, theirs = seeded("koala", 2), seeded("koala", 2)
    merge(modules_of(ours), again)
    merge(modules_of(theirs), lora)
    assert difference(weights(ours), weights(theirs)) < 1e-6
    kind = name.split(",")[0]
    assert (
        f"a {kind}, which is applied to a model with `koala generate --lora`" in inspect(out).kind
    )


def test_lycoris_norms_by_output_and_by_input(tmp_path):
    """DoRA as LyCORIS stores it: of rows, and in its older files of columns."""
    target = Target("unet", "up_blocks.2.resnets.0.conv1")
    out, inner, *kernel = shapes(SDXL)[target]
    stem = "lora_unet_output_blocks_6_0_in_layers_2"
    torch.manual_seed(0)
    down, up = torch.randn(2, inner, *kernel), torch.randn(out, 2, 1, 1)
    for norms in (torch.rand(out, 1, 1, 1) + 1, torch.rand(1, inner, 1, 1) + 1):
        file = tmp_path / f"{norms.shape[0]}.safetensors"
        factors = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": norms}
        save_file({f"{stem}.{name}": t for name, t in factors.items()}, file)
        unet = seeded("sdxl", 1)
        whole = modules_of(unet)[target].weight + torch.einsum("orxy,rikl->oikl", up, down)
        axes = (1, 2, 3) if norms.shape[0] == out else (0, 2, 3)
        expected = whole * norms / whole.square().sum(axes, keepdim=True).sqrt()
        merge(modules_of(unet), read(file, SDXL))
        torch.testing.assert_close(modules_of(unet)[target].weight, expected)


def test_a_lokr_of_whole_matrices_has_no_alpha_in_lyco_files(tmp_path):
    """LyCORIS stores one of no meaning with it."""
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    target = Target("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    width = shapes(SDXL)[target][0]
    torch.manual_seed(0)
    first, second = torch.randn(4, 4), torch.randn(width // 4, width // 4)
    factors = {"lokr_w1": first, "lokr_w2": second, "alpha": torch.tensor(1e8)}
    save_file({f"{stem}.{name}": t for name, t in factors.items()}, tmp_path / "a.safetensors")
    unet = seeded("sdxl", 1)
    expected = modules_of(unet)[target].weight + torch.kron(first, second)
    merge(modules_of(unet), read(tmp_path / "a.safetensors", SDXL))
    torch.testing.assert_close(modules_of(unet)[target].weight, expected)


def test_a_scalar_that_is_not_multiplied_in_counts(tmp_path):
    """Also in the converted file, whose alpha has it."""
    target, stem = Target("unet", "time_embedding.linear_1"), "lora_unet_time_embed_0"
    out, inner = shapes(SDXL)[target]
    torch.manual_seed(0)
    down, up = torch.randn(2, inner), torch.randn(out, 2)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    tensors["scalar"] = torch.tensor(0.25)
    save_file({f"{stem}.{name}": t for name, t in tensors.items()}, tmp_path / "a.safetensors")
    lora = read(tmp_path / "a.safetensors", SDXL)
    write_converted(lora, tmp_path / "b.safetensors")
    for file in ("a.safetensors", "b.safetensors"):
        unet = seeded("sdxl", 1)
        expected = modules_of(unet)[target].weight + 0.5 * 0.25 * up @ down
        merge(modules_of(unet), read(tmp_path / file, SDXL))
        torch.testing.assert_close(modules_of(unet)[target].weight, expected)


def test_a_whole_difference_is_added(tmp_path):
    target, stem = Target("unet", "conv_in"), "lora_unet_input_blocks_0_0"
    change = torch.randn(shapes(SDXL)[target])
    save_file({f"{stem}.diff": change}, tmp_path / "a.safetensors")
    unet = seeded("sdxl", 1)
    expected = modules_of(unet)[target].weight + 0.5 * change
    merge(modules_of(unet), read(tmp_path / "a.safetensors", SDXL), 0.5)
    torch.testing.assert_close(modules_of(unet)[target].weight, expected)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_factors_that_fit_make_a_weight_of_that_shape(data):
    """And those that do not are never reshaped into one."""
    sizes = st.sampled_from([1, 2, 3, 4, 6])
    weight = tuple(data.draw(st.lists(sizes, min_size=2, max_size=2)))
    weight += data.draw(st.sampled_from([(), (3, 3)]))
    roles = data.draw(st.sampled_from([
        ("down", "up"), ("down", "mid", "up"),
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        ("lokr_w1", "lokr_w2"), ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
    ]))  # fmt: skip
    found = {}
    for role in roles:
        axes = 4 if role in ("mid", "lokr_w2") and len(weight) == 4 else 2
        shape = data.draw(st.tuples(*[sizes] * 2)) + (weight[2:] if axes == 4 else ())
        found[role] = (*shape, *weight[2:]) if role == "down" and len(weight) == 4 else shape
    if not kinds.fits(found, weight):
        return
    factors = {role: torch.ones(shape) for role, shape in found.items()}
    if "mid" in factors or len(weight) == 2 or "down" not in factors:
        assert kinds.change(factors, weight).shape == weight
    assert math.prod(kinds.change(factors, weight).shape) == math.prod(weight)
