"""Configurations of the runs that train a VAE, text encoders or a tiny autoencoder."""

from dataclasses import dataclass

from koala.distillation.settings import Training


@dataclass(frozen=True)
class Base:
    """VAE and text encoders from scratch, with an untrained U-Net: the start of a teacher."""

    kinds: dict[str, int]  # copies of each kind of image in the VAE's epoch
    vae: Training
    decoder: Training  # continues `vae` with a frozen encoder
    text: Training


@dataclass(frozen=True)
class Autoencoder:
    """Further training of a VAE, with noise on its latents (see `Autoencoding`)."""

    kinds: dict[str, int]  # copies of each kind of image in an epoch
    training: Training
    perceptual: float  # weight of the perceptual error
    drift: float  # maximum standard deviation of the noise, relative to the latents'
    colour: float  # weight of the colour term on three latent channels
    cpu_bf16: bool = False  # as in `Hardware`


@dataclass(frozen=True)
class Tiny:
    """A tiny autoencoder distilled from a model's VAE, stored as the model's `vae_tiny`."""

    kinds: dict[str, int] | None  # copies of each kind of image in an epoch; None: all once
    training: Training
    cpu_bf16: bool = False  # as in `Hardware`
