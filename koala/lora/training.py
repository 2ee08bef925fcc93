"""A LoRA to be trained: PEFT's matrices on a U-Net, and the files that they are saved in.

Each LoRA is written twice, because programs read different spellings: diffusers' with PEFT's
settings in its metadata, and kohya's, which ComfyUI, AUTOMATIC1111's web UI and others read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.errors import UserError, unknown
from koala.lora import peft
from koala.lora.conversion import write_converted
from koala.lora.names import BaseModel
from koala.lora.reading import MADE_FOR, read, signature
from koala.utils.atomic import new_folder

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name of the file
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TRANSFORMERS = (*_ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
MODULES = {  # name -> endings of the paths of the layers that get matrices
    "attention": _ATTENTION,
    "transformers": _TRANSFORMERS,
    "all": (*_TRANSFORMERS, "conv1", "conv2"),
}
_ADAPTER = "default"  # PEFT's name of the only one


@dataclass(frozen=True)
class LoraSettings:
    """The size of a LoRA. UserError unless it can be."""

    rank: int = 16  # of each pair of matrices
    alpha: int | None = None  # they are multiplied by alpha / rank; none: the rank
    modules: str = "transformers"  # "attention", all linear layers of "transformers", or "all"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}: it must be 1 or more")
        if self.alpha is not None and self.alpha < 1:
            raise UserError(f"lora.alpha is {self.alpha}: it must be 1 or more, or none")
        if self.modules not in MODULES:
            raise unknown("lora.modules", self.modules, MODULES)

    def config(self) -> Any:
        """PEFT's config of it."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,
            target_modules=[*MODULES[self.modules]],
        )


def add_lora(unet: UNet2DConditionModel, settings: LoraSettings) -> None:
    """Freezes a U-Net and adds trainable fp32 matrices, which change nothing yet.

    Their first values come from torch's global generator.
    """
    unet.requires_grad_(False)
    unet.add_adapter(settings.config(), adapter_name=_ADAPTER)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def write_lora(
    weights: Mapping[str, Tensor], settings: LoraSettings, base: BaseModel, out: Path, name: str
) -> None:
    """Writes a LoRA to the folder `out`, replacing an older one, as `FILE` and as NAME.safetensors.

    weights: by their names in the U-Net that `add_lora` changed. base: the model of that U-Net;
    the files say so, so that they are not taken for those of its teacher.
    """
    from safetensors.torch import save_file

    tensors = {
        f"unet.{path.replace(f'.{_ADAPTER}.', '.')}": weight.contiguous()
        for path, weight in weights.items()
    }
    config = {
        f"unet.{key}": sorted(value) if isinstance(value, set) else value
        for key, value in settings.config().to_dict().items()
    }
    metadata = {
        "format": "pt",
        peft.METADATA_KEY: json.dumps(config, indent=2, sort_keys=True),
        MADE_FOR: signature(base.unet),
    }
    with new_folder(out, replace=True) as part:
        save_file(tensors, part / FILE, metadata)
        write_converted(read(part / FILE, base), part / f"{name}.safetensors")
