"""A pipeline's networks as other programs call them: tensors in, tensors out, by optimum's names.

What diffusers' pipelines compute around a network and other programs do not know is inside: the
mean and deviation of latents. The config beside an exported VAE must not state them (`vae_config`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from koala.checkpoints.latent_scale import LatentScale
from koala.utils.networks import AutoencoderKL, UNet2DConditionModel


class Flat(nn.Module):
    """A network with named inputs and outputs, all of float32 but for token ids."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    examples: tuple[Tensor, ...]  # of the inputs


class FlatUNet(Flat):
    """sample [n, c, h, w], timestep [n], text [n, t, d], pooled [n, p], time ids [n, 6] -> epsilon.

    Timestep, pooled vector and time ids are taken in float32 whatever the weights' dtype: in half
    precision the graph would be invalid, which joins the vector to sinusoids of float32.
    """

    inputs = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")
    outputs = ("out_sample",)

    def __init__(self, unet: UNet2DConditionModel, tokens: int) -> None:
        super().__init__()
        self.unet = unet
        config = unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        # Sides that no downsampling divides: a tracer must see how odd ones are enlarged again.
        self.examples = (
            torch.randn(2, config.in_channels, 18, 22),
            torch.tensor([999.0, 1.0]),
            torch.randn(2, tokens, config.cross_attention_dim),
            torch.randn(2, pooled),
            torch.full((2, 6), 64.0),
        )

    def forward(
        self, sample: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor, ids: Tensor
    ) -> Tensor:
        dtype = self.unet.dtype
        added = {"text_embeds": pooled, "time_ids": ids}
        y = self.unet(
            sample.to(dtype), timestep, text.to(dtype), added_cond_kwargs=added, return_dict=False
        )[0]
        return y.float()


class FlatDecoder(Flat):
    """Latents [n, c, h, w], the U-Net's over `scaling_factor`, to images [n, 3, H, W]."""

    inputs, outputs = ("latent_sample",), ("sample",)

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae, self.scale = vae, LatentScale(vae.config)
        self.examples = (torch.randn(2, vae.config.latent_channels, 9, 11),)

    def forward(self, latents: Tensor) -> Tensor:
        z = latents * self.scale.std + self.scale.mean
        return self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float()


class FlatEncoder(Flat):
    """Images [n, 3, H, W] to mean and log variance of latents, [n, 2c, h, w]."""

    inputs, outputs = ("sample",), ("latent_parameters",)

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae, self.scale = vae, LatentScale(vae.config)
        self.examples = (torch.randn(2, vae.config.in_channels, 72, 88),)

    def forward(self, images: Tensor) -> Tensor:
        moments = self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters.float()
        mean, log_variance = moments.chunk(2, dim=1)
        mean = (mean - self.scale.mean) / self.scale.std
        return torch.cat([mean, log_variance - 2 * self.scale.std.log()], dim=1)


class FlatText(Flat):
    """Token ids [n, t] to the text encoder's outputs, of which the last but one is SDXL's text."""

    inputs = ("input_ids",)

    def __init__(self, encoder: Any, projected: bool) -> None:
        super().__init__()
        self.encoder, self.projected = encoder, projected
        first = ("text_embeds", "last_hidden_state")
        hidden = range(encoder.config.num_hidden_layers + 1)
        self.outputs = (
            *(first if projected else ("last_hidden_state", "pooler_output")),
            *(f"hidden_states.{i}" for i in hidden),
        )
        self.examples = (torch.zeros(2, encoder.config.max_position_embeddings, dtype=torch.long),)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        y = self.encoder(ids, output_hidden_states=True)
        first = y.text_embeds if self.projected else y.last_hidden_state
        second = y.last_hidden_state if self.projected else y.pooler_output
        return tuple(one.float() for one in (first, second, *y.hidden_states))


def vae_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A VAE's config beside its exported parts."""
    return {
        key: value for key, value in config.items() if key not in ("latents_mean", "latents_std")
    }
