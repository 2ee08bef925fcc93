"""Plans obeyed: the same pictures, the memory that was promised, a step down where it ends."""

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.profiler import ProfilerActivity, profile

from koala.checkpoints.bundled import BUNDLED
from koala.cli import main
from koala.errors import Failure, UserError
from koala.generation.decode import full
from koala.generation.loader import load, placed
from koala.generation.memory.estimate import LADDER
from koala.generation.memory.meta_models import VAE
from koala.generation.memory.placement import Placement
from koala.generation.memory.plan import Planner
from koala.utils.device import ran_out
from toy import toy_pipeline, toy_tiny
from toy_lora import toy_base, toy_lora

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = toy_pipeline(tmp_path_factory.mktemp("toy") / "koala", architecture="koala")
    toy_tiny().save_pretrained(folder / "vae_tiny")
    return folder


def by_mode(folder: Path, planner: Planner, mode, lines: list[str]):
    """A pipeline whose parts were put in their places as they were read."""
    placement = Placement(planner, planner.plan(mode), lines.append)
    return placed(folder, "koala", placement, {}, lines.append), placement


def drawn(pipeline, prompt="a fox") -> np.ndarray:
    image = pipeline(prompt, steps=2, seed=1, negative_prompt="blur").images[0]
    return np.asarray(image, dtype=float)


@pytest.mark.parametrize("place", dict.fromkeys(place for _, place, _ in LADDER))
@pytest.mark.parametrize("decode", ["full", "tiled"])
def test_every_exact_plan_draws_the_plain_image(folder, place, decode):
    expected = drawn(load(folder, "cpu"))
    planner = Planner(folder, CPU, (64, 64), weights="fp32", decode=decode)
    mode = next(mode for mode in planner.modes if mode.place == place)
    assert (mode.quantised, mode.decode) == (None, decode)
    pipeline, _ = by_mode(folder, planner, mode, [])
    assert np.abs(drawn(pipeline) - expected).max() <= 1
    assert np.abs(drawn(pipeline) - expected).max() <= 1  # and once more, everybody back in place


def test_every_8_bit_plan_draws_the_same_image_and_nearly_the_plain_one(folder):
    expected = drawn(load(folder, "cpu"))
    planner = Planner(folder, CPU, (64, 64), weights="int8", decode="tiled")
    images = [drawn(by_mode(folder, planner, mode, [])[0]) for mode in planner.modes]
    assert len(images) == 4
    assert all(np.array_equal(image, images[0]) for image in images)
    assert 0 < np.abs(images[0] - expected).mean() < 4


def test_the_tiny_decoder_is_used_where_the_plan_says_so(folder):
    planner = Planner(folder, CPU, (64, 64), weights="fp32", decode="tiny")
    tiny, _ = by_mode(folder, planner, planner.modes[0], [])
    plain = load(folder, "cpu")
    assert np.abs(drawn(tiny) - drawn(plain)).mean() > 1  # its weights are random: another picture


def test_images_are_read_and_encoded_in_turns(folder):
    """Every part is wanted in one request: text, VAE's encoder, U-Net, VAE's decoder."""
    plain = load(folder, "cpu")
    given = plain("an owl", steps=1, seed=2).images[0]
    planner = Planner(folder, CPU, (64, 64), weights="fp32")
    pipeline, _ = by_mode(folder, planner, planner.modes[-2], [])
    one, other = (
        np.asarray(p("a fox", steps=4, seed=1, image=given, strength=0.5).images[0], dtype=float)
        for p in (plain, pipeline)
    )
    assert np.abs(one - other).max() <= 1


def allocations(work) -> int:
    """The most bytes that torch's CPU allocator gave out at once during `work`, by its profiler."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(BUNDLED / "koala-mini", CPU, (256, 192))


@pytest.mark.parametrize("row", range(6))
def test_the_plan_is_kept_and_not_much_too_large(planner, row):
    """What torch allocates while the bundled model draws, beside the weights that were there
    before, is within the plan, and at least three quarters of it."""
    plan = planner.plan(planner.modes[row])
    pipeline, _ = by_mode(BUNDLED / "koala-mini", planner, plan.mode, [])
    before = bytes_of(pipeline)
    peak = before + allocations(lambda: pipeline("a fox", steps=1, seed=1, size=planner.size))
    assert 0.75 * plan.peak <= peak <= plan.peak


@pytest.mark.parametrize("row", [0, 4])
def test_the_plan_is_kept_while_a_image_is_read(row):
    """The phase by itself, with nobody on the device before it."""
    size = (256, 192)
    planner = Planner(BUNDLED / "koala-mini", CPU, size, from_image=True)
    plan = planner.plan(planner.modes[row])
    pipeline, _ = by_mode(BUNDLED / "koala-mini", planner, plan.mode, [])
    (request,) = pipeline.requests("a fox", image=Image.new("RGB", size, "teal"), seed=1)
    before, phase = bytes_of(pipeline), plan.phases[1]
    with torch.inference_mode():
        peak = before + allocations(lambda: pipeline.encode(request.image))
    assert 0.75 * phase.total <= peak <= phase.total


def bytes_of(pipeline) -> int:
    models = (pipeline.unet, pipeline.vae, *pipeline.conditioner.encoders)
    storages = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def hungry(run, placement, allowed: str):
    """`run`, which wants more than any machine has until the decoder is `allowed`."""

    def more(latents):
        if placement.plan.mode.decode != allowed:
            torch.empty(2**60, dtype=torch.uint8)
        return run(latents)

    return more


def test_memory_that_ends_while_a_request_begins_is_a_step_down_too(folder):
    """Its text and its image are read then."""
    expected = drawn(load(folder, "cpu"))
    lines: list[str] = []
    planner = Planner(folder, CPU, (64, 64), weights="fp32")
    pipeline, placement = by_mode(folder, planner, planner.modes[0], lines)
    encoder = pipeline.conditioner.encoders[0]
    encoder.register_forward_pre_hook(
        lambda *_: None if lines else torch.empty(2**60, dtype=torch.uint8)
    )
    assert np.abs(drawn(pipeline) - expected).max() <= 1
    assert len(lines) == 1 and placement.plan.mode != planner.modes[0]


def test_out_of_memory_steps_down_once_and_says_so(folder):
    expected = drawn(load(folder, "cpu"))
    lines: list[str] = []
    planner = Planner(folder, CPU, (64, 64), weights="fp32")
    pipeline, placement = by_mode(folder, planner, planner.modes[0], lines)
    whole = full(pipeline.vae)
    placement._decoders["full"] = hungry(whole, placement, "tiled")
    assert np.abs(drawn(pipeline) - expected).max() <= 1
    assert len(lines) == 1
    assert lines[0].startswith("out of memory on cpu; going on with weights fp32, ")
    assert placement.plan.peak < planner.plan(planner.modes[0]).peak
    assert np.abs(drawn(pipeline) - expected).max() <= 1
    assert len(lines) == 1
    how = placement.plan.mode.decode
    placement._decoders[how] = hungry(whole, placement, "never")
    with pytest.raises(Failure, match="out of memory on cpu, and no smaller plan is left"):
        drawn(pipeline)


@pytest.mark.parametrize("row", [0, 2, 3, 4])
def test_a_step_down_from_any_place_leaves_a_pipeline_that_draws(folder, row):
    expected = drawn(load(folder, "cpu"))
    planner = Planner(folder, CPU, (64, 64))
    pipeline, placement = by_mode(folder, planner, planner.modes[row], [])
    drawn(pipeline)
    smaller = planner.plan(planner.modes[row + 1]).mode
    planner.smaller = lambda plan: planner.plan(smaller)  # whatever it saves at toy size
    placement._step_down()
    assert placement.plan.mode == smaller
    assert np.abs(drawn(pipeline) - expected).mean() < 4


def test_what_running_out_of_memory_is():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out(caught.value)
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory"))
    assert ran_out(MemoryError())
    assert not ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not ran_out(UserError("steps is 0"))


def test_load_by_a_budget(folder, tmp_path):
    lines: list[str] = []
    pipeline = load(folder, "cpu", vram=16, say=lines.append)
    assert pipeline.plan.mode.place == "resident" and pipeline.plan.budget == 16 * 2**30
    expected = drawn(load(folder, "cpu"))
    assert np.abs(drawn(pipeline) - expected).max() <= 1

    file = toy_lora(tmp_path / "style.safetensors", toy_base(pipeline.unet))
    styled = load(folder, "cpu", weights="int8", lora={file: 1.0}, size="64x64", say=lines.append)
    plain = load(folder, "cpu")
    plain.add_lora(file, 1.0, merged=True)
    assert np.abs(drawn(styled) - drawn(plain)).mean() < 4
    assert np.abs(drawn(styled) - expected).mean() > np.abs(drawn(styled) - drawn(plain)).mean()
    assert len(lines) == 1 and "style" in lines[0]
    for arguments, message in (
        ({"vram": 0}, "vram is 0"),
        ({"vram": 1e-6}, "the smallest that works is"),
        ({"size": "65x64"}, "multiples of 8"),
        ({"weights": "int3"}, "unknown weights 'int3': choose fp32"),
        ({"decode": "half"}, "unknown decoder 'half'"),
    ):
        with pytest.raises(UserError, match=message):
            load(folder, "cpu", **{"vram": "free", **arguments}, say=lines.append)


def test_weights_are_rounded_as_they_are_read(folder):
    """So a model is never in memory before its weights are rounded."""
    planner = Planner(folder, CPU, (64, 64), weights="int8")
    unrounded: list[int] = []

    class Watched(Placement):
        def put(self, part, models):
            layers = [m for each in models for m in each.modules()]
            if part != VAE:
                unrounded.append(sum(type(m) in (nn.Linear, nn.Conv2d) for m in layers))
            super().put(part, models)

    placed(folder, "koala", Watched(planner, planner.plan(planner.modes[0]), print), {}, print)
    assert unrounded == [0, 0]


def test_a_lora_that_a_budget_cannot_merge_is_refused(folder, tmp_path):
    file = toy_lora(tmp_path / "style.safetensors", toy_base(load(folder, "cpu").unet))
    planner = Planner(folder, CPU, (64, 64), weights="int8")
    plan = planner.plan(planner.modes[0])
    rounded = sum(plan.parts.values())
    for budget in (rounded, int(1.5 * rounded)):  # the weights in float32 take more than twice that
        with pytest.raises(UserError, match="give it as --teacher-lora"):
            planner.check_merging(replace(plan, budget=budget))
    load(folder, "cpu", vram=16, weights="int8", lora={file: 1.0})


def test_generate_by_a_plan_from_the_command_line(folder, tmp_path, capsys):
    given = ["generate", "a fox", "--model", str(folder), "--device", "cpu", "--steps", "1"]
    out = ["--seed", "1", "--out", str(tmp_path / "out")]
    assert main([*given, *out, "--vram", "free", "--weights", "int8", "--decode", "tiny"]) == 0
    printed = capsys.readouterr()
    assert "memory plan for 64x64, 1 picture at a time, on cpu" in printed.err
    assert "int8" in printed.err and "tiny VAE" in printed.err
    assert (tmp_path / "out" / "a-fox-0001.png").is_file()
    for asked, said in (
        (["--vram", "0.000001"], "the smallest that works is"),
        (["--vram", "much"], "vram is 'much'"),
        (["--weights", "int3"], "'int3'"),
        (["--vram", "4", "--compile"], "--compile has no effect under a memory plan"),
        (["--tiny-vae", str(tmp_path / "nowhere")], "no tiny autoencoder"),
    ):
        assert main([*given, "--out", str(tmp_path / "none"), *asked]) == 2
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1
    assert not (tmp_path / "none").exists()
