"""Writes models in the formats of other runtimes. Importing this loads no torch.

What other programs read as a model of theirs, with weights to go on with, is `convert`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from koala.checkpoints import gguf_file
from koala.checkpoints.quantised import KIND
from koala.checkpoints.resolve import name_of, read_model, resolve_model
from koala.checkpoints.validate import is_quantised, refuse_quantised
from koala.errors import UserError, unknown
from koala.generation.form import OF_DTYPE
from koala.utils.atomic import check_new
from koala.utils.extras import absent, require

# Format -> dtypes that it takes, the default first.
FORMATS: dict[str, tuple[str, ...]] = {
    "onnx": ("fp32", "fp16"),
    "openvino": tuple(OF_DTYPE),
    "gguf": tuple(gguf_file.DTYPES),
}
_REFUSED = {
    "coreml": "Core ML's models run on Apple's systems alone, where nobody has tried ours yet, and "
    "what cannot be checked is not written: on a Mac, take --to onnx with ONNX Runtime's CoreML "
    "provider",
}


@dataclass(frozen=True)
class ExportReport:
    """What `export` did."""

    model: str
    to: str  # of FORMATS
    dtype: str
    bytes: int  # of all files
    out: Path
    notes: tuple[str, ...]  # what its reader should know

    def line(self) -> str:
        """One line for the terminal."""
        notes = "".join(f"; {note}" for note in self.notes)
        return (
            f"{self.model} as {self.to}, {self.dtype}, {self.bytes / 1e6:,.1f} MB in "
            f"{self.out}{notes}"
        )


def check_export(to: str, out: Path, dtype: str | None) -> None:
    """Before a model is read: UserError unless it can be written to `out`, as `export` takes it."""
    if to in _REFUSED:
        raise UserError(f"--to {to}: {_REFUSED[to]}")
    if to not in FORMATS:
        raise unknown("format", to, FORMATS)
    if dtype is not None and dtype not in FORMATS[to]:
        raise UserError(f"dtype {dtype!r}: {to} is written in {', '.join(FORMATS[to])}")
    if to == "gguf":
        if out.suffix != ".gguf":
            raise UserError(f"the name of a GGUF file must end in .gguf, not {out.name}")
        if out.exists():
            raise UserError(f"{out} exists; name a new file")
    check_new(out)
    require(f"--to {to}", to, to)  # format, extra and package have one name


def export(model: str | Path, to: str, out: str | Path, dtype: str | None = None) -> ExportReport:
    """Writes a model for another runtime.

    model: name, folder, Hub id or single file. to: "onnx", a folder as optimum writes it, for ONNX
    Runtime; "openvino", a folder that `koala.load` and OpenVINO GenAI open; "gguf", a file for
    stable-diffusion.cpp. dtype: one of `FORMATS[to]`, by default the first, or what the folder is
    stored in. Raises `UserError` for a setting that is not known, a package that is missing, a
    model that the runtime cannot draw with, and if `out` exists or cannot be written.
    """
    out = Path(out).expanduser()
    check_export(to, out, dtype)
    name = name_of(model)
    if Path(model).expanduser().is_dir() and is_quantised(folder := resolve_model(model)):
        if to != "openvino":
            refuse_quantised(folder)
        if dtype not in (None, KIND):
            raise UserError(f"{folder} is stored in {KIND}: leave out --dtype {dtype}")
        dtype = KIND
    dtype = dtype or FORMATS[to][0]
    write = {"onnx": _onnx, "openvino": _openvino, "gguf": _gguf}[to]
    notes = write(model, out, dtype)
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return ExportReport(name, to, dtype, size, out, notes)


def _onnx(model: str | Path, out: Path, dtype: str) -> tuple[str, ...]:
    from koala.checkpoints.onnx_files import write_onnx

    write_onnx(resolve_model(model), out, dtype)
    return ()


def _openvino(model: str | Path, out: Path, dtype: str) -> tuple[str, ...]:
    from koala.generation.form_writing import Source, write_form
    from koala.generation.quantised_folder import store

    lacking = absent("openvino", "openvino_tokenizers")
    folder, four_bits = resolve_model(model), dtype == KIND
    source = Source.of_folder(folder, name_of(model), store if four_bits else None)
    backend = OF_DTYPE[dtype]
    write_form(source, backend, out, folder, for_genai=not lacking, fp16_text=four_bits)
    return (f"not for OpenVINO GenAI: {lacking}",) if lacking else ()


def _gguf(model: str | Path, out: Path, dtype: str) -> tuple[str, ...]:
    contents = read_model(model)
    gguf_file.write_gguf(contents, out, dtype)
    if contents.prediction.zero_snr:
        return ("stable-diffusion.cpp knows no zero terminal SNR, so its darkest images are paler",)
    return ()
