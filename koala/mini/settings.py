"""Configurations of the runs that make a VAE, a text side or a tiny VAE."""

from dataclasses import dataclass

from koala.distillation.settings import Training


@dataclass(frozen=True)
class MiniBase:
    """VAE and text side from nothing, with a U-Net as initialised: what a teacher starts from."""

    kinds: dict[str, int]  # copies of each kind of picture in an epoch of the VAE's
    vae: Training
    decoder: Training  # goes on from `vae` with the encoder at rest
    text: Training


@dataclass(frozen=True)
class Autoencoder:
    """A VAE that goes on by itself, with noise on its latents as `Autoencoding` says."""

    kinds: dict[str, int]  # copies of each kind of picture in an epoch
    training: Training
    perceptual: float  # weight of the perceptual error
    drift: float  # greatest deviation of the noise, in deviations of the latents
    colour: float  # pull of three latent channels towards the mean colour below them
    cpu_bf16: bool = False  # as in `Hardware`


@dataclass(frozen=True)
class Tiny:
    """A tiny autoencoder that learns from a model's VAE; the model gets it as `vae_tiny`."""

    kinds: dict[str, int] | None  # copies of each kind of picture in an epoch; None: all once
    training: Training
    cpu_bf16: bool = False  # as in `Hardware`
