"""What is checked before a model is loaded is what the loaded model would draw, or refuse."""

import json
import shutil
from dataclasses import replace

import pytest
from PIL import Image, ImageDraw

from koala.checkpoints.sampling import Sampling
from koala.errors import UserError
from koala.generation import load
from koala.generation.memory.meta_models import DTYPES
from koala.generation.quantise import LARGEST
from koala.generation.request_checks import check_values, checked
from koala.generation.requests import Known
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
    # Whether a few steps and guidance are its own is not known yet.
    image = Image.new("RGB", (64, 64))
    check_values("a fox", image=image, strength=0.02, negative_prompt="blue", guidance_until=0.5)
    with pytest.raises(UserError, match="leaves no step to do"):
        check_values("a fox", image=image, strength=0.02, steps=10)


def few_step(folder, tmp_path):
    """A copy of a model that says it is made for 2 steps of lcm without guidance."""
    copy = shutil.copytree(folder, tmp_path / "quick")
    file = copy / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | Sampling(2, 1.0, "lcm").to_config()
    file.write_text(json.dumps(config))
    return copy


def test_a_model_is_drawn_as_it_is_made_for_unless_told(toy_sdxl, tmp_path):
    quick = few_step(toy_sdxl, tmp_path)
    for known in (Known.of(quick), load(quick, "cpu").known, quick):
        (own,) = checked(known, "a fox").settings
        assert (own.steps, own.guidance, own.sampler, own.schedule) == (2, 1.0, "LCM", "lcm")
        (told,) = checked(known, "a fox", steps=7, guidance=3.0, scheduler="ddim").settings
        assert (told.steps, told.guidance, told.sampler) == (7, 3.0, "DDIM")
    (usual,) = checked(toy_sdxl, "a fox").settings
    assert (usual.steps, usual.guidance, usual.sampler) == (10, 3.5, "Euler")
    with pytest.raises(UserError, match=r"'blue' has no effect at guidance 1: "):
        checked(quick, "a fox", negative_prompt="blue")
    image = Image.new("RGB", (64, 64))
    with pytest.raises(UserError, match=r"strength 0\.4 of 2 steps"):
        checked(quick, "a fox", image=image, strength=0.4)


def test_steps_and_guidance_that_a_model_was_not_made_for_are_said(toy_sdxl, tmp_path):
    quick = Known.of(few_step(toy_sdxl, tmp_path))
    for told, said in (
        ({}, None),
        ({"steps": 1}, None),
        ({"steps": 4}, "for 2 steps without guidance, not for 4 steps without guidance"),
        ({"guidance": 3.0}, "for 2 steps without guidance, not for 2 steps with guidance 3"),
    ):
        (settings,) = checked(quick, "a fox", **told).settings
        assert quick.notes(settings) == ([] if said is None else [f"the model was made {said}"])
    usual = Known.of(toy_sdxl)
    (settings,) = checked(usual, "a fox", steps=50, guidance=9.0).settings
    assert usual.notes(settings) == []


def test_a_model_warns_when_it_draws_what_it_was_not_made_for(pipeline):
    with pytest.warns(UserWarning, match="draws worse at 16x16"):
        pipeline("a fox", size=(16, 16), steps=1, guidance=1.0)


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
