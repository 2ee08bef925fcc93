"""ControlNets of SDXL in diffusers' form: a folder, a Hub id, or a single file of its tensors.

arXiv 2302.05543. Only headers and configs are read, without torch, until `load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.architectures.config import unet_config
from koala.architectures.table import FACTOR, UNetArchitecture
from koala.checkpoints.foreign import foreign
from koala.checkpoints.foreign_folder import folder_kind
from koala.checkpoints.load import filled, without_weights
from koala.checkpoints.resolve import HUB_ID, hub_folder, single_file_path
from koala.checkpoints.schema import ABOUT
from koala.checkpoints.tensors import FLOATS, Stored, read_header
from koala.checkpoints.validate import STEMS, read_component, read_json, some
from koala.errors import UserError

if TYPE_CHECKING:
    import torch

    from koala.utils.networks import ControlNetModel

_CLASS = "ControlNetModel"
_STEM = STEMS["controlnet"]
_HUB_FILES = (
    "config.json", f"{_STEM}.safetensors", f"{_STEM}.safetensors.index.json",
    f"{_STEM}-?????-of-?????.safetensors",
)  # fmt: skip
_OTHERS = {  # substrings of tensor names -> what the file is
    "lora_controlnet": "a Control-LoRA",
    "control_add_embedding.": "a ControlNet Union",
    "control_model.": "a ControlNet with the names of the original ldm code",
    "input_hint_block.": "a ControlNet with the names of the original ldm code",
    "lllite": "a ControlNet-LLLite",
    "adapter.body.": "a T2I-Adapter",
}
_FAMILIES = {768: "SD 1.5", 1024: "SD 2"}  # by width of the text embeddings
_FORM = "give the folder, Hub id or .safetensors file of an SDXL ControlNet in diffusers' names"


@dataclass(frozen=True)
class ControlNetFiles:
    """A ControlNet on disk, of which tensors' names and shapes are known."""

    name: str  # for people: of the file or folder
    place: Path
    config: Mapping[str, Any] | None  # diffusers'; None: a single file has none
    tensors: Mapping[str, Stored]

    @property
    def residuals(self) -> list[int]:
        """Channels of the residuals for the skip connections."""
        number = sum(
            key.startswith("controlnet_down_blocks.") and key.endswith(".weight")
            for key in self.tensors
        )
        return [self._shape(f"controlnet_down_blocks.{i}")[0] for i in range(number)]

    @property
    def halvings(self) -> int:
        """How often the control image's sides are halved before it meets the latents."""
        return sum(key.startswith(f"{_READS}blocks.") for key in self.tensors) // 4

    @property
    def context(self) -> int:
        """Width of the text embeddings that it reads; 0: it reads none."""
        paths = (key.removesuffix(".weight") for key in self.tensors)
        return next((self._shape(path)[-1] for path in paths if path.endswith("attn2.to_k")), 0)

    @property
    def added(self) -> int:
        """Width of the pooled text embedding and the sizes; 0: it reads neither, as before SDXL."""
        return self._shape("add_embedding.linear_1")[-1]

    def _shape(self, path: str) -> tuple[int, ...]:
        """Of a module's weight; (0,) if there is none."""
        stored = self.tensors.get(f"{path}.weight")
        return (stored and stored.shape) or (0,)

    def settings(self, arch: UNetArchitecture) -> dict[str, Any]:
        """Arguments of diffusers' class; of a single file as its tensors and `arch` say."""
        if self.config is not None:
            return {k: v for k, v in self.config.items() if k not in ABOUT and k[0] != "_"}
        taken = ("block_out_channels", "layers_per_block", "cross_attention_dim",
                 "norm_num_groups", "use_linear_projection", "addition_embed_type",
                 "addition_time_embed_dim", "projection_class_embeddings_input_dim",
                 "attention_head_dim")  # fmt: skip
        paths = [f"down_blocks.{n}.attentions.0" for n in range(len(arch.widths))]
        depths = [self._depth(path) for path in (*paths, "mid_block.attentions.0")]
        if depths[-1] not in (0, depths[-2]):
            raise UserError(
                f"{self.name} has a mid block {depths[-1]} deep, which a single file cannot say: "
                "give its folder with config.json"
            )
        blocks = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths[:-1]]
        reads = [f"{_READS}conv_in", *(f"{_READS}blocks.{2 * i + 1}" for i in range(self.halvings))]
        return {
            **{key: value for key, value in unet_config(arch).items() if key in taken},
            "down_block_types": blocks,
            "transformer_layers_per_block": [max(1, depth) for depth in depths[:-1]],
            "mid_block_type": "UNetMidBlock2DCrossAttn" if depths[-1] else "UNetMidBlock2D",
            "conditioning_embedding_out_channels": [self._shape(path)[0] for path in reads],
        }

    def _depth(self, path: str) -> int:
        blocks = f"{path}.transformer_blocks."
        found = {key[len(blocks) :].split(".")[0] for key in self.tensors if key.startswith(blocks)}
        return len(found)

    def load(self, arch: UNetArchitecture, dtype: torch.dtype) -> ControlNetModel:
        """The network on the CPU, made for a U-Net of `arch`. UserError if it is not whole."""
        from koala.utils.networks import ControlNetModel

        try:
            with without_weights():
                net = ControlNetModel.from_config(self.settings(arch))
        except Exception as error:  # the config is untrusted, and the library checks nothing
            line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise UserError(f"{self.name}: no ControlNet is made by its config: {line}") from None
        if not filled(net, self.tensors, dtype):
            wanted = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
            found = {key: stored.shape for key, stored in self.tensors.items()}
            wrong = sorted({key for key, _ in wanted.items() ^ found.items()})
            raise UserError(f"{self.name}: its weights do not fit its config: {some(wrong)}")
        return net.eval().requires_grad_(False)


_READS = "controlnet_cond_embedding."  # the layers that read the control image


def open_controlnet(name: str | Path) -> ControlNetFiles:
    """A ControlNet by the name of its folder or file, or its Hub id.

    Raises `UserError` for what is none of SDXL's in diffusers' names, by what it is.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        found = _of_folder(path, str(name))
    elif file := single_file_path(name):
        shown = file.resolve().parent.name if file.stem.startswith(_STEM) else file.stem
        found = ControlNetFiles(shown, file, None, read_header(file))
    elif isinstance(name, str) and HUB_ID.fullmatch(name):
        folder = hub_folder(name, _HUB_FILES)
        if not any(folder.glob(f"{_STEM}*.safetensors")):
            hub_folder(name, (f"{_STEM}*.fp16*",))
        found = _of_folder(folder, name)
    else:
        raise UserError(f"the ControlNet {name} does not exist: {_FORM}")
    _check(found)
    return found


def _of_folder(folder: Path, name: str) -> ControlNetFiles:
    if (folder / "model_index.json").is_file():
        raise UserError(f"{name} is a model, not a ControlNet: {_FORM}")
    if not (folder / "config.json").is_file():
        what = folder_kind(folder, {}) or "it has no config.json"
        raise UserError(f"{name} is no ControlNet's folder ({what}): {_FORM}")
    config = read_json(folder / "config.json")
    if (kind := config.get("_class_name")) != _CLASS:
        raise UserError(f"{name} is a {kind}, not a {_CLASS}: {_FORM}")
    shown = name if HUB_ID.fullmatch(name) else folder.resolve().name
    return ControlNetFiles(shown, folder, config, read_component(folder, "controlnet"))


def _check(net: ControlNetFiles) -> None:
    for key in net.tensors:
        for mark, kind in _OTHERS.items():
            if mark in key:
                raise UserError(f"{net.place} is {kind}: {_FORM}")
    reads = net._shape(f"{_READS}conv_in")
    if not net.residuals or len(reads) != 4:
        shapes = {key: stored.shape for key, stored in net.tensors.items()}
        kind = foreign(shapes) or "a Stable Diffusion model"
        raise UserError(f"{net.place} is {kind}, not a ControlNet: {_FORM}")
    if not net.added:
        kind = _FAMILIES.get(net.context, "an unknown model")
        raise UserError(
            f"{net.place} is a ControlNet for {kind}: it has no addition embedding (pooled text "
            "and size), SDXL's has one"
        )
    if reads[1] != 3:
        raise UserError(f"{net.place} takes images of {reads[1]} channels: it must be 3, RGB")
    if 2**net.halvings != FACTOR:
        raise UserError(
            f"{net.place} reads its image at 1/{2**net.halvings} of its size: it must be 1/{FACTOR}"
        )
    if strange := sorted({stored.dtype for stored in net.tensors.values()} - {*FLOATS}):
        raise UserError(f"{net.place} holds {some(strange)} tensors; they must be floats")
