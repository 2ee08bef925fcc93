"""A student's U-Net out of its teacher's weights: the block map, and the folder that it makes.

Which teacher block each student block starts from is data (`block_map`), computed from the two
architectures alone, so the rule that turns SDXL into KOALA turns SDXL-mini into KOALA-mini, and
distillation pairs the same blocks. Weights go from file to file one tensor at a time: neither
model is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from koala import card, formats
from koala.architectures import (
    UNetArchitecture,
    parameters,
    student_of,
    tensor_shapes,
    unet_config,
)
from koala.contents import Contents, as_file, write_folder
from koala.conversion import read_model
from koala.errors import UserError, unknown
from koala.output import check_new, new_folder
from koala.weights import float_dtype

# Teacher block that student block k of s starts from, out of the teacher's t (KOALA, table 4):
DEPTH_RULES: dict[str, Callable[[int, int, int], int]] = {
    "bottom": lambda k, s, t: k,  # the first s; the paper's choice
    "interleave": lambda k, s, t: k * t // s,  # evenly spaced from the first: 0, 2, 4, ... of 2s
    "up": lambda k, s, t: t - s + k,  # the last s
}
_SCHEDULER_FILE = "scheduler/scheduler_config.json"
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
        and all(s <= t for s, t in _depth_pairs(teacher, student))
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
        raise unknown("depth rule", depth_rule, DEPTH_RULES)
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


def _pipeline_files(contents: Contents, student: UNetArchitecture) -> dict[str, bytes]:
    """The teacher's small files, with the student's U-Net and the scheduler of KOALA's recipe."""
    config = {**contents.config("unet/config.json"), **unet_config(student)}
    index = contents.config("model_index.json")
    for of in (config, index):
        of.pop("_name_or_path", None)
    for name, value in index.items():
        if isinstance(value, list) and name not in formats.CONFIGS:
            index[name] = [None, None]  # an optional part, such as an image encoder
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    schedule = contents.config(_SCHEDULER_FILE)
    kept = {key: schedule[key] for key in _SCHEDULE if key in schedule}
    scheduler = {"_class_name": "EulerDiscreteScheduler", **kept, "timestep_spacing": "trailing"}
    return {
        **contents.files,
        "model_index.json": as_file(index),
        "unet/config.json": as_file(config),
        _SCHEDULER_FILE: as_file(scheduler),
    }


def compress(
    teacher: str | Path,
    to: str,
    out: str | Path,
    dtype: str | None = None,
    depth_rule: str = "bottom",
) -> CompressReport:
    """Writes the pipeline folder `out`: `teacher`, its U-Net cut down and otherwise as it is.

    teacher: name, folder, Hub id or single file of an SDXL pipeline. to: a cut ("koala-700m",
    "koala-1b", "bk-sdxl") or depths of one's own, see `student_of`. dtype: of all weights, "fp32",
    "fp16" or "bf16"; None keeps each as it is. depth_rule: which of the teacher's transformer
    blocks stay, see `DEPTH_RULES`. Every tensor of the student is one of the teacher's. Raises
    `UserError` if the teacher is no SDXL pipeline, a setting is unknown, a weight does not fit
    the dtype, or `out` exists and is not empty or cannot be written; `Failure` if the disk is
    full.
    """
    kind, out = float_dtype(dtype), Path(out).expanduser()
    check_new(out)
    contents = read_model(teacher)
    arch = contents.architecture
    try:
        student = student_of(arch, to)
        names = tensor_map(arch, student, depth_rule)
    except UserError as error:
        raise UserError(f"{contents.source}: {error}") from None
    unet = contents.tensors["unet"]
    tensors = {**contents.tensors, "unet": {mine: unet[names[mine]] for mine in names}}
    with new_folder(out) as part:
        sizes = write_folder(part, tensors, _pipeline_files(contents, student), kind)
        inherited = len(set(names.values()))
        report = CompressReport(
            teacher=arch.name,
            student=student.name,
            teacher_parameters=parameters(arch),
            student_parameters=parameters(student),
            inherited=inherited,
            dropped=len(unet) - inherited,
            bytes=sizes["unet"],
            out=out,
        )
        _card(teacher, contents, report, depth_rule).write(part)
    return report


def adopt(
    student: str | Path, teacher: str | Path, to: str, out: str | Path, depth_rule: str = "bottom"
) -> None:
    """Writes the pipeline folder `out` in fp32: `teacher`, with the U-Net of `student` in it.

    So a student that has been distilled before goes on, from any teacher that it is a cut of:
    KOALA-700M, say, from somebody's own SDXL. student: name, folder, Hub id or single file; VAE
    and text encoders of its own are left out. teacher, to, depth_rule: as of `compress`. Raises
    `UserError` if `student` is not `teacher` cut so, or what it predicts is not what `teacher`
    does, and as `compress` does.
    """
    out = Path(out).expanduser()
    check_new(out)
    contents, other = read_model(teacher), read_model(student)
    cut = student_of(contents.architecture, to)
    if other.architecture != cut:
        raise UserError(
            f"{other.source} has a U-Net {other.architecture.name}, the student is to be "
            f"{cut.name}: take another model to go on from, or none"
        )
    mine, theirs = (_predicts(of) for of in (other, contents))
    if mine != theirs:
        raise UserError(
            f"{other.source} predicts {mine}, the teacher {contents.source} {theirs}: take a pair "
            "that predicts the same"
        )
    known = _known(other)
    if known.cut and known.cut.depth_rule != depth_rule:
        raise UserError(
            f"{other.source} was cut by depth rule {known.cut.depth_rule!r}, this recipe pairs its "
            f"blocks by {depth_rule!r}: add --set settings.depth_rule={known.cut.depth_rule}"
        )
    tensors = {**contents.tensors, "unet": other.tensors["unet"]}
    with new_folder(out) as part:
        write_folder(part, tensors, _pipeline_files(contents, cut), float_dtype("fp32"))
        card.adopted_of(known, _known(contents), card.name_of(out)).write(part)


def _predicts(contents: Contents) -> str:
    return contents.config(_SCHEDULER_FILE).get("prediction_type", "epsilon")


def _card(
    teacher: str | Path, contents: Contents, report: CompressReport, depth_rule: str
) -> card.Card:
    """The student's model card."""
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
    return card.student_of(_known(contents), name, card.name_of(report.out), cut)


def _known(contents: Contents) -> card.Card:
    """What a folder's card or a single file's metadata say."""
    if contents.source.is_dir():
        return card.read(contents.source)
    return card.read_metadata(contents.source, contents.metadata)
