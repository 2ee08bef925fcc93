"""What a U-Net is given while prompts are drawn, by which it is pruned or rounded."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from koala.checkpoints.unet_steps import Asked, rows_at_once
from koala.generation.denoise import Condition, Predict, finish
from koala.generation.pipeline import Pipeline
from koala.generation.runtime.openvino import UNetInputs, recorded
from koala.generation.runtime.pytorch import predictor

Inputs = Callable[[Path, Pipeline], list[UNetInputs]]


class Calibration(NamedTuple):
    """Evaluations of a U-Net, and what they are of."""

    every: list[Asked]
    prompts: int  # that were drawn
    latents: int  # prepared ones that were read


def calibration_of(
    calibrate: Sequence[str] | Inputs,
    folder: Path,
    pipeline: Pipeline,
    say: Callable[[str], object],
) -> Calibration:
    """calibrate: prompts, or a function of a model's folder and pipeline that gives the inputs."""
    if callable(calibrate):
        say("calibration: reading")
        samples = calibrate(folder, pipeline)
        counts = 0, sum(len(x) for x, _, _ in samples)
    else:
        say("calibration: drawing")
        samples, counts = calibration(pipeline, calibrate), (len(calibrate), 0)
    return Calibration([asked(*sample) for sample in samples], *counts)


def asked(x: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> Asked:
    """The U-Net's inputs as calibration takes them."""
    return Asked(x, timesteps, condition.text, condition.pooled, condition.time_ids)


def calibration(pipeline: Pipeline, prompts: Sequence[str], **settings: Any) -> list[UNetInputs]:
    """What the U-Net is given while the prompts are drawn, the seed being each one's number.

    settings: of all requests, such as `size`.
    """
    samples: list[UNetInputs] = []
    predict = recorded(predictor(pipeline.unet), samples)
    first = 0
    while first < len(prompts):
        first += _draw(pipeline, predict, prompts[first:], first, settings)
    return [
        (x.clone(), t.clone(), type(c)(c.text.clone(), c.pooled.clone(), c.time_ids.clone()))
        for x, t, c in samples
    ]


@torch.inference_mode()
def _draw(
    pipeline: Pipeline, predict: Predict, prompts: Sequence[str], seed: int, settings: Any
) -> int:
    """Draws as many of the prompts as go together, and returns their number."""
    every = pipeline.requests([*prompts], seed=seed, **settings)
    one = every[0].settings
    together = every[: max(1, rows_at_once(one.width * one.height) // 2)]  # with and without it
    rows = [pipeline.begin(request) for request in together]
    finish(predict, rows)
    return len(together)
