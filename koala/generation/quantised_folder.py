"""`koala convert --weights int4`: a model folder whose U-Net is stored in 4 bits, and its reading.

A layer's largest singular directions are kept in fp16, and the rest is rounded to 4 bits
(SVDQuant), by what the layers see if there are prompts or latents to calibrate on (GPTQ). Tensor by
tensor: the model is never in memory.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from koala.architectures.layout import parameters
from koala.checkpoints import card_facts, model_card
from koala.checkpoints.load import Layer, build_unet, load_unet, without_weights
from koala.checkpoints.moments import MOST_INPUTS
from koala.checkpoints.observed import observe
from koala.checkpoints.pipeline_files import Tensors, as_file, visible_progress, write_folder
from koala.checkpoints.quantised import IN_8_BITS, KIND, PARTS, is_layer, rank_of, stored_tensors
from koala.checkpoints.resolve import read_model, resolve_model
from koala.checkpoints.streamed import StoredWeights
from koala.checkpoints.tensors import (
    Source,
    float_dtype,
    load_tensor,
    size_of,
    write,
)
from koala.checkpoints.unet_steps import Asked
from koala.checkpoints.validate import (
    QUANTISED,
    QUANTISED_FILE,
    check_unet,
    is_quantised,
    read_json,
    read_tensors,
    unet_architecture,
)
from koala.generation.calibration import Inputs, calibration_of
from koala.generation.memory.calibrated import DAMPING, calibrated
from koala.generation.quantise import can_be_quantised, hold, low_rank, quantised
from koala.generation.streaming import streamed_pipeline
from koala.generation.validation import calibration_prompts
from koala.utils.atomic import check_new, new_folder
from koala.utils.counted import counted
from koala.utils.device import keep_no_freed_memory
from koala.utils.networks import UNet2DConditionModel
from koala.utils.progress import progress


@dataclass(frozen=True)
class QuantiseReport:
    """What `write_quantised` did."""

    model: str
    parameters: int  # of the U-Net
    weights: str
    unet_bytes: int
    bytes: int  # of all weights
    prompts: int  # that were drawn to calibrate on
    latents: int  # prepared ones that were read for it
    calibrated: int  # layers
    too_wide: int  # layers in 4 bits that are not, since their moments are too large
    out: Path

    def line(self) -> str:
        """One line for the terminal."""
        seen = card_facts.calibrated_on(self.prompts, self.latents)
        by = f", calibrated on {seen}" if seen else ""
        if self.too_wide:
            by += f" but for {counted(self.too_wide, 'layer')} of more than {MOST_INPUTS:,} inputs"
        return (
            f"{self.model} ({self.parameters:,} parameters in the U-Net), U-Net in {self.weights}"
            f"{by}, {self.unet_bytes / 1e6:,.1f} of {self.bytes / 1e6:,.1f} MB in {self.out}; it "
            "draws in koala, and cannot be changed, converted or trained"
        )


def write_quantised(
    model: str | Path,
    out: str | Path,
    dtype: str | None = None,
    calibrate: Sequence[str] | Inputs | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> QuantiseReport:
    """Writes the pipeline folder `out`: `model` with its U-Net in 4 bits.

    model: name, folder, Hub id or single file. dtype: of all other weights, "fp32", "fp16" or
    "bf16"; None keeps each as it is. calibrate: what the rounding goes by, as of
    `koala.generation.pruning.prune_model`; None: by the weights alone. UserError as from
    `koala.checkpoints.convert.convert`, and for what it cannot be calibrated on.
    """
    kind, out = float_dtype(dtype), Path(out).expanduser()
    if calibrate is not None and not callable(calibrate):
        calibration_prompts(calibrate)
    check_new(out)
    contents = read_model(model)
    unet = contents.tensors["unet"]
    name = model_card.name_of(model)
    config = contents.config("unet/config.json") | {QUANTISED: KIND}
    files = {**contents.files, "unet/config.json": as_file(config)}
    rest = {part: of for part, of in contents.tensors.items() if part != "unet"}
    with new_folder(out) as part, tempfile.TemporaryDirectory(dir=part) as scratch:
        layers = _Layers(unet, Path(scratch))
        prompts, latents, done, too_wide = 0, 0, 0, 0
        if calibrate is not None:
            keep_no_freed_memory()
            folder = resolve_model(model)
            pipeline = streamed_pipeline(folder, name)
            every, prompts, latents = calibration_of(calibrate, folder, pipeline, say)
            done, too_wide = layers.calibrate(pipeline.unet, every)
        sizes = write_folder(part, rest, files, kind)
        size = _write_unet(part / "unet" / QUANTISED_FILE, unet, layers, kind)
        card = model_card.of_contents(contents.source, contents.metadata)
        stored = card_facts.Quantised(name, KIND, prompts, latents)
        model_card.write(model_card.quantised_of(card, model_card.name_of(out), stored), part)
    return QuantiseReport(
        model=name,
        parameters=parameters(contents.architecture),
        weights=KIND,
        unet_bytes=size,
        bytes=size + sum(sizes.values()),
        prompts=prompts,
        latents=latents,
        calibrated=done,
        too_wide=too_wide,
        out=out,
    )


def _write_unet(file: Path, unet: Tensors, layers: "_Layers", kind: str | None) -> int:
    shapes = {name: view.shape for name, view in unet.items()}
    plain = {name: view for name, view in unet.items() if not is_layer(name, view.shape)}
    tensors = {name: (kind or view.dtype, view.shape) for name, view in plain.items()}
    tensors |= stored_tensors(shapes)
    total = sum(size_of(*tensor) for tensor in tensors.values())
    with visible_progress(total) as advance:

        def source(name: str) -> Source:
            return plain[name] if name in plain else layers.part(name)

        return write(file, tensors, source, advance=advance)


class _Layers:
    """The layers' tensors, each layer computed once and kept in files until they are asked for."""

    def __init__(self, unet: Tensors, scratch: Path) -> None:
        """scratch: a folder for the files."""
        self.scratch, self.weights = scratch, StoredWeights(unet)

    def part(self, name: str) -> bytes:
        """The bytes of one tensor of a layer, to be asked for once."""
        file = self.scratch / name
        if not file.exists():
            self._store(name.rpartition(".")[0])
        made = file.read_bytes()
        file.unlink()
        return made

    def _store(self, layer: str, factor: Tensor | None = None) -> None:
        weight = f"{layer}.weight"
        made = stored_layer(weight, self.weights[weight], factor)
        for key, tensor in made.items():
            data = tensor.contiguous().flatten().view(torch.uint8).numpy()
            data.tofile(self.scratch / f"{layer}.{key}")

    def calibrate(self, unet: UNet2DConditionModel, every: Sequence[Asked]) -> tuple[int, int]:
        """Computes all layers in 4 bits by what they see, but for those of too many inputs.

        Returns the numbers of both. unet: the whole one, streamed.
        """
        inputs = {
            name.removesuffix(".weight"): math.prod(view.shape[1:])
            for name, view in self.weights.stored.items()
            if is_layer(name, view.shape) and not name.startswith(IN_8_BITS)
        }
        alike = _alike([layer for layer, count in inputs.items() if count <= MOST_INPUTS])
        done = sum(map(len, alike.values()))
        with progress("calibrating", done, "layers") as advance:
            for first, moments in observe(unet, [*alike], every, self.scratch):
                factor = moments.about_zero(DAMPING)
                for layer in alike[first]:
                    self._store(layer, factor)
                    advance(1)
                del moments, factor  # before the next are there
        return done, len(inputs) - done


def _alike(layers: Sequence[str]) -> Mapping[str, list[str]]:
    """Those that see the same by one of them: an attention's layers on an image or a text."""
    found: dict[str, list[str]] = {}
    for layer in sorted(layers):
        path, _, leaf = layer.rpartition(".")
        of_text = path.endswith(".attn2")
        first = "to_k" if leaf == "to_v" or (leaf == "to_q" and not of_text) else leaf
        found.setdefault(f"{path}.{first}", []).append(layer)
    return found


def stored_layer(name: str, weight: Tensor, factor: Tensor | None = None) -> dict[str, Tensor]:
    """What is stored in place of a layer's weight [out, ...]; see `koala.checkpoints.quantised`.

    factor: of what a layer in 4 bits sees, as of `calibrated`.
    """
    kind = "int8" if name.startswith(IN_8_BITS) else KIND
    added: tuple[Tensor, ...] = ()
    if kind == KIND and (rank := rank_of(len(weight), weight[0].numel())):
        added = low_rank(weight, rank)
        weight = weight - (added[0].float() @ added[1].float()).reshape(weight.shape)
    half = weight.half()
    values, scale = quantised(half, kind) if factor is None else calibrated(half, factor)
    return dict(zip(PARTS, (values, scale, *added), strict=False))


def store(path: str, module: nn.Module) -> None:
    """Puts a layer of a U-Net in 4 bits, as `write_quantised` does; leaves other modules alone."""
    if can_be_quantised(module):
        hold(module, path, [*stored_layer(f"{path}.weight", module.weight).values()])


def load_any_unet(
    folder: Path, dtype: torch.dtype, layer: Layer | None = None
) -> UNet2DConditionModel:
    """The U-Net of a checked folder, stored in 4 bits or not, computing in `dtype`.

    layer: as of `load_unet`; a layer in 4 bits is left as it is.
    """
    if not is_quantised(folder):
        return load_unet(folder, dtype, layer)
    stored = read_tensors(folder, "unet")
    check_unet(unet_architecture(folder), stored, folder)
    config = read_json(folder / "unet" / "config.json")
    with without_weights():
        unet = build_unet({k: v for k, v in config.items() if k != QUANTISED})
    for path, module in unet.named_modules():
        names = [f"{path}.{part}" for part in PARTS if f"{path}.{part}" in stored]
        if names:
            hold(module, path, [load_tensor(stored.pop(name)) for name in names])
    plain = {name: load_tensor(one) for name, one in stored.items()}
    unet.load_state_dict(plain, strict=False, assign=True)
    return nn.Module.to(unet, dtype).eval()
