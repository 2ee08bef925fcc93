"""Generation equals diffusers' own pipeline, and a picture is a function of its settings alone."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image

from koala.errors import UserError
from koala.generation import load
from koala.generation.noise import TorchNoise
from koala.generation.schedule import trailing
from stepping import latents_of
from toy import toy_pipeline, toy_scheduler

ARCHITECTURES = ("sdxl", "koala")
CASES = {  # prompts, negative prompt, guidance, width, height
    "plain": (["a red fox"], "", 3.5, 64, 64),
    "no guidance": (["a red fox"], "", 1.0, 64, 64),
    "batch, negative, odd and not square": (["a red fox", "an owl", "x"], "blur", 5.0, 72, 40),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("toys")
    return {name: toy_pipeline(root / name, architecture=name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def pipeline(folders):
    return load(folders["koala"], device="cpu")


@pytest.fixture(scope="module")
def theirs(folders):
    loaded = {}
    for name, folder in folders.items():
        pipe = StableDiffusionXLPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        loaded[name] = pipe
    return loaded


def noise_of(seeds, height, width):
    shape = (1, 4, height, width)
    return torch.cat([TorchNoise(s, shape, torch.device("cpu")).draw() for s in seeds])


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_latents_and_images_equal_diffusers_pipeline(folders, theirs, architecture, case):
    prompts, negative, guidance, width, height = CASES[case]
    noise = noise_of([7 + i for i in range(len(prompts))], height // 8, width // 8)
    arguments = {
        "prompt": prompts,
        "negative_prompt": [negative] * len(prompts) if negative else None,
        "guidance_scale": guidance,
        "num_inference_steps": 10,
        "width": width,
        "height": height,
    }
    pipe = theirs[architecture]
    latents = pipe(**arguments, latents=noise.clone(), output_type="latent").images
    expected = pipe(**arguments, latents=noise.clone(), output_type="np").images

    ours = load(folders[architecture], device="cpu")
    asked = {"negative_prompt": negative, "guidance": guidance, "size": (width, height), "seed": 7}
    x = latents_of(ours, prompts, **asked)
    torch.testing.assert_close(x, latents, atol=1e-4, rtol=0)
    drawn = decoded(ours, x)
    np.testing.assert_allclose(drawn, expected, atol=1e-4, rtol=0)
    for image, array in zip(ours(prompts, **asked).images, drawn, strict=True):  # in 8 bits
        np.testing.assert_allclose(pixels(image), array, atol=0.5 / 255 + 1e-4, rtol=0)


def test_guidance_cut_off_equals_diffusers_callback_that_cuts_it_off(pipeline, theirs):
    """As diffusers' documentation does it: guidance 0 and no unconditional rows from a step on."""

    def cut_off(pipe, step, timestep, tensors):
        if step == 2:  # three of ten steps are done
            pipe._guidance_scale = 0.0
            for name in ("prompt_embeds", "add_text_embeds", "add_time_ids"):
                tensors[name] = tensors[name].chunk(2)[-1]
        return tensors

    expected = theirs["koala"](
        "a red fox", guidance_scale=5.0, num_inference_steps=10, latents=noise_of([7], 8, 8),
        output_type="latent", callback_on_step_end=cut_off,
        callback_on_step_end_tensor_inputs=["prompt_embeds", "add_text_embeds", "add_time_ids"],
    ).images  # fmt: skip
    ours = latents_of(pipeline, "a red fox", guidance=5.0, guidance_until=0.25, seed=7)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    whole = latents_of(pipeline, "a red fox", guidance=5.0, seed=7)
    assert (whole - ours).abs().max() > 1e-3


def test_guidance_costs_rows_only_as_long_as_it_is_on(pipeline, monkeypatch):
    rows, plain = [], pipeline.predict

    def counted(x, timesteps, condition):
        rows.append((len(x), len(timesteps), len(condition.text)))
        return plain(x, timesteps, condition)

    monkeypatch.setattr(pipeline, "predict", counted)
    latents_of(pipeline, ["a", "b"], guidance=2, guidance_until=0.5, steps=3)
    latents_of(pipeline, "a", guidance=1, steps=2)
    assert [n for n, *_ in rows] == [4, 4, 2, 1, 1]
    assert all(len(set(counts)) == 1 for counts in rows)


def decoded(ours, latents: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return ours.decode(latents).permute(0, 2, 3, 1).numpy()


def test_decode_without_latent_statistics_divides_by_the_scaling_factor_only(folders, theirs):
    pipe = load(folders["koala"], device="cpu")
    vae = theirs["koala"].vae
    latents = noise_of([0], 4, 4)
    pipe.vae.register_to_config(latents_mean=None, latents_std=None)
    with torch.inference_mode():
        expected = vae.decode(latents / 0.8).sample / 2 + 0.5
        ours = torch.from_numpy(decoded(pipe, latents)).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, expected.clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [*range(1, 51), 999, 1000])
def test_schedule_equals_diffusers_euler_with_trailing_spacing(steps):
    scheduler = toy_scheduler()
    scheduler.set_timesteps(steps)
    ours = trailing(dict(scheduler.config), steps)
    assert ours.timesteps.tolist() == scheduler.timesteps.tolist()
    np.testing.assert_allclose(ours.sigmas, scheduler.sigmas, atol=1e-6, rtol=1e-6)
    assert ours.sigmas[0] == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)
    assert (ours.sigmas.dtype, ours.timesteps.dtype) == (np.float32, np.float64)


def test_every_number_of_steps_has_falling_noise():
    config = dict(toy_scheduler().config)
    for steps in range(1, 1001):
        schedule = trailing(config, steps)
        assert len(schedule.timesteps) == steps and schedule.timesteps[0] == 999
        assert (np.diff(schedule.timesteps) < 0).all() and (np.diff(schedule.sigmas) < 0).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta_schedule", "linear"),
        ("trained_betas", [0.1]),
    ],
)
def test_a_scheduler_config_of_another_kind_is_refused(key, value):
    config = dict(EulerDiscreteScheduler.from_config(toy_scheduler().config).config)
    with pytest.raises(UserError, match=re.escape(f"{key} = {value!r}")):
        trailing({**config, key: value}, 10)


def test_images_of_a_batch_equal_those_drawn_alone(pipeline):
    prompts = ["a red fox", "an owl", "two green apples"]
    together = latents_of(pipeline, prompts, seed=3)
    strict = pipeline(prompts, seed=3, strict=True).images
    for i, prompt in enumerate(prompts):
        alone = latents_of(pipeline, prompt, seed=3 + i)
        torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=0)
        assert pipeline(prompt, seed=3 + i).images[0].tobytes() == strict[i].tobytes()


def test_big_batches_are_drawn_in_turns_with_the_same_images(pipeline, monkeypatch):
    steps, rows, plain = [], [], pipeline.predict

    def counted(x, timesteps, condition):
        rows.append(len(x))
        return plain(x, timesteps, condition)

    monkeypatch.setattr(pipeline, "predict", counted)
    asked = {"number": 2, "seed": 5, "steps": 2, "size": (32, 32), "guidance": 1}
    whole = pipeline(["a", "b"], **asked)
    monkeypatch.setattr("koala.generation.engine.PIXELS_AT_ONCE", 2 * 32 * 32)
    turns = pipeline(["a", "b"], **asked, on_step=lambda *done: steps.append(done))
    assert rows == [4, 4, 2, 2, 2, 2]
    assert steps == [(i, 8) for i in range(1, 9)]
    assert turns.settings == whole.settings
    for one, other in zip(turns.images, whole.images, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1 / 255 + 1e-6


def test_settings_record_every_image_and_reproduce_it(pipeline):
    result = pipeline(["a fox", "an owl"], negative_prompt="blur", number=2, steps=3, guidance=2)
    assert [s.prompt for s in result.settings] == ["a fox", "a fox", "an owl", "an owl"]
    assert [s.seed - result.settings[0].seed for s in result.settings] == [0, 1, 2, 3]
    last = result.settings[-1]
    assert (last.width, last.height, last.model) == (64, 64, "koala")
    assert (last.sampler, last.schedule, last.steps, last.guidance) == ("Euler", "trailing", 3, 2)
    again = pipeline(
        last.prompt,
        negative_prompt=last.negative_prompt,
        steps=last.steps,
        guidance=last.guidance,
        size=f"{last.width}x{last.height}",
        seed=last.seed,
    )
    assert again.settings == [last]
    assert np.abs(pixels(again.images[0]) - pixels(result.images[-1])).max() <= 1 / 255 + 1e-6


def test_without_a_seed_images_differ_with_one_they_are_equal(pipeline):
    free = [pipeline("a", steps=1).settings[0].seed for _ in range(3)]
    assert len(set(free)) == 3
    first, second = (pipeline("a", steps=2, seed=9).images[0].tobytes() for _ in range(2))
    assert first == second


def test_the_seed_the_prompt_and_the_negative_prompt_matter(pipeline):
    drawn = {
        pipeline("a fox", steps=3, seed=1).images[0].tobytes(),
        pipeline("a fox", steps=3, seed=2).images[0].tobytes(),
        pipeline("an owl", steps=3, seed=1).images[0].tobytes(),
        pipeline("a fox", steps=3, seed=1, negative_prompt="blur").images[0].tobytes(),
    }
    assert len(drawn) == 4


def test_a_folder_that_does_not_zero_empty_prompts_is_heeded(folders, theirs):
    pipe = load(folders["koala"], device="cpu")
    pipe = dataclasses.replace(pipe, zeros_for_empty=False)
    noise = noise_of([4], 8, 8)
    arguments = {"negative_prompt": "", "guidance_scale": 3.5, "num_inference_steps": 2}
    expected = theirs["koala"]("a", **arguments, latents=noise, output_type="np").images[0]
    ours = pipe("a", seed=4, steps=2).images[0]
    np.testing.assert_allclose(pixels(ours), expected, atol=0.5 / 255 + 1e-4, rtol=0)


def test_load_reads_the_flag_for_empty_prompts(tmp_path):
    folder = toy_pipeline(tmp_path / "toy", architecture="koala")
    index = json.loads((folder / "model_index.json").read_text())
    assert load(folder, device="cpu").zeros_for_empty
    index["force_zeros_for_empty_prompt"] = False
    (folder / "model_index.json").write_text(json.dumps(index))
    assert not load(folder, device="cpu").zeros_for_empty


@pytest.mark.parametrize("size", [(16, 16), (24, 136), "72x16"])
def test_any_multiple_of_eight_is_a_size(folders, size):
    pipe = load(folders["sdxl"], device="cpu")
    result = pipe("a", steps=1, size=size, seed=0)
    width, height = (int(side) for side in size.split("x")) if isinstance(size, str) else size
    assert result.images[0].size == (width, height)
    assert (result.settings[0].width, result.settings[0].height) == (width, height)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": ["a", ""]}, "prompt is empty"),
        ({"prompt": 3 * [None]}, "allowed is text"),
        ({"prompt": "\ud83e"}, "lone surrogate"),
        ({"prompt": "a" * 100_000}, "prompt has 100,000 characters: allowed are 10,000"),
        ({"negative_prompt": "a" * 10_001}, "negative prompt has 10,001 characters"),
        ({"prompt": "a\x00b\x1b"}, r"control characters .U\+0000, U\+001B"),
        ({"prompt": "a (fox:99)"}, "'fox' the weight 99: allowed are weights from 0 to 10"),
        ({"negative_prompt": "(" * 30 + "fox"}, "'fox' the weight 17.4"),
        ({"scheduler": "heun"}, "unknown scheduler 'heun': choose euler, euler-a"),
        ({"scheduler": "lcm", "steps": 51}, "51 steps: the lcm scheduler takes 1 to 50"),
        ({"guidance_until": 0}, "guidance until is 0: allowed are shares"),
        ({"guidance_until": 1.5}, "guidance until is 1.5"),
        ({"guidance_until": 0.5, "guidance": 1}, "0.5 has no effect at guidance 1"),
        ({"guidance_rescale": 1.5}, "guidance rescale is 1.5: allowed are numbers from 0"),
        ({"guidance_rescale": 0.5, "guidance": 1}, "0.5 has no effect at guidance 1"),
        ({"size": (100, 64)}, "100x64.*multiples of 8 from 16 to 4096"),
        ({"size": (8, 64)}, "8x64.*from 16"),
        ({"size": (4104, 64)}, "to 4096"),
        ({"size": "64"}, "not WIDTHxHEIGHT"),
        ({"size": "-64x64"}, "not WIDTHxHEIGHT"),
        ({"size": (64.0, 64)}, "not .width, height."),
        ({"steps": 0}, "steps is 0.*1 to 1000"),
        ({"steps": 1001}, "steps is 1001"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": True}, "steps is True"),
        ({"guidance": -1}, "guidance is -1.*0 to 100"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"guidance": 100.5}, "guidance is 100.5"),
        ({"guidance": 1, "negative_prompt": "blur"}, "'blur' has no effect at guidance 1"),
        ({"number": 0}, "number of pictures is 0"),
        ({"number": 10**9}, "number of pictures is 1000000000: allowed .* 1 to 10,000"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "from 0 to 2..63 - 1"),
        ({"seed": 2**63 - 1, "number": 2}, "from 0 to 2..63 - 2"),
    ],
)
def test_what_is_not_allowed_is_refused_in_one_line(pipeline, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        pipeline(**{"prompt": "a", **arguments})
    assert "\n" not in str(caught.value)


def test_the_largest_seed_is_a_seed(pipeline):
    assert pipeline("a", steps=1, seed=2**63 - 1).settings[0].seed == 2**63 - 1


def test_a_device_that_is_not_there_is_refused(folders):
    for device in ("tpu9", "xpu"):
        with pytest.raises(UserError, match=f"'{device}' is not available.*cpu"):
            load(folders["koala"], device=device)


def test_an_unknown_model_is_refused():
    with pytest.raises(UserError, match="no-such-model"):
        load("no-such-model")


def test_half_precision_is_near_single_precision(folders, pipeline):
    half = load(folders["koala"], device="cpu", dtype=torch.float16)
    assert half.unet.dtype == half.conditioner.dtype == torch.float16
    assert half.vae.dtype == torch.float32
    one, other = (pixels(p("a fox", seed=1).images[0]) for p in (half, pipeline))
    assert np.abs(one - other).mean() < 0.02


@pytest.mark.parametrize("dtype", [{}, {"torch_dtype": torch.float16}])
def test_the_model_cards_snippet_runs(folders, pipeline, dtype):
    """As in the README, on the CPU; there "cuda" stands."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folders["koala"], **dtype)
    pipe = pipe.to("cpu")
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    image = pipe(
        prompt="a red fox, noto style",
        negative_prompt="blurry",
        guidance_scale=3.5,
        num_inference_steps=10,
    ).images[0]
    assert image.size == (64, 64)
    assert len(np.unique(np.asarray(image))) > 16
