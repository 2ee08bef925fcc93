"""IP-Adapters of SDXL, single files as their authors publish them, and the image encoders for them.

arXiv 2308.06721. Only headers and configs are read, without torch, until `ImageEncoder.load`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.checkpoints.foreign import foreign
from koala.checkpoints.load import filled, without_weights
from koala.checkpoints.resolve import single_file_path
from koala.checkpoints.schema import ABOUT, IMAGE_ENCODER, checked
from koala.checkpoints.tensors import FLOATS, Stored, load_tensor, not_finite, read_header
from koala.checkpoints.validate import read_component, read_json, some, tensor_faults
from koala.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TOKENS = 4  # that an image becomes
BESIDE = "image_encoder"  # the folder beside an adapter's file, in which an encoder is looked for
_PROJECTION, _NORM = "image_proj.proj", "image_proj.norm"
_OTHERS = {  # patterns of tensor names -> what the file is
    r"image_proj\.perceiver_resampler\.": "an IP-Adapter FaceID Plus",
    r"image_proj\.latents": "an IP-Adapter Plus",
    r"image_proj\.proj\.3\.": "an IP-Adapter Full Face",
    r"image_proj\.proj\.\d|ip_adapter\..*_lora\.": "an IP-Adapter FaceID",
}
_FORM = "give the .safetensors file of a plain IP-Adapter of SDXL, such as ip-adapter_sdxl"
_ENCODER_FORM = "give the folder of a CLIPVisionModelWithProjection, with config.json"
_KIND = "clip_vision_model"


@dataclass(frozen=True)
class IPAdapterFile:
    """A plain IP-Adapter on disk, of which tensors' names and shapes are known."""

    name: str  # of the file, for people
    place: Path
    tensors: Mapping[str, Stored]

    @property
    def widths(self) -> list[int]:
        """Of the cross-attentions that it has layers for, in the order of the file's numbers."""
        number = sum(key.endswith(".to_k_ip.weight") for key in self.tensors)
        return [self.tensors[f"{layer_name(i)}.to_k_ip.weight"].shape[0] for i in range(number)]

    @property
    def context(self) -> int:
        """Width of the tokens that an image becomes: that of the U-Net's text embeddings."""
        return self.tensors[f"{_NORM}.weight"].shape[0]

    @property
    def reads(self) -> int:
        """Width of the image embedding that it reads."""
        return self.tensors[f"{_PROJECTION}.weight"].shape[1]

    def projection(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the projection to tokens, and of the layer norm after it."""
        w, b, gain, shift = (
            self._load(f"{part}.{kind}")
            for part in (_PROJECTION, _NORM)
            for kind in ("weight", "bias")
        )
        return w, b, gain, shift

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        """The key and value projections [width, context] of the layer at place i."""
        key, value = (self._load(f"{layer_name(i)}.to_{part}_ip.weight") for part in "kv")
        return key, value

    def _load(self, name: str) -> Tensor:
        """A tensor on the CPU. Raises `UserError` if it holds NaN or infinity."""
        tensor = load_tensor(self.tensors[name])
        if not tensor.isfinite().all():
            raise not_finite(self.tensors[name], name)
        return tensor


def layer_name(i: int) -> str:
    """Of the cross-attention at place i: self-attentions, which have no layer, are counted too."""
    return f"ip_adapter.{2 * i + 1}"


def open_ip_adapter(name: str | Path) -> IPAdapterFile:
    """An IP-Adapter by the name of its file, here or on the Hub.

    Raises `UserError` for what is no plain IP-Adapter in the form of its authors, by what it is.
    """
    file = single_file_path(name)
    if file is None:
        is_folder = Path(name).expanduser().is_dir()
        raise UserError(
            f"the IP-Adapter {name} {'is a folder' if is_folder else 'does not exist'}: {_FORM}"
        )
    found = IPAdapterFile(file.stem, file, read_header(file))
    _check(found)
    return found


def _check(adapter: IPAdapterFile) -> None:
    place, shapes = adapter.place, {key: stored.shape for key, stored in adapter.tensors.items()}
    if not any(key.startswith(("ip_adapter.", "image_proj.")) for key in shapes):
        kind = foreign(shapes) or "a Stable Diffusion model"
        raise UserError(f"{place} is {kind}, not an IP-Adapter: {_FORM}")
    for mark, kind in _OTHERS.items():
        if any(re.match(mark, key) for key in shapes):
            raise UserError(f"{place} is {kind}: {_FORM}")

    def side(name: str, axis: int) -> int:
        return next(iter(shapes.get(name, ())[axis:]), 0)

    context = side(f"{_NORM}.weight", 0)
    expected: dict[str, tuple[int, ...]] = {
        f"{_PROJECTION}.weight": (TOKENS * context, side(f"{_PROJECTION}.weight", 1)),
        f"{_PROJECTION}.bias": (TOKENS * context,),
        f"{_NORM}.weight": (context,),
        f"{_NORM}.bias": (context,),
    }
    for i in range(max(1, sum(key.endswith(".to_k_ip.weight") for key in shapes))):
        width = side(f"{layer_name(i)}.to_k_ip.weight", 0)
        expected |= {f"{layer_name(i)}.to_{part}_ip.weight": (width, context) for part in "kv"}
    if faults := tensor_faults(expected, shapes):
        raise UserError(f"{place} is not a whole IP-Adapter: {faults}")
    if strange := sorted({stored.dtype for stored in adapter.tensors.values()} - {*FLOATS}):
        raise UserError(f"{place} holds {some(strange)} tensors; they must be floats")


# --- the image encoder ------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageEncoder:
    """A CLIP image encoder on disk: a folder in transformers' format."""

    place: Path
    config: Mapping[str, Any]  # what koala reads of it
    tensors: Mapping[str, Stored]

    @property
    def side(self) -> int:
        """Of the images that it reads, in pixels."""
        return int(self.config.get("image_size", 224))

    @property
    def gives(self) -> int:
        """Width of the image embedding."""
        return self.tensors["visual_projection.weight"].shape[0]

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The network on the CPU. Raises `UserError` if its weights do not fit its config."""
        import_module("koala.utils.networks")  # first: then these bring no other models along
        from transformers.models.clip.configuration_clip import CLIPVisionConfig
        from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

        own = {key: value for key, value in self.config.items() if key not in ABOUT}
        with without_weights():
            encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**own))
        if not filled(encoder, self.tensors, dtype):
            shapes = {key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items()}
            found = {key: stored.shape for key, stored in self.tensors.items()}
            raise UserError(
                f"{self.place}: the weights do not fit config.json: {tensor_faults(shapes, found)}"
            )
        return encoder.eval().requires_grad_(False)


def open_image_encoder(folder: str | Path) -> ImageEncoder:
    """An image encoder by the name of its folder. Raises `UserError` for another folder."""
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise UserError(f"the image encoder {folder} is no folder: {_ENCODER_FORM}")
    config = read_json(place / "config.json")
    if (kind := config.get("model_type")) != _KIND:
        what = config.get("_class_name") or kind or "an unknown kind of model"
        raise UserError(f"{place} is {what}, not an image encoder: {_ENCODER_FORM}")
    settings = checked(IMAGE_ENCODER, config, str(place / "config.json"))
    if settings.get("patch_size", 32) > settings.get("image_size", 224):
        raise UserError(f"{place}/config.json: patch_size must be at most image_size")
    tensors = read_component(place, BESIDE)
    # Older files have the positions' numbers, which the network counts itself.
    own = {key: stored for key, stored in tensors.items() if not key.endswith(".position_ids")}
    if len(own.get("visual_projection.weight", Stored(place, "", (), 0, 0)).shape) != 2:
        raise UserError(f"{place} has no visual_projection: {_ENCODER_FORM}")
    return ImageEncoder(place, settings, own)
