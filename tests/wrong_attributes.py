"""What `make lint` must find: wrong attributes of the classes that KOALA works with.

Never run. mypy reads it with the package; were one of these errors not found, its "type: ignore"
would be unused, which is an error of its own.
"""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

import koala


def wrong(
    tensor: torch.Tensor,
    module: torch.nn.Module,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
) -> None:
    tensor.no_such_method()  # type: ignore[attr-defined]
    module.no_such_method()  # type: ignore[operator]
    unet.no_such_method()  # type: ignore[attr-defined]
    unet.to("cpu").no_such_method()  # type: ignore[attr-defined]
    vae.no_such_method()  # type: ignore[attr-defined]
    text_encoder.no_such_method()  # type: ignore[operator]
    koala.no_such_function()  # type: ignore[attr-defined]
    koala.load("koala-mini").no_such_method()  # type: ignore[attr-defined]
