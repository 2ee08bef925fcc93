"""Step distillation: tasks that teach a U-Net to draw in a few steps.

A student is rolled out as it is sampled: from noise, in its own K steps, by the sampler that draws
with it. Each sample goes through one of the K steps with a gradient, drawn at random, and through
those before it without.

- `ProgressiveDistillation`: the step is to lead where several steps of the teacher lead.

The others look at where the step leads. There, at noise level sigma_below, the latents get more
noise, up to a level sigma within the step, and are held against what the teacher knows:

- `FeatureMatching`: the means of the teacher's features of real latents at that level (SwD's MMD);
- `DistributionMatching`: the teacher's score. The score of what the student draws comes from a
  second U-Net, trained beside it (DMD2's fake score, along the trajectory as in TDM).

As in `koala.generation.samplers`, x = x0 + sigma * noise, and a U-Net sees x / sqrt(sigma^2 + 1).

Shapes: n samples, 4 latent channels, h x w latent pixels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from koala.distillation.forward_process import Noised, NoiseSchedule, predict
from koala.distillation.settings import StepSettings
from koala.distillation.taps import Features, tap_points
from koala.distillation.tasks import Taught, squared_error
from koala.text_conditioning import TextConditioner

LEAST = 0.02  # of the timesteps: nearer to clean latents nothing is compared (DMD2, appendix)


class StepSampler(Protocol):
    """The sampler of a student's K steps; one of `koala.generation.samplers` without added noise.

    timesteps: K. sigmas: K + 1, the last one 0. For `start`, `denoised` and `step` see there.
    """

    timesteps: list[float]
    sigmas: list[float]

    def start(self, noise: Tensor) -> Tensor: ...
    def denoised(self, i: int, x: Tensor, output: Tensor) -> Tensor: ...
    def step(self, i: int, x: Tensor, denoised: Tensor) -> Tensor: ...


class Draws(NamedTuple):
    """The random draws of a batch's samples, each from its own generator."""

    start: Tensor  # fp32 [n, 4, h, w], the noise that a drawing starts from
    step: Tensor  # int64 [n] in [0, K)
    share: Tensor  # fp32 [n] in [0, 1), of the way from the step's lower level to its upper one
    noise: Tensor  # fp32 [n, 4, h, w], added after the step


class Point(NamedTuple):
    """Where a student's step leads, and the level at which it is compared."""

    x: Tensor  # after the step, at sigma_below; on the student's graph
    denoised: Tensor  # the step's estimate of x0; on the student's graph
    below: Tensor  # sigma_below, fp32 [n, 1, 1, 1]
    timesteps: Tensor  # int64 [n], of sigma
    sigma: Tensor  # fp32 [n, 1, 1, 1], at least sigma_below

    @property
    def added(self) -> Tensor:
        """Deviation of the noise from sigma_below to sigma, fp32 [n, 1, 1, 1]."""
        return (self.sigma**2 - self.below**2).clamp(min=0.0).sqrt()


@contextmanager
def without_gradient() -> Iterator[None]:
    """No gradient inside. Autocast's copies of weights are dropped at the end: PyTorch 2.13 tells
    them from those with a gradient, but it was not tried with every version since 2.7."""
    with torch.no_grad():
        yield
    torch.clear_autocast_cache()


class StepDistillation(Taught):
    """What the methods share: the rollout of a student in `settings.steps` steps.

    student: trained, float32; it draws already, if only in many steps. teacher: of any size.
    sampler: of the student's steps. Other arguments as in `Denoising`.
    """

    def __init__(
        self,
        student: UNet2DConditionModel,
        teacher: UNet2DConditionModel,
        conditioner: TextConditioner,
        schedule: NoiseSchedule,
        settings: StepSettings,
        sampler: StepSampler,
        base: str | Path,
        **options: Any,
    ) -> None:
        assert len(sampler.timesteps) == settings.steps, (sampler.timesteps, settings.steps)
        super().__init__(
            student, teacher, conditioner, schedule, base,
            caption_dropout=0.0, sampling=settings.sampling, **options,
        )  # fmt: skip
        self.settings, self.sampler = settings, sampler

    def _draws(self, shape: torch.Size, generators: Sequence[torch.Generator]) -> Draws:
        """Draws for latents of `shape` [n,4,h,w], on the CPU: rollouts choose by them there."""
        each = [
            (
                torch.randn(shape[1:], generator=generator),
                torch.randint(self.settings.steps, (), generator=generator),
                torch.rand((), generator=generator),
                torch.randn(shape[1:], generator=generator),
            )
            for generator in generators
        ]
        return Draws(*(torch.stack(column) for column in zip(*each, strict=True)))

    def _shape(self, batch: dict[str, Any]) -> torch.Size:
        """Of the batch's latents, which are not looked at."""
        if "latents" in batch:
            return batch["latents"].shape
        n, _, height, width = batch["pixels"].shape
        return torch.Size((n, self.trainable.config.in_channels, height // 8, width // 8))

    def _conditions(self, batch: dict[str, Any]) -> Noised:
        """The batch's text and sizes; latents and timesteps are filled in later."""
        text, pooled = self._condition(batch)
        nothing = torch.empty(0, device=self.device)
        time_ids = batch["time_ids"].to(self.device, torch.float32)
        return Noised(nothing, nothing, text, pooled, time_ids)

    def _before(self, drawn: Draws, conditions: Noised) -> Tensor:
        """x before each sample's step, drawn without gradient."""
        x = self.sampler.start(drawn.start.to(self.device))
        ahead = [x]
        with without_gradient():
            for i in range(self.settings.steps - 1):
                seen = _seen(self.sampler, x, torch.full_like(drawn.step, i), conditions)
                output = predict(self.trainable, seen, torch.float32)
                x = self.sampler.step(i, x, self.sampler.denoised(i, x, output))
                ahead.append(x)
        return _chosen(ahead, drawn.step)

    def _point(self, drawn: Draws, conditions: Noised) -> Point:
        """Where each sample's step leads, with the gradient of that step alone."""
        x = self._before(drawn, conditions)
        denoised, after = self._step(x, drawn.step, conditions)
        return Point(after, denoised, *self._level(drawn))

    def _step(self, x: Tensor, step: Tensor, conditions: Noised) -> tuple[Tensor, Tensor]:
        """Each sample's estimate of x0 in its step, with a gradient, and where the step leads."""
        seen = _seen(self.sampler, x, step, conditions)
        output = predict(self._apart["called"], seen, torch.float32)
        return _stepped(self.sampler, x, step, output)

    def _output_of_teacher(self, noised: Noised) -> Tensor:
        """The teacher's prediction, guided if the settings say so."""
        assert self.teacher is not None
        output = predict(self.teacher, noised, self.teacher.dtype)
        if (scale := self.settings.guidance) is None:
            return output
        without = predict(self.teacher, noised.without_text(), self.teacher.dtype)
        return torch.lerp(without, output, scale)  # arXiv 2207.12598, equation 6

    def _level(self, drawn: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """sigma_below, and a timestep within each sample's step with its sigma."""
        least = math.ceil(LEAST * self.schedule.steps)
        times = torch.tensor([*self.sampler.timesteps, least - 1]).long()
        lower, upper = times[drawn.step + 1], times[drawn.step]
        between = lower + 1 + (drawn.share * (upper - lower)).long()
        timesteps = torch.minimum(between, upper).to(self.device)
        below = torch.tensor(self.sampler.sigmas)[drawn.step + 1].view(-1, 1, 1, 1)
        return below.to(self.device), timesteps, self.schedule.sigmas(timesteps)

    def _noised(self, x: Tensor, point: Point, conditions: Noised) -> Noised:
        """What a U-Net sees of x at the point's level."""
        noisy = x / (point.sigma**2 + 1).sqrt()
        return conditions._replace(noisy=noisy, timesteps=point.timesteps)


class ProgressiveDistillation(StepDistillation):
    """A step leads where several of the teacher's lead (Salimans and Ho, 2202.00512):

        L = (1 / sigma^2 + 1) || x0(x) - x0*(x) ||^2

    x is what the student has drawn before the step, at sigma, and x0* the estimate with which the
    step ends where `settings.substeps` steps of the teacher from x end (their algorithm 2). The
    weight is their "SNR+1", which makes L the squared error of v. They start from real images with
    noise and halve the steps again and again; here x is the student's own, so that it learns from
    the errors of the steps before, and all substeps are done at once. No image is used.

    finer: the sampler of the teacher's steps, all of them; it has every noise level of `sampler`.
    Other arguments as of `StepDistillation`.
    """

    def __init__(self, *arguments: Any, finer: StepSampler, **options: Any) -> None:
        super().__init__(*arguments, **options)
        assert self.settings.substeps is not None
        assert finer.timesteps[:: self.settings.substeps] == self.sampler.timesteps
        self.finer = finer

    def losses(
        self, batch: dict[str, Any], generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """{"progressive", "loss"}, which are equal."""
        drawn, conditions = self._draws(self._shape(batch), generators), self._conditions(batch)
        x = self._before(drawn, conditions)
        denoised, _ = self._step(x, drawn.step, conditions)
        sigmas = torch.tensor(self.sampler.sigmas).view(-1, 1, 1, 1)
        sigma, below = sigmas[drawn.step].to(x), sigmas[drawn.step + 1].to(x)
        end = self._end(x, drawn.step, conditions)
        target = (sigma * end - below * x) / (sigma - below)  # of Euler's method
        errors = squared_error(denoised, target) * (1 / sigma**2 + 1).flatten()
        progressive = errors.mean()
        return {"progressive": progressive, "loss": progressive}

    def _end(self, x: Tensor, step: Tensor, conditions: Noised) -> Tensor:
        """Where the teacher's steps end that fill each sample's step."""
        substeps = self.settings.substeps
        assert substeps is not None
        with without_gradient():
            for i in range(substeps):
                at = step * substeps + i
                output = self._output_of_teacher(_seen(self.finer, x, at, conditions))
                _, x = _stepped(self.finer, x, at, output)
        return x


class FeatureMatching(StepDistillation):
    """MMD of the teacher's features, with a linear kernel over an image's places (SwD, 2503.16397):

        L = mean over taps of || mean f_T(x) - mean f_T(y) ||^2

    x is what the student draws, y a real image of the same caption with the same noise, both at the
    same level; means are over the feature's places. Each tap's error is divided by the mean square
    of the real image's feature, so that no tap outweighs the others. No second network is trained.
    Arguments as of `StepDistillation`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._features = Features(self.teacher, tap_points(self.teacher, self.settings.taps))

    @property
    def through_teacher(self) -> bool:
        return True

    def losses(
        self, batch: dict[str, Any], generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """{"mmd", "loss"} and each tap's part, without gradient, as "tap PATH" of the teacher."""
        latents, std = self._moments(batch)
        drawn, conditions = self._draws(latents.shape, generators), self._conditions(batch)
        if std is not None:
            own = [torch.randn(latents.shape[1:], generator=g) for g in generators]
            latents = latents + std * torch.stack(own).to(self.device)
        point = self._point(drawn, conditions)
        more = point.added * drawn.noise.to(self.device)
        real = latents + point.below * drawn.start.to(self.device) + more
        ours = self._means(point.x + more, point, conditions)
        with without_gradient():
            theirs = self._means(real, point, conditions)
        errors = {
            path: (squared_error(ours[path][0], mean) / square).mean()
            for path, (mean, square) in theirs.items()
        }
        mmd = torch.stack([*errors.values()]).mean()
        taps = {f"tap {path}": error.detach() for path, error in errors.items()}
        return {**taps, "mmd": mmd, "loss": mmd}

    def _means(
        self, x: Tensor, point: Point, conditions: Noised
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The mean of each feature over an image's places [n, width], and its mean square [n]."""
        with self._features.capture() as features:
            predict(self.teacher, self._noised(x, point, conditions), self.teacher.dtype)
        return {path: _statistics(feature) for path, feature in features.items()}


class DistributionMatching(StepDistillation):
    """DMD2 (2405.14867) along the student's trajectory (TDM, 2503.06674). The student's loss has
    the gradient of the KL divergence from the teacher's distribution (DMD2, equation 1):

        gradient by x0 = (x0_fake(x) - x0_real(x)) / mean |x0 - x0_real(x)|

    x0_real is the teacher's estimate, guided if the settings say so, and x0_fake that of the
    critic, a U-Net like the teacher that learns to denoise what the student draws. The divisor is
    each sample's (DMD, 2311.18828, equation 8).

    The critic predicts the noise between what the student draws and a higher level. TDM compares
    each step's result at the noise levels of that step; so do we. Neither DMD2's adversarial loss
    nor any image is used. Arguments as of `StepDistillation`.
    """

    def __init__(
        self,
        student: UNet2DConditionModel,
        teacher: UNet2DConditionModel,
        *arguments: Any,
        **options: Any,
    ) -> None:
        critic = copy.deepcopy(teacher).requires_grad_(True)  # float32: the teacher will not be
        super().__init__(student, teacher, *arguments, **options)
        self.fake = nn.Module.to(critic, self.device)
        self._apart["critic_called"] = self.fake

    @property
    def critic(self) -> UNet2DConditionModel:
        """The U-Net that learns what the student draws, float32."""
        return self.fake

    def call_critic_through(self, wrapped: nn.Module) -> None:
        """Calls the critic through `wrapped` from now on, as DDP requires."""
        self._apart["critic_called"] = wrapped

    def losses(
        self, batch: dict[str, Any], generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """{"dmd", "loss"}: half the mean square of the gradient by x0, which falls to 0."""
        drawn, conditions = self._draws(self._shape(batch), generators), self._conditions(batch)
        point = self._point(drawn, conditions)
        with without_gradient():
            x = point.x + point.added * drawn.noise.to(self.device)
            noised = self._noised(x, point, conditions)
            fake = x - point.sigma * self._noise_by_critic(self.fake, noised)
            real = x - point.sigma * self._noise_by_teacher(noised)
            apart = (point.denoised - real).abs().mean((1, 2, 3), keepdim=True)
            target = point.denoised - (fake - real) / apart
        dmd = 0.5 * squared_error(point.denoised, target).mean()
        return {"dmd": dmd, "loss": dmd}

    def critic_losses(
        self, batch: dict[str, Any], generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """{"loss"}: || (added / sigma) eps_fake - noise ||^2, for x = x_below + added * noise.

        It is least where eps_fake is the noise in x for a student whose results have noise of their
        own (score matching, Vincent 2011); after the last step the factor is 1.
        """
        drawn, conditions = self._draws(self._shape(batch), generators), self._conditions(batch)
        noise = drawn.noise.to(self.device)
        with without_gradient():
            point = self._point(drawn, conditions)
            noised = self._noised(point.x + point.added * noise, point, conditions)
        predicted = self._noise_by_critic(self._apart["critic_called"], noised)
        return {"loss": squared_error(point.added / point.sigma * predicted, noise).mean()}

    def _noise_by_critic(self, critic: nn.Module, noised: Noised) -> Tensor:
        output = predict(critic, noised, torch.float32)
        return self.schedule.epsilon(output, noised.noisy, noised.timesteps)

    def _noise_by_teacher(self, noised: Noised) -> Tensor:
        output = self._output_of_teacher(noised)
        return self.schedule.epsilon(output, noised.noisy, noised.timesteps)


def _seen(sampler: StepSampler, x: Tensor, step: Tensor, conditions: Noised) -> Noised:
    """What a U-Net sees of x before each sample's step of the sampler."""
    sigmas = torch.tensor(sampler.sigmas)[step].view(-1, 1, 1, 1).to(x.device)
    timesteps = torch.tensor(sampler.timesteps)[step].long().to(x.device)
    return conditions._replace(noisy=x / (sigmas**2 + 1).sqrt(), timesteps=timesteps)


def _stepped(
    sampler: StepSampler, x: Tensor, step: Tensor, output: Tensor
) -> tuple[Tensor, Tensor]:
    """Each sample's estimate of x0 in its own step of the sampler, and where that step leads."""
    steps = range(len(sampler.timesteps))
    each = [sampler.denoised(i, x, output) for i in steps]
    after = [sampler.step(i, x, denoised) for i, denoised in enumerate(each)]
    return _chosen(each, step), _chosen(after, step)


def _chosen(each: Sequence[Tensor], which: Tensor) -> Tensor:
    """Of the tensors [n, ...] the which[i]-th's row i."""
    return torch.stack([*each])[which, torch.arange(len(which))]


def _statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the places [n, width] and mean square [n], fp32, of [n, places, width] or
    [n, width, h, w]."""
    feature = feature.float()
    mean = feature.flatten(2).mean(2) if feature.ndim == 4 else feature.mean(1)
    return mean, feature.square().flatten(1).mean(1)
