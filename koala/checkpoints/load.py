"""Loads the components of a checked model folder: U-Net, VAE, text encoders, noise schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.checkpoints.prediction import of_config
from koala.checkpoints.tensors import Stored, load_tensor, not_finite
from koala.checkpoints.validate import (
    check_unet,
    describe_faults,
    read_json,
    read_tensors,
    unet_architecture,
    variant_of,
)
from koala.errors import UserError

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


_LEAST_ABAR = 2.0**-24  # noise level 4096


def _load(model_class: Any, folder: Path, component: str, **options: Any) -> Any:
    """Loads a component in evaluation mode; `UserError` unless its weights fit its config."""
    stored = read_tensors(folder, component)
    model, info = model_class.from_pretrained(
        folder / component,
        **options,
        variant=variant_of(folder / component, component),
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    misshapen = (entry[0] for entry in info["mismatched_keys"])
    keys = (info["missing_keys"], info["unexpected_keys"], misshapen)
    if faults := describe_faults(*map(sorted, keys)):
        raise UserError(f"{folder}/{component}: the weights do not fit config.json: {faults}")
    _check_finite(model.state_dict(), stored)
    return model.eval()


def _check_finite(weights: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
    """Raises `UserError` naming the first weight that holds NaN or infinity."""
    for name, weight in weights.items():
        # The largest value tells: ten times faster than testing every element.
        if weight.is_floating_point() and weight.numel() and not weight.abs().max().isfinite():
            raise not_finite(stored.get(name, next(iter(stored.values()))), name)


def _load_diffusers(
    model_class: Any, folder: Path, component: str, dtype: torch.dtype | None
) -> Any:
    import torch

    # low_cpu_mem_usage needs accelerate, which is not a dependency.
    dtype = dtype or torch.float32
    return _load(model_class, folder, component, torch_dtype=dtype, low_cpu_mem_usage=False)


def load_unet(folder: Path, dtype: torch.dtype | None = None) -> UNet2DConditionModel:
    """The U-Net of a checked model folder, on the CPU; `dtype` None means float32.

    Tensor by tensor: without accelerate, diffusers' own loader holds every weight twice.
    """
    import torch
    from diffusers import UNet2DConditionModel

    stored = read_tensors(folder, "unet")
    check_unet(unet_architecture(folder), stored, folder)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read_json(folder / "unet" / "config.json"))
    kind = dtype or torch.float32
    # A copy, so that torch owns the memory and aligns it.
    weights = {name: load_tensor(one).to(kind, copy=True) for name, one in stored.items()}
    _check_finite(weights, stored)
    unet.load_state_dict(weights, assign=True)
    return unet.eval()


def load_vae(folder: Path, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """The VAE of a checked model folder, on the CPU; `dtype` None means float32."""
    from diffusers import AutoencoderKL

    return _load_diffusers(AutoencoderKL, folder, "vae", dtype)


def load_text(
    folder: Path, dtype: torch.dtype | None = None
) -> tuple[CLIPTokenizer, CLIPTokenizer, CLIPTextModel, CLIPTextModelWithProjection]:
    """(tokenizer, tokenizer_2, text_encoder, text_encoder_2) of a checked model folder.

    On the CPU; `dtype` None means float32.
    """
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    dtype = dtype or torch.float32
    with _no_bars():
        return (
            CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
            CLIPTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True),
            _load(CLIPTextModel, folder, "text_encoder", dtype=dtype),
            _load(CLIPTextModelWithProjection, folder, "text_encoder_2", dtype=dtype),
        )


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Disables transformers' progress bars inside the block."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def load_scheduler_config(folder: Path) -> dict[str, Any]:
    """The scheduler config, as diffusers writes it."""
    return read_json(folder / "scheduler" / "scheduler_config.json")


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """abar_t = prod (1 - beta_s) of a scheduler config, float32 [levels], for every timestep t.

    Ho et al. 2020, equation 4, with the scaled-linear betas of Rombach et al. 2022. For zero
    terminal SNR, sqrt(abar) is shifted and scaled so that it ends at 0 (arXiv 2305.08891,
    algorithm 1); the last is then 2**-24, so that its noise level is finite, as in diffusers.
    """
    import torch

    roots = torch.linspace(
        config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, config["num_train_timesteps"]
    )
    abar = torch.cumprod(1.0 - roots**2, dim=0)
    if not of_config(config).zero_snr:
        return abar
    root = abar.sqrt()
    rescaled = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    rescaled[-1] = _LEAST_ABAR
    return rescaled
