"""What a U-Net is asked on prepared latents: what `koala compress --prune` is calibrated on."""

from pathlib import Path

import torch
from torch import Tensor

from koala.architectures.table import FACTOR
from koala.checkpoints.load import load_scheduler_config
from koala.checkpoints.unet_steps import rows_at_once
from koala.data.index import Index
from koala.data.latents import LatentSet
from koala.distillation.forward_process import NoiseSchedule
from koala.errors import UserError
from koala.generation.denoise import Condition
from koala.generation.pipeline import Pipeline
from koala.generation.runtime.openvino import UNetInputs

COUNT = 256  # latents, at most
AT_ONCE = 8


def prepared_inputs(data: Path, model: Path, pipeline: Pipeline) -> list[UNetInputs]:
    """Inputs of the U-Net of `model`: latents of the folder `data`, with their captions and noise.

    At most 256 latents, each size of image in proportion; timesteps are spread evenly over all.
    Equal on every call. UserError for a folder that `koala prepare` did not finish, that is of
    another VAE, or holds images in place of latents.
    """
    names = Index(data).captions
    latents = LatentSet(data, model, captions=dict.fromkeys(names, 1.0) or None)
    try:
        if latents.images:
            raise UserError(f"{data} holds images, not latents: prepare it with --model")
        batches = latents.stratified(COUNT)
    finally:
        latents.close()
    schedule = NoiseSchedule(load_scheduler_config(model))
    draw = torch.Generator().manual_seed(0)
    inputs = []
    for batch in batches:
        z, ids = batch["latents"], batch["time_ids"]
        t = torch.linspace(0, schedule.steps - 1, len(z)).round().long()
        t = t[torch.randperm(len(z), generator=draw)]  # whatever the order of the data
        x = schedule.add_noise(z, torch.randn(z.shape, generator=draw), t)
        step = min(AT_ONCE, rows_at_once(FACTOR**2 * z.shape[2] * z.shape[3]))
        for k in range(0, len(z), step):
            part = slice(k, k + step)
            text, pooled = _text(batch, part, pipeline)
            inputs.append((x[part], t[part].float(), Condition(text, pooled, ids[part])))
    return inputs


def _text(batch: dict, part: slice, pipeline: Pipeline) -> tuple[Tensor, Tensor]:
    if "text" in batch:
        return batch["text"][part], batch["pooled"][part]
    return pipeline.conditioner(batch["captions"][part])
