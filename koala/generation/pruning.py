"""`koala compress --prune`: a model with fewer parameters that draws at once.

The pruning itself is `koala.checkpoints.prune`'s; here is what it is calibrated on, and the folder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from koala.architectures.config import INNER, from_unet_config
from koala.architectures.layout import parameters
from koala.checkpoints import card_facts, model_card
from koala.checkpoints.load import load_unet
from koala.checkpoints.pipeline_files import Contents, as_file, kinds_of, write_folder
from koala.checkpoints.prune import prune
from koala.checkpoints.resolve import read_model, resolve_model
from koala.checkpoints.tensors import float_dtype, torch_dtype, write
from koala.checkpoints.validate import WEIGHTS
from koala.errors import UserError
from koala.generation.denoise import Predict, evaluate
from koala.generation.loader import load
from koala.generation.pipeline import Pipeline
from koala.generation.runtime.openvino import UNetInputs, recorded
from koala.generation.runtime.pytorch import predictor
from koala.generation.validation import pruning
from koala.utils.atomic import check_new, new_folder
from koala.utils.networks import UNet2DConditionModel

Inputs = Callable[[Path, Pipeline], list[UNetInputs]]
AT_ONCE = 8  # prompts that are drawn together


@dataclass(frozen=True)
class PruneReport:
    """What `prune_model` did."""

    model: str
    before: int  # parameters of the U-Net
    after: int
    narrowed: int  # modules that are narrower
    prompts: int  # that were drawn
    latents: int  # prepared ones that were read
    out: Path

    def line(self) -> str:
        """For a person."""
        share = 1 - self.after / self.before
        seen = f"{self.latents} latents" if self.latents else f"{self.prompts} prompts"
        return (
            f"{self.model}: {self.before:,} parameters in the U-Net -> {self.after:,} "
            f"({share:.1%} fewer, in {self.narrowed} modules), by {seen}, in "
            f"{self.out}; it draws in koala, and not in programs that know SDXL's own widths alone"
        )


def prune_model(
    model: str | Path,
    share: float,
    calibrate: Sequence[str] | Inputs,
    out: str | Path,
    dtype: str | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> PruneReport:
    """Writes the pipeline folder `out`: `model` with `share` fewer parameters in its U-Net.

    model: name, folder, Hub id or single file. share: 0.01 to 0.6. calibrate: prompts, which are
    drawn in ten steps with guidance 3.5 to see what the U-Net computes, or a function of the
    model's folder and pipeline that gives the U-Net's inputs. dtype: of all weights, "fp32", "fp16"
    or "bf16"; None keeps each as it is. The whole U-Net is in memory in float32. Raises `UserError`
    for a setting that is not allowed, a model that is pruned already, more than can be removed, and
    if `out` exists or cannot be written; `Failure` if the disk is full.
    """
    kind, out = float_dtype(dtype), Path(out).expanduser()
    pruning(share, None if callable(calibrate) else calibrate)
    check_new(out)
    contents = read_model(model)
    folder = resolve_model(model)
    pipeline = load(folder, "cpu", dtype="fp32", backend="torch")
    if callable(calibrate):
        say("calibration: reading")
        samples = calibrate(folder, pipeline)
        counts = 0, sum(len(x) for x, _, _ in samples)
    else:
        say("calibration: drawing")
        samples, counts = calibration(pipeline, calibrate), (len(calibrate), 0)
    unet = load_unet(folder)
    calls = [partial(_call, sample) for sample in samples]
    smaller = prune(unet, share, calls, say)
    name = model_card.name_of(model)
    before, after = (parameters(from_unet_config(one.config)) for one in (unet, smaller))
    made = card_facts.Pruned(name, before, after, *counts)
    narrowed = len(smaller.config[INNER])
    with new_folder(out) as part:
        _write(contents, smaller, part, kind)
        card = model_card.of_contents(contents.source, contents.metadata)
        model_card.write(model_card.pruned_of(card, name, model_card.name_of(out), made), part)
    return PruneReport(name, before, after, narrowed, *counts, out)


def calibration(pipeline: Pipeline, prompts: Sequence[str]) -> list[UNetInputs]:
    """What the U-Net is given while the prompts are drawn, the seed being each one's number."""
    samples: list[UNetInputs] = []
    predict = recorded(predictor(pipeline.unet), samples)
    for first in range(0, len(prompts), AT_ONCE):
        _draw(pipeline, predict, prompts[first : first + AT_ONCE], first)
    return [
        (x.clone(), t.clone(), type(c)(c.text.clone(), c.pooled.clone(), c.time_ids.clone()))
        for x, t, c in samples
    ]


@torch.inference_mode()
def _draw(pipeline: Pipeline, predict: Predict, prompts: Sequence[str], seed: int) -> None:
    rows = [pipeline.begin(request) for request in pipeline.requests([*prompts], seed=seed)]
    while not rows[0].finished:
        for row, output in zip(rows, evaluate(predict, rows), strict=True):
            row.advance(output)


def _call(sample: UNetInputs, unet: UNet2DConditionModel) -> torch.Tensor:
    return predictor(unet)(*sample)


def _write(contents: Contents, unet: UNet2DConditionModel, part: Path, kind: str | None) -> None:
    config = contents.config("unet/config.json") | {INNER: unet.config[INNER]}
    files = {**contents.files, "unet/config.json": as_file(config)}
    rest = {name: of for name, of in contents.tensors.items() if name != "unet"}
    write_folder(part, rest, files, kind)
    weights = unet.state_dict()
    kinds = kinds_of(contents.tensors["unet"], kind)
    shapes = {name: (kinds[name], tuple(tensor.shape)) for name, tensor in weights.items()}

    def source(name: str) -> bytes:
        tensor = weights[name].to(torch_dtype(kinds[name])).contiguous()
        if not tensor.isfinite().all():
            raise UserError(f"{name} does not fit {kinds[name]} once it is fitted: --dtype fp32")
        return tensor.flatten().view(torch.uint8).numpy().tobytes()

    write(part / "unet" / f"{WEIGHTS['unet']}.safetensors", shapes, source)
