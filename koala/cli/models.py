"""`koala inspect`, `compress`, `convert`, `export`, `architectures`: models from disk to disk."""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.architectures.block_map import DEPTH_RULES
from koala.architectures.table import CUTS
from koala.checkpoints.convert import TARGETS
from koala.checkpoints.tensors import DTYPES, float_dtype
from koala.cli.command import (
    Command,
    Parser,
    assembled,
    check_push,
    listed,
    number,
    push,
    say,
    show,
)
from koala.errors import UserError
from koala.evaluation.prompts import texts_in
from koala.generation.export import FORMATS, check_export, export
from koala.generation.validation import budget, calibration_prompts, pruning
from koala.utils.atomic import check_new, write_text

if TYPE_CHECKING:
    from koala.generation.pruning import PruneReport
    from koala.generation.quantised_folder import QuantiseReport

MODEL = "bundled name, folder, single file or Hub id of an SDXL-class model"


def _inspect_arguments(p: Parser) -> None:
    p.add_argument("model", help="any .safetensors file, or a bundled name, folder or Hub id")
    p.add_json("the description")


def _inspect(o: argparse.Namespace) -> None:
    from koala.checkpoints.inspect import inspect

    found = inspect(o.model)
    show(o, asdict(found), found.text())


def _compress_arguments(p: Parser) -> None:
    p.add_argument("teacher", help=MODEL)
    how = p.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--to", metavar="STUDENT",
        help=f"{', '.join(CUTS)}, or transformer depths of your own, such as 0,2,4 or 0,2,4,no-mid",
    )  # fmt: skip
    how.add_argument(
        "--prune", type=number, metavar="SHARE",
        help="remove that share of the U-Net's parameters, such as 0.2, from inside its modules; "
        "the result draws at once, in koala",
    )  # fmt: skip
    how.add_argument(
        "--advise", action="store_true",
        help="write nothing: print every way to make this model smaller, with what it takes",
    )  # fmt: skip
    p.add_argument(
        "--vram", type=number, metavar="GIB", help="for --advise: what the GPU has for the model"
    )
    p.add_argument(
        "--calibrate", type=Path, metavar="PROMPTS|DATA",
        help="for --prune: a text file with a prompt a line, which are drawn to see what matters, "
        "or a folder of koala prepare, whose latents are read",
    )  # fmt: skip
    p.add_argument("--out", type=Path, metavar="DIR", help="the new folder")
    p.add_argument("--dtype", help=f"of all weights: {listed(DTYPES)} (default: as they are)")
    p.add_argument(
        "--depth-rule",
        help="which of the teacher's transformer blocks stay: "
        f"{listed(DEPTH_RULES)} (default bottom)",
    )  # fmt: skip
    p.add_parts("the teacher")
    p.add_push()
    p.add_json("the report")


def _compress(o: argparse.Namespace) -> None:
    from koala.checkpoints.compress import check_compression, compress

    if o.advise:
        _advise(o)
        return
    if o.vram is not None:
        raise UserError("--vram is for --advise: leave it out")
    if o.out is None:
        raise UserError("koala compress needs --out DIR, the new folder")
    check_push(o)
    if o.prune is not None:
        pruned = _prune(o)
        push(o, pruned.out)
        show(o, asdict(pruned), pruned.line())
        return
    if o.calibrate is not None:
        raise UserError("--calibrate is for --prune: leave it out")
    rule = o.depth_rule or "bottom"
    check_compression(o.to, o.out, o.dtype, rule)  # before the teacher is assembled
    report = compress(assembled(o, o.teacher), o.to, o.out, o.dtype, rule)
    push(o, report.out)
    show(o, asdict(report), report.line())


def _advise(o: argparse.Namespace) -> None:
    from koala.generation.advice import advise, text

    for name in ("out", "calibrate", "dtype", "depth_rule", "push_to_hub"):
        if getattr(o, name):
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} has no effect on --advise, which writes nothing: leave it out"
            )
    room = None if o.vram is None else budget(o.vram)
    rungs = advise(o.teacher, room, o.base, o.vae, o.teacher_lora)
    show(o, [asdict(rung) for rung in rungs], text(rungs, o.teacher, room))


def _prune(o: argparse.Namespace) -> "PruneReport":
    from koala.checkpoints.resolve import check_name

    if o.depth_rule is not None:
        raise UserError("--depth-rule has no effect on --prune, which removes no blocks")
    if o.calibrate is None:
        raise UserError(
            "--prune needs --calibrate: a text file with a prompt a line, or a folder that koala "
            "prepare made"
        )
    prompts = _calibration_prompts(o.calibrate)
    pruning(o.prune, prompts)
    float_dtype(o.dtype)
    check_new(o.out.expanduser())
    check_name(o.teacher)
    check_new(o.out.expanduser())
    from koala.generation.pruning import prune_model  # all is checked: now torch may load

    calibrate = _calibrate(o.calibrate, prompts)
    return prune_model(assembled(o, o.teacher), o.prune, calibrate, o.out, o.dtype, say)


def _calibration_prompts(calibrate: Path) -> list[str] | None:
    """The prompts of --calibrate; None: it is a folder of koala prepare. UserError if neither."""
    data = calibrate.expanduser()
    if data.is_dir() and not (data / "latents.json").is_file():
        raise UserError(f"--calibrate {data} is no folder that koala prepare made")
    return None if data.is_dir() else texts_in(data)


def _calibrate(calibrate: Path, prompts: list[str] | None) -> Any:
    """What pruning and rounding take for it. Loads torch."""
    if prompts is not None:
        return prompts
    from koala.recipes.prepared_inputs import prepared_inputs

    return partial(prepared_inputs, calibrate.expanduser())


def _convert_arguments(p: Parser) -> None:
    p.add_argument("model", help=f"{MODEL}; with --for, a LoRA's file")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--to", metavar="FORMAT",
        help=f"{listed(TARGETS)}: a folder, or a file for other programs",
    )  # fmt: skip
    what.add_argument(
        "--for", dest="student", metavar="MODEL",
        help="turn SDXL's LoRA into one for this student: koala-700m, koala-1b, bk-sdxl or a model",
    )  # fmt: skip
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="PATH",
        help="the new folder or .safetensors file",
    )
    p.add_argument("--dtype", help=f"of all weights: {listed(DTYPES)} (default: as they are)")
    p.add_argument(
        "--weights",
        help="int4: with --to diffusers, the U-Net in 4 bits; only koala draws with it",
    )
    p.add_argument(
        "--calibrate", type=Path, metavar="PROMPTS|DATA",
        help="for --weights int4: a text file with a prompt a line, which are drawn to see what is "
        "lost by rounding, or a folder of koala prepare, whose latents are read",
    )  # fmt: skip
    p.add_argument(
        "--spelling",
        help="of a LoRA's names: kohya, which other programs read in full (default), or same",
    )
    p.add_argument(
        "--workflow", type=Path, metavar="FILE",
        help="also write a ComfyUI workflow (JSON) that draws with the single file as koala does",
    )  # fmt: skip
    p.add_parts("the model")
    p.add_push()
    p.add_json("the report")


def _convert(o: argparse.Namespace) -> None:
    from koala.checkpoints.convert import check_conversion, convert
    from koala.lora.conversion import convert_lora

    if o.student is not None and o.dtype is not None:
        raise UserError("--dtype has no effect on a LoRA, which keeps its own: leave it out")
    if o.student is None and o.spelling is not None:
        raise UserError("--spelling is of a LoRA's names: leave it out, or give --for")
    check_push(o)
    if o.student is not None and (o.base or o.vae or o.teacher_lora):
        raise UserError("--base, --vae and --teacher-lora have no effect on a LoRA: leave them out")
    if o.workflow is not None:
        if o.to != "single-file":
            raise UserError("--workflow is for --to single-file, which ComfyUI reads: leave it out")
        if o.workflow.exists():
            raise UserError(f"{o.workflow} exists; name a new file")
    if o.weights is not None and (o.weights != "int4" or o.to != "diffusers"):
        raise UserError(
            f"--weights {o.weights}: allowed is int4, with --to diffusers; for others give --dtype"
        )
    if o.calibrate is not None and o.weights is None:
        raise UserError("--calibrate is for --weights int4: leave it out")
    if o.to in FORMATS:
        raise UserError(
            f"{o.to} is no format of a model to go on with: use koala export --to {o.to}"
        )
    if o.weights is not None:
        stored = _quantise(o)
        report, line = asdict(stored), stored.line()
    elif o.student is None:
        check_conversion(o.to, o.out, o.dtype)  # before the model is assembled
        model = assembled(o, o.model)
        drawn = None if o.workflow is None else _workflow(model, o.out)
        converted = convert(model, o.to, o.out, o.dtype)
        if drawn is not None:
            write_text(o.workflow, drawn)
        report, line = asdict(converted), converted.line()
    else:
        carried = convert_lora(o.model, o.student, o.out, o.spelling or "kohya")
        report, line = asdict(carried), carried.line()
    push(o, o.out.expanduser())
    show(o, report, line)


def _quantise(o: argparse.Namespace) -> "QuantiseReport":
    from koala.checkpoints.convert import check_conversion
    from koala.checkpoints.resolve import check_name

    prompts = None if o.calibrate is None else _calibration_prompts(o.calibrate)
    if prompts is not None:
        calibration_prompts(prompts)
    check_conversion(o.to, o.out, o.dtype)
    check_name(o.model)
    from koala.generation.quantised_folder import write_quantised  # all is checked

    calibrate = None if o.calibrate is None else _calibrate(o.calibrate, prompts)
    return write_quantised(assembled(o, o.model), o.out, o.dtype, calibrate, say)


def _workflow(model: str | Path, out: Path) -> str:
    """A workflow that draws an example with the single file `out`, as `model` is meant to be."""
    from koala.checkpoints import sampling
    from koala.checkpoints.pipeline_files import SCHEDULER
    from koala.checkpoints.resolve import read_model
    from koala.generation.requests import example
    from koala.generation.workflow import as_text, workflow

    contents = read_model(model)
    meant = sampling.of_named(str(model), contents.config(SCHEDULER))
    return as_text(workflow(example(out.name, contents.architecture, meant), out.name))


def _export_arguments(p: Parser) -> None:
    p.add_argument("model", help=MODEL)
    p.add_argument(
        "--to", required=True, metavar="FORMAT",
        help="onnx: a folder for ONNX Runtime, as optimum writes it; openvino: a folder that draws "
        "without PyTorch, and opens in OpenVINO GenAI; gguf: a file for stable-diffusion.cpp",
    )  # fmt: skip
    p.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="the new folder, or .gguf file"
    )
    dtypes = "; ".join(f"{to}: {listed(of)}" for to, of in FORMATS.items())
    p.add_argument("--dtype", help=f"of the weights, by default the first: {dtypes}")
    p.add_parts("the model")
    p.add_json("the report")


def _export(o: argparse.Namespace) -> None:
    from koala.checkpoints.resolve import check_name

    check_export(o.to, o.out.expanduser(), o.dtype)
    check_name(o.model)
    report = export(assembled(o, o.model), o.to, o.out, o.dtype)
    show(o, asdict(report), report.line())


def _architectures_arguments(p: Parser) -> None:
    p.add_json("the rows")


def _architectures(o: argparse.Namespace) -> None:
    from koala.architectures.flops import format_table, table

    rows = table()
    show(o, rows, format_table(rows))


INSPECT = Command(
    "inspect",
    "describe a weights file or a model without loading it",
    ("koala inspect sdxl.safetensors", "koala inspect koala-mini --json"),
    _inspect_arguments,
    _inspect,
)
COMPRESS = Command(
    "compress",
    "make an SDXL U-Net smaller: a student with its weights, or a pruned one that draws at once",
    (
        "koala compress sdxl.safetensors --to koala-700m --out runs/student",
        "koala compress sdxl.safetensors --to 0,1,1,no-mid --dtype fp16 --out runs/smaller",
        "koala compress sdxl.safetensors --prune 0.2 --calibrate prompts.txt --out runs/pruned",
        "koala compress sdxl.safetensors --advise --vram 8",
    ),
    _compress_arguments,
    _compress,
)
CONVERT = Command(
    "convert",
    "write a model in another format or dtype, or a LoRA for a student",
    (
        "koala convert runs/student --to single-file --dtype fp16 --out student.safetensors",
        "koala convert student.safetensors --to diffusers --out runs/again",
        "koala convert sdxl.safetensors --to diffusers --weights int4 --out sdxl-int4",
        "koala convert style.safetensors --for runs/student --out student-style.safetensors",
    ),
    _convert_arguments,
    _convert,
)
EXPORT = Command(
    "export",
    "write a model for another runtime: ONNX, OpenVINO or stable-diffusion.cpp",
    (
        "koala export runs/student --to onnx --dtype fp16 --out student-onnx",
        "koala export koala-mini --to openvino --out koala-mini-openvino",
        "koala export koala-mini --to openvino --dtype int4 --out koala-mini-int4",
        "koala export sdxl.safetensors --to gguf --dtype q8_0 --out sdxl-q8_0.gguf",
    ),
    _export_arguments,
    _export,
)
ARCHITECTURES = Command(
    "architectures",
    "compare the U-Nets, from their definitions",
    ("koala architectures", "koala architectures --json"),
    _architectures_arguments,
    _architectures,
)
