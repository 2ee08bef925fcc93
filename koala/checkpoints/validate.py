"""Checks that a model is complete: its folder, its configs, its weights files.

A model is a folder in the layout of diffusers' `StableDiffusionXLPipeline`. Faults are found in
its JSON files and in the headers of its safetensors files, before any weight is read. Pickled
weights are never opened.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from koala.architectures.config import from_unet_config
from koala.architectures.layout import tensor_shapes
from koala.architectures.table import FACTOR, LATENT_CHANNELS, UNetArchitecture
from koala.checkpoints.foreign import foreign
from koala.checkpoints.foreign_folder import (
    UNET_CLASS,
    exported_kind,
    folder_kind,
    foreign_unet,
)
from koala.checkpoints.prediction import of_config
from koala.checkpoints.quantised import stored_shapes
from koala.checkpoints.schema import SCHEMAS, checked
from koala.checkpoints.tensors import Stored, read_header
from koala.errors import UserError

PIPELINE = "StableDiffusionXLPipeline"
_PIPELINES = re.compile(r"StableDiffusionXL\w*Pipeline")  # with the same parts, or more
_DIFFUSERS, _TRANSFORMERS = "diffusion_pytorch_model", "model"
WEIGHTS = {  # component with weights -> stem of the file name
    "unet": _DIFFUSERS,
    "vae": _DIFFUSERS,
    "text_encoder": _TRANSFORMERS,
    "text_encoder_2": _TRANSFORMERS,
}
STEMS = {  # the same, with what a pipeline is drawn with
    **WEIGHTS,
    "controlnet": _DIFFUSERS,
    "image_encoder": _TRANSFORMERS,
}
CONFIGS = {  # component -> the config file that it must have
    **dict.fromkeys(WEIGHTS, "config.json"),
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
INPUTS = {  # what a U-Net with so many input channels is
    5: "a depth-to-image U-Net",
    7: "the U-Net of SD's upscaler",
    8: "an instruct-pix2pix U-Net",
    9: "an inpainting U-Net",
}
QUANTISED = "quantised"  # key of a U-Net's config: how its weights are stored
QUANTISED_FILE = (
    f"{_DIFFUSERS}.int4.safetensors"  # no other program takes it for weights of its own
)
_OTHER_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".onnx", ".gguf", ".msgpack")
_MOST_BYTES = 2**26  # of a small file
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]  # of tensors, by name


def some(names: Iterable[str]) -> str:
    """At most ten of the names, then how many more there are."""
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` if the file is missing or holds none."""
    return parse_object(read_small(file), str(file))


def read_small(file: Path) -> bytes:
    """The content of a small file. Raises `UserError` if it is missing, no plain file, or large."""
    try:
        kind = file.stat()
        if not stat.S_ISREG(kind.st_mode):
            raise UserError(f"{file} is no plain file; download it again")
        if kind.st_size > _MOST_BYTES:
            raise UserError(
                f"{file} has {kind.st_size:,} bytes: allowed are {_MOST_BYTES:,}; download it again"
            )
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file} is missing; is this a complete model folder?") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}; download it again") from None


def parse_object(content: bytes | str, where: str) -> dict[str, Any]:
    """The JSON object in a file's content. Raises `UserError` if it is something else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read: {error}; download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold a JSON object, not {type(value).__name__}")
    return value


def weights_files(place: Path, component: str) -> list[Path]:
    """The safetensors files in a component's folder: one, or the shards in its index.

    Files of a variant, as `fp16`, are taken where there are no others. Raises `UserError` if there
    are none of either.
    """
    if component == "unet" and (place / QUANTISED_FILE).is_file():
        return [place / QUANTISED_FILE]
    stem, variant = STEMS[component], variant_of(place, component)
    ending = f".{variant}" if variant else ""
    if (single := place / f"{stem}{ending}.safetensors").is_file():
        return [single]
    if (index := place / f"{stem}.safetensors.index{ending}.json").is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map; download it again")
        shards = sorted({str(shard) for shard in weight_map.values()})
        if outside := [shard for shard in shards if Path(shard).name != shard]:
            raise UserError(f"{index} names {outside[0]!r}, which is outside its folder")
        return [place / shard for shard in shards]
    others = sorted(p.name for p in place.glob("*") if p.suffix in _OTHER_WEIGHTS or stem in p.name)
    found = f"; found only {some(others)}" if others else ""
    if any(name.endswith((".bin", ".ckpt", ".pt", ".pth")) for name in others):
        found += ": pickles, which can run code when opened, so koala never opens them"
    raise UserError(f"{place} lacks {stem}.safetensors{found}")


def variant_of(place: Path, component: str) -> str | None:
    """Which files of a component's folder diffusers must be told to take; None: the usual ones.

    That is `fp16`, or the one other variant there is. Raises `UserError` if there are several.
    """
    stem = STEMS[component]
    usual = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    if any((place / name).is_file() for name in usual):
        return None
    one = re.compile(rf"{stem}\.(\w+)\.safetensors|{stem}\.safetensors\.index\.(\w+)\.json")
    names = (one.fullmatch(path.name) for path in place.glob(f"{stem}.*"))
    variants = sorted({found[1] or found[2] for found in names if found})
    if len(variants) > 1 and "fp16" not in variants:
        raise UserError(
            f"{place} holds {stem} in several variants, {some(variants)}: rename the files of one "
            f"to {stem}.safetensors"
        )
    return "fp16" if "fp16" in variants else next(iter(variants), None)


def read_tensors(folder: Path, component: str) -> dict[str, Stored]:
    """All tensors of a model's component by name, from the headers alone. Raises `UserError`."""
    return read_component(folder / component, component)


def read_component(place: Path, component: str) -> dict[str, Stored]:
    """The same, of the component's own folder."""
    tensors: dict[str, Stored] = {}
    for file in weights_files(place, component):
        tensors |= read_header(file)
    return tensors


def check_kind(folder: Path) -> None:
    """Raises `UserError` if the small files of `folder` are not those of an SDXL pipeline."""
    if not (folder / "model_index.json").is_file():
        config = folder / "config.json"
        found = folder_kind(folder, read_json(config) if config.is_file() else {})
        what = f" but {found}" if found else ""
        raise UserError(f"{folder} is not a model (it has no model_index.json){what}")
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if not isinstance(kind, str) or not _PIPELINES.fullmatch(kind):
        why = ""
        if kind == "StableDiffusionPipeline":
            why = " (SD 1 or 2; its U-Net has no addition embedding)"
        raise UserError(f"{folder} is a {kind}{why}; it must be a {PIPELINE}")
    if index.get("requires_aesthetics_score"):
        raise UserError(f"{folder} is the SDXL refiner: give the base model")
    for component, file in CONFIGS.items():
        if not (folder / component / file).is_file():
            if kind := exported_kind(folder):
                raise UserError(f"{folder} is {kind}")
            raise UserError(f"{folder} lacks {component}/{file}, which every {PIPELINE} has")
    _check_files(folder)
    if strange := foreign_unet(read_json(folder / "unet" / CONFIGS["unet"])):
        raise UserError(f"{folder} has {strange}")
    for path in SCHEMAS:
        if (folder / path).is_file():
            checked(path, read_json(folder / path), str(folder / path))
    try:
        of_config(read_json(folder / "scheduler" / CONFIGS["scheduler"]))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if not unet_architecture(folder).pooled:
        raise UserError(f"{folder}/unet has no addition embedding; an SDXL U-Net has one")


def _check_files(folder: Path) -> None:
    """Raises `UserError` for small files that are no plain files, or links out of the folder.

    Programs read all of a component's folder, and `convert` carries what it holds along. A link may
    lead to a file of the same name, as in another model's folder, and in the Hub's cache to the
    folder `blobs` beside the folders of a model's versions.
    """
    places = [folder, *(folder / component for component in CONFIGS)]
    allowed = [place.resolve() for place in places]
    allowed += [parent / "blobs" for parent in allowed[0].parents[:2]]
    for path in (path for place in places for path in place.iterdir()):
        if path.is_dir() or path.suffix == ".safetensors":
            continue
        if not path.is_file():
            raise UserError(f"{path} is no file, or a link to none; download the model again")
        target = path.resolve()
        inside = any(target.is_relative_to(place) for place in allowed)
        if path.is_symlink() and target.name != path.name and not inside:
            raise UserError(f"{path} is a link out of the model's folder; copy the file there")


def check_folder(folder: Path) -> None:
    """Raises `UserError` if `folder` is not a complete SDXL pipeline, naming the fault."""
    check_kind(folder)
    stored = {component: read_tensors(folder, component) for component in WEIGHTS}
    arch = unet_architecture(folder)
    check_unet(arch, stored["unet"], folder)
    _check_widths(folder, arch)


def unet_architecture(folder: Path) -> UNetArchitecture:
    """The architecture of a model folder's U-Net, by its config. Raises `UserError`."""
    file = folder / "unet" / "config.json"
    return architecture_of(file, str(folder))


def architecture_of(file: Path, where: str) -> UNetArchitecture:
    """The same, of a U-Net's config.json; where: what has the U-Net, for messages."""
    config = read_json(file)
    if kind := foreign_unet(config):
        raise UserError(f"{where} has {kind}")
    channels = config.get("in_channels", LATENT_CHANNELS)
    if kind := INPUTS.get(channels if isinstance(channels, int) else LATENT_CHANNELS, ""):
        use = "; use the base model, which koala inpaints with (--mask)" if channels == 9 else ""
        raise UserError(
            f"{where} has {kind}: {channels} input channels, SDXL's has {LATENT_CHANNELS}{use}"
        )
    checked("unet/config.json", config, str(file))
    try:
        return from_unet_config(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def is_unet(folder: Path) -> bool:
    """Whether a folder holds a U-Net alone, in diffusers' format."""
    config = folder / "config.json"
    if (folder / "model_index.json").is_file() or not config.is_file():
        return False
    return read_json(config).get("_class_name") == UNET_CLASS


def is_quantised(folder: Path) -> bool:
    """Whether a model folder's U-Net is stored in 4 bits."""
    return QUANTISED in read_json(folder / "unet" / "config.json")


def refuse_quantised(folder: Path) -> None:
    """UserError for a model that draws in koala, and that nothing else can be done with."""
    if is_quantised(folder):
        raise UserError(
            f"{folder} is stored in int4, which draws and cannot be changed, converted or trained: "
            "give the model that it was made of"
        )


def check_unet(arch: UNetArchitecture, stored: dict[str, Stored], folder: Path) -> None:
    """Raises `UserError` unless `stored` has exactly the tensors of `arch`, whole or in 4 bits."""
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    expected: Shapes = tensor_shapes(arch)
    if is_quantised(folder):
        expected = stored_shapes(expected)
    if faults := tensor_faults(expected, shapes):
        if kind := foreign(shapes):
            raise UserError(f"{folder}/unet holds {kind}")
        raise UserError(f"{folder}/unet: the weights do not fit config.json: {faults}")


def tensor_faults(expected: Shapes, found: Shapes) -> str:
    """How `found` differs from the tensors `expected`; "" if it does not."""
    return describe_faults(
        [name for name in expected if name not in found],
        [name for name in found if name not in expected],
        [
            f"{name} {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    )


def describe_faults(
    missing: Iterable[str], unexpected: Iterable[str], misshapen: Iterable[str]
) -> str:
    """The faults of a component's tensors, for an error message; "" if there are none."""
    kinds = {
        "missing tensors": missing,
        "unexpected tensors": unexpected,
        "tensors of the wrong shape": misshapen,
    }
    return "; ".join(f"{kind}: {some(names)}" for kind, names in kinds.items() if names)


def _check_widths(folder: Path, arch: UNetArchitecture) -> None:
    """Raises `UserError` if the components of a pipeline disagree on a width."""
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
        raise UserError(f"{folder}: a config.json has no {error}") from None
    for what, (own, other, whose) in agreements.items():
        if own != other:
            raise UserError(f"{folder}: the U-Net's {what} is {own}, but {whose} give {other}")
