"""Runs a recipe: builds task and data from its configuration, trains, exports.

A run writes its finished pipeline folder to `<out>/model`; the same call resumes it.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from koala.architectures.config import from_unet_config, unet_config
from koala.architectures.table import get
from koala.checkpoints import model_card, sampling
from koala.checkpoints.compress import adopt, compress
from koala.checkpoints.grow import grow
from koala.checkpoints.load import load_scheduler_config, load_unet
from koala.checkpoints.resolve import resolve_model
from koala.checkpoints.sampling import USUAL
from koala.checkpoints.validate import unet_architecture
from koala.data.encoding import Moments
from koala.data.latents import LatentSet
from koala.data.prepare import facts_of
from koala.distillation import checkpoint
from koala.distillation.forward_process import NoiseSchedule
from koala.distillation.loop import train
from koala.distillation.parallel import World, joined, lay_out
from koala.distillation.settings import DistillationSettings
from koala.distillation.tasks import Denoising, Encode, Taught
from koala.errors import UserError
from koala.mini.runs import run_autoencoder, run_base, run_tiny
from koala.mini.settings import Autoencoder, Base, Tiny
from koala.recipes import configured
from koala.recipes.flops import per_sample
from koala.recipes.previews import drawing
from koala.recipes.recipe import ALONE, MINI_PROMPTS, Recipe, Student, Teacher
from koala.recipes.tasks import student_task
from koala.recipes.validation import check, teacher_of
from koala.text_conditioning import TextConditioner

CAPTION_CACHE = 2**31  # bytes of embeddings cached by a training on the CPU: the whole mini set's
VALIDATION_SAMPLES = 128
VALIDATION_SPLITS = ("test", "test-pair")  # the first one present


UNCLAIMED = ("hardware", "teacher", "of", "pixels", "prompts")  # may differ when a run is resumed


def distill(
    recipe: str | Recipe,
    data: str | Path,
    out: str | Path,
    teacher: str | None = None,
    device: str | None = None,
    settings: Sequence[str] = (),
    loggers: Sequence[str] = (),
    student: str | None = None,
) -> Path:
    """Runs a recipe to its end and returns the folder of the finished pipeline, `out`/model.

    recipe: a name in `koala.recipes` or a configuration. data: a folder made by `koala prepare`, or
    for U-Nets the URL of one.
    teacher: the model to learn from (for `Teacher`, the one that provides VAE and text encoders);
    the paper's recipes have a default.
    device: by default the GPU if there is one, else the CPU; under torchrun each process gets its
    own GPU. settings: "name=value", replacing the recipe's (`overrides`). loggers: "tensorboard",
    "wandb". student: for `Student`, a model of the recipe's cut to train further; None: the
    teacher, cut. The same call resumes a run, also on other hardware.
    UserError if something is unknown, missing or without effect; Failure if the training fails.
    """
    name = recipe if isinstance(recipe, str) else "custom"
    out = Path(out)
    with joined(device) as world:
        with world.together():
            recipe = configured(recipe, settings)
            check(recipe, data, teacher, student, device, loggers)
            if isinstance(recipe, ALONE) and world.size > 1:
                raise UserError("this recipe trains in one process: run it without torchrun")
            teacher = teacher_of(recipe, teacher)
        if isinstance(recipe, Base):
            models = [run_base(recipe, Path(data), out, str(world.device), loggers)]
        elif isinstance(recipe, Autoencoder):
            assert teacher is not None
            return run_autoencoder(recipe, data, out, teacher, str(world.device), loggers)
        elif isinstance(recipe, Tiny):
            assert teacher is not None
            return run_tiny(recipe, data, out, teacher, str(world.device), loggers)
        else:
            assert teacher is not None
            models = _run(recipe, data, out, teacher, student, world, loggers)
        with world.together():
            for model in models if world.first else ():
                _card(name, recipe, data, out, teacher, student).write(model)
    return models[0]


def _run(
    recipe: Teacher | Student,
    data: str | Path,
    out: Path,
    teacher: str,
    student: str | None,
    world: World,
    loggers: Sequence[str],
) -> list[Path]:
    """Trains a U-Net and exports it with each average, the main one first."""
    training = recipe.training
    with world.together():
        source = resolve_model(teacher)
        if isinstance(recipe, Student):
            _check_guidance(recipe, teacher, source)
        recipe.hardware.micro_batch(training.batch, world.size)
        mixture = recipe.mixture
        size = recipe.pixels if isinstance(recipe, Student) else None
        latents = LatentSet(data, source, mixture.kinds, mixture.captions, training.seed, size=size)
        validation = _validation(latents, recipe, source) if training.validate_every else []
        start = out / "start"
        if isinstance(recipe, Student) and world.first and not start.exists():
            settings = recipe.settings
            rule = settings.depth_rule if isinstance(settings, DistillationSettings) else None
            if student is None and recipe.cut is not None:
                compress(teacher, recipe.cut, start, "fp32", rule or "bottom")
            else:
                adopt(student or teacher, teacher, recipe.cut, start, rule)
    conditioner = _conditioner(source, world.device, latents)
    encode = Moments(source, world.device) if latents.images else None
    task = (
        _teaching(recipe, source, conditioner, world.device, encode)
        if isinstance(recipe, Teacher)
        else _distilling(recipe, source, start, conditioner, world.device, encode)
    )
    layout = lay_out(task, recipe.hardware, world)
    claimed = {name: value for name, value in asdict(recipe).items() if name not in UNCLAIMED}
    note = {"recipe": claimed} | ({"student": model_card.name_of(student)} if student else {})
    count = _flops(recipe, task, latents) if world.device.type == "cuda" else None
    try:
        train(
            task, latents, training, out, note, layout=layout, validation=validation,
            loggers=loggers, flops=count,
        )  # fmt: skip
    finally:
        latents.close()
    models = [out / "model", *(out / f"model-ema-{length}" for length in training.ema_others)]
    with world.together():
        for length, model in zip(training.half_lives, models, strict=True) if world.first else ():
            unet = UNet2DConditionModel.from_config(task.trainable.config)
            unet.load_state_dict(checkpoint.average(out, length))
            task.export(unet, model)
    return models


def _check_guidance(recipe: Student, teacher: str, folder: Path) -> None:
    """UserError for guidance with a teacher that is drawn without."""
    if recipe.settings.guidance and not sampling.of_model(teacher, folder).guided:
        raise UserError(
            f"settings.guidance is {recipe.settings.guidance:g}, but the teacher {teacher} is made "
            "to be drawn without guidance: take a base model or a fine-tune of one, or leave "
            "guidance out (--set settings.guidance=none)"
        )


def _validation(latents: LatentSet, recipe: Teacher | Student, model: Path) -> list[dict[str, Any]]:
    """Batches of held-out samples, a fixed choice from all buckets."""
    folder, captions = latents.index.files.folder, recipe.mixture.captions
    for split in VALIDATION_SPLITS:
        if len(latents.index.select(split)):
            there = LatentSet(folder, model, None, captions, recipe.training.seed, split=split)
            batches = there.stratified(VALIDATION_SAMPLES)
            there.close()
            return batches
    raise UserError(
        f"{folder} holds out no images for validation: prepare with a larger --held-out, or train "
        "without (--set training.validate_every=0)"
    )


def _flops(recipe: Teacher | Student, task: Denoising, latents: LatentSet) -> float:
    """FLOPs of one sample's step. All buckets have about the same area."""
    side = latents.index.made_with["size"]
    student = from_unet_config(task.trainable.config)
    teacher = None if task.teacher is None else from_unet_config(task.teacher.config)
    settings = recipe.settings if isinstance(recipe, Student) else None
    flops, _ = per_sample(student, teacher, settings, recipe.training, side, task.tokens)
    return flops


def _card(
    name: str,
    recipe: Recipe,
    data: str | Path,
    out: Path,
    teacher: str | None,
    student: str | None,
) -> model_card.ModelCard:
    """The finished model's card: the card of the model it started from, and this training."""
    start = model_card.ModelCard("")
    if isinstance(recipe, Base):
        trained = {"VAE": recipe.vae, "decoder": recipe.decoder, "text encoders": recipe.text}
    else:
        assert teacher is not None
        trained = {"U-Net": recipe.training}
        start = model_card.read(
            out / "start" if isinstance(recipe, Student) else resolve_model(teacher)
        )
    grown = isinstance(recipe, Teacher) and start.cut is not None
    before = start.trained if student else None
    facts = model_card.Trained(
        recipe=name,
        settings=asdict(recipe),
        samples={what: training.samples for what, training in trained.items()},
        data=facts_of(data),
        teacher=teacher and model_card.name_of(teacher),
        distilled=isinstance(recipe, Student) and recipe.settings.learns_from_teacher,
        student=student and model_card.name_of(student),
        before=before.samples.get("U-Net", 0) + before.before if before else 0,
        grown=teacher and model_card.name_of(teacher) if grown else None,
    )
    if grown:
        start = replace(start, cut=None)
    return model_card.trained_of(start, model_card.name_of(out / "model"), facts)


def _conditioner(model: Path, device: torch.device, latents: LatentSet) -> TextConditioner:
    """The text encoders: on the device, or on the CPU if only previews need them."""
    if latents.index.made_with["text"] or device.type == "cpu":
        arch = unet_architecture(model)
        return TextConditioner.from_folder(
            model, cache_size=CAPTION_CACHE // (4 * arch.tokens * arch.context)
        )
    # On a GPU encoding is faster than a cache, and few captions are repeated.
    return TextConditioner.from_folder(model, torch.float16, device, cache_size=0)


def _teaching(
    recipe: Teacher,
    base: Path,
    conditioner: TextConditioner,
    device: torch.device,
    encode: Encode | None,
) -> Denoising:
    torch.manual_seed(recipe.training.seed)
    arch = get(recipe.architecture)
    if recipe.further:
        found, unet = unet_architecture(base), load_unet(base)
        if found != arch:
            try:
                unet = grow(unet, arch)
            except UserError:
                raise UserError(
                    f"{base} has the U-Net {found.name}, but this recipe continues {arch.name}: "
                    "give the model made by the recipe before it, or a cut of it"
                ) from None
    else:
        unet = UNet2DConditionModel(**unet_config(arch))
    return Denoising(
        unet.to(device),
        conditioner,
        NoiseSchedule(load_scheduler_config(base)),
        base,
        caption_dropout=recipe.caption_dropout,
        min_snr=recipe.min_snr,
        draw=drawing(base, conditioner, device),
        prompts=MINI_PROMPTS,
        encode=encode,
    )


def _distilling(
    recipe: Student,
    teacher: Path,
    start: Path,
    conditioner: TextConditioner,
    device: torch.device,
    encode: Encode | None,
) -> Taught:
    """Distils a copy of `start`, the student before distillation."""
    return student_task(
        recipe.settings,
        load_unet(start).to(device),
        load_unet(teacher),  # the task casts it and moves it to the device
        conditioner,
        load_scheduler_config(teacher),
        start,
        draw=drawing(teacher, conditioner, device, recipe.settings.sampling or USUAL),
        prompts=recipe.prompts,
        encode=encode,
    )
