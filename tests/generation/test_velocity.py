"""A model that predicts v, with zero terminal SNR or without, is drawn as diffusers draws it."""

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from koala.checkpoints.pipeline_files import BETAS
from koala.checkpoints.prediction import EPSILON, VELOCITY, Prediction
from koala.generation import load
from koala.generation.samplers import SAMPLERS
from koala.generation.schedule import trailing
from stepping import latents_of, stepped
from toy_schedulers import their_scheduler

PLAIN = {"num_train_timesteps": 1000, "timestep_spacing": "trailing", **BETAS}
PREDICTIONS = [Prediction(VELOCITY), Prediction(VELOCITY, True), Prediction(EPSILON, True)]
# With zero terminal SNR diffusers' DDIM and LCM start at abar = 0, its other schedulers and all of
# ours at 2**-24: the first estimate of the image differs by 2**-12 of the noise.
FROM_ZERO = {"ddim", "lcm"}


def pair(toy_koala, name, prediction, kind=StableDiffusionXLPipeline):
    """Our pipeline, diffusers' with the same settings, and a generator for its noise."""
    config = {**PLAIN, **prediction.config}
    ours = load(toy_koala, device="cpu")
    ours.scheduler_config = config
    draws = torch.Generator().manual_seed(11)
    theirs = kind.from_pretrained(toy_koala, scheduler=their_scheduler(name, config, draws))
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs, draws


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=str)
@pytest.mark.parametrize("steps", [1, 10, 999])
def test_noise_levels_are_diffusers_own(prediction, steps):
    config = {**PLAIN, **prediction.config}
    theirs = EulerDiscreteScheduler.from_config(config)
    theirs.set_timesteps(steps)
    sigmas = torch.from_numpy(trailing(config, steps).sigmas)
    assert sigmas.isfinite().all()
    torch.testing.assert_close(sigmas, theirs.sigmas, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        (name, prediction)
        for name in (*SAMPLERS, "dpm++2m-karras", "unipc-karras", "dpm++sde-karras")
        for prediction in PREDICTIONS
        # There diffusers divides by zero: epsilon says nothing of the image at abar = 0.
        if not (name in FROM_ZERO and prediction == Prediction(EPSILON, True))
    ],
    ids=str,
)
def test_every_sampler_equals_diffusers_pipeline(toy_koala, name, prediction):
    ours, theirs, draws = pair(toy_koala, name, prediction)
    expected = theirs(
        "a red fox", negative_prompt="blur", guidance_scale=4.0, num_inference_steps=5,
        generator=[draws], output_type="latent",
    ).images  # fmt: skip
    x = latents_of(
        ours, "a red fox", negative_prompt="blur", guidance=4, steps=5, scheduler=name, seed=11
    )
    bound = 1e-3 if prediction.zero_snr and name in FROM_ZERO else 1e-4
    scale = max(1.0, expected.abs().max().item())  # epsilon at noise level 4096 blows a toy up
    torch.testing.assert_close(x / scale, expected / scale, atol=bound, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS[:2], ids=str)
@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_guidance_rescale_equals_diffusers(toy_koala, prediction, rescale):
    ours, theirs, _ = pair(toy_koala, "euler", prediction)
    expected = theirs(
        "a red fox", negative_prompt="blur", guidance_scale=7.0, guidance_rescale=rescale,
        num_inference_steps=6, generator=[torch.Generator().manual_seed(3)], output_type="latent",
    ).images  # fmt: skip
    asked = {"negative_prompt": "blur", "guidance": 7, "steps": 6, "seed": 3}
    x = latents_of(ours, "a red fox", guidance_rescale=rescale, **asked)
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)
    assert (latents_of(ours, "a red fox", **asked) - x).abs().max() > 1e-3


@pytest.mark.parametrize("prediction", PREDICTIONS[:2], ids=str)
# At a midpoint of DPM++ SDE diffusers' inpainting has what is kept at the noise level after it,
# ours at the midpoint's own.
@pytest.mark.parametrize(
    ("name", "masked"),
    [(name, masked) for name in SAMPLERS for masked in (False, True)
     if not (masked and name == "dpm++sde")],
)  # fmt: skip
def test_starting_from_an_image_equals_diffusers(toy_koala, name, prediction, masked):
    kind = StableDiffusionXLInpaintPipeline if masked else StableDiffusionXLImg2ImgPipeline
    ours, theirs, draws = pair(toy_koala, name, prediction, kind)
    image = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    draw = torch.Generator().manual_seed(11)
    noise = torch.randn(1, 4, 8, 8, generator=draw)
    (request,) = ours.requests(
        "a red fox", guidance=3, steps=10, strength=0.6, seed=11, image=image, scheduler=name,
        **({"mask": mask} if masked else {}),
    )  # fmt: skip
    with torch.inference_mode():
        row = ours.begin(request)
        latents = ours.encode(request.image)
        if name == "euler":
            first = latents + row.sampler.sigmas[0] * noise
            torch.testing.assert_close(row.x, first, atol=1e-5, rtol=1e-5)
        stepped(ours, [row])
        given = {"image": latents}
        if masked:
            given |= {"mask_image": mask, "height": 64, "width": 64}
        expected = theirs(
            "a red fox", strength=0.6, guidance_scale=3.0, num_inference_steps=10,
            generator=draws, output_type="latent", **given,
        ).images  # fmt: skip
    torch.testing.assert_close(row.x, expected, atol=1e-4, rtol=0)
