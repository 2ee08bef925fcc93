"""What is checked before a model is loaded is what the loaded model would draw, or refuse."""

from dataclasses import replace

import pytest
from PIL import Image, ImageDraw

from koala.errors import UserError
from koala.generation import load
from koala.generation.memory.meta_models import DTYPES
from koala.generation.memory.quantise import LARGEST
from koala.generation.requests import Known, checked
from koala.generation.samplers import LABELS, SAMPLERS
from koala.generation.schedule import SPACINGS
from koala.generation.validation import WEIGHTS, runtime


@pytest.fixture(scope="module")
def pipeline(toy_sdxl):
    return load(toy_sdxl, "cpu")


def test_what_is_known_of_a_folder_is_what_is_known_of_the_model(pipeline, toy_sdxl):
    assert Known.of(toy_sdxl) == replace(pipeline.known, name=str(toy_sdxl))


def test_the_settings_are_those_of_the_loaded_model(pipeline, toy_sdxl):
    image = Image.new("RGB", (48, 64), "teal")
    ImageDraw.Draw(mask := Image.new("L", image.size)).rectangle((8, 8, 40, 40), fill=255)
    for asked in (
        {"number": 2, "seed": 3, "steps": 4, "guidance": 2.0, "negative_prompt": "blue"},
        {"size": "64x48", "seed": 1, "scheduler": "lcm", "steps": 4, "guidance": 1.0},
        {"image": image, "mask": mask, "strength": 0.5, "seed": 9, "guidance_until": 0.5},
    ):
        found = checked(toy_sdxl, ["a fox", "an owl"], **asked)
        drawn = pipeline.requests(["a fox", "an owl"], **asked)
        assert [replace(s, model=pipeline.name) for s in found.settings] == [
            request.settings for request in drawn
        ]
        assert (found.image, found.mask is None) == (asked.get("image"), "mask" not in asked)


def test_all_else_is_checked_before_the_model_is_looked_for():
    with pytest.raises(UserError, match="size 70x64"):
        checked("no-such-model", "a fox", size="70x64")
    with pytest.raises(UserError, match="unknown model 'no-such-model'"):
        checked("no-such-model", "a fox")


def test_the_names_that_are_listed_are_those_that_there_are():
    assert (*DTYPES, *LARGEST) == WEIGHTS
    assert {name for sampler in SAMPLERS.values() for name in sampler.spacings} == {*SPACINGS}
    assert {*LABELS} == {*SPACINGS}


def test_a_plan_is_asked_for_by_any_of_its_settings():
    assert not runtime(None, True, True) and not runtime("openvino", False, False)
    for asked in ({"vram": 4}, {"vram": "free"}, {"weights": "int8"}, {"decode": "tiny"}):
        assert runtime(None, False, False, **asked)
        for wrong in (("torch", False, False), (None, True, False), (None, False, True)):
            with pytest.raises(UserError, match="has no effect under a memory plan"):
                runtime(*wrong, **asked)
    for given, name in (((True, False), "--compile"), ((False, True), "--graphs")):
        with pytest.raises(UserError, match=f"{name} is PyTorch's.* --backend openvino"):
            runtime("openvino", *given)
