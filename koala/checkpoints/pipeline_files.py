"""The contents of a pipeline: tensors to copy from, and small files.

Folders and single files are both read into `Contents`, by diffusers' names, without reading a
weight. Students, other formats and other dtypes are all written from it, tensor by tensor.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from koala.architectures.table import UNetArchitecture
from koala.checkpoints import model_card
from koala.checkpoints.prediction import Prediction, of_config
from koala.checkpoints.spellings import current
from koala.checkpoints.tensors import FLOATS, FP8, Source, View, size_of, write
from koala.checkpoints.validate import (
    CONFIGS,
    PIPELINE,
    WEIGHTS,
    parse_object,
    read_small,
    read_tensors,
    refuse_quantised,
    some,
    unet_architecture,
)
from koala.errors import UserError
from koala.utils.atomic import new_folder

_TELLING = ("README.md", "NOTICE", "LICENSE", "words.json")  # file name prefixes
SCHEDULER = "scheduler/scheduler_config.json"
_VISIBLE = 100_000_000  # bytes from which writing shows a progress bar

# SDXL's noise schedule (Rombach et al. 2022) and the scale of its VAE's latents.
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCALING_FACTOR = 0.13025

Tensors = Mapping[str, View]  # by diffusers' name


@dataclass(frozen=True)
class Contents:
    """A complete SDXL pipeline."""

    source: Path  # the folder or the file
    architecture: UNetArchitecture
    tensors: Mapping[str, Tensors]  # by component with weights, `validate.WEIGHTS`
    files: Mapping[str, bytes]  # by path in a model folder: configs, tokenizers, credits
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a single file, for a single file
    left_out: tuple[str, ...] = ()  # tensors of a single file that no pipeline uses

    @property
    def prediction(self) -> Prediction:
        """What the U-Net predicts. Raises `UserError` for a schedule that is not SDXL's kind."""
        return of_config(self.config(SCHEDULER))

    def config(self, path: str) -> dict[str, Any]:
        """The JSON object in one of the files. Raises `UserError` if it holds none."""
        return parse_object(self.files[path], f"{self.source}: {path}")


def as_file(value: Mapping[str, Any]) -> bytes:
    """A JSON object as a file's content."""
    return (json.dumps(value, indent=2) + "\n").encode()


def from_folder(folder: Path) -> Contents:
    """The contents of a model folder that passed `validate.check_folder`."""
    refuse_quantised(folder)
    tensors = {
        component: {
            name: View((stored,))
            for name, stored in current(read_tensors(folder, component)).items()
        }
        for component in WEIGHTS
    }
    check_dtypes(folder, tensors)
    paths = [folder / "model_index.json", *(p for p in folder.glob("*") if tells_of_model(p.name))]
    for component in CONFIGS:
        paths += [*(folder / component).glob("*.json"), *(folder / component).glob("*.txt")]
    files = {
        path.relative_to(folder).as_posix(): read_small(path)
        for path in paths
        if ".index." not in path.name
    }
    index = parse_object(files["model_index.json"], "model_index.json")
    if index.get("_class_name") != PIPELINE:  # one that starts from images, or takes a ControlNet
        files["model_index.json"] = as_file(_plain(index))
    return Contents(folder, unet_architecture(folder), tensors, files)


def pipeline_index() -> dict[str, Any]:
    """model_index.json of an SDXL pipeline with the usual classes."""
    return {
        "_class_name": PIPELINE,
        "force_zeros_for_empty_prompt": True,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _plain(index: Mapping[str, Any]) -> dict[str, Any]:
    """The model_index.json of the plain pipeline with the same networks."""
    usual = pipeline_index()
    return usual | {key: value for key, value in index.items() if key in {*usual} - {"_class_name"}}


def tells_of_model(name: str) -> bool:
    """Whether a file of that name tells of a model: its authors, licence, the words it knows."""
    return name.startswith(_TELLING)


def check_dtypes(source: Path, tensors: Mapping[str, Tensors]) -> None:
    """Raises `UserError` if weights are not floats that can be read."""
    for component, of in tensors.items():
        parts = (part for name, v in of.items() if not is_obsolete(name) for part in v.parts)
        if strange := {part.dtype for part in parts} - {*FLOATS, *FP8}:
            raise UserError(
                f"{source}: {component} holds {some(sorted(strange))} weights; they must be "
                "fp32, fp16, bf16 or fp8"
            )


def is_obsolete(name: str) -> bool:
    """Whether a tensor of that name is a constant that older programs saved too."""
    return name.endswith(("position_ids", "logit_scale"))


# --- writing --------------------------------------------------------------------------------


def write_tensors(
    file: Path,
    tensors: Tensors,
    dtype: str | None,
    metadata: Mapping[str, str] | None = None,
    advance: Callable[[int], object] = lambda size: None,
    change: Callable[[str, View, str], Source] = lambda name, view, dtype: view,
) -> int:
    """Writes a weights file and returns its size in bytes; `dtype` as in `kinds_of`.

    change: what is written for a tensor, of its name, the tensor and the dtype to write.
    """
    kinds = kinds_of(tensors, dtype)
    shapes = {name: (kinds[name], view.shape) for name, view in tensors.items()}

    def source(name: str) -> Source:
        return change(name, tensors[name], kinds[name])

    return write(file, shapes, source, metadata, advance)


def kinds_of(tensors: Tensors, dtype: str | None) -> dict[str, str]:
    """The dtype each tensor is written in: `dtype` for floats, if given (safetensors' name)."""
    return {
        name: dtype if dtype and view.parts[0].dtype in (*FLOATS, *FP8) else view.dtype
        for name, view in tensors.items()
    }


def write_folder(
    folder: Path,
    tensors: Mapping[str, Tensors],
    files: Mapping[str, bytes],
    dtype: str | None = None,
    change: Callable[[str, str, View, str], Source] = lambda component, name, view, dtype: view,
) -> dict[str, int]:
    """Fills a new model folder and returns the size of every component's weights in bytes.

    `dtype`: safetensors' name, of all weights; None leaves each as it is. `change`: as in
    `write_tensors`, after the component. Raises as `tensors.write` does.
    """
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    total = sum(bytes_of(of, dtype) for of in tensors.values())
    with visible_progress(total) as advance:
        return {
            component: write_tensors(
                folder / component / f"{WEIGHTS[component]}.safetensors",
                of,
                dtype,
                advance=advance,
                change=partial(change, component),
            )
            for component, of in tensors.items()
        }


def write_pipeline(contents: Contents, out: Path, dtype: str | None = None) -> int:
    """Writes the model folder `out` and returns the bytes of all weights; `dtype`: see above.

    Adds a model card if there is none. Raises as `write_folder` and `atomic.new_folder` do.
    """
    with new_folder(out) as part:
        written = sum(write_folder(part, contents.tensors, contents.files, dtype).values())
        if model_card.FILE not in contents.files:
            card = model_card.read_metadata(contents.source, contents.metadata)
            model_card.write(card, part)
    return written


def bytes_of(tensors: Tensors, dtype: str | None) -> int:
    """Bytes of all tensors, converted to `dtype`."""
    kinds = kinds_of(tensors, dtype)
    return sum(size_of(kinds[name], view.shape) for name, view in tensors.items())


@contextlib.contextmanager
def visible_progress(total: int) -> Iterator[Callable[[int], object]]:
    """Yields advance(bytes); shows a progress bar on stderr if there is much to write."""
    if total < _VISIBLE:
        yield lambda size: None
        return
    from koala.utils.progress import progress

    with progress("writing", total // 1_000_000, "MB") as advance:
        yield lambda size: advance(size / 1e6)
