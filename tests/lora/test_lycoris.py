"""DoRA, LoHa, LoKr and LoCon as LyCORIS' own modules write, apply and merge them."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from koala.checkpoints import ldm_keys
from koala.lora.adapters import merge
from koala.lora.names import Target
from koala.lora.reading import read
from toy import toy_unet
from toy_lora import toy_base

pytest.importorskip("lycoris", reason="LyCORIS is in the dev extra")

from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

LAYERS = (  # a matrix, a kernel of 3 x 3, one of 1 x 1 and one with a stride
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.2.resnets.0.conv1",
    "up_blocks.2.resnets.0.conv_shortcut",
    "down_blocks.0.downsamplers.0.conv",
)
RANK = 3
DORA = {"weight_decompose": True}
KINDS = {
    "LoRA": (LoConModule, {}, "LoRA"),
    "LoRA, Tucker": (LoConModule, {"use_tucker": True}, "LoRA"),
    "LoRA, rank-stabilised": (LoConModule, {"rs_lora": True}, "LoRA"),
    "LoRA, a scalar": (LoConModule, {"use_scalar": True}, "LoRA"),
    "DoRA": (LoConModule, DORA, "DoRA"),
    "DoRA of columns": (LoConModule, {**DORA, "wd_on_out": False}, "DoRA"),
    "DoRA, Tucker": (LoConModule, {**DORA, "use_tucker": True}, "DoRA"),
    "LoHa": (LohaModule, {}, "LoHa"),
    "LoHa, Tucker": (LohaModule, {"use_tucker": True}, "LoHa"),
    "LoHa, a scalar": (LohaModule, {"use_scalar": True}, "LoHa"),
    "LoHa with DoRA": (LohaModule, DORA, "LoHa with DoRA"),
    "LoKr": (LokrModule, {"factor": 4}, "LoKr"),
    "LoKr, both factored": (LokrModule, {"factor": 2, "decompose_both": True}, "LoKr"),
    "LoKr, Tucker": (LokrModule, {"factor": 2, "use_tucker": True}, "LoKr"),
    "LoKr, whole": (LokrModule, {"full_matrix": True}, "LoKr"),
    "LoKr, unbalanced": (LokrModule, {"factor": 4, "unbalanced_factorization": True}, "LoKr"),
    "LoKr with DoRA": (LokrModule, {**DORA, "factor": 4}, "LoKr with DoRA"),
    "difference": (FullModule, {}, "difference"),
}


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return toy_unet("sdxl").requires_grad_(False)


@torch.no_grad()
def trained(unet: nn.Module, kind: str, alpha: float, file: Path) -> dict[str, nn.Module]:
    """Random modules of LyCORIS on copies of the layers; their file is as LyCORIS names it."""
    module, options, _ = KINDS[kind]
    paths = ldm_keys.unet_modules(toy_base(unet).unet)
    found, tensors = {}, {}
    torch.manual_seed(7)
    for path in LAYERS:
        stem = f"lora_unet_{paths[path].replace('.', '_')}"
        layer = copy.deepcopy(unet.get_submodule(path))
        found[path] = module(stem, layer, lora_dim=RANK, alpha=alpha, **options).eval()
        found[path].apply_to()
        for name, weight in found[path].named_parameters():
            if name == "dora_scale":  # as training moves it
                weight *= 1 + 0.1 * torch.rand_like(weight)
            else:
                weight += 0.3 * torch.randn_like(weight)
        tensors |= {f"{stem}.{name}": w for name, w in found[path].state_dict().items()}
    save_file({name: weight.contiguous() for name, weight in tensors.items()}, file)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [1.5, RANK], ids=["alpha 1.5", "alpha as rank"])
@torch.no_grad()
def test_merged_equals_lycoris_own(unet, kind, alpha, tmp_path):
    """What LyCORIS computes while it trains, and what it merges.

    LyCORIS 4.1.3 merges LoHa and LoKr with alpha / rank squared and without the scalar, though it
    trains with it once, and with the scalar; so its merge is compared where these are 1.
    """
    ones = alpha == RANK and "use_scalar" not in KINDS[kind][1]
    theirs = trained(unet, kind, alpha, tmp_path / "lyco.safetensors")
    lora = read(tmp_path / "lyco.safetensors", toy_base(unet))
    assert lora.report.kinds == [KINDS[kind][2]]
    assert lora.report.applied == len(LAYERS)
    ours = copy.deepcopy(unet)
    merge({Target("unet", path): ours.get_submodule(path) for path in LAYERS}, lora)
    for path, module in theirs.items():
        layer, before = ours.get_submodule(path), unet.get_submodule(path)
        ends = (6, 6) if isinstance(layer, nn.Conv2d) else ()
        x = torch.randn(2, before.weight.shape[1], *ends)
        if KINDS[kind][0] is not FullModule:  # whose bias differs too
            torch.testing.assert_close(layer(x), module(x), atol=1e-5, rtol=1e-5)
        if ones or isinstance(module, LoConModule | FullModule):
            merged, _ = module.get_merged_weight(1, layer.weight.shape)
            torch.testing.assert_close(layer.weight, merged, atol=1e-5, rtol=1e-5)
        assert (layer.weight - before.weight).abs().max() > 1e-2
