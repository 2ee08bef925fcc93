"""A memory plan carried out: each part of a model is put where the plan has it.

If memory runs out all the same, the next smaller plan is followed, once, and a line says so.
"""

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from koala.errors import Failure
from koala.generation.decode import Autoencoder, load_tiny, tiled, whole
from koala.generation.memory.meta_models import TEXT, UNET, VAE
from koala.generation.memory.offload import GroupOffload, ModelOffload, OneAtATime, Resident
from koala.generation.memory.plan import GIB, MemoryPlan, Planner
from koala.generation.pixels import Decode
from koala.generation.quantise import quantise, quantise_layer
from koala.generation.runtime.dtypes import DTYPES
from koala.generation.runtime.pytorch import encode_image
from koala.utils.device import free_unused, ran_out
from koala.utils.networks import AutoencoderKL

P = ParamSpec("P")
R = TypeVar("R")

_PLACES = {"resident": Resident, "model offload": ModelOffload, "group offload": GroupOffload}


class Placement:
    """Puts the parts of one pipeline where a plan has them, and runs the VAE there.

    say: called with one line when memory ran out and a smaller plan is followed.
    """

    def __init__(self, planner: Planner, plan: MemoryPlan, say: Callable[[str], object]) -> None:
        self.planner, self.plan, self.say = planner, plan, say
        self._device = OneAtATime()
        self._models: dict[str, Sequence[nn.Module]] = {}
        self._decoders: dict[str, Decode] = {}
        self._stepped_down = False

    def layer(self, path: str, module: nn.Module) -> None:
        """Stores the weights of a layer of the U-Net or a text encoder as the plan has them."""
        if self.plan.mode.quantised:
            quantise_layer(path, module, self.plan.mode.quantised)

    def put(self, part: str, models: Sequence[nn.Module]) -> None:
        """Puts a part (TEXT, UNET or VAE), which is on the CPU, where the plan has it."""
        mode, device = self.plan.mode, self.plan.device
        self._models[part] = models
        for model in models:
            # diffusers' own `to` refuses some casts that are right here, and warns of others.
            nn.Module.to(model, DTYPES[mode.vae_dtype if part == VAE else mode.dtype])
            if part != VAE and mode.quantised:
                quantise(model, mode.quantised)
        if mode.place == "resident":
            for model in models:
                model.to(device)
            return
        first = models
        if part == VAE:  # is not called as a whole: each of its halves begins with a convolution
            halves = ("encoder", "decoder")
            first = [vae.get_submodule(f"{half}.conv_in") for vae in models for half in halves]
        self._device.add(_PLACES[mode.place_of(part)](models, device), first)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """`encode_image` by the plan."""
        (vae,) = self._models[VAE]
        assert isinstance(vae, AutoencoderKL)
        return encode_image(vae, pixels, tiled=self.plan.mode.encoder == "tiled")

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """A `Decode` by the plan."""
        how = self.plan.mode.decode
        if how not in self._decoders:
            self._decoders[how] = self._decoder(how)
        return self._decoders[how](latents)

    def autoencoder(self) -> Autoencoder:
        """Whose decoder the plan has: the VAE, or the tiny autoencoder, read anew."""
        if self.plan.mode.decode != "tiny":
            (vae,) = self._models[VAE]
            assert isinstance(vae, AutoencoderKL)
            return vae
        assert self.planner.tiny is not None, "no mode is tiny without a tiny autoencoder"
        model = load_tiny(self.planner.tiny, DTYPES[self.plan.mode.dtype])
        model.to(self.plan.device)
        return model

    def _decoder(self, how: str) -> Decode:
        model = self.autoencoder()
        if how == "tiled":
            assert isinstance(model, AutoencoderKL)
            return tiled(model)
        return whole(model)

    def guarded(self, run: Callable[P, R]) -> Callable[P, R]:
        """`run`; if memory runs out, the next smaller plan is followed and `run` called again."""

        def run_again(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return run(*args, **kwargs)
            except Exception as error:
                if not ran_out(error):
                    raise
            # Past the handler, the error no longer holds what the failed run had made.
            self._step_down()
            return run(*args, **kwargs)

        return run_again

    def _step_down(self) -> None:
        smaller = None if self._stepped_down else self.planner.smaller(self.plan)
        if smaller is None:
            raise Failure(
                f"out of memory on {self.plan.device}, and no smaller plan is left: "
                "draw smaller pictures or fewer at a time"
            )
        self.say(
            f"out of memory on {self.plan.device}; going on with {smaller.mode.summary()} "
            f"({smaller.peak / GIB:.2f} GiB)"
        )
        self._stepped_down = True
        self._device.release()
        for models in self._models.values():
            for model in models:
                model.to("cpu")
        self.plan = smaller
        free_unused()
        for part in (TEXT, UNET, VAE):
            self.put(part, self._models[part])
