"""Whether a LoRA that a teacher learnt does its work on the student: a style, carried and measured.

A LoRA for one art set that the mini family was not trained on is trained on the teacher
(`koala finetune lora`) and put on the student by weight inheritance. Both draw the same prompts,
things that the LoRA has not seen, from the same noise with and without it. The shift is how far the
pictures' mean feature (EfficientNet-Lite0) goes towards that of the real drawings of those things;
the student's should be at least half of its teacher's.

`python -m benchmarks.lora_carry --teacher runs/sdxl-mini/model --student runs/koala-mini/model
--out runs/lora` writes `lora_carry.json`, `lora_carry.png` and the LoRA. Needs the extra `lora`.
"""

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from koala import finetune
from koala.checkpoints.resolve import resolve_model
from koala.data.illustrations.art import ART_SETS
from koala.data.illustrations.images import ImageSet, prepare_images
from koala.data.illustrations.scenes import SMALL
from koala.data.prepare import encode_images
from koala.errors import UserError
from koala.evaluation.features import EffLite0, extract
from koala.evaluation.pictures import at_size
from koala.generation import Pipeline, load
from koala.lora.training import FILE
from koala.utils.contact_sheet import contact_sheet
from koala.utils.device import hardware
from koala.utils.progress import progress

SHOWN = 8  # things on the sheet


@dataclass(frozen=True)
class Training:
    """How the LoRA is trained."""

    style: str = "openmoji"  # art set
    samples: int = 20_000
    batch: int = 32
    rank: int = 16
    learning_rate: float = 5e-4
    held_out: float = 0.2  # share of things that it does not see
    seed: int = 0


@dataclass(frozen=True)
class Shift:
    """How far a LoRA moves a model's pictures towards the target style, in feature space."""

    distance: float  # of the model's mean without the LoRA from the target's mean
    shift: float  # towards the target, mean over the pictures
    error: float  # standard error of that mean
    sideways: float  # length of the mean shift's part that leads elsewhere


def prepare(training: Training, teacher: Path, out: Path) -> Path:
    """The style's pictures with the teacher's latents; returns their folder."""
    if training.style not in ART_SETS or ART_SETS[training.style].kind != "emoji":
        raise UserError(f"style {training.style!r}: give an art set of emoji")
    if training.style in SMALL.styles:
        raise UserError(f"style {training.style!r} is one that the mini family was trained on")
    settings = replace(
        SMALL,
        styles=(training.style,),
        icons=0,
        scenes=0,
        test_concepts=training.held_out,
        test_pairs=0,
    )
    prepare_images(settings, out, workers=1)
    encode_images(out, teacher)
    return out


def train(
    training: Training, model: str, data: Path, out: Path, recipe: str = "lora"
) -> tuple[Path, list[float]]:
    """Fine-tunes the model by `koala.finetune`; returns the result and the losses as logged.

    A LoRA has matrices in the convolutions too.
    """
    settings = [
        f"training.samples={training.samples}", f"training.batch={training.batch}",
        f"training.lr={training.learning_rate}", f"training.seed={training.seed}",
        f"training.log_every={training.batch}", f"training.preview_every={training.samples}",
        f"training.ema_half_life={training.batch}", "hardware.accumulate=1",
        "hardware.checkpointing=false", "hardware.ema_on_cpu=false", "caption_dropout=0.1",
        "mixture.kinds=emoji:1", "mixture.captions=short:1,long:1",
    ]  # fmt: skip
    if recipe == "lora":
        settings += [f"lora.rank={training.rank}", "lora.modules=all"]
    result = finetune(recipe, model, data, out, settings=settings)
    lines = (out / "stats.jsonl").read_text().splitlines()
    return result, [json.loads(line)["loss"] for line in lines]


def draw(pipeline: Pipeline, prompts: list[str], seeds: int, seed: int) -> list[Image.Image]:
    """`seeds` pictures of each prompt."""
    with progress("drawing", len(prompts) * seeds, "pictures") as advance:
        images = []
        for i, prompt in enumerate(prompts):
            images += pipeline(prompt, number=seeds, seed=seed + i * seeds).images
            advance(seeds)
    return images


def measure(without: Tensor, with_lora: Tensor, target: Tensor) -> Shift:
    """All float [n, d]: features of a model's pictures from the same noise, and real drawings'."""
    way = target.mean(0) - without.mean(0)
    moved = with_lora - without
    along = moved @ (way / way.norm())
    mean = moved.mean(0)
    return Shift(
        distance=way.norm().item(),
        shift=along.mean().item(),
        error=(along.std() / len(along) ** 0.5).item(),
        sideways=(mean - along.mean() * way / way.norm()).norm().item(),
    )


def compare(
    models: dict[str, str], lora: Path, data: Path, extractor: nn.Module, things: int, seeds: int
) -> tuple[dict, Image.Image]:
    """What the LoRA does to every model (figures by name), and a sheet of it."""
    real = ImageSet(data)
    held_out = evenly(real.select("test-concept"), things)
    prompts = [real.rows[i]["short"] for i in held_out]
    figures, rows, captions = {}, [], []
    for name, model in models.items():
        pipeline = load(model)
        before = draw(pipeline, prompts, seeds, seed=0)
        report = pipeline.add_lora(lora)
        after = draw(pipeline, prompts, seeds, seed=0)
        drawings = [at_size(real.image(i), before[0].size) for i in held_out]
        features = [extract(extractor, images) for images in (before, after, drawings)]
        figures[name] = asdict(measure(*features)) | {"lora": asdict(report)}
        for what, images in (("without", before), ("with", after)):
            rows += evenly(images[::seeds], SHOWN)
            captions += [f"{name} {what}: {prompt}" for prompt in evenly(prompts, SHOWN)]
    rows += evenly(drawings, SHOWN)
    captions += [f"drawn: {prompt}" for prompt in evenly(prompts, SHOWN)]
    return figures, contact_sheet(rows, captions, columns=min(SHOWN, len(prompts)), scale=2)


def evenly(found: list, most: int) -> list:
    """At most so many of them, from all over the list."""
    number = min(most, len(found))
    return [found[i * len(found) // number] for i in range(number)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True, help="name or folder of the teacher")
    parser.add_argument("--student", required=True, help="name or folder of its student")
    parser.add_argument("--style", default=Training.style, help="art set (default openmoji)")
    parser.add_argument("--samples", type=int, default=Training.samples, help="seen in training")
    parser.add_argument("--things", type=int, default=96, help="held-out things drawn (at most)")
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each thing")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    o = parser.parse_args()
    start = time.perf_counter()
    training = Training(style=o.style, samples=o.samples)
    data = prepare(training, resolve_model(o.teacher), o.out / "data")
    lora, losses = train(training, o.teacher, data, o.out / "run")
    models = {"teacher": o.teacher, "student": o.student}
    figures, sheet = compare(models, lora / FILE, data, EffLite0(), o.things, o.seeds)
    share = figures["student"]["shift"] / figures["teacher"]["shift"]
    tail = max(1, len(losses) // 10)
    record = {
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
        "training": asdict(training),
        "loss_first_tenth": sum(losses[:tail]) / tail,
        "loss_last_tenth": sum(losses[-tail:]) / tail,
        "student_shift_over_teacher_shift": share,
        **figures,
        "seconds": round(time.perf_counter() - start),
    }
    (o.out / "lora_carry.json").write_text(json.dumps(record, indent=1) + "\n")
    sheet.save(o.out / "lora_carry.png", optimize=True)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
