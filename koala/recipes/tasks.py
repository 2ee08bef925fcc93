"""The task of a student, from its settings: used by runs and by estimates of their cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from koala.distillation.few_steps import (
    DistributionMatching,
    FeatureMatching,
    ProgressiveDistillation,
    StepDistillation,
    StepSampler,
)
from koala.distillation.forward_process import NoiseSchedule
from koala.distillation.settings import DistillationSettings, StepSettings
from koala.distillation.tasks import Distillation
from koala.generation.noise import TorchNoise
from koala.generation.samplers import Euler
from koala.generation.schedule import trailing
from koala.text_conditioning import TextConditioner

METHODS: dict[str, type[StepDistillation]] = {
    "progressive": ProgressiveDistillation,
    "mmd": FeatureMatching,
    "dmd": DistributionMatching,
}


def student_task(
    settings: DistillationSettings | StepSettings,
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    conditioner: TextConditioner,
    scheduler_config: dict[str, Any],
    base: str | Path,
    kind: type[Distillation] = Distillation,
    **options: Any,
) -> Distillation | StepDistillation:
    """The task of these settings; options as of `koala.distillation.tasks.Denoising`.

    kind: the task of `DistillationSettings`.
    """
    schedule = NoiseSchedule(scheduler_config)
    if isinstance(settings, DistillationSettings):
        return kind(student, teacher, conditioner, schedule, settings, base, **options)
    sampler = step_sampler(scheduler_config, settings.steps)
    if settings.substeps is not None:
        options["finer"] = step_sampler(scheduler_config, settings.steps * settings.substeps)
    task = METHODS[settings.method]
    return task(student, teacher, conditioner, schedule, settings, sampler, base, **options)


def step_sampler(scheduler_config: dict[str, Any], steps: int) -> StepSampler:
    """What draws a student of step distillation: Euler's method, trailing, as by default."""
    unused = TorchNoise(0, (), torch.device("cpu"))  # Euler's method adds none
    return Euler(trailing(scheduler_config, steps), unused)
