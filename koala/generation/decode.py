"""Latents to images: the whole VAE, the VAE with row tiling, or a tiny autoencoder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from koala.architectures.table import FACTOR, LATENT_CHANNELS
from koala.checkpoints.latent_scale import LatentScale
from koala.checkpoints.load import without_weights
from koala.checkpoints.resolve import HUB_ID
from koala.checkpoints.schema import checked
from koala.checkpoints.tensors import load_tensor, read_header
from koala.checkpoints.validate import read_json
from koala.errors import UserError
from koala.generation.pixels import Decode, finished
from koala.generation.row_tiling import POSITIONS, decode_tiled
from koala.utils.device import device_and_dtype
from koala.utils.networks import AutoencoderKL, AutoencoderTiny

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny

TINY = "vae_tiny"  # where a model folder keeps its tiny autoencoder
TINY_FILE = "diffusion_pytorch_model.safetensors"


def full(vae: AutoencoderKL) -> Decode:
    """The VAE's decoder as it is, all images at once."""
    return _finite(vae, lambda z: vae.decode(z).sample, partial(vae_latents, vae))


def whole(autoencoder: Autoencoder) -> Decode:
    """`full` of a VAE, `tiny` of a tiny one."""
    how: Callable[[Any], Decode] = tiny if isinstance(autoencoder, AutoencoderTiny) else full
    return how(autoencoder)


def tiled(vae: AutoencoderKL, positions: int = POSITIONS) -> Decode:
    """The VAE's decoder with row tiling (`koala.generation.row_tiling`), one image at a time.

    Less than half the memory of `full`, and the same image within 1e-4 in float32.
    """

    def run(z: Tensor) -> Tensor:
        return torch.cat([decode_tiled(vae, one[None], positions) for one in z])

    return _finite(vae, run, partial(vae_latents, vae))


def tiny(autoencoder: AutoencoderTiny) -> Decode:
    """A tiny autoencoder, one image at a time: close to the VAE's images at a tenth of the cost.

    It takes latents as the U-Net sees them, whatever the VAE's scale.
    """

    def run(z: Tensor) -> Tensor:
        return torch.cat([autoencoder.decode(one[None]).sample.float() for one in z])

    return _finite(autoencoder, run, lambda latents: latents / autoencoder.config.scaling_factor)


def _finite(model: nn.Module, run: Decode, prepared: Decode) -> Decode:
    """`run` on `prepared` latents, in float32 if it overflows: SDXL's own VAE does in float16."""

    def decode(latents: Tensor) -> Tensor:
        return finished(computed(model, run, prepared(latents)), latents)

    return decode


def computed(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """run(x), float32: computed in the model's dtype, and in float32 if that overflows."""
    device, dtype = device_and_dtype(model)
    y = run(x.to(device, dtype)).float()
    if dtype != torch.float32 and not y.isfinite().all():
        nn.Module.to(model, torch.float32)  # diffusers' own `to` warns where nothing is wrong
        y = run(x.to(device, torch.float32))
        nn.Module.to(model, dtype)  # loses nothing: the values came from there
    return y


def vae_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents as the VAE made them, float32, of latents as the U-Net sees them."""
    return LatentScale(vae.config, latents.device).denormalise(latents.float())


# --- tiny autoencoders ----------------------------------------------------------------------


def load_tiny(source: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderTiny:
    """An `AutoencoderTiny` on the CPU: of a folder, of a model's `vae_tiny`, or of a Hub id.

    A Hub id (such as madebyollin/taesdxl) is downloaded unless the local cache has it. UserError
    for anything else, and for an autoencoder that does not fit SDXL's latents.
    """
    folder = tiny_folder(source)
    file = folder / "config.json"
    config = checked(f"{TINY}/config.json", read_json(file), str(file))
    if config.get("_class_name") != "AutoencoderTiny":
        raise UserError(f"{folder} holds a {config.get('_class_name')}, not an AutoencoderTiny")
    with without_weights():
        model = AutoencoderTiny.from_config(config)
    assert isinstance(model, AutoencoderTiny)
    factor = _upscaling(model.config)
    if (model.config.latent_channels, factor) != (LATENT_CHANNELS, FACTOR):
        raise UserError(
            f"{folder} decodes {model.config.latent_channels} channels {factor}-fold; SDXL's "
            f"latents have {LATENT_CHANNELS} and are enlarged {FACTOR}-fold"
        )
    stored = read_header(folder / TINY_FILE)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if wanted != {name: tensor.shape for name, tensor in stored.items()}:
        raise UserError(f"{folder / TINY_FILE} does not fit its config.json; fetch it again")
    weights = {name: load_tensor(tensor) for name, tensor in stored.items()}
    model.load_state_dict(weights, assign=True)
    nn.Module.to(model, dtype)  # diffusers' own `to` warns of an empty list of modules
    return model.eval().requires_grad_(False)


def _upscaling(config: Any) -> int:
    return int(config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1))


def tiny_folder(source: str | Path) -> Path:
    """The folder of its config.json; downloads a Hub id. UserError as for `load_tiny`."""
    path = Path(source).expanduser()
    for folder in (path / TINY, path):
        if (folder / "config.json").is_file():
            return folder
    if not path.exists() and isinstance(source, str) and HUB_ID.fullmatch(source):
        return _fetched(source)
    raise UserError(
        f"no tiny autoencoder at {str(source)!r}: name a folder with the config.json and "
        f"{TINY_FILE} of an AutoencoderTiny, or a Hub id such as madebyollin/taesdxl"
    )


def _fetched(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["config.json", TINY_FILE]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"tiny autoencoder {hub_id!r} is no local folder and cannot be downloaded from the "
            f"Hub ({reason})"
        ) from None
