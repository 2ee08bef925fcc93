"""Estimates the cost of a run before it starts: `koala distill RECIPE --dry-run`.

The FLOPs of a sample follow from the architectures (`koala.recipes.flops`), and the VAE's if the
training encodes images. Memory comes from `koala.recipes.memory`. Time follows
from the device's throughput: a named GPU's, at an assumed share of its peak, or one measured here
(`koala.recipes.calibrate`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from koala.architectures.layout import parameters
from koala.architectures.table import ARCHITECTURES, FACTOR, UNetArchitecture, get, student_of
from koala.checkpoints.bundled import BUNDLED, bundled_names
from koala.checkpoints.resolve import local_prediction, resolve_model
from koala.checkpoints.validate import read_json, read_tensors
from koala.data.index import Index
from koala.distillation.optimizers import trained_parameters
from koala.distillation.parallel import check_fp16
from koala.distillation.settings import StepSettings
from koala.distillation.taps import regions, tap_points
from koala.errors import UserError
from koala.lora.names import base_named
from koala.recipes.build import CAPTION_CACHE, UNet
from koala.recipes.calibrate import assumed, measured
from koala.recipes.flops import per_sample
from koala.recipes.memory import (
    META,
    TrainingSetup,
    blank_student,
    blank_unet,
    device_memory,
    main_memory,
)
from koala.recipes.recipe import ALONE, Finetune, Recipe, Student, Teacher, described
from koala.recipes.runs import duration
from koala.recipes.validation import check_dry_run
from koala.utils.device import pick_device

MINI = get("sdxl-mini")
SDXL_TEXT = 123_060_480 + 694_659_840  # parameters of its two text encoders
SDXL_VAE = 83_653_863
ENCODE = 4.65e6  # FLOPs of its encoder per pixel, at 1024 x 1024; 8 % fewer at 512 x 512


@dataclass(frozen=True)
class Estimate:
    """The cost of a run. Memory in GiB of one device, or of one process's main memory."""

    student: str
    teacher: str | None
    predicts: str | None  # the teacher: "epsilon" or "v"; None if it is not here, or there is none
    trained: int  # parameters
    frozen: int  # of the teacher's U-Net, text encoders and VAE
    taps: dict[str, int]  # by location
    samples: int
    batch: int
    processes: int
    micro_batch: int
    pixels: int
    tflop_a_sample: float  # all passes of a step, over what the steps train by turns
    tflop_again: float  # extra, if activations are recomputed
    compilations: int  # of blocks, at most, whatever the number of image sizes; 0: eager
    device: str
    room: float  # of the device
    memory: dict[str, float]
    main_memory: dict[str, float]
    advice: str  # settings if it does not fit, or if more would fit
    samples_per_second: float
    basis: str  # how the throughput was determined
    days: float
    device_hours: float

    @property
    def total(self) -> float:
        """GiB of one device."""
        return sum(self.memory.values())

    @property
    def _compiled(self) -> str:
        return f"at most {self.compilations} blocks, once for all sizes of images"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "total_memory": self.total}

    def text(self) -> str:
        """For the terminal."""
        taps = " + ".join(f"{n} {location}" for location, n in self.taps.items()) or "none"
        again = f" + {self.tflop_again:.4g} recomputed" if self.tflop_again else ""
        lines = [
            f"student       {self.student}, {self.trained:,} parameters trained",
            f"teacher       {self.teacher or 'none'}; {self.frozen:,} parameters frozen"
            + (f"; predicts {self.predicts}" if self.predicts else ""),
            f"taps          {taps}",
            f"samples       {self.samples:,} of {self.pixels} px, {self.batch} a step: "
            f"{self.processes} x {self.micro_batch} at once",
            f"a sample      {self.tflop_a_sample:.4g} TFLOP{again}",
            *([f"compiled      {self._compiled}"] if self.compilations else []),
            f"memory        {self.total:.2f} of {self.room:.1f} GiB of each {self.device}:",
            *(f"{size:14.2f} {part}" for part, size in self.memory.items()),
            *(f"{size:14.2f} in main memory: {n}" for n, size in self.main_memory.items()),
            *([f"              {self.advice}"] if self.advice else []),
            f"throughput    {self.samples_per_second:.3g} samples/s (estimate: {self.basis})",
            f"whole run     {duration(self.days * 86_400)}, {self.device_hours:,.4g} device-hours "
            "(estimate)",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class DryRun:
    """What a recipe's run would be."""

    recipe: Recipe
    cost: Estimate | None  # None for a recipe that trains no U-Net

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return described(self.recipe) | ({"cost": self.cost.as_dict()} if self.cost else {})

    def text(self) -> str:
        """For the terminal."""
        cost = self.cost.text() if self.cost else "(no estimate: this recipe trains no U-Net)"
        return f"{json.dumps(described(self.recipe), indent=2)}\n{cost}"


def dry_run(recipe: Recipe, **options: Any) -> DryRun:
    """The recipe and its cost; options as of `estimate`."""
    return DryRun(recipe, None if isinstance(recipe, ALONE) else estimate(recipe, **options))


def estimate(
    recipe: Recipe,
    *,
    teacher: str | None = None,
    data: str | Path | None = None,
    card: str | None = None,
    processes: int = 1,
    device: str | None = None,
) -> Estimate:
    """The estimated cost of the recipe's run on `processes` devices.

    teacher: inspected if it is a local folder or file; otherwise taken from the recipe. For
    `Finetune` the model itself, local or the name of an architecture.
    data: a prepared folder, which states the image size if the recipe does not, and whether text
    embeddings are stored; by default they are if the recipe asks for it.
    card: a name in `koala.recipes.gpus`; None measures `device` for at most half a minute.
    UserError for a recipe without a U-Net, an unknown GPU, or a batch that does not divide evenly.
    """
    if not isinstance(recipe, UNet):
        raise UserError("a dry run covers U-Nets only; this recipe trains a VAE or text encoders")
    check_dry_run(recipe, processes, card, device, data)
    named = isinstance(recipe, Finetune) and teacher in ARCHITECTURES  # no model is there
    prediction = None if teacher is None or named else local_prediction(teacher)
    made_with = Index(data).made_with if data is not None else {}
    known = assumed(card) if card is not None else None
    here = pick_device(device)
    if known is None:
        check_fp16(recipe.hardware, here)
    on_gpu = known is not None or here.type == "cuda"
    setup = _setup(recipe, teacher, processes, on_gpu, made_with.get("size"))
    again, flops = _flops(setup)
    frozen = _frozen(teacher, setup)
    text = made_with.get("text", recipe.hardware.stored_text)
    memory = device_memory(setup) | _other_memory(frozen, on_gpu, text)
    speed = known or measured(setup, here, sum(memory.values()), again + flops)
    if made_with.get("posterior") == "pixels":
        flops += _encoding(teacher, setup)
    rate = processes * speed.flops / (again + flops)
    seconds = recipe.training.samples / rate
    return Estimate(
        student=setup.student.name,
        teacher=setup.teacher.name if setup.teacher else None,
        predicts=None if prediction is None else str(prediction),
        trained=sum(p.numel() for p in trained_parameters(blank_student(setup)).values()),
        frozen=sum(frozen.values()),
        taps=_taps(recipe, setup),
        samples=recipe.training.samples,
        batch=recipe.training.batch,
        processes=processes,
        micro_batch=setup.micro_batch,
        pixels=setup.pixels,
        tflop_a_sample=flops / 1e12,
        tflop_again=again / 1e12,
        compilations=_compilations(setup),
        device=speed.device,
        room=speed.room,
        memory={part: size / 2**30 for part, size in memory.items()},
        main_memory={part: size / 2**30 for part, size in main_memory(setup).items()},
        advice=_advice(setup, memory, speed.room),
        samples_per_second=rate,
        basis=speed.basis,
        days=seconds / 86_400,
        device_hours=seconds / 3600 * processes,
    )


def _setup(
    recipe: UNet, teacher: str | None, processes: int, on_gpu: bool, size: int | None
) -> TrainingSetup:
    """The recipe with its sizes: a local teacher's own, else the recipe's.

    size: pixels of the data's square bucket, if the recipe states none; None: the native size.
    """
    common: dict[str, Any] = {
        "training": recipe.training,
        "hardware": recipe.hardware,
        "world": processes,
        "on_gpu": on_gpu,
    }
    if isinstance(recipe, Teacher):
        arch = get(recipe.architecture)
        return TrainingSetup(arch, None, None, pixels=size or arch.sample * FACTOR, **common)
    if isinstance(recipe, Finetune):
        arch = _architecture(teacher)
        pixels = recipe.pixels or size or arch.sample * FACTOR
        return TrainingSetup(arch, None, None, pixels=pixels, lora=recipe.lora, **common)
    master = base_named(teacher).unet if teacher and _is_local(teacher) else get(recipe.of)
    student = master if recipe.cut is None else student_of(master, recipe.cut)
    pixels = recipe.pixels or size or master.sample * FACTOR
    return TrainingSetup(student, master, recipe.settings, pixels=pixels, **common)


def _architecture(model: str | None) -> UNetArchitecture:
    """Of a model that is fine-tuned: of a local one, or by name; nothing is downloaded."""
    if model is not None and (model in ARCHITECTURES or _is_local(model)):
        return base_named(model).unet if _is_local(model) else get(model)
    raise UserError(
        f"--model {model}: a dry run downloads nothing; give a folder or file that is here, or an "
        f"architecture: {', '.join(ARCHITECTURES)}"
    )


def _is_local(model: str) -> bool:
    return model in bundled_names() or Path(model).expanduser().exists()


def _folder(teacher: str | None) -> Path | None:
    """The teacher's folder if it is local and none of a single file."""
    if teacher is None or Path(teacher).expanduser().is_file() or not _is_local(teacher):
        return None
    return resolve_model(teacher)


def _small_parts(teacher: str | None, setup: TrainingSetup) -> Path | None:
    """A folder with the run's VAE and text encoders; None if they are SDXL's."""
    of_the_family = setup.student.context == MINI.context
    return _folder(teacher) or (BUNDLED / "koala-mini" if of_the_family else None)


def _encoding(teacher: str | None, setup: TrainingSetup) -> float:
    """FLOPs of encoding an image with the VAE."""
    folder = _small_parts(teacher, setup)
    if folder is None:
        return int(ENCODE * setup.pixels**2)
    with META, FlopCounterMode(display=False) as counter:
        vae = AutoencoderKL.from_config(read_json(folder / "vae" / "config.json"))
        vae.encode(torch.empty(1, 3, setup.pixels, setup.pixels))
    return counter.get_total_flops()


def _frozen(teacher: str | None, setup: TrainingSetup) -> dict[str, int]:
    """Frozen parameters by part."""
    folder = _small_parts(teacher, setup)
    parts = {"text encoders": SDXL_TEXT, "VAE": SDXL_VAE}
    if folder is not None:
        stored = {
            name: sum(math.prod(t.shape) for t in read_tensors(folder, name).values())
            for name in ("text_encoder", "text_encoder_2", "vae")
        }
        parts = {
            "text encoders": stored["text_encoder"] + stored["text_encoder_2"],
            "VAE": stored["vae"],
        }
    if setup.teacher is not None:
        parts["teacher"] = parameters(setup.teacher)
    if setup.lora:
        parts["U-Net"] = parameters(setup.student)
    return parts


def _other_memory(frozen: dict[str, int], on_gpu: bool, text_stored: bool) -> dict[str, int]:
    """Bytes on the device of a run's VAE and text encoders."""
    parts = {"VAE, for previews": 4 * frozen["VAE"]}
    if not text_stored:
        parts["text encoders"] = (2 if on_gpu else 4) * frozen["text encoders"]
        if not on_gpu:
            parts["cached caption embeddings, at most"] = CAPTION_CACHE
    return parts


def _flops(setup: TrainingSetup) -> tuple[float, float]:
    """FLOPs of a sample's step: recomputed by checkpointing, and all others."""
    rest, again = per_sample(
        setup.student,
        setup.teacher,
        setup.settings,
        setup.training,
        setup.pixels,
        lora=setup.lora is not None,
    )
    return (again if setup.hardware.checkpointing else 0), rest


def _compilations(setup: TrainingSetup) -> int:
    """Compiled blocks, at most: those of one shape share the code. A network that runs both with a
    gradient and without one, as in step distillation, is compiled for each."""
    if not setup.hardware.compile:
        return 0
    student = len(regions(blank_unet(setup.student)))
    teacher = 0 if setup.teacher is None else len(regions(blank_unet(setup.teacher)))
    if isinstance(setup.settings, StepSettings):
        critic = teacher if setup.training.critic_updates else 0
        return 2 * (student + critic) + teacher
    return student + teacher


def _taps(recipe: UNet, setup: TrainingSetup) -> dict[str, int]:
    if not isinstance(recipe, Student):
        return {}
    tapped = setup.teacher if isinstance(recipe.settings, StepSettings) else setup.student
    assert tapped is not None
    unet = blank_unet(tapped)
    return {tap.location: len(tap_points(unet, [tap])) for tap in recipe.settings.taps}


def _advice(setup: TrainingSetup, memory: Mapping[str, int], room: float) -> str:
    """Settings to change if the run does not fit in `room` GiB, or could use larger parts."""
    fixed, per_sample = sum(memory.values()), memory["activations"] / setup.micro_batch
    fixed -= memory["activations"]
    share = setup.training.batch // setup.world
    fitting = [
        parts
        for parts in range(1, share + 1)
        if share % parts == 0 and fixed + per_sample * share / parts <= room * 2**30
    ]
    if not fitting:
        return f"does not fit, not even one sample at a time: {_remedies(setup, memory)}"
    if fitting[0] > setup.hardware.accumulate:
        return f"does not fit: --set hardware.accumulate={fitting[0]} would"
    if fitting[0] < setup.hardware.accumulate:
        return f"--set hardware.accumulate={fitting[0]} would fit as well"
    return ""


def _remedies(setup: TrainingSetup, memory: Mapping[str, int]) -> str:
    """Settings that save memory and are not yet set."""
    hardware, training = setup.hardware, setup.training
    undone = {
        "hardware.checkpointing=true": not hardware.checkpointing,
        "training.optimizer=adamw-8bit": training.optimizer == "adamw",
        "hardware.ema_on_cpu=true": not hardware.ema_on_cpu,
        "hardware.teacher=offloaded": hardware.teacher == "whole" and setup.teacher is not None,
        "hardware.sharding=fsdp": hardware.sharding == "ddp" and setup.world > 1,
    }
    settings = " ".join(name for name, is_undone in undone.items() if is_undone)
    ways = [f"--set {settings}"] if settings else []
    if "text encoders" in memory:
        ways.append("--data with stored embeddings (koala prepare --text)")
    return " or ".join([*ways, "larger or more GPUs"])
