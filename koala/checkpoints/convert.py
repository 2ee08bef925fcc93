"""Converts models between a folder in diffusers' layout and a single file in SDXL's own layout.

diffusers and tools built on it read the folder; A1111, ComfyUI and others read the file. Weights
are copied bit for bit unless another dtype is requested.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from koala.architectures.layout import parameters
from koala.checkpoints import modelspec, single_file
from koala.checkpoints.pipeline_files import write_pipeline
from koala.checkpoints.resolve import read_model
from koala.checkpoints.tensors import float_dtype
from koala.errors import UserError, unknown
from koala.utils.atomic import check_new

TARGETS = ("diffusers", "single-file")


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` did."""

    architecture: str  # of the U-Net
    parameters: int  # of the U-Net
    to: str  # one of TARGETS
    dtypes: tuple[str, ...]  # of the weights written, as safetensors names them
    bytes: int  # of all weights
    left_out: tuple[str, ...]  # tensors of a single file that no pipeline uses
    out: Path

    def line(self) -> str:
        """One line for the terminal."""
        left = f"; {len(self.left_out)} unused tensors left out" if self.left_out else ""
        return (
            f"{self.architecture} ({self.parameters:,} parameters in the U-Net), "
            f"{' and '.join(self.dtypes)}, {self.bytes / 1e6:,.1f} MB in {self.out}{left}"
        )


def check_conversion(to: str, out: str | Path, dtype: str | None) -> None:
    """UserError for arguments of `convert` that no model can be converted with."""
    if to not in TARGETS:
        raise unknown("format", to, TARGETS)
    float_dtype(dtype)
    out = Path(out).expanduser()
    if to == "single-file" and out.suffix != ".safetensors":
        raise UserError(f"the name of a single file must end in .safetensors, not {out.name}")
    if to == "single-file" and out.exists():
        raise UserError(f"{out} exists; name a new file")
    check_new(out)


def convert(model: str | Path, to: str, out: str | Path, dtype: str | None = None) -> ConvertReport:
    """Writes `model` in another format.

    model: name, folder, Hub id or single file of an SDXL-class pipeline. to: "diffusers" writes
    the folder `out`, "single-file" the file `out` (.safetensors). dtype: of all weights, "fp32",
    "fp16" or "bf16"; None keeps each as it is, bit for bit. Raises `UserError` if the model is no
    such pipeline, a setting is unknown, a weight does not fit the dtype, or `out` exists or
    cannot be written; `Failure` if the disk is full.
    """
    check_conversion(to, out, dtype)
    out, kind = Path(out).expanduser(), float_dtype(dtype)
    contents = read_model(model)
    if to == "single-file":
        written = single_file.write(contents, out, kind, modelspec.of_contents(contents))
    else:
        written = write_pipeline(contents, out, kind)
    views = [view for of in contents.tensors.values() for view in of.values()]
    return ConvertReport(
        architecture=contents.architecture.name,
        parameters=parameters(contents.architecture),
        to=to,
        dtypes=(kind,) if kind else tuple(sorted({view.dtype for view in views})),
        bytes=written,
        left_out=contents.left_out,
        out=out,
    )
