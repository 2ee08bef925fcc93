"""A complete pipeline in one safetensors file, in SDXL's original layout.

Such a file holds four networks and no configuration. Files written by koala carry the small files
of a model folder in their metadata (`koala.files`), so a round trip loses nothing. For others'
files the configuration is inferred from the shapes and from SDXL's defaults.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from koala.architectures.config import from_unet_config, unet_config
from koala.architectures.table import UNetArchitecture
from koala.checkpoints import ldm_keys
from koala.checkpoints.detect import Detected, detect
from koala.checkpoints.pipeline_files import (
    SCHEDULER,
    Contents,
    Tensors,
    as_file,
    bytes_of,
    check_dtypes,
    is_obsolete,
    tells_of_model,
    visible_progress,
    write_tensors,
)
from koala.checkpoints.prediction import Prediction, is_mark, of_config, of_file
from koala.checkpoints.sdxl_files import (
    EMBEDDING,
    TOKENIZERS,
    VOCABULARY,
    known_files,
    vocabularies,
)
from koala.checkpoints.shards import shard_of
from koala.checkpoints.spellings import canonical, current
from koala.checkpoints.tensors import Stored, View, read_header, read_metadata, rows
from koala.checkpoints.validate import (
    CONFIGS,
    WEIGHTS,
    Shapes,
    describe_faults,
    parse_object,
    some,
    tensor_faults,
)
from koala.errors import UserError

FILES = "koala.files"  # key of the metadata: JSON, path in a model folder -> content
CREDIT = "NOTICE.modelspec.txt"  # metadata of others' files, in a folder
_LONG = 4000  # characters: an embedded image, not a credit


# --- reading --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SingleFile:
    """A weights file with an SDXL-class U-Net, and everything else in it."""

    found: Detected
    parts: Mapping[str, Mapping[str, Stored]]  # component -> tensors, without the prefix
    rest: Mapping[str, Stored]  # tensors of no component
    metadata: Mapping[str, str]
    files: Mapping[str, bytes]  # of a model folder, carried in the metadata; empty in others' files
    prediction: Prediction | None  # None: the file does not say

    @property
    def missing(self) -> list[str]:
        """Components of a pipeline that it does not hold."""
        return [component for component in WEIGHTS if component not in self.parts]


def open_file(file: Path, like: UNetArchitecture | None = None) -> SingleFile:
    """What a file holds, from its header alone; it need not be a complete pipeline.

    like: the U-Net it may hold where its shapes do not tell. Raises `UserError` if it is damaged,
    a pickle, another kind of model (named in the message), or has missing or unexpected U-Net
    tensors.
    """
    if shard := shard_of(file):
        raise UserError(f"{file} is {shard}")
    header, metadata = canonical(read_header(file)), read_metadata(file)
    files, stated = _carried(file, metadata), None
    shapes = {name: stored.shape for name, stored in header.items() if not is_mark(name)}
    try:
        prediction = of_file(header.keys(), metadata)
        if config := files.get("unet/config.json"):
            stated = from_unet_config(parse_object(config, "its unet/config.json"))
        if prediction is None and files:
            prediction = of_config(parse_object(files[SCHEDULER], f"its {SCHEDULER}"))
        found = _detected(shapes, stated, like)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    parts: dict[str, dict[str, Stored]] = {component: {} for component in found.components}
    prefixes = {c: found.prefix if c == "unet" else ldm_keys.PREFIXES[c] for c in parts}
    rest = {}
    for name in shapes:
        fitting = [c for c, prefix in prefixes.items() if name.startswith(prefix)]
        if not fitting or is_obsolete(name):
            rest[name] = header[name]
        else:  # the longest prefix: the U-Net may have none
            component = max(fitting, key=lambda c: len(prefixes[c]))
            parts[component][name.removeprefix(prefixes[component])] = header[name]
    return SingleFile(found, parts, rest, metadata, files, prediction)


def _detected(
    shapes: Shapes, stated: UNetArchitecture | None, like: UNetArchitecture | None
) -> Detected:
    try:
        return detect(shapes, stated)
    except UserError:
        if like is None or stated is not None:
            raise
        return detect(shapes, like)


def read(
    file: Path, base: Contents | None = None, parts: Mapping[str, Tensors] | None = None
) -> Contents:
    """The contents of a single file, from its header alone.

    base: a model that completes it: components and small files that it does not hold are the
    base's. parts: components to take instead of its own. Raises `UserError` as `open_file` does, if
    a component or some of its tensors are missing, and if the base would have no effect.
    """
    opened = open_file(file, base.architecture if base else None)
    found = opened.found
    missing = [component for component in opened.missing if component not in (parts or {})]
    if missing and base is None:
        rest, there = len(opened.rest), f"holds {some(opened.parts)}"
        if rest:
            there += f" ({rest:,} tensors are of no known part, such as {next(iter(opened.rest))})"
        raise UserError(f"{file} {there} and lacks {some(missing)}: add {_help_for(missing)}")
    if base is not None and not missing:
        raise UserError(f"--base {base.source} has no effect: {file} lacks nothing; leave it out")
    own = tensors_of(file, opened)
    check_dtypes(file, own)
    tensors = {**(base.tensors if base else {}), **own, **(parts or {})}
    files = dict(opened.files)
    if base is not None:
        files = completed(file, found.architecture, opened.prediction, base)
    elif not files:
        try:
            files = known_files(found.architecture, tensors, opened.prediction)
        except (ValueError, LookupError) as error:
            raise UserError(f"{file} is not an SDXL pipeline: {error}") from None
    elif opened.prediction is not None:
        schedule = parse_object(files[SCHEDULER], f"{file}: {SCHEDULER}")
        if of_config(schedule) != opened.prediction:  # changed by another program since
            files[SCHEDULER] = as_file(schedule | opened.prediction.config)
    files |= vocabularies(file, files, tensors)
    kept = {k: v for k, v in opened.metadata.items() if k.startswith("modelspec.")}
    if kept and not opened.files and CREDIT not in files:
        lines = [f"{key}: {value}\n" for key, value in kept.items() if len(value) < _LONG]
        files[CREDIT] = "".join(lines).encode()
    return Contents(file, found.architecture, tensors, files, kept, tuple(opened.rest))


def _help_for(missing: list[str]) -> str:
    if missing == ["vae"]:
        return "--vae FILE, or --base MODEL with the SDXL model that it was made from"
    return "--base MODEL with the SDXL model that it was made from, as for Lightning's and DMD2's"


def completed(
    file: Path, mine: UNetArchitecture, prediction: Prediction | None, base: Contents
) -> dict[str, bytes]:
    """The base's small files, for the U-Net `mine` of a file and what that predicts."""
    theirs = base.architecture
    if (mine.context, mine.pooled) != (theirs.context, theirs.pooled):
        raise UserError(
            f"{file}: its U-Net reads text {mine.context} and {mine.pooled} wide, that of the base "
            f"{base.source} is {theirs.context} and {theirs.pooled}: choose another --base"
        )
    files = {path: content for path, content in base.files.items() if not tells_of_model(path)}
    files["unet/config.json"] = as_file(base.config("unet/config.json") | unet_config(mine))
    if prediction is not None:
        files[SCHEDULER] = as_file(base.config(SCHEDULER) | prediction.config)
    return files


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
        if not plain or not (known or path == "model_index.json" or tells_of_model(path)):
            raise UserError(f"{where} holds {path!r}, which is not a file of a model folder")
        if not isinstance(content, str):
            raise UserError(f"{where}: {path} must be text")
        files[path] = content.encode()
    needed = {f"{part}/{name}" for part, name in CONFIGS.items()} | {"model_index.json"}
    if missing := sorted(needed - files.keys()):
        raise UserError(f"{where} lacks {some(missing)}")
    return files


def tensors_of(file: Path, opened: SingleFile) -> dict[str, Tensors]:
    """Diffusers' tensors of each component that a file holds. `UserError` names those at fault."""
    tensors: dict[str, Tensors] = {}
    for component, stored in opened.parts.items():
        arch = opened.found.architecture
        if component == "unet" and opened.found.layout == "diffusers":
            tensors[component] = {name: View((one,)) for name, one in stored.items()}
        else:
            tensors[component] = component_tensors(file, component, stored, arch)
    return tensors


def component_tensors(
    file: Path, component: str, stored: Mapping[str, Stored], arch: UNetArchitecture | None = None
) -> Tensors:
    """Diffusers' tensors of a component, from either layout's without prefix.

    arch: the U-Net's. Raises `UserError` naming the tensors at fault.
    """
    if component == "unet":
        assert arch is not None
        return _split(file, component, ldm_keys.unet_pairs(arch), stored)
    pairs, direct = _part_pairs(component, stored)
    return (_renamed if direct else _split)(file, component, pairs, stored)


def _part_pairs(component: str, stored: Mapping[str, Stored]) -> tuple[list[ldm_keys.Pair], bool]:
    """(the pairs of a VAE or text encoder in its size, whether it has diffusers' names)."""
    if component == "text_encoder":
        return ldm_keys.clip_pairs(_count(stored, "text_model.encoder.layers")), False
    if component == "text_encoder_2":
        layers = _count(stored, "text_model.encoder.layers")
        blocks = layers or _count(stored, "transformer.resblocks")
        return ldm_keys.open_clip_pairs(blocks), layers > 0
    direct = _count(stored, "encoder.down_blocks") > 0
    level, resnet = ("down_blocks", "resnets") if direct else ("down", "block")
    widths: list[int] = []
    while one := stored.get(f"encoder.{level}.{len(widths)}.{resnet}.0.conv1.weight"):
        widths.append(one.shape[0] if one.shape else 0)
    return ldm_keys.vae_pairs(widths, _count(stored, f"encoder.{level}.0.{resnet}")), direct


def _count(names: Mapping[str, Stored], path: str) -> int:
    """Number of a module's children with tensors."""
    start = path + "."
    return len({name[len(start) :].split(".")[0] for name in names if name.startswith(start)})


def _renamed(
    file: Path, component: str, pairs: list[ldm_keys.Pair], stored: Mapping[str, Stored]
) -> Tensors:
    """The tensors of a component that has diffusers' or transformers' names already."""
    tensors = {name: View((one,)) for name, one in current(stored).items()}
    if bare := tensors.pop("text_projection", None):  # OpenCLIP's own, beside transformers' names
        tensors["text_projection.weight"] = View(bare.parts, transposed=True)
    expected = [name for pair in pairs for name in pair.parts]
    missing = [name for name in expected if name not in tensors]
    if faults := describe_faults(missing, [name for name in tensors if name not in expected], ()):
        raise UserError(f"{file}: {component}: {faults}")
    return tensors


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


# --- writing --------------------------------------------------------------------------------


def write(contents: Contents, out: Path, dtype: str | None, metadata: Mapping[str, str]) -> int:
    """Writes the single file and returns its size in bytes.

    `dtype`: safetensors' name, of all weights; `metadata`: additional entries. Raises `UserError`
    if a component has tensors unknown to the original layout, and as `tensors.write` does.
    """
    tensors = joined(contents)
    metadata = {**contents.metadata, **metadata, FILES: json.dumps(_carriable(contents))}
    with visible_progress(bytes_of(tensors, dtype)) as advance:
        return write_tensors(out, tensors, dtype, metadata, advance)


def joined(contents: Contents) -> dict[str, View]:
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
    joined = _marks(contents)
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


def _marks(contents: Contents) -> dict[str, View]:
    """The empty tensors that state what the U-Net predicts."""
    some_tensor = next(iter(contents.tensors["unet"].values())).parts[0]
    empty = View((rows(some_tensor, 0, 0)._replace(shape=(0,)),))
    return dict.fromkeys(contents.prediction.marks, empty)


def _published(component: str, name: str) -> str:
    """CLIP-L's names as SDXL spells them; transformers shortens them since version 5.6."""
    short = component == "text_encoder" and not name.startswith("text_model.")
    return f"text_model.{name}" if short else name


def _carriable(contents: Contents) -> dict[str, str]:
    """The small files that a single file carries: all but CLIP's own vocabulary."""
    files = {}
    for path, content in contents.files.items():
        component, _, name = path.partition("/")
        if component in TOKENIZERS and name != "tokenizer_config.json":
            tensors = contents.tensors[TOKENIZERS[component]]
            embedding = next(v for n, v in tensors.items() if EMBEDDING.endswith(n))
            if embedding.shape[0] == VOCABULARY:
                continue
        files[path] = content.decode("utf-8", "replace")
    return files
