"""Doing what a memory plan says: a loaded pipeline's models are put where the plan has them.

What the pipeline is afterwards draws like any other: its U-Net's `Predict` and its `Decode` find
their weights where they need them. If memory runs out in spite of the plan, the arrangement goes
one plan further down, once, and says so.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from koala.architectures.table import FACTOR
from koala.checkpoints.resolve import resolve_model
from koala.checkpoints.validate import unet_architecture
from koala.errors import Failure
from koala.generation import validation
from koala.generation.decode import Decode, full, load_tiny, tiled, tiny
from koala.generation.denoise import predictor
from koala.generation.engine import PIXELS_AT_ONCE
from koala.generation.image_inputs import encode_picture
from koala.generation.memory.meta_models import DTYPES, TEXT, UNET, VAE
from koala.generation.memory.offload import Resident, Streaming, Turns, Visiting, Visitor
from koala.generation.memory.plan import GIB, Plan, Planner
from koala.generation.memory.quantise import quantise
from koala.generation.pipeline import Pipeline, load
from koala.utils.device import pick_device

P = ParamSpec("P")
R = TypeVar("R")


class Arrangement:
    """Where the models of one pipeline are, by a plan.

    `settle` puts a part where the plan has it, `fit` then gives the pipeline what runs it there.
    `say` is told, in one line, when memory ran out and a smaller plan is followed.
    """

    def __init__(self, planner: Planner, plan: Plan, say: Callable[[str], object]) -> None:
        self.planner, self.plan, self.say = planner, plan, say
        self._turns = Turns()
        self._models: dict[str, Sequence[nn.Module]] = {}
        self._decoders: dict[str, Decode] = {}
        self._stepped_down = False

    def settle(self, part: str, models: Sequence[nn.Module]) -> None:
        """Puts a part (TEXT, UNET or VAE), now on the CPU, where the plan has it."""
        mode, device = self.plan.mode, self.plan.device
        self._models[part] = models
        for model in models:
            # diffusers' own `to` refuses some casts that are right here, and warns of others.
            nn.Module.to(model, DTYPES[mode.vae_dtype if part == VAE else mode.dtype])
            if part != VAE and mode.packed:
                quantise(model, mode.packed)
        place = mode.place_of(part)
        if mode.place == "resident":
            for model in models:
                model.to(device)
            return
        kinds: dict[str, type[Visitor]] = {
            "resident": Resident, "in turns": Visiting, "streamed": Streaming,
        }  # fmt: skip
        visitor = kinds[place](models, device)
        doors = models
        if part == VAE:  # is not called as a whole: both of its halves begin with a convolution
            doors = [half.conv_in for vae in models for half in (vae.encoder, vae.decoder)]
        self._turns.admit(visitor, doors)

    def fit(self, pipeline: Pipeline) -> None:
        """Has the pipeline, whose parts are settled, draw by the plan."""
        (vae,) = self._models[VAE]
        self._decoders = {"full": full(vae), "tiled": tiled(vae)}
        pipeline.device = self.plan.device
        pipeline.predict = self._guarded(predictor(pipeline.unet))
        pipeline.encode = lambda pixels: encode_picture(
            vae, pixels, strips=self.plan.mode.encoder == "tiled"
        )
        pipeline.decode = self._guarded(self._decode)
        # Text and pictures are read in it. What a retry begins anew is a function of the request.
        pipeline.begin = self._guarded(pipeline.begin)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        how = self.plan.mode.decode
        if how not in self._decoders:
            assert self.planner.tiny is not None, "no row of the ladder is tiny without one"
            model = load_tiny(self.planner.tiny, DTYPES[self.plan.mode.dtype])
            self._decoders[how] = tiny(model.to(self.plan.device))
        return self._decoders[how](latents)

    def _guarded(self, run: Callable[P, R]) -> Callable[P, R]:
        """`run`; where memory runs out, once more after a step down."""

        def once_more(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return run(*args, **kwargs)
            except Exception as error:
                if not ran_out(error):
                    raise
            # Here, past the handler, what the failed run had made is no longer held by its error.
            self._step_down()
            return run(*args, **kwargs)

        return once_more

    def _step_down(self) -> None:
        smaller = None if self._stepped_down else self.planner.smaller(self.plan)
        if smaller is None:
            raise Failure(
                f"out of memory on {self.plan.device}, and no smaller plan is left: "
                "draw smaller pictures or fewer at a time"
            )
        self.say(
            f"out of memory on {self.plan.device}; going on with {smaller.mode.told()} "
            f"({smaller.peak / GIB:.2f} GiB)"
        )
        self._stepped_down = True
        self._turns.release()
        for models in self._models.values():
            for model in models:
                model.to("cpu")
        self.plan = smaller
        free_unused(smaller.device)
        for part, models in self._models.items():
            self.settle(part, models)


def load_within(
    model: str | Path,
    device: str | None = None,
    vram: float | str = "free",
    *,
    size: tuple[int, int] | str | None = None,
    pictures: int = 1,
    weights: str | None = None,
    decode: str | None = None,
    tiny: str | Path | None = None,
    lora: Mapping[str | Path, float] | None = None,
    given: bool = False,
    say: Callable[[str], object],
) -> tuple[Pipeline, Plan]:
    """A model, loaded so that it draws within `vram` GiB, or in what is "free"; and its plan.

    size: of the pictures, as in `Pipeline.requests`. pictures: how many there will be. weights,
    decode, tiny: as in `koala.generation.memory.plan.Planner`. lora: files and scales, merged
    into the weights. given: whether there will be pictures to start from. `say` is told what became
    of the LoRAs, and of a plan that had to be left. UserError where nothing fits, and as in
    `koala.generation.pipeline.load`.
    """
    budget = validation.budget(vram)
    folder, place = resolve_model(model), pick_device(device)
    native = unet_architecture(folder).sample * FACTOR
    width, height = (native, native) if size is None else validation.size(size)
    at_once = max(1, min(pictures, PIXELS_AT_ONCE // (width * height)))
    planner = Planner(folder, place, (width, height), at_once, weights, decode, tiny, given)
    plan = planner.choose(budget)
    arrangement = Arrangement(planner, plan, say)
    dtype = DTYPES[plan.mode.dtype]
    if not lora:  # each part goes to its place before the next is read
        pipeline = load(model, place, dtype, settle=arrangement.settle)
    else:
        pipeline = load(model, "cpu", dtype)
        for file, scale in lora.items():
            say(pipeline.add_lora(file, scale, merged=True).line())
        arrangement.settle(TEXT, pipeline.conditioner.encoders)
        arrangement.settle(UNET, [pipeline.unet])
        arrangement.settle(VAE, [pipeline.vae])
    arrangement.fit(pipeline)
    if budget is not None and place.type == "cuda":  # what is asked for more fails, and steps down
        _, total = torch.cuda.mem_get_info(place)
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), place)
    return pipeline, plan


def ran_out(error: BaseException) -> bool:
    """Whether an error means that a device or the machine has no more memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # on the CPU
    )


def free_unused(device: torch.device) -> None:
    """Gives back what torch keeps for itself and nobody uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
