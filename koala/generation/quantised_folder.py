"""`koala convert --weights int4`: a model folder whose U-Net is stored in 4 bits, and its reading.

A layer's largest singular directions are kept in fp16, and the rest is rounded to 4 bits
(SVDQuant). Tensor by tensor: the model is never in memory.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from koala.architectures.layout import parameters
from koala.checkpoints import model_card
from koala.checkpoints.load import build_unet, without_weights
from koala.checkpoints.pipeline_files import Tensors, as_file, visible_progress, write_folder
from koala.checkpoints.quantised import IN_8_BITS, KIND, PARTS, is_layer, rank_of, stored_tensors
from koala.checkpoints.resolve import read_model
from koala.checkpoints.tensors import (
    Source,
    float_dtype,
    load_tensor,
    not_finite,
    size_of,
    write,
)
from koala.checkpoints.validate import (
    QUANTISED,
    QUANTISED_FILE,
    check_unet,
    read_json,
    read_tensors,
    unet_architecture,
)
from koala.generation.memory.quantise import hold, low_rank, quantised
from koala.utils.atomic import check_new, new_folder
from koala.utils.networks import UNet2DConditionModel


@dataclass(frozen=True)
class QuantiseReport:
    """What `write_quantised` did."""

    model: str
    parameters: int  # of the U-Net
    weights: str
    unet_bytes: int
    bytes: int  # of all weights
    out: Path

    def line(self) -> str:
        """One line for the terminal."""
        return (
            f"{self.model} ({self.parameters:,} parameters in the U-Net), U-Net in {self.weights}, "
            f"{self.unet_bytes / 1e6:,.1f} of {self.bytes / 1e6:,.1f} MB in {self.out}; it draws "
            "in koala, and cannot be changed, converted or trained"
        )


def write_quantised(model: str | Path, out: str | Path, dtype: str | None = None) -> QuantiseReport:
    """Writes the pipeline folder `out`: `model` with its U-Net in 4 bits.

    model: name, folder, Hub id or single file. dtype: of all other weights, "fp32", "fp16" or
    "bf16"; None keeps each as it is. UserError as from `koala.checkpoints.convert.convert`.
    """
    kind, out = float_dtype(dtype), Path(out).expanduser()
    check_new(out)
    contents = read_model(model)
    unet = contents.tensors["unet"]
    name = model_card.name_of(model)
    config = contents.config("unet/config.json") | {QUANTISED: KIND}
    files = {**contents.files, "unet/config.json": as_file(config)}
    rest = {part: of for part, of in contents.tensors.items() if part != "unet"}
    with new_folder(out) as part:
        sizes = write_folder(part, rest, files, kind)
        size = _write_unet(part / "unet" / QUANTISED_FILE, unet, kind)
        card = model_card.of_contents(contents.source, contents.metadata)
        model_card.write(model_card.quantised_of(card, name, model_card.name_of(out), KIND), part)
    count = parameters(contents.architecture)
    return QuantiseReport(name, count, KIND, size, size + sum(sizes.values()), out)


def _write_unet(file: Path, unet: Tensors, kind: str | None) -> int:
    shapes = {name: view.shape for name, view in unet.items()}
    plain = {name: view for name, view in unet.items() if not is_layer(name, view.shape)}
    tensors = {name: (kind or view.dtype, view.shape) for name, view in plain.items()}
    tensors |= stored_tensors(shapes)
    total = sum(size_of(*tensor) for tensor in tensors.values())
    layers = _Layers(unet)
    with visible_progress(total) as advance:

        def source(name: str) -> Source:
            return plain[name] if name in plain else layers.part(name)

        return write(file, tensors, source, advance=advance)


class _Layers:
    """The layers' tensors, each computed once."""

    def __init__(self, unet: Tensors) -> None:
        self.unet = unet
        self._made: dict[str, Tensor] = {}  # what is written later

    def part(self, name: str) -> bytes:
        """The bytes of one tensor of a layer."""
        if name not in self._made:
            base = name.rpartition(".")[0]
            view = self.unet[f"{base}.weight"]
            weight = load_tensor(view, "F32")
            if not weight.abs().max().isfinite():
                raise not_finite(view, f"{base}.weight")
            made = stored_layer(f"{base}.weight", weight)
            self._made |= {f"{base}.{key}": tensor for key, tensor in made.items()}
        tensor = self._made.pop(name).contiguous()
        return tensor.flatten().view(torch.uint8).numpy().tobytes()


def stored_layer(name: str, weight: Tensor) -> dict[str, Tensor]:
    """What is stored in place of a layer's weight [out, ...]; see `koala.checkpoints.quantised`."""
    kind = "int8" if name.startswith(IN_8_BITS) else KIND
    added: tuple[Tensor, ...] = ()
    if kind == KIND and (rank := rank_of(len(weight), weight[0].numel())):
        added = low_rank(weight, rank)
        weight = weight - (added[0].float() @ added[1].float()).reshape(weight.shape)
    values, scale = quantised(weight.half(), kind)
    return dict(zip(PARTS, (values, scale, *added), strict=False))


def load_quantised(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """The U-Net of a checked folder that `write_quantised` wrote, computing in `dtype`."""
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
