"""U-Net, ControlNet and VAE encoder run by PyTorch."""

from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor

from koala.checkpoints.latent_scale import LatentScale
from koala.generation.decode import computed
from koala.generation.denoise import Condition, Predict, Residuals
from koala.generation.row_tiling import encode_tiled
from koala.utils.device import device_and_dtype, to_device
from koala.utils.networks import AutoencoderKL, ControlNetModel, UNet2DConditionModel, without_peft


def predictor(unet: UNet2DConditionModel) -> Predict:
    """The U-Net run by PyTorch, on its device and in its dtype."""

    def predict(x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        device, dtype = device_and_dtype(unet)
        own, given = (
            condition.to(device, dtype),
            (x.to(device, dtype), to_device(timesteps, device)),
        )
        down = mid = None
        if own.hint is not None:
            down, mid = own.hint.net(*given, own)
        image = own.image
        with (
            nullcontext() if image is None else image.attached(unet, image.tokens, image.scale),
            without_peft(),
        ):
            (epsilon,) = unet(
                *given,
                encoder_hidden_states=own.text,
                added_cond_kwargs={"text_embeds": own.pooled, "time_ids": own.time_ids},
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
                return_dict=False,
            )
        return epsilon.float()

    return predict


def residuals_of(net: ControlNetModel, takes: Sequence[int]) -> Residuals:
    """What a ControlNet adds to a U-Net whose places take these of its residuals.

    takes: as of `koala.architectures.skip_map`. The network is on the U-Net's device, in its dtype.
    """

    def residuals(
        x: Tensor, timesteps: Tensor, condition: Condition
    ) -> tuple[list[Tensor], Tensor]:
        hint = condition.hint
        assert hint is not None
        with without_peft():
            down, mid = net(
                x,
                timesteps,
                encoder_hidden_states=condition.text,
                controlnet_cond=hint.image.to(x),
                added_cond_kwargs={
                    "text_embeds": condition.pooled,
                    "time_ids": condition.time_ids,
                },
                return_dict=False,
            )
        scale = hint.scale.to(x)[:, None, None, None]
        every = [scale * residual for residual in (*down, mid)]
        *own, last = (every[i] for i in takes)
        return own, last

    return residuals


def encode_image(vae: AutoencoderKL, pixels: Tensor, tiled: bool = False) -> Tensor:
    """Latents float32 [n, c, h, w] as the U-Net sees them, of pixels [n, 3, 8h, 8w] in -1..1.

    They are the posterior's mode, not a sample, as in diffusers' image-to-image pipeline. tiled:
    with row tiling, which takes less memory (`koala.generation.row_tiling`).
    """

    def mode(x: Tensor) -> Tensor:
        return encode_tiled(vae, x) if tiled else vae.encode(x).latent_dist.mode()

    z = computed(vae, mode, pixels)
    return LatentScale(vae.config, z.device).normalise(z)
