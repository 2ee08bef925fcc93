"""A folder with a U-Net alone, in diffusers' format, and a base that completes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from koala.architectures.layout import tensor_shapes
from koala.architectures.table import UNetArchitecture
from koala.checkpoints.bundled import bundled_names
from koala.checkpoints.pipeline_files import Contents, Tensors, check_dtypes
from koala.checkpoints.resolve import HUB_ID, hub_folder
from koala.checkpoints.single_file import completed
from koala.checkpoints.tensors import Stored, View
from koala.checkpoints.validate import (
    STEMS,
    architecture_of,
    is_unet,
    read_component,
    tensor_faults,
)
from koala.errors import UserError

_HUB_FILES = ("config.json", f"{STEMS['unet']}*.safetensors", f"{STEMS['unet']}*.index*.json")


def unet_folder(model: str | Path, fetch: bool = False) -> Path | None:
    """The folder with a U-Net alone that a model's name refers to; None if it is another thing.

    fetch: download it, if it is a Hub id.
    """
    folder = Path(model).expanduser()
    if str(model) in bundled_names():
        return None
    if not folder.exists() and fetch and HUB_ID.fullmatch(str(model)):
        folder = hub_folder(str(model), ("model_index.json", "config.json"))
        if is_unet(folder):
            folder = hub_folder(str(model), _HUB_FILES)
    return folder if is_unet(folder) else None


def open_unet(folder: Path) -> tuple[UNetArchitecture, Mapping[str, Stored]]:
    """The U-Net in a folder and its tensors. UserError if it is no whole one of SDXL's."""
    arch = architecture_of(folder / "config.json", str(folder))
    if not arch.pooled:
        raise UserError(f"{folder} has no addition embedding; an SDXL U-Net has one")
    stored = read_component(folder, "unet")
    shapes = {name: one.shape for name, one in stored.items()}
    if faults := tensor_faults(tensor_shapes(arch), shapes):
        raise UserError(f"{folder}: the weights do not fit config.json: {faults}")
    return arch, stored


def read_unet(folder: Path, base: Contents, parts: Mapping[str, Tensors]) -> Contents:
    """The base with the U-Net in a folder; parts: components to take instead of the base's."""
    arch, stored = open_unet(folder)
    unet = {name: View((one,)) for name, one in stored.items()}
    check_dtypes(folder, {"unet": unet})
    tensors = {**base.tensors, "unet": unet, **parts}
    return Contents(folder, arch, tensors, completed(folder, arch, None, base))
