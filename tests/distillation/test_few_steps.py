"""Step distillation: losses equal a direct computation, students move toward their teacher, and
loops with two networks resume, accumulate and divide as those with one."""

import copy
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

from koala.checkpoints.load import load_scheduler_config
from koala.checkpoints.prediction import VELOCITY, Prediction
from koala.checkpoints.sampling import Sampling, of_config
from koala.distillation.few_steps import (
    DistributionMatching,
    ProgressiveDistillation,
    StepDistillation,
)
from koala.distillation.forward_process import NoiseSchedule, generators_at
from koala.distillation.loop import train
from koala.distillation.parallel import World, joined, lay_out
from koala.distillation.settings import PLAIN, Hardware, StepSettings, Tap, Training
from koala.errors import Failure, UserError
from koala.recipes.tasks import student_task
from koala.text_conditioning import TextConditioner
from toy import toy_scheduler, toy_unet
from toy_training import SignalledStream, Stream, processes, state, toy_task

TRAILING = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "timestep_spacing": "trailing"}  # fmt: skip
SCHEDULE = NoiseSchedule(dict(toy_scheduler().config))
MMD = StepSettings("mmd", 2, taps=(Tap("lf", ("UP-1", "UP-3")), Tap("sa", ("DW-2",))))
DMD = StepSettings("dmd", 3, guidance=2.0)
PROGRESSIVE = StepSettings("progressive", 3, guidance=2.0, substeps=2)
TRAINING = Training(
    samples=24, batch=4, lr=1e-3, ema_half_life=32, log_every=12, preview_every=24, save_every=0,
    critic_lr=2e-3, critic_updates=2, keep=100,
)  # fmt: skip
GRADIENT_BOUND = 1e-5  # of the difference's norm, relative to the gradient's


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


@pytest.mark.parametrize("changes", [{}, Prediction(VELOCITY).config], ids=["epsilon", "v"])
def test_a_progressive_step_ends_where_the_teachers_steps_end(base: Path, changes: dict) -> None:
    """The loss is the squared error, of v, from the prediction with which it would."""
    task = new_task(base, PROGRESSIVE, **changes)
    config = {**load_scheduler_config(base), **changes}
    hand = ByHand(task, base, config)
    losses = task.losses(Stream().batch(0, 4), seeded())
    losses["loss"].backward()
    assert all(p.grad is None for p in task.teacher.parameters())
    assert all(p.grad is not None for p in task.trainable.parameters())
    coarse = hand.scheduler
    fine = EulerDiscreteScheduler.from_config({**config, **TRAILING})
    errors = []
    with torch.no_grad():
        for i, (start, step, _, _) in enumerate(hand.draws):
            fine.set_timesteps(6)
            x, denoised = start[None] * fine.sigmas[0], None
            for k in range(step + 1):
                coarse.set_timesteps(3)
                coarse._init_step_index(t := coarse.timesteps[k])
                seen = coarse.scale_model_input(x, t)
                ours = hand.output(task.trainable, i, seen, int(t), True)
                before, done = x, coarse.step(ours, t, x)
                x, denoised = done.prev_sample, done.pred_original_sample
            y = before
            for t in fine.timesteps[2 * step : 2 * step + 2]:
                seen = fine.scale_model_input(y, t)
                no, yes = (
                    hand.output(task.teacher, i, seen, int(t), text) for text in (False, True)
                )
                y = fine.step(no + 2.0 * (yes - no), t, y).prev_sample
            sigma, below = coarse.sigmas[step], coarse.sigmas[step + 1]
            # Both ends of Euler's step lie on the line from x to the estimate of x0.
            apart = (x - y) * sigma / (sigma - below)
            assert denoised is not None
            errors.append((apart.square() * (1 / sigma**2 + 1)).mean())
    torch.testing.assert_close(
        losses["loss"].detach(), torch.stack(errors).mean(), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("settings", [MMD, DMD, PROGRESSIVE], ids=["mmd", "dmd", "progressive"])
def test_bf16_loses_no_gradient_to_the_passes_without(base: Path, settings: StepSettings) -> None:
    """Autocast keeps copies of weights; those made without gradient must serve no later pass."""
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


class Gaussian(nn.Module):
    """The denoiser of latents that are normal, of one mean and deviation: a U-Net's stand-in whose
    distribution is known."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log = nn.Parameter(torch.tensor(deviation).log())
        self.dtype = torch.float32

    def forward(self, z: Tensor, timesteps: Tensor, **conditions: object) -> SimpleNamespace:
        abar = SCHEDULE.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        variance = abar * (2 * self.log).exp() + 1 - abar
        return SimpleNamespace(sample=(1 - abar).sqrt() * (z - abar.sqrt() * self.mean) / variance)


def drawn(task: StepDistillation) -> Tensor:
    """What the student draws from 128 noises, by the task's own rollout."""
    shape, generators = torch.Size((128, 4, 8, 8)), generators_at(7, 0, 128)
    draws = task._draws(shape, generators)
    last = draws._replace(step=torch.full((128,), task.settings.steps - 1))
    given = Stream().batch(0, 128)
    with torch.no_grad():
        return task._point(last, task._conditions(given)).x


@pytest.mark.parametrize("steps", [1, 2])
def test_a_student_of_dmd_draws_what_its_teacher_describes(base: Path, steps: int) -> None:
    """A normal distribution's mean and deviation, within a tenth."""
    settings = StepSettings("dmd", steps)
    teacher, student = Gaussian(0.5, 0.7), Gaussian(-0.5, 1.5)
    conditioner = TextConditioner.from_folder(base)
    config = load_scheduler_config(base)
    task = student_task(settings, student, teacher, conditioner, config, base)
    assert isinstance(task, DistributionMatching)
    optimizers = {
        False: torch.optim.Adam(task.trainable.parameters(), lr=0.02, betas=(0.5, 0.9)),
        True: torch.optim.Adam(task.critic.parameters(), lr=0.05, betas=(0.5, 0.9)),
    }
    batch = Stream().batch(0, 16)
    for i in range(600):
        of_critic = i % 3 < 2
        compute = task.critic_losses if of_critic else task.losses
        optimizers[of_critic].zero_grad()
        compute(batch, generators_at(0, 16 * i, 16))["loss"].backward()
        optimizers[of_critic].step()
    images = drawn(task)
    assert abs(images.mean() - 0.5) < 0.1
    assert abs(images.std() - 0.7) < 0.1


def test_a_student_of_mmd_comes_nearer_to_the_images(base: Path) -> None:
    """Images are brighter in one channel: the channels' means come half of the way in 20 steps."""
    task = new_task(base, StepSettings("mmd", 2, taps=(Tap("lf"),)))
    batch = Stream().batch(0, 8)
    batch["latents"][:, 0] += 3.0
    real = batch["latents"].mean((0, 2, 3))
    before = (drawn(task).mean((0, 2, 3)) - real).norm()
    optimizer = torch.optim.Adam(task.trainable.parameters(), lr=1e-3)
    for i in range(20):
        optimizer.zero_grad()
        task.losses(batch, generators_at(0, 8 * i, 8))["loss"].backward()
        optimizer.step()
    assert (drawn(task).mean((0, 2, 3)) - real).norm() < 0.5 * before


def test_a_progressive_student_draws_in_its_steps_what_its_teacher_draws_in_more(
    base: Path,
) -> None:
    """From the same noise; the difference falls to less than 0.6 in 40 steps."""
    task = new_task(base, StepSettings("progressive", 2, substeps=3))
    assert isinstance(task, ProgressiveDistillation)
    batch = Stream().batch(0, 128)
    conditions = task._conditions(batch)
    draws = task._draws(torch.Size((128, 4, 8, 8)), generators_at(7, 0, 128))
    x = task.sampler.start(draws.start)
    for step in range(2):
        x = task._end(x, torch.full((128,), step), conditions)
    before = (drawn(task) - x).norm()
    optimizer = torch.optim.Adam(task.trainable.parameters(), lr=4e-3)
    for i in range(40):
        optimizer.zero_grad()
        task.losses(Stream().batch(8 * i, 8), generators_at(0, 8 * i, 8))["loss"].backward()
        optimizer.step()
    assert (drawn(task) - x).norm() < 0.6 * before


# --- the loop -------------------------------------------------------------------------------


def distil(
    base: Path,
    run: Path,
    hardware: Hardware = PLAIN,
    *,
    training: Training = TRAINING,
    settings: StepSettings = DMD,
    world: World | None = None,
    data: Stream | None = None,
) -> None:
    task = new_task(base, settings)
    layout = lay_out(task, hardware, world or World())
    train(task, data or Stream(), training, run, layout=layout)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cycles of two steps of the critic and one of the student, every state kept."""
    run = tmp_path_factory.mktemp("whole") / "run"
    distil(base, run)
    return run


def test_steps_train_critic_and_student_by_turns(base: Path, whole: Path, tmp_path: Path) -> None:
    states = {0: initial(base)} | {seen: state(whole, seen) for seen in range(4, 25, 4)}
    for seen in range(4, 25, 4):
        moved = {
            prefix: any(
                not torch.equal(value, states[seen - 4][name])
                for name, value in states[seen].items()
                if name.startswith("weights.critic.") == (prefix == "critic")
                and name.startswith("weights.")
            )
            for prefix in ("critic", "student")
        }
        assert moved == {"critic": seen % 12 != 0, "student": seen % 12 == 0}
    lines = [json.loads(line) for line in (whole / "stats.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [12, 24]
    assert {"dmd", "loss", "grad_norm", "critic_loss", "critic_grad_norm"} <= lines[0].keys()
    assert not any("critic" in name for name in states[24] if name.startswith("ema."))


def initial(base: Path) -> dict[str, Tensor]:
    task = new_task(base, DMD)
    assert isinstance(task, DistributionMatching)
    student = {f"weights.{name}": p for name, p in task.trainable.named_parameters()}
    critic = {f"weights.critic.{name}": p for name, p in task.critic.named_parameters()}
    return student | critic


@pytest.mark.parametrize("at", [4, 12])
def test_a_run_with_two_networks_goes_on_bit_for_bit(
    base: Path, whole: Path, tmp_path: Path, at: int
) -> None:
    """Stopped after a step of the critic, and before the student ever moved."""
    run = tmp_path / "run"
    with pytest.raises(Failure, match=f"stopped after {at + 4}"):
        distil(base, run, data=SignalledStream(at, signal.SIGTERM))
    stream = Stream()
    distil(base, run, data=stream)
    assert stream.asked == list(range(at + 4, 24))
    ours, theirs = state(run, 24), state(whole, 24)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    volatile = ("seconds", "samples_per_second", "memory_gib")
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if k not in volatile}
            for line in (folder / "stats.jsonl").read_text().splitlines()
        ]
        for folder in (run, whole)
    ]
    assert lines[0] == lines[1]


ONE = replace(TRAINING, samples=8, critic_updates=1, critic_lr=1e-7)  # a step of each network
LAYOUTS = {
    "ddp": PLAIN,
    "shards": Hardware(sharding="fsdp", teacher="sharded", checkpointing=True, accumulate=2),
}


def _work(rank: int, base: Path, folder: Path) -> None:
    with joined("cpu") as world:
        for name, hardware in LAYOUTS.items():
            distil(base, folder / f"{name}-dmd", hardware, training=ONE, world=world)
            plain = replace(hardware, teacher="whole")  # gradients go through it
            run = folder / f"{name}-mmd"
            distil(base, run, plain, training=ONE_NETWORK, settings=MMD, world=world)
            run = folder / f"{name}-progressive"
            distil(base, run, hardware, training=ONE_NETWORK, settings=PROGRESSIVE, world=world)


ONE_NETWORK = replace(ONE, samples=4, critic_updates=0, critic_lr=0.0)


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left, and one."""
    folder = tmp_path_factory.mktemp("two")
    processes(_work, base, folder)
    distil(base, folder / "one-dmd", training=ONE)
    distil(base, folder / "one-mmd", training=ONE_NETWORK, settings=MMD)
    distil(base, folder / "one-progressive", training=ONE_NETWORK, settings=PROGRESSIVE)
    parts = Hardware(accumulate=2, checkpointing=True)
    distil(base, folder / "parts-dmd", parts, training=ONE)
    distil(base, folder / "parts-mmd", parts, training=ONE_NETWORK, settings=MMD)
    run = folder / "parts-progressive"
    distil(base, run, parts, training=ONE_NETWORK, settings=PROGRESSIVE)
    return folder


@pytest.mark.parametrize("method", ["dmd", "mmd", "progressive"])
@pytest.mark.parametrize("name", [*LAYOUTS, "parts"])
def test_hardware_changes_a_step_of_each_network_by_rounding_alone(
    folder: Path, name: str, method: str
) -> None:
    seen = 8 if method == "dmd" else 4
    ours, theirs = state(folder / f"{name}-{method}", seen), state(folder / f"one-{method}", seen)
    assert ours.keys() == theirs.keys()
    for of_critic in (True, False) if method == "dmd" else (False,):
        names = [
            key
            for key in theirs
            if key.startswith("optimizer.") and key.endswith(".exp_avg")
            and key.startswith("optimizer.critic.") == of_critic
        ]  # fmt: skip
        gradient = torch.cat([theirs[key].flatten() for key in names])
        apart = torch.cat([ours[key].flatten() for key in names]) - gradient
        # The student's comes after the critic's step, which rounds.
        bound = GRADIENT_BOUND if of_critic or method != "dmd" else 10 * GRADIENT_BOUND
        assert apart.norm() < bound * gradient.norm()


# --- what is refused, and what is written ---------------------------------------------------


def test_the_folder_says_its_steps_and_diffusers_draws_it(base: Path, tmp_path: Path) -> None:
    task = new_task(base, MMD)
    task.export(task.trainable, tmp_path / "out")
    config = load_scheduler_config(tmp_path / "out")
    assert of_config(config) == Sampling(steps=2, guidance=1.0)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.timestep_spacing == "trailing"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "gan"}, "unknown method 'gan': choose progressive, mmd, dmd"),
        ({"method": "dmd", "steps": 0}, "steps 0: a student draws in 1 to 10"),
        ({"method": "dmd", "steps": 11}, "steps 11: a student draws in 1 to 10"),
        ({"method": "dmd", "guidance": 1.0}, "guidance 1.0: it must be above 1"),
        ({"method": "dmd", "taps": (Tap("sa"),)}, "taps have no effect on method dmd"),
        ({"method": "mmd"}, "method mmd needs taps"),
        ({"method": "mmd", "taps": (Tap("sa"),), "guidance": 2.0}, "guidance 2 has no effect"),
        ({"method": "progressive"}, "method progressive needs substeps"),
        ({"method": "progressive", "substeps": 0}, "substeps 0: give 1 to 50"),
        ({"method": "progressive", "substeps": 51}, "substeps 51: give 1 to 50"),
        ({"method": "dmd", "substeps": 2}, "substeps have no effect on method dmd"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        StepSettings(**given)


def test_a_critics_settings_need_a_critic_and_a_critic_needs_them(
    base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="this task trains one network"):
        train(toy_task(base), Stream(), TRAINING, tmp_path / "run")
    with pytest.raises(UserError, match="this task trains a second network"):
        distil(base, tmp_path / "run", training=ONE_NETWORK)
    with pytest.raises(UserError, match=r"critic_updates 2: give both a value above 0"):
        replace(TRAINING, critic_lr=0.0)
    with pytest.raises(UserError, match="critic_lr is -1"):
        replace(TRAINING, critic_lr=-1)


@pytest.mark.parametrize("place", ["offloaded", "sharded"])
def test_gradients_through_a_teacher_keep_it_whole(base: Path, place: str) -> None:
    with pytest.raises(UserError, match="needs gradients through the teacher"):
        lay_out(new_task(base, MMD), Hardware(teacher=place), World())
