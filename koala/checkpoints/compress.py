"""Builds a student's U-Net from its teacher's weights, by `koala.architectures.block_map`.

Tensors are copied from file to file one at a time; neither model is ever loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from koala.architectures.block_map import check_depth_rule, tensor_map
from koala.architectures.config import before_pruning, unet_config
from koala.architectures.layout import parameters
from koala.architectures.table import UNetArchitecture, check_student, student_of
from koala.checkpoints import card_facts, model_card, sampling
from koala.checkpoints.pipeline_files import SCHEDULER, Contents, as_file, write_folder
from koala.checkpoints.resolve import read_model
from koala.checkpoints.tensors import float_dtype
from koala.checkpoints.validate import CONFIGS
from koala.errors import UserError
from koala.utils.atomic import check_new, new_folder

_SCHEDULE = (  # what the student keeps of its teacher's scheduler, with how it is drawn
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
    inherited: int  # teacher tensors that the student inherits
    dropped: int  # teacher tensors that it does not inherit
    bytes: int  # of the student's U-Net weights
    out: Path

    def line(self) -> str:
        """For a person."""
        if not self.dropped:
            return (
                f"{self.teacher} ({self.teacher_parameters:,} parameters) has no block that this "
                f"cut removes: {self.out} is a copy"
            )
        return (
            f"{self.teacher} ({self.teacher_parameters:,} parameters) -> "
            f"{self.student} ({self.student_parameters:,}): {self.inherited} tensors "
            f"inherited, {self.dropped} left behind, {self.bytes / 1e6:,.1f} MB in {self.out}"
        )


def _pipeline_files(contents: Contents, student: UNetArchitecture) -> dict[str, bytes]:
    """The teacher's small files, with the student's U-Net config and KOALA's scheduler."""
    config = {**contents.config("unet/config.json"), **unet_config(student)}
    index = contents.config("model_index.json")
    for of in (config, index):
        of.pop("_name_or_path", None)
    for name, value in index.items():
        if isinstance(value, list) and name not in CONFIGS:
            index[name] = [None, None]  # an optional part, such as an image encoder
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    schedule = contents.config(SCHEDULER)
    kept = {key: schedule[key] for key in (*_SCHEDULE, sampling.KEY) if key in schedule}
    scheduler = {"_class_name": "EulerDiscreteScheduler", **kept, "timestep_spacing": "trailing"}
    return {
        **contents.files,
        "model_index.json": as_file(index),
        "unet/config.json": as_file(config),
        SCHEDULER: as_file(scheduler),
    }


def check_compression(to: str, out: str | Path, dtype: str | None, depth_rule: str) -> None:
    """UserError for arguments of `compress` that no teacher can be compressed with."""
    float_dtype(dtype)
    check_student(to)
    check_depth_rule(depth_rule)
    check_new(Path(out).expanduser())


def compress(
    teacher: str | Path,
    to: str,
    out: str | Path,
    dtype: str | None = None,
    depth_rule: str = "bottom",
) -> CompressReport:
    """Writes the pipeline folder `out`: `teacher` with a smaller U-Net, otherwise unchanged.

    teacher: name, folder, Hub id or single file of an SDXL, or of a student of one. to: a cut
    ("koala-700m", "koala-1b", "bk-sdxl") or custom depths, see `student_of`. dtype: of all weights,
    "fp32", "fp16" or "bf16"; None keeps each as it is. depth_rule: which of the teacher's
    transformer blocks are kept, see `DEPTH_RULES`. Every tensor of the student is copied from the
    teacher. Raises `UserError` if the teacher is no such pipeline, a setting is unknown, a weight
    does not fit the dtype, or `out` is not empty or cannot be written; `Failure` if the disk is
    full.
    """
    check_compression(to, out, dtype, depth_rule)
    kind, out = float_dtype(dtype), Path(out).expanduser()
    contents = read_model(teacher)
    arch = contents.architecture
    try:
        student = student_of(arch, to)
        names = tensor_map(arch, student, depth_rule)
    except UserError as error:
        raise UserError(f"{teacher}: {error}") from None
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
        model_card.write(_card(teacher, contents, report, depth_rule), part)
    return report


def adopt(
    student: str | Path,
    teacher: str | Path,
    to: str | None,
    out: str | Path,
    depth_rule: str | None = "bottom",
) -> None:
    """Writes the pipeline folder `out` in fp32: `teacher` with the U-Net of `student`.

    A distilled student can thus be distilled further, from any teacher that it is a cut of:
    KOALA-700M from a fine-tuned SDXL, for example. student: name, folder, Hub id or single file,
    which may have been pruned; its VAE and text encoders are not used. teacher: as in `compress`.
    to, depth_rule: as there; None: `student` has the teacher's own U-Net; any rule. Raises
    `UserError` if `student` is not that cut of `teacher` or has another prediction type, and as
    `compress` does.
    """
    out = Path(out).expanduser()
    check_new(out)
    contents, other = read_model(teacher), read_model(student)
    cut = contents.architecture if to is None else student_of(contents.architecture, to)
    if (whole := before_pruning(other.architecture)) != cut:
        uncut = to is not None and whole == contents.architecture
        raise UserError(
            f"{student} has the U-Net {whole.name}, but this recipe trains {cut.name}: "
            + ("add --set cut=none" if uncut else "give another --student, or none")
        )
    mine, theirs = (of.prediction for of in (other, contents))
    if mine != theirs:
        raise UserError(
            f"{student} predicts {mine}, but the teacher {teacher} predicts {theirs}: "
            "choose two models with one prediction type"
        )
    known = _known(other)
    if known.cut and depth_rule is not None and known.cut.depth_rule != depth_rule:
        raise UserError(
            f"{student} was cut by depth rule {known.cut.depth_rule!r}, but this recipe pairs "
            f"blocks by {depth_rule!r}: add --set settings.depth_rule={known.cut.depth_rule}"
        )
    tensors = {**contents.tensors, "unet": other.tensors["unet"]}
    with new_folder(out) as part:
        files = _pipeline_files(contents, other.architecture)
        write_folder(part, tensors, files, float_dtype("fp32"))
        adopted = model_card.adopted_of(known, _known(contents), model_card.name_of(out))
        model_card.write(adopted, part)


def _card(
    teacher: str | Path, contents: Contents, report: CompressReport, depth_rule: str
) -> card_facts.ModelCard:
    """The student's model card."""
    name = model_card.name_of(teacher)
    cut = card_facts.Compressed(
        teacher=name,
        teacher_architecture=report.teacher,
        teacher_parameters=report.teacher_parameters,
        architecture=report.student,
        parameters=report.student_parameters,
        inherited=report.inherited,
        dropped=report.dropped,
        depth_rule=depth_rule,
        predicts=str(contents.prediction),
    )
    return model_card.student_of(_known(contents), name, model_card.name_of(report.out), cut)


def _known(contents: Contents) -> card_facts.ModelCard:
    """The model card of a folder, or of a single file's metadata."""
    return model_card.of_contents(contents.source, contents.metadata)
