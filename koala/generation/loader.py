"""From a model's name to a pipeline that runs as asked: device, dtype, LoRAs, runtime, memory."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import koala
from koala.architectures.table import FACTOR
from koala.checkpoints.bundled import DEFAULT
from koala.checkpoints.load import (
    Layer,
    load_scheduler_config,
    load_vae,
    zeros_for_empty,
)
from koala.checkpoints.quantised import KIND
from koala.checkpoints.resolve import name_of, resolve_model
from koala.checkpoints.validate import is_quantised, unet_architecture
from koala.checkpoints.words import words_in
from koala.errors import Failure, UserError
from koala.generation import validation
from koala.generation.decode import Autoencoder, full
from koala.generation.denoise import Condition, Predict, finish
from koala.generation.engine import PIXELS_AT_ONCE
from koala.generation.form_writing import keep_form
from koala.generation.memory.meta_models import TEXT, UNET, VAE
from koala.generation.memory.placement import Placement
from koala.generation.memory.plan import Planner, beside_model
from koala.generation.pipeline import Pipeline
from koala.generation.prompts import CACHED_CHUNKS
from koala.generation.quantised_folder import load_any_unet
from koala.generation.runtime.backends import Backend, choose
from koala.generation.runtime.compile import (
    compile_blocks,
    fuse_projections,
    graphed,
)
from koala.generation.runtime.dtypes import DTYPES, torch_dtype
from koala.generation.runtime.fixed_batches import ROWS, in_fixed_batches, one_by_one
from koala.generation.runtime.openvino import Calibration, UNetInputs, recorded
from koala.generation.runtime.pytorch import predictor
from koala.text_conditioning import TextConditioner
from koala.utils.device import (
    keep_no_freed_memory,
    keep_some_freed_memory,
    pick_device,
)
from koala.utils.networks import AutoencoderKL

CALIBRATION = ("a fox, noto style", "two green apples on a light blue background")
_COST = "; it rounds: docs/speed.md has what that costs"

Say = Callable[[str], object]
Put = Callable[[str, Sequence[nn.Module]], None]


def load(
    model: str | Path = DEFAULT,
    device: torch.device | str | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    lora: Mapping[str | Path, float] | None = None,
    backend: str | None = None,
    compile: bool = False,
    graphs: bool = False,
    vram: float | str | None = None,
    weights: str | None = None,
    decode: str | None = None,
    tiny_vae: str | Path | None = None,
    size: tuple[int, int] | str | None = None,
    images: int = 1,
    from_image: bool = False,
    say: Say = lambda line: None,
) -> Pipeline:
    """`koala.load` with PyTorch; arguments and errors as in `koala.generation.opening.load`."""
    folder, place = resolve_model(model), pick_device(device)
    if is_quantised(folder):
        weights = _as_stored(folder, weights, lora)
    planned = validation.runtime(
        backend, compile, graphs, vram, weights, decode, tiny_vae, str(dtype) if dtype else None
    )
    name = name_of(model)
    scales = {file: validation.lora_scale(scale) for file, scale in (lora or {}).items()}
    if not planned:
        return _whole(folder, name, place, dtype, backend, compile, graphs, scales, say)
    planner = Planner(
        folder, place, *_largest(folder, size, images, from_image), weights, decode, tiny_vae,
        from_image, beside_model(place),
    )  # fmt: skip
    budget = None if vram is None else validation.budget(vram)
    unbound = vram is None and weights is None
    return _as_planned(folder, name, planner, budget, unbound, scales, say)


def _largest(
    folder: Path, size: tuple[int, int] | str | None, images: int, from_image: bool
) -> tuple[tuple[int, int], int]:
    """The size of images to plan for, the model's own by default, and how many at once."""
    native = unet_architecture(folder).sample * FACTOR
    asked = (native, native)
    if size is not None:  # what starts from an image is padded
        asked = validation.size(size, 1 if from_image else FACTOR)
    width, height = (-(-side // FACTOR) * FACTOR for side in asked)
    return (width, height), max(1, min(images, PIXELS_AT_ONCE // (width * height)))


def _as_planned(
    folder: Path, name: str, planner: Planner, budget: int | None, unbound: bool,
    scales: Mapping[str | Path, float], say: Say,
) -> Pipeline:  # fmt: skip
    """The pipeline in the way that fits: into the budget in bytes, or what is free.

    unbound: any backend may run it, if all of it fits as it is.
    """
    place = planner.device
    placement = Placement(planner, planner.choose(budget), say)
    if budget is not None and place.type == "cpu":
        keep_no_freed_memory()
        if scales:
            planner.check_merging(placement.plan)
    pipeline = placed(folder, name, placement, scales, say)
    if budget is not None and place.type == "cpu" and placement.plan.mode.place == "resident":
        keep_some_freed_memory()
    if unbound and place.type == "cpu" and placement.plan.mode.is_whole:
        set_runtime(pipeline, say=say, decoder=placement.autoencoder())
    if budget is not None and place.type == "cuda":  # more than that fails, and steps down
        _, total = torch.cuda.mem_get_info(place)
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), place)
    return pipeline


def _whole(
    folder: Path, name: str, place: torch.device, dtype: torch.dtype | str | None,
    backend: str | None, compile: bool, graphs: bool, scales: Mapping[str | Path, float], say: Say,
) -> Pipeline:  # fmt: skip
    """The pipeline with all its networks on the device."""
    if dtype is None:
        dtype = torch.float32 if place.type == "cpu" else torch.float16
    own = torch_dtype(dtype) if isinstance(dtype, str) else dtype

    def put(_: str, models: Sequence[nn.Module]) -> None:
        for each in models:
            if isinstance(each, AutoencoderKL) and place.type != "cpu":
                nn.Module.to(each, torch.float32 if each.config.force_upcast else own)
            nn.Module.to(each, place)  # diffusers' own `to` asks for hooks that none has

    pipeline = _read(folder, name, own, put)
    if backend or compile or graphs:
        _merge(pipeline, scales, say)
        chosen = set_runtime(pipeline, backend, compile, graphs, say)
    elif scales:  # they can be scaled and removed: PyTorch's, which a default gives way to
        for file, scale in scales.items():
            say(pipeline.add_lora(file, scale).line())
        return pipeline
    else:
        chosen = set_runtime(pipeline, say=say)
    if chosen is not None:
        pipeline.keep_form = partial(_keep_form, pipeline, folder, chosen, say)
    return pipeline


def _as_stored(folder: Path, weights: str | None, lora: Mapping[str | Path, float] | None) -> str:
    """The weights that a folder is stored in. UserError for others, and LoRAs to be merged."""
    if weights not in (None, KIND):
        raise UserError(f"{folder} is stored in {KIND}: leave out --weights {weights}")
    if lora:
        raise UserError(
            f"{folder} is stored in {KIND}, and LoRAs are merged before weights are rounded: draw "
            f"with the model that it was made of and --weights {KIND}"
        )
    return KIND


def _keep_form(pipeline: Pipeline, folder: Path, chosen: Backend, say: Say) -> None:
    try:
        keep_form(pipeline, folder, chosen)
    except (OSError, UserError, Failure) as error:
        say(f"the cache cannot keep the model's OpenVINO form, so starts stay slow: {error}")


def placed(
    folder: Path, name: str, placement: Placement, lora: Mapping[str | Path, float], say: Say
) -> Pipeline:
    """A pipeline whose parts are where `placement` puts them, each before the next is read.

    Layers are quantised before the next is read, too. With LoRAs, which are merged into the
    weights, the whole model is read first.
    """
    whole: dict[str, Sequence[nn.Module]] = {}
    put, layer = (whole.__setitem__, None) if lora else (placement.put, placement.layer)
    pipeline = _read(folder, name, DTYPES[placement.plan.mode.dtype], put, layer)
    _merge(pipeline, lora, say)
    for part, models in whole.items():
        placement.put(part, models)
    pipeline.plan, pipeline.device = placement.plan, placement.plan.device
    pipeline.predict = placement.guarded(predictor(pipeline.unet))
    pipeline.encode = placement.encode
    pipeline.decode = placement.guarded(placement.decode)
    # Text and images are encoded in it. A retry begins the request anew, from its seed.
    pipeline.begin = placement.guarded(pipeline.begin)  # type: ignore[method-assign]  # for this pipeline
    return pipeline


def _read(
    folder: Path, name: str, dtype: torch.dtype, put: Put, layer: Layer | None = None
) -> Pipeline:
    """The pipeline of a folder; `put` is given each part's models, on the CPU, once it is read.

    So is `layer` each layer of the U-Net and the text encoders.
    """
    conditioner = TextConditioner.from_folder(folder, dtype, cache_size=CACHED_CHUNKS, layer=layer)
    put(TEXT, conditioner.encoders)
    unet = load_any_unet(folder, dtype, layer)
    nn.Module.to(unet, memory_format=torch.channels_last)  # type: ignore[call-overload]  # it does take it
    put(UNET, [unet])
    vae = load_vae(folder, torch.float32)
    put(VAE, [vae])
    return Pipeline(
        name=name,
        unet=unet.eval(),
        vae=vae.eval(),
        conditioner=conditioner,
        scheduler_config=load_scheduler_config(folder),
        zeros_for_empty=zeros_for_empty(folder),
        words=words_in(folder),
    )


def _merge(pipeline: Pipeline, lora: Mapping[str | Path, float], say: Say) -> None:
    for file, scale in lora.items():
        say(pipeline.add_lora(file, scale, merged=True).line())


def set_runtime(
    pipeline: Pipeline,
    backend: str | None = None,
    compiled: bool = False,
    graphs: bool = False,
    say: Say = lambda line: None,
    decoder: Autoencoder | None = None,
) -> Backend | None:
    """Sets what runs a pipeline's networks, which are all on one device, with LoRAs merged.

    decoder: a tiny autoencoder that decodes in the VAE's place, not where PyTorch is compiled or
    replays graphs. Returns the backend; None in those two. Arguments and errors as in `load`.
    """
    assert decoder is None or not (compiled or graphs), "neither is made for a tiny decoder"
    validation.runtime(backend, compiled, graphs)
    if compiled:
        fuse_projections(pipeline.unet)
        blocks = compile_blocks(pipeline.unet) + compile_blocks(pipeline.vae.decoder)
        pipeline.decode = one_by_one(full(pipeline.vae))
        say(f"{blocks} blocks are compiled at each size's first picture, unless in the cache")
    if graphs:
        pipeline.predict = graphed(pipeline.predict, pipeline.device)
    if compiled or graphs:
        pipeline.predict, pipeline.batch_sizes = in_fixed_batches(pipeline.predict), ROWS
        return None
    samples = Calibration(f"{CALIBRATION} {koala.__version__}", partial(_samples, pipeline))
    chosen = choose(pipeline.unet, decoder or pipeline.vae, backend, samples)
    if chosen.name != "torch" or decoder is not None:  # else it has them from the beginning
        pipeline.decode = chosen.decode
    if chosen.name != "torch":
        # Requests may have LoRAs of their own, as under PyTorch.
        pipeline.predict = pipeline._plain = _giving_way(pipeline, chosen.predict)
    if chosen.name.startswith("openvino"):
        pipeline.batch_sizes = ROWS
    cost = _COST if chosen.name in validation.ROUNDED else ""
    if backend not in (None, "remembered") or pipeline.device.type == "cpu":
        say(f"backend {chosen.name} ({chosen.why}){cost}")
    return chosen


def _giving_way(pipeline: Pipeline, predict: Predict) -> Predict:
    """`predict`, and PyTorch for what it was not made with.

    Those are LoRAs of the pipeline, ControlNets and IP-Adapters.
    """
    plain, made_with = predictor(pipeline.unet), len(pipeline.loras)

    def evaluate_unet(x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        changed = len(pipeline.loras) != made_with or pipeline._lora_switcher.active
        changed = changed or condition.hint is not None or condition.image is not None
        return (plain if changed else predict)(x, timesteps, condition)

    return evaluate_unet


@torch.inference_mode()
def _samples(pipeline: Pipeline) -> list[UNetInputs]:
    """The U-Net's inputs while two images are drawn, which are not decoded."""
    samples: list[UNetInputs] = []
    predict = recorded(predictor(pipeline.unet), samples)
    rows = [pipeline.begin(request) for request in pipeline.requests([*CALIBRATION], seed=0)]
    finish(predict, rows)
    return samples
