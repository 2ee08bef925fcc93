"""Where a model comes from and whether it is whole: names, folders, weights files.

A model is a folder in the layout of diffusers' `StableDiffusionXLPipeline`. Everything that can be
wrong with one is found here, from its JSON files and the headers of its safetensors files, before
a single weight is read. Pickled weights are never opened.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from koala.architectures.table import (
    FACTOR,
    LATENT_CHANNELS,
    UNetArchitecture,
    from_unet_config,
    tensor_shapes,
)
from koala.checkpoints.tensors import Stored, load_tensor, read_header
from koala.errors import UserError

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

BUNDLED = Path(__file__).parents[1] / "models"
PIPELINE = "StableDiffusionXLPipeline"
_DIFFUSERS, _TRANSFORMERS = "diffusion_pytorch_model", "model"
WEIGHTS = {  # components with weights: stem of the file's name
    "unet": _DIFFUSERS,
    "vae": _DIFFUSERS,
    "text_encoder": _TRANSFORMERS,
    "text_encoder_2": _TRANSFORMERS,
}
CONFIGS = {  # the file without which a component is not there
    **dict.fromkeys(WEIGHTS, "config.json"),
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]  # of tensors, by name
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILE = re.compile(rf"({_HUB_ID.pattern})/([\w.-][\w./-]*\.safetensors)")  # org/name/FILE
_HUB_FILES = [
    "model_index.json",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    *(f"{component}/*.{ending}" for component in CONFIGS for ending in ("json", "txt")),
    *(f"{component}/*.safetensors" for component in WEIGHTS),
]


def some(names: Iterable[str], limit: int = 10) -> str:
    """At most `limit` of the names, then how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` if it is missing or is none."""
    try:
        return parse_object(file.read_bytes(), str(file))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; is this a whole model folder?") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}; fetch it again") from None


def parse_object(content: bytes | str, where: str) -> dict[str, Any]:
    """The JSON object in a file's content. Raises `UserError` if there is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read: {error}; fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold a JSON object, not {type(value).__name__}")
    return value


def weights_files(folder: Path, component: str) -> list[Path]:
    """The safetensors files of a component, one or the shards that its index names.

    Raises `UserError` if there are none.
    """
    stem, place = WEIGHTS[component], folder / component
    if (single := place / f"{stem}.safetensors").is_file():
        return [single]
    if (index := place / f"{stem}.safetensors.index.json").is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map; fetch it again")
        shards = sorted({str(shard) for shard in weight_map.values()})
        if outside := [shard for shard in shards if Path(shard).name != shard]:
            raise UserError(f"{index} names {outside[0]!r}, which lies outside its folder")
        return [place / shard for shard in shards]
    others = sorted(p.name for p in place.glob(f"*{stem}*"))
    found = f"; found only {some(others)}" if others else ""
    raise UserError(f"{place} lacks {stem}.safetensors{found}")


def read_tensors(folder: Path, component: str) -> dict[str, Stored]:
    """Every tensor of a component by name, from the headers alone. Raises `UserError`."""
    tensors: dict[str, Stored] = {}
    for file in weights_files(folder, component):
        tensors |= read_header(file)
    return tensors


# --- what a model folder must hold ----------------------------------------------------------


def resolve_model(name_or_path: str | Path) -> Path:
    """The checked folder of a model.

    `name_or_path`: a bundled name ("koala-mini"), the path of a folder, a Hub id ("org/name"),
    which is fetched unless the local Hugging Face cache has it, or a single file in SDXL's
    original layout, here or on the Hub ("org/name/FILE.safetensors"), which is unpacked into
    koala's cache once. A bundled name wins over a folder
    of the same name in the working directory (write ./koala-mini for that). Raises `UserError` if
    it is none of these or the model is no whole SDXL pipeline.
    """
    name = str(name_or_path)
    if file := single_file_path(name_or_path):
        from koala.checkpoints.convert import unpacked

        folder = unpacked(file)
    elif name in bundled_names():
        folder = BUNDLED / name
    elif name and Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
    elif isinstance(name_or_path, str) and _HUB_ID.fullmatch(name):
        folder = _hub_folder(name)
    else:
        raise UserError(
            f"unknown model {name!r}; allowed are a bundled name ({some(bundled_names()) or 'none'}"
            "), a folder in diffusers' SDXL layout, a single .safetensors file, or a Hub id like "
            "org/name"
        )
    check_folder(folder)
    return folder


def single_file_path(model: str | Path) -> Path | None:
    """The path of the single file that a model's name means; None if it means something else.

    One of the Hub is fetched unless the local Hugging Face cache has it; UserError if it cannot be.
    """
    path = Path(model).expanduser()
    if str(model) in bundled_names() or path.is_dir():
        return None
    if not path.exists() and isinstance(model, str) and (found := _HUB_FILE.fullmatch(model)):
        return _hub_file(*found.groups())
    return path if path.is_file() else None


def bundled_names() -> list[str]:
    """Names of the models that are installed with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/model_index.json"))


def _hub_folder(hub_id: str) -> Path:
    """Where the local cache has a model of the Hub; fetched only if it is not whole there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    files = {"allow_patterns": _HUB_FILES, "ignore_patterns": ["*.fp16*"]}
    with contextlib.suppress(HfHubHTTPError, OSError, ValueError):  # not here, or not all of it
        folder = Path(snapshot_download(hub_id, **files, local_files_only=True))
        check_folder(folder)
        return folder
    try:
        return Path(snapshot_download(hub_id, **files))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"model {hub_id!r} is no local folder and cannot be had from the Hub "
            f"({_first_line(error)}); "
            f"bundled are: {some(bundled_names()) or 'none'}"
        ) from None


def _hub_file(hub_id: str, file: str) -> Path:
    """Where the local cache has a file of the Hub; fetched only if it is not there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    with contextlib.suppress(HfHubHTTPError, OSError, ValueError):  # not here
        return Path(hf_hub_download(hub_id, file, local_files_only=True))
    try:
        return Path(hf_hub_download(hub_id, file))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"model {f'{hub_id}/{file}'!r} is no local file and cannot be had from the Hub "
            f"({_first_line(error)})"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_folder(folder: Path) -> None:
    """Raises `UserError` naming what keeps `folder` from being a whole SDXL pipeline."""
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is no model: it has no model_index.json of a {PIPELINE}")
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind != PIPELINE:
        why = ""
        if kind == "StableDiffusionPipeline":
            why = " (SD 1 or 2, whose U-Net has no addition embedding)"
        raise UserError(f"{folder} is a {kind}{why}; must be a {PIPELINE}")
    for component, file in CONFIGS.items():
        if not (folder / component / file).is_file():
            raise UserError(f"{folder} lacks {component}/{file}, a part of every {PIPELINE}")
    stored = {component: read_tensors(folder, component) for component in WEIGHTS}
    arch = unet_architecture(folder)
    if not arch.pooled:
        raise UserError(f"{folder}/unet has no addition embedding, an SDXL U-Net has one")
    check_unet(arch, stored["unet"], folder)
    _check_widths(folder, arch)


def unet_architecture(folder: Path) -> UNetArchitecture:
    """What the U-Net of a model folder is, by its configuration. Raises `UserError`."""
    file = folder / "unet" / "config.json"
    try:
        return from_unet_config(read_json(file))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def check_unet(arch: UNetArchitecture, stored: dict[str, Stored], folder: Path) -> None:
    """Raises `UserError` unless `stored` has exactly the tensors of `arch`, in its shapes."""
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    if faults := tensor_faults(tensor_shapes(arch), shapes):
        raise UserError(f"{folder}/unet: the weights do not fit config.json: it {faults}")


def tensor_faults(expected: Shapes, found: Shapes) -> str:
    """What keeps `found` from having exactly the tensors `expected`; "" if nothing does."""
    wrong = {
        "lacks": [name for name in expected if name not in found],
        "has foreign": [name for name in found if name not in expected],
        "has misshapen": [
            f"{name} {list(found[name])} for {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    return "; ".join(f"{what} {some(names)}" for what, names in wrong.items() if names)


def _check_widths(folder: Path, arch: UNetArchitecture) -> None:
    """The widths on which the parts of a pipeline must agree."""
    text, text_2, vae = (
        read_json(folder / part / "config.json")
        for part in ("text_encoder", "text_encoder_2", "vae")
    )
    try:
        context = text["hidden_size"] + text_2["hidden_size"]
        agreements = {
            "cross_attention_dim": (arch.context, context, "the text encoders' hidden sizes"),
            "pooled width": (arch.pooled, text_2["projection_dim"], "text_encoder_2's projection"),
            "latent channels": (
                LATENT_CHANNELS,
                vae["latent_channels"],
                "the VAE's latent_channels",
            ),
            "latent factor": (
                FACTOR,
                2 ** (len(vae["block_out_channels"]) - 1),
                "the VAE's",
            ),
        }
    except KeyError as error:
        raise UserError(f"{folder}: a config.json lacks {error}") from None
    for what, (own, other, whose) in agreements.items():
        if own != other:
            raise UserError(f"{folder}: the U-Net's {what} is {own}, {whose} give {other}")


# --- loading --------------------------------------------------------------------------------


def _load(model_class: Any, folder: Path, component: str, **options: Any) -> Any:
    """A component in evaluation mode through its library's class, every tensor accounted for."""
    read_tensors(folder, component)
    model, info = model_class.from_pretrained(
        folder / component,
        **options,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    wrong = {
        "lacks": info["missing_keys"],
        "has foreign": info["unexpected_keys"],
        "has misshapen": [entry[0] for entry in info["mismatched_keys"]],
    }
    faults = "; ".join(f"{what} {some(sorted(keys))}" for what, keys in wrong.items() if keys)
    if faults:
        raise UserError(f"{folder}/{component}: the weights do not fit config.json: it {faults}")
    return model.eval()


def _load_diffusers(
    model_class: Any, folder: Path, component: str, dtype: torch.dtype | None
) -> Any:
    import torch

    # Without accelerate, which is no dependency, diffusers can only load in the plain way.
    dtype = dtype or torch.float32
    return _load(model_class, folder, component, torch_dtype=dtype, low_cpu_mem_usage=False)


def load_unet(folder: Path, dtype: torch.dtype | None = None) -> UNet2DConditionModel:
    """The U-Net of a checked model folder, on the CPU; `dtype` None means float32.

    Tensor by tensor: diffusers' own way, without accelerate, holds every weight twice.
    """
    import torch
    from diffusers import UNet2DConditionModel

    stored = read_tensors(folder, "unet")
    check_unet(unet_architecture(folder), stored, folder)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read_json(folder / "unet" / "config.json"))
    kind = dtype or torch.float32
    # A copy, so that the memory is torch's own and aligned as it likes it.
    weights = {name: load_tensor(one).to(kind, copy=True) for name, one in stored.items()}
    unet.load_state_dict(weights, assign=True)
    return unet.eval()


def load_vae(folder: Path, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """The VAE of a checked model folder, on the CPU; `dtype` None means float32."""
    from diffusers import AutoencoderKL

    return _load_diffusers(AutoencoderKL, folder, "vae", dtype)


def load_text(
    folder: Path, dtype: torch.dtype | None = None
) -> tuple[CLIPTokenizer, CLIPTokenizer, CLIPTextModel, CLIPTextModelWithProjection]:
    """(tokenizer, tokenizer_2, text_encoder, text_encoder_2) of a checked model folder.

    On the CPU; `dtype` None means float32.
    """
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    dtype = dtype or torch.float32
    with _no_bars():
        return (
            CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
            CLIPTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True),
            _load(CLIPTextModel, folder, "text_encoder", dtype=dtype),
            _load(CLIPTextModelWithProjection, folder, "text_encoder_2", dtype=dtype),
        )


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keeps transformers' bar for every small file off the terminal, and leaves it as it was."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def load_scheduler_config(folder: Path) -> dict[str, Any]:
    """The noise schedule's settings, as diffusers writes them."""
    return read_json(folder / "scheduler" / "scheduler_config.json")
