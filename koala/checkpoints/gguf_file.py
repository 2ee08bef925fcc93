"""Writes a model as one GGUF file for stable-diffusion.cpp, by SDXL's original names.

Weights are copied or quantised tensor by tensor; the model is never held in memory. The U-Nets that
stable-diffusion.cpp draws with are built into it, so others are refused (`unknown_to_sd_cpp`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala import __version__
from koala.architectures.table import UNetArchitecture, get
from koala.checkpoints import model_card
from koala.checkpoints.pipeline_files import Contents, tells_of_model, visible_progress
from koala.checkpoints.single_file import joined
from koala.checkpoints.tensors import View, all_finite, load_tensor, not_finite
from koala.errors import UserError
from koala.utils.atomic import new_file

if TYPE_CHECKING:
    import numpy as np

KNOWN = ("sdxl", "ssd-1b", "segmind-vega")  # U-Nets of stable-diffusion.cpp, of SDXL's kind
DTYPES = {"fp16": "F16", "fp32": "F32", "q8_0": "Q8_0", "q5_0": "Q5_0", "q4_0": "Q4_0"}
# stable-diffusion.cpp multiplies by this matrix as Transformers does, though under the name of
# OpenCLIP's, whose file holds it the other way round.
_TURNED = "conditioner.embedders.1.model.text_projection"
# Of matrices that stable-diffusion.cpp leaves as they are when it quantises a file itself.
_KEPT = ("time_embed.", "label_emb.", "embedding", "text_projection")


def unknown_to_sd_cpp(arch: UNetArchitecture) -> str | None:
    """Why stable-diffusion.cpp cannot draw with a U-Net; None if it can."""
    if any(arch == get(name) for name in KNOWN):
        return None
    takes = "SSD-1B or Vega" if not arch.mid else "SDXL"
    return (
        f"stable-diffusion.cpp knows the U-Nets {', '.join(KNOWN)} and not {arch.name}: it would "
        f"take it for {takes}, by its names, and fail; for it to draw with this model it needs "
        f"that U-Net's description in its code ({arch.layers} resnets a block, depths "
        f"{list(arch.depths)}, {'no' if arch.mid is None else 'a'} mid block); other programs take "
        "koala convert --to single-file, or koala export --to onnx or openvino"
    )


def write_gguf(contents: Contents, out: Path, dtype: str) -> int:
    """Writes the file and returns its size in bytes.

    dtype: a key of `DTYPES`: of matrices and kernels. q8_0, q5_0 and q4_0 are for matrices, in
    groups of 32 with an fp16 scale; kernels are then fp16. Vectors stay fp32. Raises `UserError`
    for a U-Net that stable-diffusion.cpp does not know, a weight that does not fit fp16, is NaN or
    infinite.
    """
    from gguf import GGUFWriter

    if reason := unknown_to_sd_cpp(contents.architecture):
        raise UserError(f"{contents.source}: {reason}")
    tensors = {name: view for name, view in joined(contents).items() if view.shape != (0,)}
    with new_file(out) as part:
        writer = GGUFWriter(part, "sdxl")
        card = model_card.of_contents(contents.source, contents.metadata)
        writer.add_name(card.title)
        writer.add_license(card.licence.name or card.licence.identifier)
        writer.add_string("general.quantized_by", f"koala {__version__}")
        for path, content in contents.files.items():
            if tells_of_model(path):
                writer.add_string(f"koala.{path}", content.decode("utf-8", "replace"))
        for name, view in tensors.items():
            shape, kind, size = _stored_as(name, view, dtype)
            writer.add_tensor_info(name, shape, _element(kind), size, kind)
        marks = {"v_pred": _one()} if "v_pred" in contents.prediction.marks else {}
        for name, value in marks.items():
            writer.add_tensor_info(name, value.shape, value.dtype, value.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with visible_progress(sum(_stored_as(n, v, dtype)[2] for n, v in tensors.items())) as done:
            for name, view in tensors.items():
                value = _value(name, view, dtype)
                writer.write_tensor_data(value)
                done(value.nbytes)
        for value in marks.values():
            writer.write_tensor_data(value)
        writer.close()
        return part.stat().st_size


def _kind(name: str, view: View, dtype: str) -> Any:
    """A tensor's `GGMLQuantizationType`."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[DTYPES[dtype]]
    if len(view.shape) < 2:
        return GGMLQuantizationType.F32
    block = GGML_QUANT_SIZES[kind][0]
    whole = len(view.shape) != 2 or view.shape[-1] % block or any(part in name for part in _KEPT)
    return GGMLQuantizationType.F16 if block > 1 and whole else kind


def _stored_as(name: str, view: View, dtype: str) -> tuple[tuple[int, ...], Any, int]:
    """(shape as GGUFWriter asks for it: in bytes if quantised, type, size in bytes)."""
    from math import prod

    from gguf import GGML_QUANT_SIZES, quant_shape_to_byte_shape

    kind = _kind(name, view, dtype)
    block, width = GGML_QUANT_SIZES[kind]
    shape = quant_shape_to_byte_shape(view.shape, kind) if block > 1 else view.shape
    return shape, kind, prod(view.shape) // block * width


def _element(kind: Any) -> np.dtype:
    import numpy as np

    return np.dtype({"F16": "float16", "F32": "float32"}.get(kind.name, "uint8"))


def _value(name: str, view: View, dtype: str) -> np.ndarray:
    from gguf import quantize

    kind = _kind(name, view, dtype)
    tensor = load_tensor(view, "F16" if kind.name == "F16" else "F32").numpy()
    if name == _TURNED:
        tensor = tensor.T.copy()
    if not all_finite(tensor.tobytes(), "F16" if kind.name == "F16" else "F32"):
        raise not_finite(view, name)
    return quantize(tensor, kind)


def _one() -> np.ndarray:
    import numpy as np

    return np.ones(1, np.float32)
