"""Tasks: small objects that turn a batch of latents into named losses.

`Denoising` trains a U-Net on L_task alone (a teacher from scratch, fine-tuning, a baseline).
`Distillation` adds two terms that compare the student with its teacher (KOALA A.5):

    L = w_task L_task + w_out L_outKD + w_feat L_featKD

A task owns the trainable module, draws previews and writes the finished model. Optimisers,
checkpoints and progress belong to the loop. Every loss is a mean over independent samples, so a
batch may be computed in parts.

Shapes: n samples, 4 latent channels, h x w latent pixels, L tokens, D text width, P pooled width.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from koala.checkpoints import model_card
from koala.checkpoints.sampling import Sampling
from koala.distillation.forward_process import Noised, NoiseSchedule, draw_noise, predict
from koala.distillation.settings import DistillationSettings, check_dropout, check_min_snr
from koala.distillation.taps import Features, paired_points, tap_points
from koala.errors import UserError
from koala.text_conditioning import TextConditioner
from koala.utils.atomic import new_folder
from koala.utils.device import compute_dtype

# Draws one sheet: (U-Net, prompts, seed) -> image, or None if nothing can be drawn.
Draw = Callable[[nn.Module, Sequence[str], int], Image.Image | None]
# The VAE: fp32 images [n, 3, 8h, 8w] in [-1, 1] to mean and standard deviation of the posterior,
# fp32 [n, 4, h, w], normalised.
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]

PREVIEW_SEED = 0  # the same noise in every preview, so that a run's previews are comparable


def squared_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean squared error of each sample, in fp32 even under autocast: [n, ...] to [n]."""
    return (ours.float() - theirs.float()).square().flatten(1).mean(1)


class Denoising(nn.Module):
    """L_task alone: ||eps - eps_S(z_t, t, c)||^2, for an SDXL-class U-Net; or v in place of eps.

    unet: the trainable U-Net, float32. conditioner: the frozen text encoders.
    base: pipeline folder that `export` copies, with its U-Net replaced; it must exist (UserError).
    caption_dropout: share of samples whose text is replaced by the zeros that the pipeline uses
      for an empty negative prompt, for classifier-free guidance; 0 to 1, else UserError.
    min_snr: gamma of `NoiseSchedule.min_snr_weights`, or None: all timesteps have equal weight.
    draw, prompts: how and what `preview` draws; without `draw` there is no preview.
    encode: the VAE, if batches hold images instead of latents.
    sampling: what the result is drawn with, if not as its base; `export` writes it.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        conditioner: TextConditioner,
        schedule: NoiseSchedule,
        base: str | Path,
        *,
        caption_dropout: float = 0.1,
        min_snr: float | None = None,
        draw: Draw | None = None,
        prompts: Sequence[str] = (),
        encode: Encode | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__()
        check_dropout(caption_dropout)
        check_min_snr(min_snr)
        if draw is not None and not prompts:
            raise UserError("previews need prompts: give at least one, or no `draw`")
        self.base = Path(base)
        if not (self.base / "model_index.json").is_file():
            raise UserError(f"{base}: not a pipeline folder (no model_index.json)")
        self.trainable = unet
        self.schedule = schedule
        self.caption_dropout = caption_dropout
        self.min_snr = min_snr
        self.prompts = tuple(prompts)
        self.sampling = sampling
        self._draw = draw
        self._encode = encode
        # Not submodules: excluded from state dicts and .train().
        self._apart: dict[str, Any] = {"conditioner": conditioner, "called": unet}

    @property
    def device(self) -> torch.device:
        return next(self.trainable.parameters()).device

    @property
    def tokens(self) -> int:
        """Number of tokens that the text encoders read."""
        return self._apart["conditioner"].tokens

    @property
    def teacher(self) -> UNet2DConditionModel | None:
        """The frozen U-Net that runs beside the trainable one."""
        return None

    @property
    def through_teacher(self) -> bool:
        """Whether gradients go through the teacher, to the student before it."""
        return False

    def call_through(self, wrapped: nn.Module) -> None:
        """Calls the trainable module through `wrapped` from now on, as DDP requires."""
        self._apart["called"] = wrapped

    def noised(
        self, batch: dict[str, Any], generators: Sequence[torch.Generator]
    ) -> tuple[Noised, Tensor]:
        """Draws eps, t and the dropped captions of each sample from its own generator.

        Returns the noised batch, and what the U-Net is to predict: eps or v, fp32 [n,4,h,w].

        batch: {"latents": float [n,4,h,w] normalised, "captions": n strings,
        "time_ids": float [n,6]}, and "text" [n,L,D] and "pooled" [n,P] if prepared; instead of
        latents "pixels": uint8 [n,3,8h,8w], encoded here with one draw from the posterior each.
        generators: n, on the CPU (`koala.distillation.forward_process`).
        """
        latents, std = self._moments(batch)
        drawn = draw_noise(latents.shape, self.schedule.steps, generators)
        if std is not None:
            own = [torch.randn(latents.shape[1:], generator=g) for g in generators]
            latents = latents + std * torch.stack(own).to(self.device)
        noise, timesteps = drawn.noise.to(self.device), drawn.timesteps.to(self.device)
        text, pooled = self._condition(batch)
        kept = (drawn.share >= self.caption_dropout).to(self.device)  # the others get zeros
        noised = Noised(
            noisy=self.schedule.add_noise(latents, noise, timesteps),
            timesteps=timesteps,
            text=text * kept[:, None, None],
            pooled=pooled * kept[:, None],
            time_ids=batch["time_ids"].to(self.device, torch.float32),
        )
        return noised, self.schedule.target(latents, noise, timesteps)

    @torch.no_grad()
    def _moments(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The latents and None; for images, mean and standard deviation of the posterior."""
        if "pixels" not in batch:
            return batch["latents"].to(self.device, torch.float32), None
        assert self._encode is not None, "images need a VAE"
        return self._encode(batch["pixels"].to(self.device).float() / 127.5 - 1)

    @torch.no_grad()
    def _condition(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if "text" in batch:
            return batch["text"].to(self.device), batch["pooled"].to(self.device)
        conditioner: TextConditioner = self._apart["conditioner"]
        with torch.autocast(self.device.type, enabled=False):  # as exact as in generation
            text, pooled = conditioner(list(batch["captions"]))
        return text.to(self.device), pooled.to(self.device)

    def losses(
        self, batch: dict[str, Any], generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """{"task", "loss"}: fp32 scalars; arguments as in `noised`."""
        noised, target = self.noised(batch, generators)
        prediction = predict(self._apart["called"], noised, torch.float32)
        task = self._task_loss(prediction, target, noised.timesteps)
        return {"task": task, "loss": task}

    def _task_loss(self, prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        errors = squared_error(prediction, target)
        if self.min_snr is not None:
            errors = errors * self.schedule.min_snr_weights(timesteps, self.min_snr)
        return errors.mean()

    def preview(self, trainable: nn.Module) -> Image.Image | None:
        """A sheet of the task's prompts drawn with `trainable`, always from the same noise."""
        if self._draw is None:
            return None
        with torch.no_grad():
            return self._draw(trainable, self.prompts, PREVIEW_SEED)

    def export(self, trainable: nn.Module, folder: str | Path) -> None:
        """Writes a pipeline folder: `base` with the weights and config of `trainable` as U-Net.

        Written atomically; an existing folder is replaced. The base's model card is not copied: the
        run writes another (`koala.checkpoints.model_card`).
        """
        assert isinstance(trainable, UNet2DConditionModel)
        folder = Path(folder)
        assert folder.resolve() != self.base.resolve(), "the base would be replaced"
        with new_folder(folder, replace=True) as part:
            kept = shutil.ignore_patterns("unet", model_card.FILE)
            shutil.copytree(self.base, part, ignore=kept, dirs_exist_ok=True)
            trainable.save_pretrained(part / "unet", safe_serialization=True)
            with _edited(part / "unet" / "config.json") as config:
                config.pop("_name_or_path", None)  # a local path
            if self.sampling is not None:
                self.sampling.state_in(part)


@contextmanager
def _edited(file: Path) -> Iterator[dict[str, Any]]:
    """A JSON file's values, written back at the end."""
    values = json.loads(file.read_text("utf-8"))
    yield values
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class Taught(Denoising):
    """A task with a frozen teacher beside the student; its losses are defined by subclasses.

    student: trained, float32. teacher: evaluated in `compute_dtype`; it follows the student to its
    device. Other arguments as in `Denoising`.
    """

    def __init__(
        self,
        student: UNet2DConditionModel,
        teacher: UNet2DConditionModel,
        conditioner: TextConditioner,
        schedule: NoiseSchedule,
        base: str | Path,
        **options: Any,
    ) -> None:
        assert student is not teacher, "the teacher must be a model of its own"
        super().__init__(student, conditioner, schedule, base, **options)
        self._apart["teacher"] = teacher.requires_grad_(False).eval()
        self._place_teacher()

    @property
    def teacher(self) -> UNet2DConditionModel:
        """The frozen U-Net that runs beside the trainable one."""
        return self._apart["teacher"]

    def _place_teacher(self) -> None:
        # Not diffusers' own `to`, which warns needlessly about fp32 modules.
        nn.Module.to(self.teacher, self.device, compute_dtype(self.device))

    def _apply(self, *args: Any, **kwargs: Any) -> Taught:
        super()._apply(*args, **kwargs)  # called by .to() and .cuda(): the teacher follows
        self._place_teacher()
        return self


class Distillation(Taught):
    """L_task + L_outKD + L_featKD (KOALA A.5), each a mean squared error in fp32:

        L_outKD  = ||eps_T - eps_S||^2
        L_featKD = sum over taps of ||f_T - f_S||^2

    eps stands for v where the models predict v.

    student, teacher: as in `Taught`. Both see the same z_t, t and text. Other arguments as in
    `Denoising`. UserError if the student is not a cut of the teacher or a tap does not exist.
    """

    def __init__(
        self,
        student: UNet2DConditionModel,
        teacher: UNet2DConditionModel,
        conditioner: TextConditioner,
        schedule: NoiseSchedule,
        settings: DistillationSettings,
        base: str | Path,
        **options: Any,
    ) -> None:
        super().__init__(
            student, teacher, conditioner, schedule, base,
            caption_dropout=settings.caption_dropout, min_snr=settings.min_snr,
            sampling=settings.sampling, **options,
        )  # fmt: skip
        self.settings = settings
        self.pairs = self.tapped(student, teacher)
        self._features = Features(student, [*self.pairs])
        self._teacher_features = Features(teacher, [*self.pairs.values()])

    def tapped(
        self, student: UNet2DConditionModel, teacher: UNet2DConditionModel
    ) -> dict[str, str]:
        """The student's modules whose outputs are compared -> the teacher's. May be overridden."""
        points = tap_points(student, self.settings.taps)
        pairs = paired_points(student, teacher, points, self.settings.depth_rule)
        return dict(zip(points, pairs, strict=True))

    def tap_error(self, feature: Tensor, of_teacher: Tensor) -> Tensor:
        """The error of each sample at a tap: [n, ...] twice to fp32 [n]. May be overridden."""
        error = squared_error(feature, of_teacher)
        if self.settings.normalise:
            error = error / of_teacher.float().square().flatten(1).mean(1)
        return error

    def losses(
        self, batch: dict[str, Any], generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """The computed terms of {"task", "out", "feat"}, unweighted, and their weighted "loss".

        Also each tap's part of "feat", without gradient, as "tap PATH" by the student's module.
        """
        settings = self.settings
        noised, noise = self.noised(batch, generators)
        with self._features.capture() as features:
            prediction = predict(self._apart["called"], noised, torch.float32)
        terms: dict[str, tuple[float, Tensor]] = {}
        taps: dict[str, Tensor] = {}
        if settings.task_weight > 0:
            task = self._task_loss(prediction, noise, noised.timesteps)
            terms["task"] = settings.task_weight, task
        if settings.learns_from_teacher:
            target, teacher_features = self._teach(noised)
            if settings.output_weight > 0:
                out = squared_error(prediction, target)
                if settings.min_snr_out:
                    assert self.min_snr is not None
                    out = out * self.schedule.min_snr_weights(noised.timesteps, self.min_snr)
                terms["out"] = settings.output_weight, out.mean()
            if settings.feature_weight > 0:
                taps = self._tap_errors(features, teacher_features)
                terms["feat"] = settings.feature_weight, torch.stack([*taps.values()]).sum()
        losses = {f"tap {point}": error.detach() for point, error in taps.items()}
        losses |= {name: term for name, (_, term) in terms.items()}
        losses["loss"] = torch.stack([weight * term for weight, term in terms.values()]).sum()
        return losses

    @torch.no_grad()
    def _teach(self, noised: Noised) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's prediction and features, guided if the settings say so."""
        prediction, features = self._pass_of_teacher(noised)
        if (scale := self.settings.guidance) is None:
            return prediction, features
        without, features_without = self._pass_of_teacher(noised.without_text())
        guided = {
            point: torch.lerp(features_without[point].float(), feature.float(), scale)
            for point, feature in features.items()
        }
        return torch.lerp(without, prediction, scale), guided  # arXiv 2207.12598, equation 6

    def _pass_of_teacher(self, noised: Noised) -> tuple[Tensor, dict[str, Tensor]]:
        with self._teacher_features.capture() as features:
            prediction = predict(self.teacher, noised, self.teacher.dtype)
        return prediction, features

    def _tap_errors(
        self, features: dict[str, Tensor], teacher_features: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {
            point: self.tap_error(features[point], teacher_features[pair]).mean()
            for point, pair in self.pairs.items()
        }
