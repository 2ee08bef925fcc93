"""A student's U-Net out of its teacher's weights: the block map, and the folder that it makes.

Which teacher block each student block starts from is data (`block_map`), computed from the two
architectures alone, so the rule that turns SDXL into KOALA turns SDXL-mini into KOALA-mini, and
distillation pairs the same blocks. Weights go from file to file one tensor at a time: neither
model is ever in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koala import card, formats
from koala.architectures import (
    CUTS,
    UNetArchitecture,
    parameters,
    student_of,
    tensor_shapes,
    unet_config,
)
from koala.errors import UserError
from koala.output import new_folder
from koala.weights import DTYPES, FLOATS, write

# Teacher block that student block k of s starts from, out of the teacher's t (KOALA, table 4):
DEPTH_RULES: dict[str, Callable[[int, int, int], int]] = {
    "bottom": lambda k, s, t: k,  # the first s; the paper's choice
    "interleave": lambda k, s, t: k * t // s,  # evenly spaced from the first: 0, 2, 4, ... of 2s
    "up": lambda k, s, t: t - s + k,  # the last s
}
_SCHEDULE = (  # what the student keeps of its teacher's scheduler: the noise it was trained on
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "rescale_betas_zero_snr",
)  # fmt: skip


@dataclass(frozen=True)
class CompressReport:
    """What `compress` did."""

    teacher: str  # architecture's name, or "custom"
    student: str
    teacher_parameters: int  # of the U-Nets
    student_parameters: int
    inherited: int  # teacher tensors that the student starts from
    dropped: int  # teacher tensors that it does not
    bytes: int  # of the student's U-Net weights
    out: Path


# --- the map --------------------------------------------------------------------------------


def _check_pair(teacher: UNetArchitecture, student: UNetArchitecture) -> None:
    """Raises `UserError` unless every block of `student` has one of its size in `teacher`."""
    fits = (
        student.widths == teacher.widths
        and student.layers <= teacher.layers
        and all(s <= t and bool(s) == bool(t) for s, t in _depth_pairs(teacher, student))
        and (student.mid is None or (teacher.mid is not None and student.mid <= teacher.mid))
    )
    same = ("heads", "context", "pooled", "time_ids", "groups", "linear")
    fits = fits and all(getattr(student, key) == getattr(teacher, key) for key in same)
    if not fits:
        raise UserError(
            f"{student.name} cannot inherit from {teacher.name}: it must be the same U-Net with "
            "fewer layers, less depth or no mid block"
        )


def _depth_pairs(teacher: UNetArchitecture, student: UNetArchitecture) -> Iterator[tuple[int, int]]:
    """Depths of every student resnet's transformer and of the teacher's one it comes from."""
    yield from zip(student.depths, teacher.depths, strict=True)
    for own, theirs in zip(student.up, teacher.up, strict=True):
        for j, depth in enumerate(own):
            yield depth, theirs[_up_layer(j, teacher, student)]


def _up_layer(j: int, teacher: UNetArchitecture, student: UNetArchitecture) -> int:
    """Teacher's resnet in an up block for the student's resnet j.

    The last one joins the skip of the stage above, whose width differs, so it must come from
    the teacher's last; the others keep their index.
    """
    return j if j < student.layers else teacher.layers


def block_map(
    teacher: UNetArchitecture, student: UNetArchitecture, depth_rule: str = "bottom"
) -> dict[str, str]:
    """Student module prefix -> teacher module prefix ("at the same block location", KOALA 3.1).

    Prefixes are of whole blocks: "conv_in", "up_blocks.0.resnets.1", "up_blocks.0.attentions.1"
    (its norm and projections), "up_blocks.0.attentions.1.transformer_blocks.3", ... A tensor
    belongs to the longest prefix of its name. Raises `UserError` if the depth rule is unknown or
    `student` is no cut of `teacher`.
    """
    if depth_rule not in DEPTH_RULES:
        raise UserError(f"unknown depth rule {depth_rule!r}; choose {', '.join(DEPTH_RULES)}")
    if len(student.depths) != len(teacher.depths):
        raise UserError(f"{student.name} and {teacher.name} have different numbers of stages")
    _check_pair(teacher, student)
    rule = DEPTH_RULES[depth_rule]
    ends = ["conv_in", "time_embedding", "conv_norm_out", "conv_out"]
    pairs = {end: end for end in [*ends, *(["add_embedding"] if student.pooled else [])]}

    def layer(block: str, j: int, i: int, s: int, t: int) -> None:
        pairs[f"{block}.resnets.{j}"] = f"{block}.resnets.{i}"
        if s:
            pairs[f"{block}.attentions.{j}"] = f"{block}.attentions.{i}"
        for k in range(s):
            mine, theirs = (f"{block}.attentions.{n}.transformer_blocks" for n in (j, i))
            pairs[f"{mine}.{k}"] = f"{theirs}.{rule(k, s, t)}"

    last = len(student.depths) - 1
    for n, (s, t) in enumerate(zip(student.depths, teacher.depths, strict=True)):
        for j in range(student.layers):
            layer(f"down_blocks.{n}", j, j, s, t)
        if n < last:
            pairs[f"down_blocks.{n}.downsamplers.0"] = f"down_blocks.{n}.downsamplers.0"
    if student.mid is not None:
        layer("mid_block", 0, 0, student.mid, teacher.mid or 0)
        if student.mid:
            pairs["mid_block.resnets.1"] = "mid_block.resnets.1"
    for n, (own, theirs) in enumerate(zip(student.up, teacher.up, strict=True)):
        for j, s in enumerate(own):
            i = _up_layer(j, teacher, student)
            layer(f"up_blocks.{n}", j, i, s, theirs[i])
        if n < last:
            pairs[f"up_blocks.{n}.upsamplers.0"] = f"up_blocks.{n}.upsamplers.0"
    return pairs


def tensor_map(
    teacher: UNetArchitecture, student: UNetArchitecture, depth_rule: str = "bottom"
) -> dict[str, str]:
    """Student tensor name -> teacher tensor name, for every tensor of the student.

    Shapes agree. Raises `UserError` as `block_map` does.
    """
    blocks = block_map(teacher, student, depth_rule)
    of_teacher, names = tensor_shapes(teacher), {}
    for name, shape in tensor_shapes(student).items():
        prefix = name
        while prefix not in blocks:
            prefix = prefix[: prefix.rindex(".")]
        names[name] = blocks[prefix] + name[len(prefix) :]
        assert of_teacher[names[name]] == shape, name
    return names


# --- files ----------------------------------------------------------------------------------


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _copy_components(teacher: Path, out: Path) -> None:
    """Tokenizers, text encoders, VAE and credits as they are; the scheduler as KOALA's recipe."""
    for component in ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae"):
        files = [*(teacher / component).glob("*.json"), *(teacher / component).glob("*.txt")]
        if component in formats.WEIGHTS:
            files += formats.weights_files(teacher, component)
        (out / component).mkdir()
        for file in files:
            shutil.copyfile(file, out / component / file.name)
    for credit in (*teacher.glob("NOTICE*"), *teacher.glob("LICENSE*")):
        shutil.copyfile(credit, out / credit.name)
    index = formats.read_json(teacher / "model_index.json")
    index.pop("_name_or_path", None)
    for name, value in index.items():
        if isinstance(value, list) and name not in formats.CONFIGS:
            index[name] = [None, None]  # an optional part, such as an image encoder
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    _write_json(out / "model_index.json", index)
    schedule = formats.load_scheduler_config(teacher)
    kept = {key: schedule[key] for key in _SCHEDULE if key in schedule}
    scheduler = {"_class_name": "EulerDiscreteScheduler", **kept, "timestep_spacing": "trailing"}
    _write_json(out / "scheduler" / "scheduler_config.json", scheduler)


def compress(
    teacher: str | Path,
    to: str,
    out: str | Path,
    dtype: str | None = None,
    depth_rule: str = "bottom",
) -> CompressReport:
    """Writes the pipeline folder `out`: `teacher`, its U-Net cut down and otherwise as it is.

    teacher: name, folder or Hub id of an SDXL pipeline. to: a cut ("koala-700m", "koala-1b",
    "bk-sdxl"). dtype: of the student's U-Net weights, "fp32", "fp16" or "bf16"; None keeps the
    teacher's. depth_rule: which of the teacher's transformer blocks stay, see `DEPTH_RULES`.
    Every tensor of the student is one of the teacher's. Raises `UserError` if the teacher is no
    SDXL pipeline, a setting is unknown, or `out` exists and is not empty or cannot be written.
    """
    if to not in CUTS:
        raise UserError(f"no student {to!r}; choose one of {', '.join(CUTS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    folder, out = formats.resolve_model(teacher), Path(out).expanduser()
    arch = formats.unet_architecture(folder)
    try:
        student = student_of(arch, to)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    names = tensor_map(arch, student, depth_rule)
    stored = formats.read_tensors(folder, "unet")
    if strange := {s.dtype for s in stored.values()} - {*FLOATS}:
        raise UserError(f"{folder}/unet holds {formats.some(strange)} weights; must be floats")
    kinds = {name: DTYPES[dtype] if dtype else stored[names[name]].dtype for name in names}
    shapes = tensor_shapes(student)
    config = {**formats.read_json(folder / "unet" / "config.json"), **unet_config(student)}
    config.pop("_name_or_path", None)
    with new_folder(out) as part:
        _write_json(part / "unet" / "config.json", config)
        size = write(
            part / "unet" / "diffusion_pytorch_model.safetensors",
            {name: (kinds[name], shapes[name]) for name in names},
            lambda name: stored[names[name]],
        )
        _copy_components(folder, part)
        report = CompressReport(
            teacher=arch.name,
            student=student.name,
            teacher_parameters=parameters(arch),
            student_parameters=parameters(student),
            inherited=len(set(names.values())),
            dropped=len(stored) - len(set(names.values())),
            bytes=size,
            out=out,
        )
        _card(teacher, folder, report, depth_rule).write(part)
    return report


def _card(teacher: str | Path, folder: Path, report: CompressReport, depth_rule: str) -> card.Card:
    """The student's model card; `teacher` as it was given, `folder` where it lies."""
    name = card.name_of(teacher)
    cut = card.Cut(
        teacher=name,
        teacher_architecture=report.teacher,
        teacher_parameters=report.teacher_parameters,
        architecture=report.student,
        parameters=report.student_parameters,
        inherited=report.inherited,
        dropped=report.dropped,
        depth_rule=depth_rule,
    )
    return card.student_of(card.read(folder), name, card.name_of(report.out), cut)
