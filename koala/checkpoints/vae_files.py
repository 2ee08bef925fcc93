"""Reads a VAE that takes the place of a model's own: from a file, a folder or the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koala.checkpoints.bundled import bundled_folder, bundled_names
from koala.checkpoints.foreign_folder import folder_kind
from koala.checkpoints.ldm_keys import PREFIXES
from koala.checkpoints.pipeline_files import Tensors, check_dtypes, is_obsolete
from koala.checkpoints.resolve import HUB_ID, hub_folder, single_file_path
from koala.checkpoints.schema import checked
from koala.checkpoints.single_file import component_tensors
from koala.checkpoints.spellings import canonical
from koala.checkpoints.tensors import Stored, read_header
from koala.checkpoints.validate import WEIGHTS, parse_object, read_component, read_small
from koala.errors import UserError

_SCALES = {  # settings of a VAE's config -> diffusers' defaults
    "scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None,
}  # fmt: skip
_FILES = ("config.json", f"{WEIGHTS['vae']}*.safetensors", "*.index.json")


@dataclass(frozen=True)
class VaeFiles:
    """A VAE without its weights read: tensors by diffusers' names, and its config if it has one."""

    source: Path
    tensors: Tensors
    config: bytes | None

    def note(self, own: Mapping[str, Any]) -> str:
        """A line where its latents are scaled in another way than a model's own VAE; "" if not.

        own: the config of the model's VAE.
        """
        other = parse_object(self.config or b"{}", str(self.source))
        differing = [key for key in _SCALES if _scale(other, key) != _scale(own, key)]
        if not differing:
            return ""
        values = (f"{key} {_scale(other, key)}, not {_scale(own, key)}" for key in differing)
        return (
            f"the VAE {self.source} scales latents in another way than the model's own "
            f"({'; '.join(values)}): only a U-Net that was trained with it draws well; SD 1.5's "
            "VAE fits no SDXL model"
        )


def _scale(config: Mapping[str, Any], key: str) -> Any:
    return config.get(key, _SCALES[key])


def read_vae(vae: str | Path) -> VaeFiles:
    """The VAE in a .safetensors file (alone or of a whole model), a folder, a Hub id or a bundled
    model.

    A folder holds its config.json, or is a model's. Raises `UserError` if there is none.
    """
    if file := single_file_path(vae):
        return _of_file(file)
    bundled = str(vae) in bundled_names()
    folder = bundled_folder(str(vae)) if bundled else Path(vae).expanduser()
    if not folder.is_dir():
        if not (isinstance(vae, str) and HUB_ID.fullmatch(vae)):
            raise UserError(f"--vae {vae} does not exist: give a file, a folder or a Hub id")
        folder = hub_folder(vae, _FILES)
    place = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (place / "config.json").is_file():
        what = folder_kind(place, {}) or "it has no config.json"
        raise UserError(
            f"--vae {vae} is no VAE's folder ({what}): give a file, a folder or a Hub id"
        )
    config = read_small(place / "config.json")
    values = parse_object(config, str(place / "config.json"))
    if values.get("_class_name") != "AutoencoderKL":
        raise UserError(f"{place} is no AutoencoderKL, as SDXL's VAE is: choose another --vae")
    checked("vae/config.json", values, str(place / "config.json"))
    return _checked(place, read_component(place, "vae"), config)


def _of_file(file: Path) -> VaeFiles:
    header = canonical(read_header(file))
    prefix = PREFIXES["vae"]
    own = {n.removeprefix(prefix): s for n, s in header.items() if n.startswith(prefix)}
    if not own:
        own = {n: s for n, s in header.items() if not is_obsolete(n)}
    if "decoder.conv_in.weight" not in own:
        raise UserError(f"{file} holds no VAE of SDXL's kind: choose another --vae")
    return _checked(file, own, None)


def _checked(source: Path, stored: dict[str, Stored], config: bytes | None) -> VaeFiles:
    tensors = component_tensors(source, "vae", stored)
    check_dtypes(source, {"vae": tensors})
    return VaeFiles(source, tensors, config)
