"""The grader of composed prompts: what it says of rendered pictures, and of ones that are wrong."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.composition import (
    ORDERS,
    PROMPTS,
    SPOTS,
    Grader,
    aspect,
    best_order,
    fit_layout,
    prompts,
    shares,
)
from koala.data.illustrations.colours import INKS
from koala.data.illustrations.images import render
from koala.data.illustrations.scenes import (
    BESIDE,
    PLACES,
    STACKED,
    Illustrations,
    PlannedImage,
    plan,
)
from koala.evaluation.features import extract
from koala.evaluation.retrieval import Judge

pytestmark = pytest.mark.usefixtures("packages")

TOY = Illustrations(
    styles=("noto", "twemoji", "fluent-flat"), colour_icons=(), painted=150, icons=600,
    scenes=1200, size=48, test_concepts=0.0,
)  # fmt: skip


class Middle(nn.Module):
    """Picture features at toy size: the middle of the picture, which no ground reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = images.shape[-1]
        return images[..., side // 3 : side // 2, side // 3 : side // 2].flatten(1) / 255.0


def hashed(texts: list[str]) -> torch.Tensor:
    """Text features at toy size: random, the same for the same text."""
    rows = [
        torch.randn(
            64, generator=torch.Generator().manual_seed(sum(map(ord, text * 3)) + len(text))
        )
        for text in texts
    ]
    return nn.functional.normalize(torch.stack(rows), dim=-1)


@pytest.fixture
def grader() -> Grader:
    rows = plan(TOY)
    scenes = [row for row in rows if row.kind == "scene"]
    emoji = [row for row in rows if row.kind == "emoji"]
    features = extract(Middle(), drawn(emoji))
    texts = hashed([row.short for row in emoji])
    number = torch.arange(len(emoji))
    judge = Judge.fit(features, texts[:, None], number, number)
    return Grader(fit_layout(scenes, drawn(scenes)), judge, Middle(), hashed)


def drawn(rows: list[PlannedImage]) -> list[Image.Image]:
    return [render(row, TOY.size) for row in rows]


def test_prompts_are_new_and_say_what_is_graded(packages):
    captions = [row.short for row in prompts(TOY)]
    assert not {row.short for row in plan(TOY)} & {*captions}
    assert len({*captions}) == len(captions) == sum(PROMPTS.values())
    assert Counter(map(aspect, prompts(TOY))) == PROMPTS
    for row in prompts(TOY):
        sides = re.search("left|right|above|below", row.subject)
        assert sides or aspect(row) != "place", row


def test_what_is_rendered_is_right(grader):
    rows = prompts(TOY)
    found = shares(grader, rows, drawn(rows))
    assert found.pop("place") >= 0.9  # of 60; a judge of 20 thumbnails errs now and then
    assert found.pop("layout") >= 0.95  # a thing may have the colour of its ground
    assert found == {"ink": 1, "colour": 1, "ground": 1, "number": 1}


def wrong(row: PlannedImage) -> PlannedImage:
    """The same caption, another picture: another ground and ink, one thing more, places swapped."""
    layers = row.layers
    if aspect(row) in ("ink", "colour"):
        other = next(ink for ink in INKS if ink != layers[0].ink)
        layers = (replace(layers[0], ink=other),)
    elif aspect(row) == "number":
        places = PLACES[len(layers) % 4 + 1]
        layers = tuple(replace(layers[0], box=box) for box in places)
    else:
        ways = (BESIDE[::-1], STACKED) if layers[0].box == BESIDE[0] else (STACKED[::-1], BESIDE)
        boxes = ways[len(row.short) % 2]
        layers = tuple(replace(a, box=box) for a, box in zip(layers, boxes, strict=True))
    ground = "white" if row.background == "black" else "black"
    return replace(row, background=ground, layers=layers)


def test_what_is_wrong_is_told(grader):
    rows = [row for row in prompts(TOY) if row.background in row.short]
    images = drawn([wrong(row) for row in rows])
    grades = [(row, grader.grade(row, p)) for row, p in zip(rows, images, strict=True)]
    assert not any(grade["ground"] for _, grade in grades)
    assert not any(
        grade.get("ink") or grade.get("colour") or grade.get("number") for _, grade in grades
    )
    places = [grade["place"] for _, grade in grades if "place" in grade]
    assert sum(places) <= 0.2 * len(places)  # by that judge


def test_an_empty_image_shows_no_ink_and_its_ground(grader):
    row = next(row for row in prompts(TOY) if aspect(row) == "ink" and " on a pale" in row.short)
    empty = render(replace(row, layers=()), TOY.size)
    assert grader.grade(row, empty) == {"ground": True, "ink": False}


@pytest.mark.parametrize("order", ORDERS)
def test_the_best_order_is_the_one_whose_spots_are_most_alike(order):
    likeness = torch.zeros(len(SPOTS), 2)
    for thing, box in enumerate(order):
        likeness[SPOTS.index(box), thing] = 1
    assert best_order(likeness) == order
