"""Writes a model as ONNX networks, in the folder layout that optimum reads.

One network at a time is in memory. Batch and size are free, and every input and output is float32
or a token id, whatever the weights' dtype. Weights lie beside the graph, in model.onnx_data.
"""

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from koala.checkpoints.flat import Flat, FlatDecoder, FlatEncoder, FlatText, FlatUNet, vae_config
from koala.checkpoints.load import load_text, load_unet, load_vae
from koala.checkpoints.pipeline_files import as_file, tells_of_model
from koala.checkpoints.validate import CONFIGS, read_json
from koala.utils.atomic import new_folder

OPSET = 18
WEIGHTS_FILE = "model.onnx_data"
_INSIDE = 1024  # bytes up to which a tensor stays in the graph: shapes and other constants
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_SIDES = {"sample": (2, 3), "latent_sample": (2, 3)}  # free dimensions besides the batch
_LENGTHS = {"encoder_hidden_states": (1,), "input_ids": (1,)}


@torch.inference_mode(False)
@torch.no_grad()
def write_onnx(folder: Path, out: Path, dtype: str) -> None:
    """Writes a checked model folder as ONNX into the new folder `out`, whole or not at all.

    dtype: of weights and arithmetic, a key of `DTYPES`.
    """
    with new_folder(out) as part:
        for path in _small_files(folder):
            (part / path).parent.mkdir(parents=True, exist_ok=True)
            (part / path).write_bytes((folder / path).read_bytes())
        vae = as_file(vae_config(read_json(folder / "vae" / "config.json")))
        for name, network in _networks(folder, DTYPES[dtype]):
            (part / name).mkdir(exist_ok=True)
            if name.startswith("vae"):
                (part / name / "config.json").write_bytes(vae)
            _export(network.eval(), part / name)


def _small_files(folder: Path) -> Iterator[Path]:
    """Configs, tokenizers, schedule, card and credits, relative to the folder."""
    yield Path("model_index.json")
    yield from (file.relative_to(folder) for file in folder.iterdir() if tells_of_model(file.name))
    for component in CONFIGS:
        if component != "vae":
            for file in (*(folder / component).glob("*.json"), *(folder / component).glob("*.txt")):
                if ".index." not in file.name:
                    yield file.relative_to(folder)


def _networks(folder: Path, dtype: torch.dtype) -> Iterator[tuple[str, Flat]]:
    """Each network by the name of its folder, one in memory at a time."""
    *_, encoder, encoder_2 = load_text(folder, dtype)
    tokens = encoder.config.max_position_embeddings
    yield "text_encoder", FlatText(encoder, projected=False)
    yield "text_encoder_2", FlatText(encoder_2, projected=True)
    del encoder, encoder_2
    vae = load_vae(folder, dtype)
    yield "vae_encoder", FlatEncoder(vae)
    yield "vae_decoder", FlatDecoder(vae)
    del vae
    yield "unet", FlatUNet(load_unet(folder, dtype), tokens)


def _export(network: Flat, folder: Path) -> None:
    free: dict[str, dict[int, str]] = {}
    for name in (*network.inputs, *network.outputs):
        free[name] = {0: "batch"} | {
            i: ("", "", "height", "width")[i] for i in _SIDES.get(name, ())
        }
        free[name] |= dict.fromkeys(_LENGTHS.get(name, ()), "tokens")
    # By tracing, not by torch.export: that takes 20 times as long and fixes what batches may be.
    with tempfile.TemporaryDirectory(dir=folder) as traced, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(traced) / "model.onnx"
        torch.onnx.export(
            network, network.examples, str(file), dynamo=False, opset_version=OPSET,
            input_names=network.inputs, output_names=network.outputs, dynamic_axes=free,
        )  # fmt: skip
        _move_weights(file, folder)


def _move_weights(file: Path, folder: Path) -> None:
    """Writes the graph into `folder`, and its weights beside it into one file, one at a time.

    PyTorch leaves them in the graph, or where that would exceed what ONNX allows, in a file each.
    """
    import onnx
    from onnx.external_data_helper import uses_external_data

    model = onnx.load(file, load_external_data=False)
    with open(folder / WEIGHTS_FILE, "wb") as weights:
        for tensor in model.graph.initializer:
            if uses_external_data(tensor):
                place = {entry.key: entry.value for entry in tensor.external_data}
                content = (file.parent / place["location"]).read_bytes()
            else:
                content = tensor.raw_data
            if len(content) <= _INSIDE:
                _put_inside(tensor, content)
                continue
            weights.seek(-weights.tell() % 64, 1)  # aligned, as runtimes map them
            _put_beside(tensor, weights.tell(), len(content))
            weights.write(content)
    onnx.save(model, folder / "model.onnx")


def _put_inside(tensor: Any, content: bytes) -> None:
    """Makes an ONNX tensor one that holds its content."""
    if tensor.external_data:
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = content


def _put_beside(tensor: Any, offset: int, length: int) -> None:
    """Makes an ONNX tensor one that lies in the weights' file."""
    import onnx

    tensor.ClearField("raw_data")
    tensor.ClearField("external_data")
    place = {"location": WEIGHTS_FILE, "offset": str(offset), "length": str(length)}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    tensor.data_location = onnx.TensorProto.EXTERNAL
