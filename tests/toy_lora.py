"""Random LoRAs for toy models, in any spelling."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from koala.architectures.config import from_unet_config
from koala.lora.names import BaseModel, Target, TextEncoder, shapes, spellings
from toy import TEXT_WIDTHS

# Spellings of the U-Net and of the text encoders, and how tensors' names end in each.
KOHYA_ENDINGS = (".lora_down.weight", ".lora_up.weight")
FORMS = {
    "kohya": (("kohya, original names", *KOHYA_ENDINGS), ("kohya, text", *KOHYA_ENDINGS)),
    "kohya of diffusers": (
        ("kohya, diffusers names", *KOHYA_ENDINGS),
        ("kohya, text", *KOHYA_ENDINGS),
    ),
    "diffusers": (
        ("diffusers", ".lora.down.weight", ".lora.up.weight"),
        ("diffusers, text", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ),
    "PEFT": (
        ("diffusers", ".lora_A.weight", ".lora_B.weight"),
        ("diffusers, text", ".lora_A.weight", ".lora_B.weight"),
    ),
    "PEFT alone": (("PEFT", ".lora_A.weight", ".lora_B.weight"), ("", "", "")),
    "old diffusers": (
        ("diffusers, processors", "_lora.down.weight", "_lora.up.weight"),
        ("diffusers, old text", "_lora.down.weight", "_lora.up.weight"),
    ),
}
TOY_TEXT = (
    TextEncoder(layers=2, width=TEXT_WIDTHS[0], inner=2 * TEXT_WIDTHS[0], projection=0),
    TextEncoder(3, TEXT_WIDTHS[1], 2 * TEXT_WIDTHS[1], TEXT_WIDTHS[1]),
)


def toy_base(unet: torch.nn.Module) -> BaseModel:
    """What a LoRA for a toy U-Net and the toy text encoders is for."""
    return BaseModel(from_unet_config(unet.config), TOY_TEXT)


def toy_lora(
    file: Path,
    base: BaseModel,
    form: str = "kohya",
    select: Callable[[Target], bool] = lambda target: True,
    rank: int = 2,
    alpha: float | None = None,
    seed: int = 0,
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a random LoRA for the modules of `base` that the form can name and returns its path.

    It changes what a module gives by some 5%; without `alpha` there are no such tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for target, weight in shapes(base).items():
        spelling, down, up = FORMS[form][target.part != "unet"]
        stem = spellings(base).get(spelling, {}).get(target)
        if stem is None or not select(target):
            continue
        inner, ones = math.prod(weight[1:]), (1,) * len(weight[2:])
        strength = 0.05 / math.sqrt(inner)
        tensors[stem + down] = torch.randn(rank, *weight[1:], generator=generator)
        tensors[stem + up] = strength * torch.randn(weight[0], rank, *ones, generator=generator)
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file({name: t.to(dtype) for name, t in tensors.items()}, file, metadata)
    return file
