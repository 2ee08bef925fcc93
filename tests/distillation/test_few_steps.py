"""Step distillation: losses equal a direct computation, students move toward their teacher, and
loops with two networks resume, accumulate and divide as those with one."""

import copy
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from koala.checkpoints.load import load_scheduler_config
from koala.checkpoints.prediction import VELOCITY, Prediction
from koala.checkpoints.sampling import Sampling, of_config
from koala.distillation.few_steps import DistributionMatching, StepDistillation
from koala.distillation.forward_process import NoiseSchedule, generators_at
from koala.distillation.loop import train
from koala.distillation.parallel import World, joined, lay_out
from koala.distillation.settings import PLAIN, Hardware, StepSettings, Tap, Training
from koala.errors import Failure, UserError
from koala.recipes.tasks import student_task
from koala.text_conditioning import TextConditioner
from toy import toy_pipeline, toy_scheduler, toy_unet
from toy_training import SignalledStream, Stream, processes, toy_task

TRAILING = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "timestep_spacing": "trailing"}  # fmt: skip
MMD = StepSettings("mmd", 2, taps=(Tap("lf", ("UP-1", "UP-3")), Tap("sa", ("DW-2",))))
DMD = StepSettings("dmd", 3, guidance=2.0)
TRAINING = Training(
    samples=24, batch=4, lr=1e-3, ema_half_life=32, log_every=12, preview_every=24, save_every=0,
    critic_lr=2e-3, critic_updates=2, keep=100,
)  # fmt: skip
GRADIENT_BOUND = 1e-5  # of the difference's norm, relative to the gradient's


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_pipeline(tmp_path_factory.mktemp("base") / "koala", architecture="koala")


def new_task(
    base: Path, settings: StepSettings, student: str = "koala", **changes: object
) -> StepDistillation:
    """A seeded student and teacher of toy size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet, teacher = toy_unet(student), toy_unet("sdxl")
    config = {**load_scheduler_config(base), **changes}
    conditioner = TextConditioner.from_folder(base)
    task = student_task(settings, unet, teacher, conditioner, config, base)
    assert isinstance(task, StepDistillation)
    return task


def seeded() -> list[torch.Generator]:
    return generators_at(1, 0, 4)


# --- by hand --------------------------------------------------------------------------------


class ByHand:
    """The batch of `Stream` and the draws of `seeded()`, one sample at a time, with diffusers."""

    def __init__(self, task: StepDistillation, base: Path, config: dict) -> None:
        self.task, self.steps = task, task.settings.steps
        self.scheduler = EulerDiscreteScheduler.from_config({**config, **TRAILING})
        self.batch = Stream().batch(0, 4)
        text, pooled = TextConditioner.from_folder(base)(self.batch["captions"])
        self.text, self.pooled = text, pooled
        self.draws = []
        for g in seeded():
            start = torch.randn(4, 8, 8, generator=g)
            step = int(torch.randint(self.steps, (), generator=g))
            share = float(torch.rand((), generator=g))
            self.draws.append((start, step, share, torch.randn(4, 8, 8, generator=g)))
        abar = NoiseSchedule(config).alphas_cumprod
        self.sigmas = ((1 - abar) / abar).sqrt()

    def output(self, unet: UNet2DConditionModel, i: int, z: Tensor, t: int, text: bool) -> Tensor:
        added = {
            "text_embeds": self.pooled[i : i + 1] * text,
            "time_ids": self.batch["time_ids"][i : i + 1],
        }
        words = self.text[i : i + 1] * text
        t_one = torch.tensor([t])
        return unet(z, t_one, encoder_hidden_states=words, added_cond_kwargs=added).sample

    def point(self, i: int, unet: UNet2DConditionModel) -> tuple[Tensor, Tensor, float, int]:
        """x after the sample's step, its estimate of x0, sigma below, and the timestep compared."""
        start, step, share, _ = self.draws[i]
        self.scheduler.set_timesteps(self.steps)
        x = start[None] * self.scheduler.sigmas[0]
        for k in range(step + 1):
            t = self.scheduler.timesteps[k]
            seen = self.scheduler.scale_model_input(x, t)
            with torch.set_grad_enabled(k == step):
                done = self.scheduler.step(self.output(unet, i, seen, int(t), True), t, x)
            x, denoised = done.prev_sample, done.pred_original_sample
        times = [int(t) for t in self.scheduler.timesteps] + [19]
        timestep = times[step + 1] + 1 + int(share * (times[step] - times[step + 1]))
        return x, denoised, float(self.scheduler.sigmas[step + 1]), timestep


def gradient(unet: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])


@pytest.mark.parametrize("changes", [{}, Prediction(VELOCITY).config], ids=["epsilon", "v"])
def test_dmd_has_the_gradient_of_its_equation(base: Path, changes: dict) -> None:
    task = new_task(base, DMD, **changes)
    assert isinstance(task, DistributionMatching)
    with torch.no_grad():  # else it is the teacher's copy, and only guidance is left
        for parameter in task.critic.parameters():
            parameter.mul_(1.05)
    config = {**load_scheduler_config(base), **changes}
    hand = ByHand(task, base, config)
    losses = task.losses(Stream().batch(0, 4), seeded())
    losses["loss"].backward()
    found = gradient(task.trainable)
    assert all(p.grad is None for p in (*task.critic.parameters(), *task.teacher.parameters()))
    student = copy.deepcopy(task.trainable).requires_grad_(True)
    student.zero_grad()
    sizes = []
    for i, (_, _, _, noise) in enumerate(hand.draws):
        x, denoised, below, t = hand.point(i, student)
        sigma = float(hand.sigmas[t])
        higher = x + (sigma**2 - below**2) ** 0.5 * noise[None]
        z = higher / (sigma**2 + 1) ** 0.5

        def x0(output: Tensor, z: Tensor = z, sigma: float = sigma) -> Tensor:
            scaled = (sigma**2 + 1) ** 0.5
            if changes:
                return z / scaled - sigma / scaled * output
            return z * scaled - sigma * output

        with torch.no_grad():
            fake = x0(hand.output(task.critic, i, z, t, True))
            apart = [x0(hand.output(task.teacher, i, z, t, text)) for text in (False, True)]
            real = apart[0] + 2.0 * (apart[1] - apart[0])
            direction = (fake - real) / (denoised - real).abs().mean()
        sizes.append(0.5 * direction.square().mean())
        denoised.backward(direction / direction.numel() / len(hand.draws))
    torch.testing.assert_close(losses["loss"], torch.stack(sizes).mean(), rtol=1e-3, atol=0)
    expected = gradient(student)
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_the_critic_learns_the_noise_of_what_the_student_draws(base: Path) -> None:
    task = new_task(base, DMD)
    assert isinstance(task, DistributionMatching)
    hand = ByHand(task, base, load_scheduler_config(base))
    losses = task.critic_losses(Stream().batch(0, 4), seeded())
    losses["loss"].backward()
    assert all(p.grad is None for p in task.trainable.parameters())
    assert all(p.grad is not None for p in task.critic.parameters())
    each = []
    with torch.no_grad():
        for i, (_, _, _, noise) in enumerate(hand.draws):
            x, _, below, t = hand.point(i, task.trainable)
            sigma = float(hand.sigmas[t])
            added = (sigma**2 - below**2) ** 0.5
            z = (x + added * noise[None]) / (sigma**2 + 1) ** 0.5
            predicted = hand.output(task.critic, i, z, t, True)
            each.append((added / sigma * predicted - noise).square().mean())
    torch.testing.assert_close(losses["loss"].detach(), torch.stack(each).mean(), rtol=1e-4, atol=0)


def test_mmd_is_the_difference_of_mean_features(base: Path) -> None:
    task = new_task(base, MMD)
    hand = ByHand(task, base, load_scheduler_config(base))
    losses = task.losses(Stream().batch(0, 4), seeded())
    paths = ("up_blocks.0", "up_blocks.2",
             "down_blocks.1.attentions.0.transformer_blocks.0.attn1",
             "down_blocks.1.attentions.1.transformer_blocks.0.attn1")  # fmt: skip
    kept: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: object, args: object, output: Tensor | tuple) -> None:
            feature = output[0] if isinstance(output, tuple) else output
            kept[path] = feature if feature.ndim == 3 else feature.flatten(2).transpose(1, 2)

        return hook

    for path in paths:
        task.teacher.get_submodule(path).register_forward_hook(keep(path))
    errors: dict[str, list[Tensor]] = {path: [] for path in paths}
    with torch.no_grad():
        for i, (start, _, _, noise) in enumerate(hand.draws):
            x, _, below, t = hand.point(i, task.trainable)
            sigma = float(hand.sigmas[t])
            more = (sigma**2 - below**2) ** 0.5 * noise[None]
            real = hand.batch["latents"][i : i + 1] + below * start[None]
            means, squares = [], []
            for each in (x + more, real + more):
                hand.output(task.teacher, i, each / (sigma**2 + 1) ** 0.5, t, True)
                means.append({path: kept[path].mean(1) for path in paths})
                squares.append({path: kept[path].square().mean() for path in paths})
            for path in paths:
                apart = (means[0][path] - means[1][path]).square().mean()
                errors[path].append(apart / squares[1][path])
    expected = {path: torch.stack(each).mean() for path, each in errors.items()}
    for path, value in expected.items():
        torch.testing.assert_close(losses[f"tap {path}"], value, rtol=1e-3, atol=1e-7)
    mean = torch.stack([*expected.values()]).mean()
    torch.testing.assert_close(losses["loss"].detach(), mean, rtol=1e-3, atol=0)
    losses["loss"].backward()
    assert all(p.grad is None for p in task.teacher.parameters())
    assert all(p.grad is not None for p in task.trainable.parameters())


@pytest.mark.parametrize("settings", [MMD, DMD], ids=["mmd", "dmd"])
def test_bf16_loses_no_gradient_to_the_passes_without(base: Path, settings: StepSettings) -> None:
    """Autocast keeps copies of weights: one made without gradient must not serve later passes."""
    task = new_task(base, settings)
    computes = [(task.losses, task.trainable)]
    if isinstance(task, DistributionMatching):
        computes.append((task.critic_losses, task.critic))
    for compute, moving in computes:
        with torch.autocast("cpu", torch.bfloat16):
            loss = compute(Stream().batch(0, 4), seeded())["loss"]
        loss.backward()
        low = gradient(moving)
        moving.zero_grad()
        compute(Stream().batch(0, 4), seeded())["loss"].backward()
        exact = gradient(moving)
        assert low.shape == exact.shape  # none is missing
        assert (low - exact).norm() < 0.2 * exact.norm()
        moving.zero_grad()


# --- what it learns -------------------------------------------------------------------------


def drawn(task: StepDistillation, unet: UNet2DConditionModel) -> Tensor:
    """What a U-Net draws in the task's steps from 64 noises under one caption, [64, 4, 8, 8]."""
    sampler = task.sampler
    x = sampler.start(torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(3)))
    batch = {"captions": ["a red fox"] * 64, "time_ids": Stream().batch(0, 1)["time_ids"]}
    batch["time_ids"] = batch["time_ids"].expand(64, -1)
    conditions = task._conditions(batch)
    with torch.no_grad():
        for i in range(task.settings.steps):
            seen = task._seen(x, torch.full((64,), i), conditions)
            output = unet(
                seen.noisy, seen.timesteps, encoder_hidden_states=seen.text,
                added_cond_kwargs={"text_embeds": seen.pooled, "time_ids": seen.time_ids},
            ).sample  # fmt: skip
            x = sampler.step(i, x, sampler.denoised(i, x, output))
    return x
