"""A full-size SDXL with random weights, as a diffusers folder: the published model's files, names,
shapes and configurations, about 6.9 GB in fp16. What moves weights about cannot tell it from one.

`python -m benchmarks.random_sdxl FOLDER`
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from koala.architectures.config import unet_config as config_of
from koala.architectures.layout import tensor_shapes
from koala.architectures.table import get
from koala.benchmark import models
from koala.benchmark.models import CLIP
from koala.checkpoints.bundled import BUNDLED

BUFFER = 32 << 20  # random values; every tensor is cut out of them at a place of its own
CLIP_L, BIG_G = ({**each, "pad_token_id": 1} for each in (models.CLIP_L, models.BIG_G))
VAE = {**models.VAE, "norm_num_groups": 32, "force_upcast": True}
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "vae": ["diffusers", "AutoencoderKL"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}
Shapes = dict[str, tuple[int, ...]]


def write_random_sdxl(folder: Path) -> None:
    """Writes the folder; equal on every call. Takes the memory of one buffer, not of the model."""
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE)
        text = CLIPTextModel(CLIPTextConfig(**CLIP, **CLIP_L))
        text_2 = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP, **BIG_G))
    sdxl = get("sdxl")
    unet_config = {"_class_name": "UNet2DConditionModel", **config_of(sdxl)}
    vae_config = {"_class_name": "AutoencoderKL", **VAE}
    values = np.random.default_rng(0).standard_normal(BUFFER, dtype=np.float32)
    buffer = (values * 0.02).astype(np.float16)
    parts: dict[str, tuple[str, dict[str, Any], Shapes]] = {
        "unet": ("diffusion_pytorch_model", unet_config, tensor_shapes(sdxl)),
        "vae": ("diffusion_pytorch_model", vae_config, _shapes(vae)),
        "text_encoder": ("model", text.config.to_dict(), _published(_shapes(text))),
        "text_encoder_2": ("model", text_2.config.to_dict(), _published(_shapes(text_2))),
    }
    for component, (stem, config, shapes) in parts.items():
        _write_json(folder / component / "config.json", config)
        _write_tensors(folder / component / f"{stem}.safetensors", shapes, buffer)
    for tokenizer, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        _copy_tokenizer(BUNDLED / "koala-mini" / tokenizer, folder / tokenizer, pad)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(folder / "model_index.json", INDEX)


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _published(shapes: Shapes) -> Shapes:
    """A text encoder's names as in the published files, whatever the installed library's are."""
    projection = "text_projection.weight"
    return {
        name if name.startswith("text_model.") or name == projection else f"text_model.{name}": s
        for name, s in shapes.items()
    }


def _write_tensors(file: Path, shapes: Shapes, buffer: np.ndarray) -> None:
    """One tensor after the other, in the header's order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for k, shape in enumerate(shapes.values()):
            for piece in _values(k, math.prod(shape), buffer):
                stream.write(piece)


def _values(k: int, count: int, buffer: np.ndarray) -> Iterator[memoryview]:
    """`count` values for tensor k: the buffer, round and round, from a place of its own."""
    at = k * 1_000_003 % len(buffer)
    while count:
        piece = buffer[at : at + count]
        yield piece.data
        count, at = count - len(piece), 0


def _copy_tokenizer(source: Path, target: Path, pad: str) -> None:
    target.mkdir()
    shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")
    config = json.loads((source / "tokenizer_config.json").read_text())
    _write_json(
        target / "tokenizer_config.json", config | {"model_max_length": 77, "pad_token": pad}
    )


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write_random_sdxl(parser.parse_args().folder)
