"""Runs a recipe: builds task and data from its configuration, trains, exports.

A run writes its finished pipeline folder to `<out>/model`; the same call resumes it.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from koala.architectures.config import from_unet_config
from koala.checkpoints import card_facts, lora_card, model_card, sampling
from koala.checkpoints.compress import adopt, compress
from koala.checkpoints.load import build_unet
from koala.checkpoints.resolve import resolve_model
from koala.checkpoints.validate import unet_architecture
from koala.checkpoints.words import FILE as WORDS
from koala.data.encoding import Moments
from koala.data.latents import LatentSet
from koala.data.prepare import facts_of
from koala.distillation import checkpoint
from koala.distillation.loop import Data, train
from koala.distillation.parallel import World, joined, lay_out
from koala.distillation.settings import DistillationSettings, StepSettings
from koala.distillation.tasks import Denoising, Distillation
from koala.errors import UserError
from koala.lora.names import base_of
from koala.lora.training import write_lora
from koala.mini.runs import run_autoencoder, run_base, run_tiny
from koala.mini.settings import Autoencoder, Base, Tiny
from koala.recipes import FINETUNES, configured
from koala.recipes.build import UNet, conditioner_of, task_of, validation_of
from koala.recipes.flops import per_sample
from koala.recipes.recipe import ALONE, Custom, Finetune, Recipe, Student, Teacher
from koala.recipes.validation import check, check_finetune, teacher_of
from koala.utils.atomic import locked

UNCLAIMED = ("hardware", "teacher", "of", "pixels", "prompts")  # may differ when a run is resumed


def distill(
    recipe: str | Recipe | Custom,
    data: str | Path,
    out: str | Path,
    teacher: str | None = None,
    device: str | None = None,
    settings: Sequence[str] = (),
    loggers: Sequence[str] = (),
    student: str | None = None,
) -> Path:
    """Runs a recipe to its end and returns the folder of the finished pipeline, `out`/model.

    recipe: a name in `koala.recipes` or a configuration; `Custom` has parts of one's own. data: a
    folder made by `koala prepare`, or for U-Nets the URL of one.
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
    own, recipe = (recipe, recipe.recipe) if isinstance(recipe, Custom) else (None, recipe)
    with joined(device) as world, contextlib.ExitStack() as stack:
        with world.together():
            recipe = configured(recipe, settings)
            check(recipe, data, teacher, student, device, loggers)
            if isinstance(recipe, ALONE) and world.size > 1:
                raise UserError("this recipe trains in one process: run it without torchrun")
            teacher = teacher_of(recipe, teacher)
            if world.first:
                stack.enter_context(locked(out))
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
            models = _run(recipe, data, out, teacher, student, world, loggers, own)
        with world.together():
            for model in models if world.first else ():
                model_card.write(_card(name, recipe, data, out, teacher, student), model)
    return models[0]


def finetune(
    recipe: str | Finetune,
    model: str,
    data: str | Path,
    out: str | Path,
    device: str | None = None,
    settings: Sequence[str] = (),
    loggers: Sequence[str] = (),
) -> Path:
    """Trains a model's U-Net further by L_task alone; the same call resumes it.

    recipe: "full", "lora", "dreambooth" or a configuration. model: bundled name, folder, file or
    Hub id, of any SDXL or student of one; its VAE must be that of the data. Returns `out`/model, a
    pipeline, or `out`/lora, a LoRA in diffusers' spelling and in kohya's. Other arguments and
    errors as of `distill`.
    """
    name, out = recipe if isinstance(recipe, str) else "custom", Path(out)
    with joined(device) as world, contextlib.ExitStack() as stack:
        with world.together():
            chosen = configured(recipe, settings, FINETUNES)
            assert isinstance(chosen, Finetune)
            recipe = chosen
            check_finetune(recipe, model, data, device, loggers)
            if world.first:
                stack.enter_context(locked(out))
        results = _run(recipe, data, out, model, None, world, loggers)
        with world.together():
            for result in results if world.first else ():
                if recipe.lora:
                    facts = _trained(name, recipe, data, model, None)
                    card = model_card.read(resolve_model(model))
                    lora_card.write(result, out.absolute().name, card, facts)
                else:
                    model_card.write(_card(name, recipe, data, out, model, None), result)
    return results[0]


def _run(
    recipe: UNet,
    data: str | Path,
    out: Path,
    teacher: str,
    student: str | None,
    world: World,
    loggers: Sequence[str],
    own: Custom | None = None,
) -> list[Path]:
    """Trains a U-Net and exports it with each average, the main one first."""
    training, start = recipe.training, out / "start"
    with world.together():
        source = resolve_model(teacher)
        if isinstance(recipe, Student):
            _check_guidance(recipe, teacher, source)
            if own and (own.task or own.optimizer) and isinstance(recipe.settings, StepSettings):
                raise UserError(
                    "step distillation has tasks and an optimiser for two networks: leave out your "
                    "own task and optimiser"
                )
        recipe.hardware.micro_batch(training.batch, world.size)
        latents = _latents(recipe, data, source)
        validation = validation_of(latents, recipe, source) if training.validate_every else []
        if isinstance(recipe, Student) and world.first and not start.exists():
            _write_start(recipe, teacher, student, start)
    if isinstance(recipe, Student):
        world.check_shared(start)
    conditioner = conditioner_of(source, world.device, latents)
    encode = Moments(source, world.device) if latents.images else None
    kind = own.task if own and own.task else Distillation
    task = task_of(recipe, source, start, conditioner, world.device, encode, latents, kind)
    layout = lay_out(task, recipe.hardware, world, latents.buckets)
    try:
        train(
            task,
            _stream(own, recipe, data, source) or latents,
            training,
            out,
            _note(recipe, teacher if isinstance(recipe, Finetune) else student, own),
            layout=layout,
            validation=validation,
            loggers=loggers,
            flops=_flops(recipe, task, latents) if world.device.type == "cuda" else None,
            optimizer=own.optimizer if own else None,
        )
    finally:
        latents.close()
    result = "lora" if isinstance(recipe, Finetune) and recipe.lora else "model"
    results = [out / result, *(out / f"{result}-ema-{length}" for length in training.ema_others)]
    with world.together():
        for length, path in zip(training.half_lives, results, strict=True) if world.first else ():
            _export(recipe, task, out, length, path)
    return results


def _latents(recipe: UNet, data: str | Path, source: Path) -> LatentSet:
    """The recipe's samples, for the model in `source`."""
    mixture, size = recipe.mixture, None if isinstance(recipe, Teacher) else recipe.pixels
    seed = recipe.training.seed
    latents = LatentSet(data, source, mixture.kinds, mixture.captions, seed, size=size)
    if recipe.hardware.stored_text and not latents.index.made_with["text"]:
        raise UserError(
            f"{data} holds no text embeddings, which this recipe's hardware needs: koala "
            "prepare it with --text, or encode while training (--set hardware.stored_text=false)"
        )
    return latents


def _write_start(recipe: Student, teacher: str, student: str | None, start: Path) -> None:
    """The model that the training begins from: the teacher, cut, or the student that is named."""
    settings = recipe.settings
    rule = settings.depth_rule if isinstance(settings, DistillationSettings) else None
    if student is None and recipe.cut is not None:
        compress(teacher, recipe.cut, start, "fp32", rule or "bottom")
    else:
        adopt(student or teacher, teacher, recipe.cut, start, rule)
    if settings.sampling is not None:
        settings.sampling.state_in(start)  # its checkpoints are drawn so, too


def _note(recipe: UNet, begun_from: str | None, own: Custom | None) -> dict[str, Any]:
    """What the run's folder claims beside the settings of the training."""
    claimed = {name: value for name, value in asdict(recipe).items() if name not in UNCLAIMED}
    note: dict[str, Any] = {"recipe": claimed}
    if begun_from:
        note["student"] = model_card.name_of(begun_from)
    if own and own.described():
        note["custom"] = own.described()
    return note


def _stream(own: Custom | None, recipe: UNet, data: str | Path, source: Path) -> Data | None:
    """The user's own stream of batches; None: there is none."""
    if own is None or own.data is None:
        return None
    assert isinstance(recipe, Student)
    if recipe.training.validate_every:
        raise UserError("data of one's own are not validated: set training.validate_every=0")
    return own.data(str(data), source, recipe)


def _export(recipe: UNet, task: Denoising, run: Path, half_life: int, path: Path) -> None:
    """Writes what was trained, averaged with that half-life."""
    weights = checkpoint.average(run, half_life)
    if isinstance(recipe, Finetune) and recipe.lora:
        write_lora(weights, recipe.lora, base_of(task.base), path, run.absolute().name)
        return
    unet = build_unet(task.trainable.config)
    unet.load_state_dict(weights)
    task.export(unet, path)
    if isinstance(recipe, Finetune):  # which taught it words that are not listed
        (path / WORDS).unlink(missing_ok=True)


def _check_guidance(recipe: Student, teacher: str, folder: Path) -> None:
    """UserError for guidance with a teacher that is drawn without."""
    if recipe.settings.guidance and not sampling.of_model(teacher, folder).guided:
        raise UserError(
            f"settings.guidance is {recipe.settings.guidance:g}, but the teacher {teacher} is made "
            "to be drawn without guidance: take a base model or a fine-tune of one, or leave "
            "guidance out (--set settings.guidance=none)"
        )


def _flops(recipe: UNet, task: Denoising, latents: LatentSet) -> float:
    """FLOPs of one sample's step. All buckets have about the same area."""
    side = latents.index.made_with["size"]
    student = from_unet_config(task.trainable.config)
    teacher = None if task.teacher is None else from_unet_config(task.teacher.config)
    settings = recipe.settings if isinstance(recipe, Student) else None
    lora = isinstance(recipe, Finetune) and recipe.lora is not None
    flops, _ = per_sample(student, teacher, settings, recipe.training, side, task.tokens, lora)
    return flops


def _card(
    name: str,
    recipe: Recipe,
    data: str | Path,
    out: Path,
    teacher: str | None,
    student: str | None,
) -> card_facts.ModelCard:
    """The finished model's card: the card of the model it started from, and this training."""
    start = card_facts.ModelCard("")
    if not isinstance(recipe, Base):
        assert teacher is not None
        start = model_card.read(
            out / "start" if isinstance(recipe, Student) else resolve_model(teacher)
        )
    facts = _trained(name, recipe, data, teacher, student)
    if isinstance(recipe, Teacher) and recipe.further:
        assert teacher is not None
        grown = unet_architecture(resolve_model(teacher)).name != recipe.architecture
        facts = replace(facts, further=model_card.name_of(teacher), grown=grown)
        start = replace(start, cut=None)
    goes_on = student or facts.further or isinstance(recipe, Finetune)
    before = start.trained if goes_on else None
    if before is not None:
        facts = replace(facts, before=before.samples.get("U-Net", 0) + before.before)
    return model_card.trained_of(start, model_card.name_of(out / "model"), facts)


def _trained(
    name: str, recipe: Recipe, data: str | Path, teacher: str | None, student: str | None
) -> card_facts.Trained:
    """This training, for a card."""
    trained = {"U-Net": recipe.training} if not isinstance(recipe, Base) else {
        "VAE": recipe.vae, "decoder": recipe.decoder, "text encoders": recipe.text,
    }  # fmt: skip
    return card_facts.Trained(
        recipe=name,
        settings=asdict(recipe),
        samples={what: training.samples for what, training in trained.items()},
        data=facts_of(data),
        teacher=teacher and model_card.name_of(teacher),
        distilled=isinstance(recipe, Student) and recipe.settings.learns_from_teacher,
        student=student and model_card.name_of(student),
        tuned=isinstance(recipe, Finetune),
    )
