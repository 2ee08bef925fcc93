"""A complete pipeline in one safetensors file, in SDXL's original layout.

Such a file holds four networks and no configuration. Files written by koala carry the small files
of a model folder in their metadata (`koala.files`), so a round trip loses nothing. For others'
files the configuration is inferred from the shapes and from SDXL's defaults.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koala.architectures.config import from_unet_config, unet_config
from koala.architectures.table import UNetArchitecture
from koala.checkpoints import ldm_keys
from koala.checkpoints.bundled import BUNDLED
from koala.checkpoints.detect import GROUPS, Detected, detect
from koala.checkpoints.pipeline_files import (
    BETAS,
    SCALING_FACTOR,
    Contents,
    Tensors,
    as_file,
    bytes_of,
    check_dtypes,
    is_credit,
    is_obsolete,
    pipeline_index,
    visible_progress,
    write_tensors,
)
from koala.checkpoints.tensors import Stored, View, read_header, read_metadata
from koala.checkpoints.validate import (
    CONFIGS,
    WEIGHTS,
    describe_faults,
    parse_object,
    read_json,
    some,
    tensor_faults,
)
from koala.errors import UserError

FILES = "koala.files"  # key of the metadata: JSON, path in a model folder -> content
VOCABULARY = 49408  # tokens of CLIP; its tokenizer files are bundled, so single files omit them
CREDIT = "NOTICE.modelspec.txt"  # metadata of others' files, in a folder
_LONG = 4000  # characters: an embedded image, not a credit
_TOKENIZERS = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
_EMBEDDING = "text_model.embeddings.token_embedding.weight"
_MARKS: dict[
    str, dict[str, Any]
] = {  # empty tensors that state the noise schedule of a fine-tuned model
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True},
}


# --- reading --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SingleFile:
    """A weights file with an SDXL-class U-Net, and everything else in it."""

    found: Detected
    parts: Mapping[str, Mapping[str, Stored]]  # component -> tensors, without the prefix
    rest: Mapping[str, Stored]  # tensors of no component
    metadata: Mapping[str, str]
    files: Mapping[str, bytes]  # of a model folder, carried in the metadata; empty in others' files


def open_file(file: Path) -> SingleFile:
    """What a file holds, from its header alone; it need not be a complete pipeline.

    Raises `UserError` if it is damaged, a pickle, another kind of model (named in the message), or
    has missing or unexpected U-Net tensors.
    """
    header, metadata = read_header(file), read_metadata(file)
    files, stated = _carried(file, metadata), None
    try:
        if config := files.get("unet/config.json"):
            stated = from_unet_config(parse_object(config, "its unet/config.json"))
        found = detect({name: stored.shape for name, stored in header.items()}, stated)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    parts: dict[str, dict[str, Stored]] = {component: {} for component in found.components}
    prefixes = {c: found.prefix if c == "unet" else ldm_keys.PREFIXES[c] for c in parts}
    rest = {}
    for name, stored in header.items():
        fitting = [c for c, prefix in prefixes.items() if name.startswith(prefix)]
        if not fitting or is_obsolete(name):
            rest[name] = stored
        else:  # the longest prefix: the U-Net may have none
            component = max(fitting, key=lambda c: len(prefixes[c]))
            parts[component][name.removeprefix(prefixes[component])] = stored
    return SingleFile(found, parts, rest, metadata, files)


def read(file: Path) -> Contents:
    """The contents of a single file with a complete pipeline, from its header alone.

    Raises `UserError` as `open_file` does, and if a component or some of its tensors are missing.
    """
    opened = open_file(file)
    found, parts = opened.found, opened.parts
    if found.layout != "ldm" or set(parts) != set(WEIGHTS):
        missing = [part for part in WEIGHTS if part not in parts]
        raise UserError(
            f"{file}: a U-Net in the {found.layout} layout, without {some(missing)}; use a "
            "complete checkpoint, or a folder in diffusers' layout"
        )
    pairs = _pairs(found.architecture, parts)
    tensors = {c: _split(file, c, pairs[c], parts[c]) for c in WEIGHTS}
    check_dtypes(file, tensors)
    files = dict(opened.files)
    if not files:
        try:
            files = _known_files(found.architecture, tensors, opened.rest)
        except (ValueError, LookupError) as error:
            raise UserError(f"{file} is not an SDXL pipeline: {error}") from None
    files |= _vocabularies(file, files, tensors)
    kept = {k: v for k, v in opened.metadata.items() if k.startswith("modelspec.")}
    if kept and CREDIT not in files:
        lines = [f"{key}: {value}\n" for key, value in kept.items() if len(value) < _LONG]
        files[CREDIT] = "".join(lines).encode()
    return Contents(file, found.architecture, tensors, files, kept, tuple(opened.rest))


def _carried(file: Path, metadata: Mapping[str, str]) -> dict[str, bytes]:
    """The small files in a file's metadata, if each is one that a model folder may have."""
    if FILES not in metadata:
        return {}
    where = f"{file}: {FILES} in its metadata"
    files = {}
    for path, content in parse_object(metadata[FILES], where).items():
        folder, _, name = path.rpartition("/")
        plain = "/" not in folder and "\\" not in path and name == Path(name).name
        known = folder in CONFIGS and name.endswith((".json", ".txt"))
        if not plain or not (known or path == "model_index.json" or is_credit(path)):
            raise UserError(f"{where} holds {path!r}, which is not a file of a model folder")
        if not isinstance(content, str):
            raise UserError(f"{where}: {path} must be text")
        files[path] = content.encode()
    needed = {f"{part}/{name}" for part, name in CONFIGS.items()} | {"model_index.json"}
    if missing := sorted(needed - files.keys()):
        raise UserError(f"{where} lacks {some(missing)}")
    return files


def _pairs(
    arch: UNetArchitecture, parts: Mapping[str, Mapping[str, Stored]]
) -> dict[str, list[ldm_keys.Pair]]:
    """The pairs of every component, in the sizes that its tensors show."""
    widths: list[int] = []
    while stored := parts["vae"].get(f"encoder.down.{len(widths)}.block.0.conv1.weight"):
        widths.append(stored.shape[0] if stored.shape else 0)
    resnets = _count(parts["vae"], "encoder.down.0.block")
    return {
        "unet": ldm_keys.unet_pairs(arch),
        "vae": ldm_keys.vae_pairs(widths, resnets),
        "text_encoder": ldm_keys.clip_pairs(
            _count(parts["text_encoder"], "text_model.encoder.layers")
        ),
        "text_encoder_2": ldm_keys.open_clip_pairs(
            _count(parts["text_encoder_2"], "transformer.resblocks")
        ),
    }


def _count(names: Mapping[str, Stored], path: str) -> int:
    """Number of a module's children with tensors."""
    start = path + "."
    return len({name[len(start) :].split(".")[0] for name in names if name.startswith(start)})


def _split(
    file: Path, component: str, pairs: list[ldm_keys.Pair], stored: Mapping[str, Stored]
) -> Tensors:
    """Diffusers' tensors of a component. Raises `UserError` naming those at fault."""
    expected = {pair.single: pair for pair in pairs}
    faults = describe_faults(
        [name for name in expected if name not in stored],
        [name for name in stored if name not in expected],
        [
            f"{name} {list(stored[name].shape)}"
            for name, pair in expected.items()
            if name in stored and not ldm_keys.fits(pair, stored[name].shape)
        ],
    )
    if faults:
        raise UserError(f"{file}: {component}: {faults}")
    tensors: dict[str, View] = {}
    for pair in pairs:
        tensors |= ldm_keys.split(pair, stored[pair.single])
    return tensors


# --- what is known of SDXL ------------------------------------------------------------------


def _known_files(
    arch: UNetArchitecture, tensors: Mapping[str, Tensors], names: Collection[str]
) -> dict[str, bytes]:
    """The configs of a file that carries none: SDXL's, in the sizes that its shapes show.

    `names`: of the other tensors in the file. Raises `ValueError` or `LookupError` if the VAE or a
    text encoder is not SDXL's.
    """
    schedule: dict[str, Any] = {
        "_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000, **BETAS,
        "prediction_type": "epsilon", "timestep_spacing": "trailing",
    }  # fmt: skip
    for mark, settings in _MARKS.items():
        schedule |= settings if mark in names else {}
    configs = {
        "model_index.json": pipeline_index(),
        "scheduler/scheduler_config.json": schedule,
        "unet/config.json": unet_config(arch),
        "vae/config.json": _vae_config(tensors["vae"]),
        "text_encoder/config.json": _text_config(tensors["text_encoder"], "quick_gelu", 49407),
        "text_encoder_2/config.json": _text_config(tensors["text_encoder_2"], "gelu", 0),
    }
    for component, encoder in _TOKENIZERS.items():
        bundled = read_json(_bundled(component) / "tokenizer_config.json")
        positions = tensors[encoder]["text_model.embeddings.position_embedding.weight"].shape[0]
        configs[f"{component}/tokenizer_config.json"] = {**bundled, "model_max_length": positions}
    return {path: as_file(config) for path, config in configs.items()}


def _bundled(tokenizer: str) -> Path:
    """The folder of a tokenizer of the bundled model; its vocabulary is CLIP's."""
    return BUNDLED / "koala-mini" / tokenizer


def _vae_config(tensors: Tensors) -> dict[str, Any]:
    widths: list[int] = []
    while view := tensors.get(f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight"):
        widths.append(view.shape[0])
    if any(width % GROUPS for width in widths):
        raise ValueError(f"the VAE has widths {widths}; they must be multiples of {GROUPS}")
    layers = sum(
        f"encoder.down_blocks.0.resnets.{j}.conv1.weight" in tensors for j in range(len(tensors))
    )
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "force_upcast": True,  # its activations are too large for fp16
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": tensors["post_quant_conv.weight"].shape[0],
        "layers_per_block": layers,
        "norm_num_groups": GROUPS,
        "sample_size": 1024,
        "scaling_factor": SCALING_FACTOR,
    }


def _text_config(tensors: Tensors, activation: str, pad: int) -> dict[str, Any]:
    """The config of CLIP-L or OpenCLIP bigG, whose heads are 64 wide."""
    tokens, width = tensors[_EMBEDDING].shape
    if width not in (768, 1280):
        raise ValueError(f"a text encoder is {width} wide; SDXL's are 768 and 1280 wide")
    positions = tensors["text_model.embeddings.position_embedding.weight"].shape[0]
    projection = tensors.get("text_projection.weight")
    layers = 0
    while f"text_model.encoder.layers.{layers}.mlp.fc1.weight" in tensors:
        layers += 1
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
        "hidden_act": activation,
        "hidden_size": width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": positions,
        "model_type": "clip_text_model",
        "num_attention_heads": max(1, width // 64),
        "num_hidden_layers": layers,
        "pad_token_id": pad,
        "projection_dim": projection.shape[0] if projection else width,
        "vocab_size": tokens,
    }


def _vocabularies(
    file: Path, files: Mapping[str, bytes], tensors: Mapping[str, Tensors]
) -> dict[str, bytes]:
    """CLIP's vocabulary for tokenizers that the file does not carry."""
    added = {}
    for component, encoder in _TOKENIZERS.items():
        names = {path.rpartition("/")[2] for path in files if path.startswith(f"{component}/")}
        if names - {"tokenizer_config.json"}:
            continue
        if (tokens := tensors[encoder][_EMBEDDING].shape[0]) != VOCABULARY:
            raise UserError(
                f"{file}: {encoder} has {tokens:,} tokens, CLIP has {VOCABULARY:,}; the file does "
                "not say which: use the folder that it was made from"
            )
        added[f"{component}/tokenizer.json"] = (_bundled(component) / "tokenizer.json").read_bytes()
    return added


# --- writing --------------------------------------------------------------------------------


def write(contents: Contents, out: Path, dtype: str | None, metadata: Mapping[str, str]) -> int:
    """Writes the single file and returns its size in bytes.

    `dtype`: safetensors' name, of all weights; `metadata`: additional entries. Raises `UserError`
    if a component has tensors unknown to the original layout, and as `tensors.write` does.
    """
    tensors = _joined(contents)
    metadata = {**contents.metadata, **metadata, FILES: json.dumps(_carriable(contents))}
    with visible_progress(bytes_of(tensors, dtype)) as advance:
        return write_tensors(out, tensors, dtype, metadata, advance)


def _joined(contents: Contents) -> dict[str, View]:
    """All tensors by their names in the original layout."""
    vae = contents.config("vae/config.json")
    try:
        pairs = {
            "unet": ldm_keys.unet_pairs(contents.architecture),
            "vae": ldm_keys.vae_pairs(vae["block_out_channels"], vae["layers_per_block"]),
            "text_encoder": ldm_keys.clip_pairs(
                contents.config("text_encoder/config.json")["num_hidden_layers"]
            ),
            "text_encoder_2": ldm_keys.open_clip_pairs(
                contents.config("text_encoder_2/config.json")["num_hidden_layers"]
            ),
        }
    except KeyError as error:
        raise UserError(f"{contents.source}: a config.json has no {error}") from None
    joined = {}
    for component, of in contents.tensors.items():
        tensors = {
            _published(component, name): v for name, v in of.items() if not is_obsolete(name)
        }
        shapes = {name: view.shape for name, view in tensors.items()}
        expected = {n: shapes.get(n, ()) for pair in pairs[component] for n in pair.parts}
        if faults := tensor_faults(expected, shapes):
            raise UserError(f"{contents.source}: {component} does not fit config.json: {faults}")
        for pair in pairs[component]:
            joined[ldm_keys.PREFIXES[component] + pair.single] = ldm_keys.join(pair, tensors)
    return joined


def _published(component: str, name: str) -> str:
    """CLIP-L's names as SDXL spells them; transformers shortens them since version 5.6."""
    short = component == "text_encoder" and not name.startswith("text_model.")
    return f"text_model.{name}" if short else name


def _carriable(contents: Contents) -> dict[str, str]:
    """The small files that a single file carries: all but CLIP's own vocabulary."""
    files = {}
    for path, content in contents.files.items():
        component, _, name = path.partition("/")
        if component in _TOKENIZERS and name != "tokenizer_config.json":
            tensors = contents.tensors[_TOKENIZERS[component]]
            embedding = next(v for n, v in tensors.items() if _EMBEDDING.endswith(n))
            if embedding.shape[0] == VOCABULARY:
                continue
        files[path] = content.decode("utf-8", "replace")
    return files
