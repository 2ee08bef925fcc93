"""U-Net and VAE encoder run by PyTorch."""

from torch import Tensor

from koala.checkpoints.latent_scale import LatentScale
from koala.generation.decode import computed
from koala.generation.denoise import Condition, Predict
from koala.generation.row_tiling import encode_tiled
from koala.utils.device import device_and_dtype, to_device
from koala.utils.networks import AutoencoderKL, UNet2DConditionModel, without_peft


def predictor(unet: UNet2DConditionModel) -> Predict:
    """The U-Net run by PyTorch, on its device and in its dtype."""

    def predict(x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        device, dtype = device_and_dtype(unet)
        own = condition.to(device, dtype)
        with without_peft():
            (epsilon,) = unet(
                x.to(device, dtype),
                to_device(timesteps, device),
                encoder_hidden_states=own.text,
                added_cond_kwargs={"text_embeds": own.pooled, "time_ids": own.time_ids},
                return_dict=False,
            )
        return epsilon.float()

    return predict


def encode_image(vae: AutoencoderKL, pixels: Tensor, tiled: bool = False) -> Tensor:
    """Latents float32 [n, c, h, w] as the U-Net sees them, of pixels [n, 3, 8h, 8w] in -1..1.

    They are the posterior's mode, not a sample, as in diffusers' image-to-image pipeline. tiled:
    with row tiling, which takes less memory (`koala.generation.row_tiling`).
    """

    def mode(x: Tensor) -> Tensor:
        return encode_tiled(vae, x) if tiled else vae.encode(x).latent_dist.mode()

    z = computed(vae, mode, pixels)
    return LatentScale(vae.config, z.device).normalise(z)
