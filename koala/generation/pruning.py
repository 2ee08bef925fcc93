"""`koala compress --prune`: a model with fewer parameters that draws at once.

The pruning itself is `koala.checkpoints.prune`'s; here is the folder that it is written to.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from koala.architectures.config import INNER, from_unet_config
from koala.architectures.layout import parameters
from koala.checkpoints import card_facts, model_card
from koala.checkpoints.pipeline_files import Contents, as_file, kinds_of, write_folder
from koala.checkpoints.prune import Pruned, prune
from koala.checkpoints.resolve import read_model, resolve_model
from koala.checkpoints.streamed import StoredWeights
from koala.checkpoints.tensors import float_dtype, torch_dtype, write
from koala.checkpoints.validate import WEIGHTS
from koala.errors import UserError
from koala.generation.calibration import Inputs, calibration_of
from koala.generation.streaming import streamed_pipeline
from koala.generation.validation import pruning
from koala.utils.atomic import check_new, new_folder
from koala.utils.counted import counted
from koala.utils.device import keep_no_freed_memory


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
        seen = card_facts.calibrated_on(self.prompts, self.latents)
        return (
            f"{self.model}: {self.before:,} parameters in the U-Net -> {self.after:,} "
            f"({share:.1%} fewer, in {counted(self.narrowed, 'module')}), by {seen}, in "
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
    or "bf16"; None keeps each as it is. The model is never in memory as a whole; beside `out`, a
    folder is there meanwhile, of what its layers see. Raises `UserError` for a setting that is not
    allowed, a model that is pruned already, more than can be removed, and if `out` exists or cannot
    be written; `Failure` if the disk is full.
    """
    kind, out = float_dtype(dtype), Path(out).expanduser()
    pruning(share, None if callable(calibrate) else calibrate)
    check_new(out)
    contents = read_model(model)
    folder, name = resolve_model(model), model_card.name_of(model)
    keep_no_freed_memory()
    pipeline = streamed_pipeline(folder, name)
    config, whole = pipeline.unet.config, StoredWeights(contents.tensors["unet"])
    with new_folder(out) as part, tempfile.TemporaryDirectory(dir=part) as scratch:
        every, prompts, latents = calibration_of(calibrate, folder, pipeline, say)
        smaller = prune(config, whole, share, every, Path(scratch), say)
        before, after = (parameters(from_unet_config(one)) for one in (config, smaller.config))
        made = card_facts.Pruned(name, before, after, prompts, latents)
        say("writing")
        _write(contents, smaller, part, kind)
        card = model_card.of_contents(contents.source, contents.metadata)
        model_card.write(model_card.pruned_of(card, name, model_card.name_of(out), made), part)
    narrowed = len(smaller.config[INNER])
    return PruneReport(name, before, after, narrowed, prompts, latents, out)


def _write(contents: Contents, unet: Pruned, part: Path, kind: str | None) -> None:
    config = contents.config("unet/config.json") | {INNER: unet.config[INNER]}
    files = {**contents.files, "unet/config.json": as_file(config)}
    rest = {name: of for name, of in contents.tensors.items() if name != "unet"}
    write_folder(part, rest, files, kind)
    kinds = kinds_of(contents.tensors["unet"], kind)
    shapes = {name: (kinds[name], shape) for name, shape in unet.shapes.items()}

    def source(name: str) -> bytes:
        tensor = unet[name].to(torch_dtype(kinds[name])).contiguous()
        if not tensor.isfinite().all():
            raise UserError(f"{name} does not fit {kinds[name]} once it is fitted: --dtype fp32")
        return tensor.flatten().view(torch.uint8).numpy().tobytes()

    write(part / "unet" / f"{WEIGHTS['unet']}.safetensors", shapes, source)
