"""The benchmark of ControlNets, at toy size: it trains, draws, measures and records."""

import json
import math

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw
from safetensors.torch import load_file

from benchmarks import control, looks
from koala.architectures.table import ARCHITECTURES
from koala.data.illustrations.images import ImageSet
from koala.generation import load
from koala.generation.runtime.pytorch import residuals_of
from toy_controlnet import saved, toy_controlnet

pytestmark = pytest.mark.usefixtures("packages")


def test_a_controlnet_is_trained_and_measured(teacher, tmp_path):
    looks.prepare(looks.Training(held_out=0.5), teacher, tmp_path / "data")
    data = ImageSet(tmp_path / "data")
    training = control.Training(samples=8, images=4, batch=4)
    losses = control.train(training, str(teacher), data, tmp_path / "net")
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    tensors = load_file(tmp_path / "net" / "diffusion_pytorch_model.safetensors")
    assert all(tensors[f"controlnet_down_blocks.{i}.weight"].any() for i in range(9))  # were zero

    pairs = control.Pairs.of(data, 2)
    assert len(pairs.images) == 2
    models = {"teacher": str(teacher), "student": "koala-mini"}
    found, sheet = control.compare(pairs, tmp_path / "net", models)
    assert found["residuals"].startswith("ControlNet net: 7 of 10 residuals are used")
    assert set(found["follows"]) == {
        "teacher without", "teacher with", "student without", "student with",
        "student with, by block", "student with, by block and mid", "student with, summed",
    }  # fmt: skip
    assert all(0 <= one["value"] <= 1 for one in found["follows"].values())
    assert sheet.height > sheet.width / 2
    json.dumps(found)


def test_an_image_follows_its_own_edges_and_not_others():
    def disc(left):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).ellipse((left, 20, left + 20, 40), fill="black")
        return image

    plain = Image.new("RGB", (64, 64), "white")
    assert control.follows(disc(10), disc(10)) == 1
    assert control.follows(disc(11), disc(10)) > 0.8
    assert control.follows(ImageChops.invert(disc(10)), disc(10)) == 1  # edges have no colour
    assert control.follows(disc(40), disc(10)) == control.follows(plain, disc(10)) == 0


def test_edges_are_where_the_brightness_changes():
    image = Image.new("RGB", (16, 16), "black")
    image.paste("white", (8, 0, 16, 16))
    found = np.asarray(control.edges(image))[..., 0]
    assert (found[:, 7:9] == 255).all() and not found[:, :5].any() and not found[:, 11:].any()


def test_other_ways_to_give_the_residuals():
    found = control.other_maps(ARCHITECTURES["sdxl"], ARCHITECTURES["koala-700m"])
    assert found == {
        "by block": [[0], [1], [3], [4], [6], [7], []],
        "by block and mid": [[0], [1], [3], [4], [6], [7], [9]],
        "summed": [[0], [1, 2], [3], [4, 5], [6], [7, 8], [9]],
    }


def test_a_map_of_ones_own_takes_those_sums(teacher, tmp_path):
    """The map of the feature itself, spelt out, draws what the feature draws."""
    net = toy_controlnet(load(teacher, "cpu", backend="torch").unet)
    asked = {"control": saved(net, tmp_path / "net"), "control_image": Image.new("RGB", (128, 128))}
    pipeline = load("koala-mini", "cpu", backend="torch")
    expected = pipeline("a fox", seed=1, steps=1, **asked).images[0]
    every = residuals_of(net, range(10))
    for second, same in ((2, True), (1, False)):
        control.by_map(pipeline, every, [[0], [second], [3], [5], [6], [8], [9]])
        found = pipeline("a fox", seed=1, steps=1, **asked).images[0]
        assert (np.asarray(ImageChops.difference(found, expected)).max() <= 1) == same


def test_what_the_student_follows_of_its_teacher():
    low, high = np.full(8, 0.2), np.linspace(0.5, 0.7, 8)
    found = control.figures({
        "teacher without": low, "teacher with": high, "student without": low,
        "student with": low + (high - low) / 2,
    })  # fmt: skip
    ratio = found["student with, over its teacher"]
    assert ratio["gain"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})
    assert ratio["follows"]["value"] == pytest.approx(0.4 / 0.6)
    assert found["follows"]["teacher with"]["low"] < 0.6 < found["follows"]["teacher with"]["high"]
