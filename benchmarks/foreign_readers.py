"""Our single files, read by programs that are not ours.

    pip install sd-mecha einops
    git clone https://github.com/Stability-AI/generative-models  # measured: commit 0ad7de9
    PYTHONPATH=.:tests python -m benchmarks.foreign_readers --sgm generative-models

sgm is the code that SDXL was published with, and has no package; its U-Net and VAE load our file,
strictly, and must draw what diffusers draws from our folder (it cannot build a U-Net without a
middle block, as KOALA-700M's). sd-mecha, a merger of models, brings its own list of the tensors of
SDXL's file, which must be ours. diffusers' reader is part of the tests
(`tests/checkpoints/test_convert.py`, `tests/checkpoints/test_ldm_keys.py`). The result goes to
`foreign_readers.json` beside this file.
"""

import argparse
import importlib
import sys
import tempfile
import types
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file

from benchmarks.record import keep
from koala.architectures.config import from_unet_config, unet_config
from koala.architectures.table import get
from koala.checkpoints import ldm_keys
from koala.checkpoints.convert import convert
from published import published
from toy import TEXT_WIDTHS, TIME_EMBED, TOKENS, toy_pipeline

BOUND = 1e-5  # of the largest value, float32


def sd_mecha() -> dict[str, object]:
    """Whether SDXL's file as we write it has the tensors that sd-mecha knows, in their shapes."""
    from sd_mecha.extensions import model_configs

    known = model_configs.resolve("sdxl-sgm").keys()
    ours = published("sdxl")
    needed = {name for name, key in known.items() if not key.optional}
    return {
        "version": version("sd-mecha"),
        "tensors": len(ours),
        "missing": sorted(needed - ours.keys()),
        "unknown": sorted(ours.keys() - known.keys()),
        "misshapen": [n for n in ours if n in known and tuple(known[n].shape) != ours[n]],
    }


def sgm_module(checkout: Path, name: str) -> types.ModuleType:
    """A module of sgm, without what its packages import (training, video, embedders)."""
    for package in ("sgm", "sgm.modules", "sgm.modules.encoders"):
        if package not in sys.modules:
            module = types.ModuleType(package)
            module.__path__ = [str(checkout / package.replace(".", "/"))]
            sys.modules[package] = module
    return importlib.import_module(f"sgm.modules.{name}")


def pipeline_of(name: str, folder: Path) -> Path:
    """A random pipeline with a known U-Net, as narrow as sgm's norms of 32 groups allow."""
    torch.manual_seed(0)
    arch = replace(
        get(name), widths=(32, 64, 128), heads=(1, 2, 4), groups=32,
        context=sum(TEXT_WIDTHS), pooled=TEXT_WIDTHS[1], time_ids=TIME_EMBED,
    )  # fmt: skip
    toy_pipeline(folder)
    UNet2DConditionModel(**unet_config(arch)).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    return folder


@torch.no_grad()
def sgm(checkout: Path, name: str, work: Path) -> dict[str, float]:
    """Largest differences between sgm, from our file, and diffusers, from the folder."""
    folder = pipeline_of(name, work / name)
    tensors = load_file(convert(folder, "single-file", work / f"{name}.safetensors").out)
    parts = {
        component: {n.removeprefix(p): t for n, t in tensors.items() if n.startswith(p)}
        for component, p in ldm_keys.PREFIXES.items()
    }
    g = torch.Generator().manual_seed(1)
    ours = UNet2DConditionModel.from_pretrained(folder / "unet")
    arch = from_unet_config(ours.config)
    theirs = sgm_module(checkout, "diffusionmodules.openaimodel").UNetModel(
        in_channels=4, out_channels=4, model_channels=32, num_res_blocks=arch.layers,
        attention_resolutions=[4, 2], channel_mult=[1, 2, 4], num_head_channels=32,
        use_linear_in_transformer=True, transformer_depth=[max(1, d) for d in arch.depths],
        context_dim=arch.context, num_classes="sequential",
        adm_in_channels=arch.pooled + 6 * arch.time_ids,
    )  # fmt: skip
    theirs.load_state_dict(parts["unet"], strict=True)
    x, text = (
        torch.randn(2, 4, 16, 16, generator=g),
        torch.randn(2, TOKENS, arch.context, generator=g),
    )
    pooled, sizes = (
        torch.randn(2, arch.pooled, generator=g),
        torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
    )
    time = torch.tensor([3, 700])
    added = {"text_embeds": pooled, "time_ids": sizes}
    vector = torch.cat([pooled, ours.add_time_proj(sizes.flatten()).reshape(2, -1)], 1)
    expected = ours(x, time, text, added_cond_kwargs=added).sample
    differences = {"unet": relative(theirs(x, time, context=text, y=vector), expected)}

    vae = AutoencoderKL.from_pretrained(folder / "vae")
    module = sgm_module(checkout, "diffusionmodules.model")
    settings = {
        "ch": 32, "out_ch": 3, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 2, "in_channels": 3,
        "attn_resolutions": [], "resolution": 64, "z_channels": 4,
    }  # fmt: skip
    for side, given in (
        ("encoder", torch.randn(1, 3, 64, 64, generator=g)),
        ("decoder", x[:1, :, :8, :8]),
    ):
        network = getattr(module, side.capitalize())(**settings)
        own = {n.removeprefix(f"{side}."): t for n, t in parts["vae"].items() if n.startswith(side)}
        network.load_state_dict(own, strict=True)
        differences[side] = relative(network(given), getattr(vae, side)(given))
    return differences


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sgm", type=Path, required=True, help="checkout of generative-models")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_suffix(".json"), help="the result"
    )
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        drawn = {n: sgm(o.sgm, n, Path(work)) for n in ("sdxl", "bk-sdxl", "koala-1b")}
    result = {"torch": torch.__version__, "bound": BOUND, "sgm": drawn, "sd-mecha": sd_mecha()}
    keep(o.out, result)
    listed = result["sd-mecha"]
    wrong = [k for k in ("missing", "unknown", "misshapen") if listed[k]]
    wrong += [n for n, found in drawn.items() if max(found.values()) > BOUND]
    sys.exit(f"differs: {wrong}" if wrong else 0)


if __name__ == "__main__":
    main()
