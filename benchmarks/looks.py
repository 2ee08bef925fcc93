"""A look that a model does not know, taught by `koala finetune` and measured: for the benchmarks.

The look is an art set that the mini family was not trained on. Some of its things are held out of
the training; the model draws them from the same noise before and after. The shift is how far the
images' mean feature (EfficientNet-Lite0) goes towards that of the real drawings of those things.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.record import keep
from koala import finetune
from koala.data.illustrations.art import ART_SETS
from koala.data.illustrations.images import ImageSet, prepare_images
from koala.data.illustrations.scenes import SMALL
from koala.data.prepare import encode_images
from koala.errors import UserError
from koala.evaluation.features import extract
from koala.evaluation.pictures import at_size
from koala.generation import Pipeline
from koala.utils.contact_sheet import image_grid
from koala.utils.device import hardware
from koala.utils.progress import progress

T = TypeVar("T")
SHOWN = 8  # things on the sheet


@dataclass(frozen=True)
class Training:
    """How the look is taught."""

    style: str = "openmoji"  # art set, or a name of another look
    samples: int = 20_000
    batch: int = 32
    rank: int = 16  # of a LoRA
    learning_rate: float = 5e-4
    held_out: float = 0.2  # share of things that it does not see
    seed: int = 0


@dataclass(frozen=True)
class Shift:
    """How far a model's images move towards others, in feature space."""

    distance: float  # of the mean before from the mean of the others
    shift: float  # towards it, mean over the images
    error: float  # standard error of that mean
    sideways: float  # length of the mean shift's part that leads elsewhere


@dataclass(frozen=True)
class Losses:
    """Mean losses at the ends of a training."""

    first_tenth: float
    last_tenth: float

    @staticmethod
    def of(losses: Sequence[float]) -> "Losses":
        """Of the losses as logged."""
        tenth = max(1, len(losses) // 10)
        return Losses(sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth)


@dataclass(frozen=True)
class HeldOut:
    """Things that the training does not show, and their real drawings."""

    prompts: list[str]
    drawings: list[Image.Image]

    @staticmethod
    def of(data: Path, most: int) -> "HeldOut":
        """At most so many things of a folder that `prepare` made."""
        real = ImageSet(data)
        rows = evenly(real.select("test-concept"), most)
        return HeldOut([real.rows[i]["short"] for i in rows], [real.image(i) for i in rows])

    def shift(
        self, extractor: nn.Module, before: Sequence[Image.Image], after: Sequence[Image.Image]
    ) -> Shift:
        """How far images of these things have moved towards the drawings."""
        drawings = [at_size(drawing, before[0].size) for drawing in self.drawings]
        return measure(*(extract(extractor, images) for images in (before, after, drawings)))

    def sheet(self, shown: dict[str, list[Image.Image]]) -> Image.Image:
        """A row of each: an image of every thing, and last the drawings."""
        size = next(iter(shown.values()))[0].size
        shown = shown | {"drawn": [at_size(drawing, size) for drawing in self.drawings]}
        return sheet(shown, self.prompts)


def prepare(training: Training, model: Path, out: Path) -> Path:
    """The style's drawings with the model's latents; returns their folder."""
    if training.style not in ART_SETS or ART_SETS[training.style].kind != "emoji":
        raise UserError(f"style {training.style!r}: give an art set of emoji")
    if training.style in SMALL.styles:
        raise UserError(f"style {training.style!r} is one that the mini family was trained on")
    settings = replace(
        SMALL,
        styles=(training.style,),
        icons=0,
        scenes=0,
        painted=0,
        test_concepts=training.held_out,
        test_pairs=0,
    )
    prepare_images(settings, out, workers=1)
    encode_images(out, model)
    return out


def train(
    training: Training, model: str, data: Path, out: Path, recipe: str = "lora"
) -> tuple[Path, Losses]:
    """Fine-tunes the model by `koala.finetune`. A LoRA has matrices in the convolutions too."""
    settings = [
        f"training.samples={training.samples}", f"training.batch={training.batch}",
        f"training.lr={training.learning_rate}", f"training.seed={training.seed}",
        f"training.log_every={training.batch}", f"training.preview_every={training.samples}",
        f"training.ema_half_life={training.batch}", "hardware.accumulate=1",
        "hardware.checkpointing=false", "hardware.ema_on_cpu=false",
    ]  # fmt: skip
    if recipe != "dreambooth":
        settings.append("caption_dropout=0.1")
    if (data / "set.json").exists():  # illustrations, which have several captions each
        settings += ["mixture.kinds=emoji:1", "mixture.captions=short:1,long:1"]
    if recipe != "full":
        settings += [f"lora.rank={training.rank}", "lora.modules=all"]
    result = finetune(recipe, model, data, out, settings=settings)
    lines = (out / "stats.jsonl").read_text().splitlines()
    return result, Losses.of([json.loads(line)["loss"] for line in lines])


def draw(pipeline: Pipeline, prompts: Sequence[str], seeds: int) -> list[Image.Image]:
    """`seeds` images of each prompt."""
    with progress("drawing", len(prompts) * seeds, "images") as advance:
        images = []
        for i, prompt in enumerate(prompts):
            images += pipeline(prompt, number=seeds, seed=i * seeds).images
            advance(seeds)
    return images


def measure(before: Tensor, after: Tensor, target: Tensor) -> Shift:
    """All float [n, d]: features of a model's images from the same noise, and of the target's."""
    way = target.mean(0) - before.mean(0)
    moved = after - before
    along = moved @ (way / way.norm())
    mean = moved.mean(0)
    return Shift(
        distance=way.norm().item(),
        shift=along.mean().item(),
        error=(along.std() / len(along) ** 0.5).item(),
        sideways=(mean - along.mean() * way / way.norm()).norm().item(),
    )


def sheet(shown: dict[str, list[Image.Image]], prompts: Sequence[str]) -> Image.Image:
    """A row of each name's images, of prompts from all over the list."""
    rows = {name: evenly(row, SHOWN) for name, row in shown.items()}
    return image_grid(rows, evenly(prompts, SHOWN))


def evenly(found: Sequence[T], most: int) -> list[T]:
    """At most so many of them, from all over the list."""
    number = min(most, len(found))
    return [found[i * len(found) // number] for i in range(number)]


def write_record(record: dict, pictures: Image.Image, out: Path, name: str) -> None:
    """Writes `name`.json with hardware and versions, and `name`.png; prints the record."""
    made_on = {"hardware": hardware(), "peft": version("peft"), "threads": torch.get_num_threads()}
    keep(out / f"{name}.json", made_on | record)
    save_sheet(pictures, out / f"{name}.png")


def save_sheet(pictures: Image.Image, path: Path) -> None:
    """As a PNG of 256 colours, a third of the size."""
    pictures.quantize(256).save(path, optimize=True)
