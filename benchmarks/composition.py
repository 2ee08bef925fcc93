"""How often composed prompts come out right: ink, colour, ground, number, layout and place.

240 captions that no training picture has: one-colour icons, emoji in a named colour, one to four of
a thing, and two things beside or above each other, most of these on a ground that is named. They
are planned as the training's are, with another seed, so the same pictures can be rendered too: what
the grader says of those is what can be reached.

    ground  of 16: the named colour nearest to the median of the picture's edge
    ink     of 12: the named colour nearest to the median of what stands out from the ground
    colour  of 12: the named colour that most of what stands out is nearest to
    number  of 4: how many places are taken, told by a ridge regression from where something stands
            out (16 x 16 cells) to the five ways in which places can be taken, learnt from the
            training's scenes
    layout  of 5, where two things are asked for: whether they stand beside or above each other
    place   of 4, where two things are asked for: which stands where; of all ways the one whose
            parts are most like the things' words, for the judge of `koala evaluate`

`python -m benchmarks.composition [MODEL ...] --pictures data [--sheet docs/composition.png]`
writes `composition.json` beside this file.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor, nn

from benchmarks.evaluator import build_evaluator
from benchmarks.record import command, keep
from koala.data.illustrations.colours import BACKGROUNDS, INKS, named, oklab
from koala.data.illustrations.concepts import with_article
from koala.data.illustrations.images import ImageSet, render, settings_of
from koala.data.illustrations.scenes import (
    BESIDE,
    PLACES,
    STACKED,
    Illustrations,
    PlannedImage,
    plan,
)
from koala.evaluation.features import EffLite0, extract
from koala.evaluation.illustrations import choose
from koala.evaluation.retrieval import Judge, Sentences
from koala.generation import load
from koala.mini.sentence_encoder import SentenceEncoder
from koala.utils.contact_sheet import contact_sheet
from koala.utils.device import hardware

OTHER_SEED = 1  # of the plan; the training's is 0
PROMPTS = {"ink": 60, "colour": 60, "number": 60, "place": 60}
JUDGED_BY = 200  # prompts of the report, which leaves the judge its training pictures
SEEDS = (0, 1, 2)
CELLS = 16  # a side
APART = 40  # of 255, in the channel that differs most: what stands out from the ground
LAYOUTS = (PLACES[1], BESIDE, STACKED, PLACES[3], PLACES[4])
SPOTS = (*BESIDE, *STACKED)
ORDERS = (BESIDE, BESIDE[::-1], STACKED, STACKED[::-1])  # where the first and the second stand


@dataclass(frozen=True)
class Grader:
    """Tells what of a planned row a picture shows. `layout` is what `fit_layout` gave."""

    layout: Tensor
    judge: Judge
    extractor: nn.Module
    sentences: Sentences

    def grade(self, row: PlannedImage, image: Image.Image) -> dict[str, bool]:
        """Of everything that the row's caption says, whether the picture shows it."""
        right = {}
        if row.background in row.short:
            right["ground"] = _nearest(_ground(image), BACKGROUNDS) == row.background
        what = aspect(row)
        if what == "colour":
            return right | {"colour": _main_colour(image) == row.layers[0].ink}
        if what == "ink":
            right["ink"] = _nearest(_ink(image), INKS) == row.layers[0].ink
            return right
        layout = LAYOUTS[int((_taken(image) @ self.layout).argmax())]
        boxes = [layer.box for layer in row.layers]
        if what == "number":
            right["number"] = len(layout) == len(boxes)
        else:
            right["layout"] = sorted(layout) == sorted(boxes)
            right["place"] = best_order(self._likeness(row, image)) == boxes
        return right

    @torch.no_grad()
    def _likeness(self, row: PlannedImage, image: Image.Image) -> Tensor:
        """[4, 2]: how much each of SPOTS is like each of the row's two things."""
        side = image.width
        spots = [
            tuple(round(side * x) for x in (left, top, left + box, top + box))
            for left, top, box in SPOTS
        ]
        parts = [image.crop(spot).resize((side, side)) for spot in spots]
        texts = [f"{with_article(name)}, {row.style}" for name in row.concept.split(" + ")]
        shown = self.judge.picture(extract(self.extractor, parts))
        return shown @ self.judge.text(self.sentences(texts).float()).T


def aspect(row: PlannedImage) -> str:
    """What a composed row's caption says beside the ground: ink, colour, number or place."""
    if row.kind in ("icon", "painted"):
        return "ink" if row.kind == "icon" else "colour"
    return "number" if len({layer.name for layer in row.layers}) == 1 else "place"


def best_order(likeness: Tensor) -> list[tuple[float, float, float]]:
    """The one of ORDERS whose two spots are most like the two things. likeness: [4, 2]."""
    return max(
        ORDERS, key=lambda o: float(likeness[SPOTS.index(o[0]), 0] + likeness[SPOTS.index(o[1]), 1])
    )


def prompts(settings: Illustrations) -> list[PlannedImage]:
    """The rows that are drawn, in the order of their ids' hashes; no caption of the training."""
    known = {row.short for row in plan(settings)}
    others = sorted(
        plan(replace(settings, seed=OTHER_SEED)), key=lambda row: sha256(row.id.encode()).digest()
    )
    told: dict[str, dict[str, PlannedImage]] = {
        what: {} for what in PROMPTS
    }  # aspect -> caption -> row
    for row in others:
        if row.kind in ("icon", "painted", "scene") and row.short not in known and _says_where(row):
            told[aspect(row)].setdefault(row.short, row)
    return [row for what, n in PROMPTS.items() for row in [*told[what].values()][:n]]


def _says_where(row: PlannedImage) -> bool:
    """False for "a fox and an owl" and "a fox next to an owl": either may stand on the left.

    Nor are things in named colours asked for, which the judge knows less well than their own.
    """
    if aspect(row) != "place":
        return True
    sides = (" left ", " right ", " above ", " below ")
    own = all(layer.ink is None for layer in row.layers)
    return own and any(side in row.subject for side in sides)


def fit_layout(rows: Iterable[PlannedImage], images: Iterable[Image.Image]) -> Tensor:
    """A ridge regression [cells + 1, layouts] from what stands out where to one of LAYOUTS."""
    ways = [sorted(layout) for layout in LAYOUTS]
    way = torch.tensor([ways.index(sorted(layer.box for layer in row.layers)) for row in rows])
    x = torch.stack([_taken(image) for image in images])
    y = nn.functional.one_hot(way, len(LAYOUTS)).float()
    return torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ y)


def _ground(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    edge = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    return np.median(np.concatenate([part.reshape(-1, 3) for part in edge]), axis=0)


def _stands_out(image: Image.Image) -> np.ndarray:
    """bool [h, w]"""
    return np.abs(np.asarray(image) - _ground(image)).max(-1) > APART


def _ink(image: Image.Image) -> np.ndarray:
    shown = np.asarray(image)[_stands_out(image)]
    return np.median(shown, axis=0) if len(shown) else _ground(image)


def _main_colour(image: Image.Image) -> str | None:
    """The ink that most of what stands out is nearest to, in Oklab; None where nothing does."""
    shown = oklab(np.asarray(image)[_stands_out(image)] / 255)  # [pixels, 3]
    inks = np.stack([named(ink) for ink in INKS])
    nearest = np.linalg.norm(shown[:, None] - inks, axis=-1).argmin(1)
    return [*INKS][np.bincount(nearest).argmax()] if len(shown) else None


def _taken(image: Image.Image) -> Tensor:
    """[cells + 1]: the share of each cell that stands out, and a one."""
    mask = Image.fromarray(np.uint8(255) * _stands_out(image).astype(np.uint8))
    cells = np.asarray(mask.resize((CELLS, CELLS), Image.Resampling.BOX), dtype=np.float32) / 255
    return torch.cat([torch.from_numpy(cells.flatten()), torch.ones(1)])


def _nearest(colour: np.ndarray, names: dict[str, str]) -> str:
    return min(names, key=lambda name: np.abs(colour - ImageColor.getrgb(names[name])).sum())


def shares(
    grader: Grader, rows: Sequence[PlannedImage], drawn: Sequence[Image.Image]
) -> dict[str, float]:
    """Of all pictures of which something was asked, the share that shows it."""
    grades = [grader.grade(row, image) for row, image in zip(rows, drawn, strict=True)]
    asked = dict.fromkeys(what for grade in grades for what in grade)
    return {
        what: round(float(np.mean([g[what] for g in grades if what in g])), 3) for what in asked
    }


def grader_of(images: ImageSet, settings: Illustrations) -> Grader:
    """Learnt from a folder of real pictures and what they were planned as."""
    extractor, sentences = EffLite0(), SentenceEncoder()
    size = (settings.size, settings.size)
    chosen = choose(images, JUDGED_BY)
    judge = build_evaluator(images, *chosen, size, extractor, sentences, None).judge
    planned = {row.id: row for row in plan(settings)}
    scenes = images.select(split="train", kind="scene")
    layout = fit_layout(
        (planned[images.rows[i]["id"]] for i in scenes), (images.image(i) for i in scenes)
    )
    return Grader(layout, judge, extractor, sentences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["koala-mini"], metavar="MODEL")
    parser.add_argument("--pictures", type=Path, required=True, help="of koala prepare")
    parser.add_argument("--sheet", type=Path, help="the last model's pictures of the first seed")
    options = parser.parse_args()
    made_with = settings_of(options.pictures)
    del made_with["source"]
    settings = Illustrations(
        **{name: tuple(v) if isinstance(v, list) else v for name, v in made_with.items()}
    )
    grader = grader_of(ImageSet(options.pictures), settings)
    rows = prompts(settings)
    texts = [row.short for row in rows]
    found = {"rendered": shares(grader, rows, [render(row, settings.size) for row in rows])}
    for model in options.models:
        pipeline = load(model)
        drawn = [pipeline(texts, seed=seed * len(rows)).images for seed in SEEDS]
        of_seeds = [shares(grader, rows, images) for images in drawn]
        found[model] = {what: [s[what] for s in of_seeds] for what in of_seeds[0]}
        if options.sheet:
            contact_sheet(drawn[0], texts, columns=10).save(options.sheet, optimize=True)
    record = {
        "prompts": PROMPTS,
        "seeds": SEEDS,
        "right": found,
        "hardware": hardware(),
        "command": command("composition"),
    }
    keep(Path(__file__).with_suffix(".json"), record)


if __name__ == "__main__":
    main()
