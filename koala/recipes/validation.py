"""Checks the arguments of a run before torch is loaded."""

from collections.abc import Sequence
from pathlib import Path

from koala.checkpoints.resolve import check_name
from koala.distillation.records import check_loggers
from koala.errors import UserError
from koala.generation.request_checks import check_values
from koala.mini.settings import Base
from koala.recipes import gpus
from koala.recipes.recipe import Finetune, Recipe, Student, Teacher
from koala.utils.device import check_device
from koala.utils.extras import require


def check(
    recipe: Recipe,
    data: str | Path,
    teacher: str | None = None,
    student: str | None = None,
    device: str | None = None,
    loggers: Sequence[str] = (),
) -> None:
    """UserError for arguments of `distill` that do not fit the recipe, or do not exist.

    Nothing is downloaded: Hub ids and URLs are only checked for their form.
    """
    if isinstance(recipe, Finetune):
        raise UserError("this recipe fine-tunes a model: run it by `koala finetune`")
    check_device(device)
    check_loggers(loggers)
    if student is not None and not isinstance(recipe, Student):
        raise UserError(f"--student {student}: this recipe trains no student; leave it out")
    if isinstance(recipe, Student) and recipe.prompts:
        check_values([*recipe.prompts])  # before the first preview
    for model in (teacher_of(recipe, teacher), student):
        if model is not None:
            check_name(model)
    _check_data(data)


def check_finetune(
    recipe: Finetune,
    model: str,
    data: str | Path,
    device: str | None,
    loggers: Sequence[str],
) -> None:
    """UserError for arguments of `finetune` that do not exist; nothing is downloaded."""
    check_device(device)
    check_loggers(loggers)
    if recipe.lora:
        require("training a LoRA", "lora", "peft")
    _check_hardware(recipe)
    if recipe.prompts:
        check_values([*recipe.prompts])
    check_name(model)
    _check_data(data)


def _check_hardware(recipe: Finetune) -> None:
    if recipe.lora and recipe.hardware.sharding == "fsdp":
        raise UserError(
            "sharding=fsdp: a LoRA is too small to be worth sharding, and the model beside it "
            "rests in bf16; leave it out"
        )
    if recipe.hardware.teacher != "whole":
        raise UserError(f"teacher={recipe.hardware.teacher}: there is no teacher; leave it out")


def check_dry_run(
    recipe: Recipe,
    processes: int,
    card: str | None,
    device: str | None,
    data: str | Path | None,
) -> None:
    """UserError for settings that a cost estimate or a run of the recipe would reject."""
    check_device(device)
    if card is not None:
        gpus.get(card)
    if processes < 1:
        raise UserError(f"--gpus {processes}: it must be 1 or more")
    if data is not None:
        _check_data(data)
    if isinstance(recipe, Finetune):
        _check_hardware(recipe)
    if isinstance(recipe, Student | Teacher | Finetune):
        sharded = recipe.hardware.sharding == "fsdp" or recipe.hardware.teacher == "sharded"
        if processes == 1 and sharded:
            raise UserError("sharding=fsdp and teacher=sharded need several GPUs: give --gpus N")
        recipe.hardware.micro_batch(recipe.training.batch, processes)


def _check_data(data: str | Path) -> None:
    if "://" not in str(data) and not Path(data).exists():
        raise UserError(f"--data {data} does not exist: give a folder made by `koala prepare`")


def teacher_of(recipe: Recipe, given: str | None) -> str | None:
    """The teacher's name: the given one, else the recipe's; None if none is needed."""
    if isinstance(recipe, Base) and given is not None:
        raise UserError(f"--teacher {given}: this recipe trains from scratch; leave it out")
    teacher = given or (recipe.teacher if isinstance(recipe, Student) else None)
    if not isinstance(recipe, Base) and teacher is None:
        raise UserError(
            "this recipe needs --teacher: the folder or name of the model to learn from"
        )
    return teacher
