"""Every sampler equals diffusers' scheduler, step by step, on the same predictions and noise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.schedulers import AysSchedules
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from koala.errors import UserError
from koala.generation import load
from koala.generation.noise import TorchNoise
from koala.generation.samplers import LABELS, SAMPLERS, get
from koala.generation.schedule import SPACINGS, align_your_steps, lcm, trailing
from stepping import latents_of, stepped
from toy import toy_scheduler
from toy_schedulers import NOISY, PRECEDED, SPACED, their_scheduler

CONFIG = dict(toy_scheduler().config)
RELATIVE = {"euler", "euler-a", "dpm++sde"}  # diffusers keeps their x as we do, others' divided
SHAPE = (1, 4, 6, 5)
CPU = torch.device("cpu")


def ours_of(name, steps, seed=3):
    """(sampler, the noise it starts from)."""
    kind, spacing = get(name)
    noise = TorchNoise(seed, SHAPE, CPU)
    return kind(kind.adapted(SPACINGS[spacing](CONFIG, steps), spacing), noise), noise.draw()


def model(x, timestep):
    """Stands for a U-Net: any smooth function of what it sees."""
    return torch.tanh(x * 1.3 + 0.3 * torch.sin(x.flip(-1)) + timestep / 2000)


# DDIM's own step back is 1000 // steps timesteps; ours leads to the schedule's next one. The two
# agree where steps divides 1000.
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 10, 25, 50])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_equals_diffusers_scheduler(name, steps):
    compared(name, steps)


@pytest.mark.parametrize("steps", [2, 7, 10, 30])
@pytest.mark.parametrize("name", SPACED)
def test_every_spacing_equals_diffusers_scheduler(name, steps):
    compared(name, steps)


def compared(name, steps):
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(SHAPE, generator=generator)
    scheduler = their_scheduler(name, CONFIG, generator)
    scheduler.set_timesteps(steps)
    sampler, first = ours_of(name, steps)
    theirs = scheduler.timesteps.double()
    torch.testing.assert_close(torch.tensor(sampler.timesteps).double(), theirs, atol=1e-3, rtol=0)
    theirs = start * scheduler.init_noise_sigma
    kind = next(key for key, sampler_ in SAMPLERS.items() if type(sampler) is sampler_)
    draws = {"generator": generator} if kind in NOISY else {}
    x = sampler.start(first)
    for i, timestep in enumerate(scheduler.timesteps):
        sigma, to = sampler.sigmas[i : i + 2]
        seen = x / (sigma**2 + 1) ** 0.5
        expected = scheduler.scale_model_input(theirs, timestep)
        torch.testing.assert_close(seen, expected, atol=1e-4, rtol=0)
        x = sampler.step(i, x, x - sigma * model(seen, sampler.timesteps[i]))
        theirs = scheduler.step(model(expected, timestep), timestep, theirs, **draws).prev_sample
        scale = 1 if kind in RELATIVE else (to**2 + 1) ** 0.5
        torch.testing.assert_close(x, theirs * scale, atol=1e-4 * max(1, to), rtol=0)


def test_aligned_steps_are_diffusers_table():
    theirs = EulerDiscreteScheduler(**{k: CONFIG[k] for k in PRECEDED})
    theirs.set_timesteps(sigmas=AysSchedules["StableDiffusionXLSigmas"])
    ours = align_your_steps(CONFIG, 10)
    torch.testing.assert_close(torch.from_numpy(ours.sigmas), theirs.sigmas)
    torch.testing.assert_close(torch.from_numpy(ours.timesteps).float(), theirs.timesteps)


@given(
    spacing=st.sampled_from([name for name in SPACINGS if name != "lcm"]),
    steps=st.integers(1, 1000),
    zero_snr=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_spacing_falls_over_the_trained_levels(spacing, steps, zero_snr):
    config = {**CONFIG, "rescale_betas_zero_snr": zero_snr}
    schedule = SPACINGS[spacing](config, steps)
    assert len(schedule) == steps and schedule.sigmas.shape == (steps + 1,)
    assert (np.diff(schedule.sigmas) < 0).all() and schedule.sigmas[-1] == 0
    assert (np.diff(schedule.timesteps) <= 0).all()
    assert schedule.timesteps[-1] >= 0 and schedule.timesteps[0] <= 999
    doubled = schedule.with_midpoints()
    assert np.array_equal(doubled.timesteps[::2], schedule.timesteps)
    assert np.array_equal([*doubled.sigmas[:-1:2], 0], schedule.sigmas)
    assert (np.diff(doubled.sigmas) < 0).all() and len(doubled) == 2 * steps - 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_goes_by_our_names_and_those_of_other_programs(name):
    kind = SAMPLERS[name]
    assert get(name) == get(kind.name) == get(f" {kind.name.upper()} ") == (kind, kind.spacing)
    for spacing in kind.spacings:
        for spelled in (f"{name}-{spacing}", f"{kind.name} {LABELS[spacing]}"):
            assert get(spelled) == (kind, spacing)


@pytest.mark.parametrize(
    "name", ["lcm-karras", "euler-lcm", "euler-", "karras", "DPM++ 2M  Karras"]
)
def test_an_unknown_sampler_is_refused_with_all_names(name):
    with pytest.raises(UserError, match=r"choose euler, .*; each but lcm also with -trailing"):
        get(name)


@given(
    name=st.sampled_from([*SAMPLERS, *SPACED]),
    steps=st.integers(1, 50),
    values=st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_a_model_that_knows_the_image_leads_to_it(name, steps, values):
    """Whatever the sampler, its noise and its number of steps: if the U-Net always sees the same
    picture, that picture comes out."""
    image = torch.tensor(values)[None, :, None, None].expand(SHAPE)
    sampler, first = ours_of(name, steps)
    x = sampler.start(first)
    for i in range(len(sampler.timesteps)):
        x = sampler.step(i, x, image)
    torch.testing.assert_close(x, image.float(), atol=1e-3, rtol=0)


def test_ddim_follows_the_schedule_where_steps_do_not_divide_it():
    """Exact for a model of constant noise: what is left is the picture, at 7 steps too."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    sampler, _ = ours_of("ddim", 7)
    x = 2.0 + sampler.sigmas[0] * noise
    for i in range(7):
        x = sampler.step(i, x, x - sampler.sigmas[i] * noise)
    torch.testing.assert_close(x, torch.full(SHAPE, 2.0), atol=1e-4, rtol=0)


def test_samplers_share_no_state():
    """Two of a kind, their steps interleaved, end as each does by itself."""
    for name in SAMPLERS:
        ends = []
        for company in (False, True):
            sampler, first = ours_of(name, 6)
            other, theirs = ours_of(name, 6, seed=9)
            x, y = sampler.start(first), other.start(theirs)
            for i in range(len(sampler.timesteps)):
                if company:
                    y = other.step(i, y, torch.cos(y))
                x = sampler.step(i, x, torch.tanh(x))
            ends.append(x)
        assert torch.equal(*ends), name


def test_noise_is_a_function_of_the_seed_alone():
    one, again, other = (TorchNoise(seed, SHAPE, CPU) for seed in (5, 5, 6))
    first = one.draw()
    assert torch.equal(first, again.draw()) and not torch.equal(first, one.draw())
    assert not torch.equal(first, other.draw()) and first.dtype == torch.float32


@given(steps=st.integers(1, 1000), share=st.floats(0.001, 1))
@settings(max_examples=100, deadline=None)
def test_the_last_share_of_a_schedule_is_its_end(steps, share):
    schedule = trailing(CONFIG, steps)
    kept = min(int(steps * share), steps)  # as diffusers counts
    if kept == 0:
        with pytest.raises(UserError, match=f"strength {share:g} of {steps} steps leaves no step"):
            schedule.last(share)
    else:
        last = schedule.last(share)
        assert len(last) == kept and len(last.sigmas) == kept + 1
        assert np.array_equal(last.timesteps, schedule.timesteps[-kept:])
        assert np.array_equal(last.sigmas, schedule.sigmas[-kept - 1 :])


@pytest.mark.parametrize("steps", [0, 51, 1000])
def test_lcm_has_fifty_levels(steps):
    with pytest.raises(UserError, match=f"{steps} steps: the lcm scheduler takes 1 to 50"):
        lcm(CONFIG, steps)


# --- whole pipelines ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(toy_koala):
    return load(toy_koala, device="cpu")


@pytest.mark.parametrize("name", [*SAMPLERS, "dpm++2m-karras", "unipc-beta"])
def test_images_equal_diffusers_pipeline_with_its_own_generator(toy_koala, pipeline, name):
    draws = torch.Generator().manual_seed(11)
    scheduler = their_scheduler(name, CONFIG, draws)
    pipe = StableDiffusionXLPipeline.from_pretrained(toy_koala, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a red fox", negative_prompt="blur", guidance_scale=4.0, num_inference_steps=5,
        generator=[draws], output_type="latent",
    ).images  # fmt: skip
    ours = latents_of(
        pipeline, "a red fox", negative_prompt="blur", guidance=4, steps=5, scheduler=name, seed=11
    )
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["euler-a", "dpm++2m", "dpm++sde", "unipc-karras", "lcm"])
def test_from_a_image_every_kind_of_sampler_begins_in_the_middle(toy_koala, pipeline, name):
    """Given latents, diffusers' pipeline draws the same noise as ours."""
    draws = torch.Generator().manual_seed(11)
    scheduler = their_scheduler(name, CONFIG, draws)
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(toy_koala, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    grey = torch.zeros(1, 3, 64, 64)
    with torch.inference_mode():
        latents = pipeline.vae.encode(grey).latent_dist.mode()
        config = pipeline.vae.config
        mean, std = (
            torch.tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std)
        )
        latents = (latents - mean) / std * config.scaling_factor
        expected = pipe(
            "a red fox", image=latents, strength=0.6, guidance_scale=1.0, num_inference_steps=10,
            generator=[draws], output_type="latent",
        ).images  # fmt: skip
    (request,) = pipeline.requests(
        "a red fox", guidance=1, steps=10, scheduler=name, seed=11, strength=0.6,
        image=Image.new("RGB", (64, 64), "grey"),
    )  # fmt: skip
    request = replace(request, image=grey)  # no 8-bit picture is exactly zero
    with torch.inference_mode():
        row = pipeline.begin(request)
    assert row.steps == (11 if name == "dpm++sde" else 6)
    torch.testing.assert_close(stepped(pipeline, [row]), expected, atol=1e-4, rtol=0)
