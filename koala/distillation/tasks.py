"""What is learnt: small objects that turn a batch of latents into named losses.

`Denoising` trains a U-Net on L_task alone (a teacher from scratch, a fine-tuning, a baseline).
`Distillation` adds the two terms that compare the student with its teacher (KOALA A.5):

    L = w_task L_task + w_out L_outKD + w_feat L_featKD

A task owns the trainable module, knows how to draw a preview and how to write the finished
model; it knows nothing of optimisers, checkpoints or progress, which are the loop's.

Shapes: n samples, 4 latent channels, h x w latent pixels, L tokens, D text width, P pooled width.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from koala import card
from koala.compression import DEPTH_RULES
from koala.conditioning import TextConditioner
from koala.distillation.taps import PAPER_TAPS, Features, Tap, paired_points, tap_points
from koala.errors import UserError

# Draws one sheet: (U-Net, prompts, seed) -> picture, or None where nothing can be drawn.
Draw = Callable[[nn.Module, Sequence[str], int], Image.Image | None]

PREVIEW_SEED = 0  # the same noise in every preview, so that sheets of a run can be compared


class NoiseSchedule:
    """SDXL's discrete forward process: z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps.

    config: a diffusers scheduler config as a dict (`koala.formats.load_scheduler_config`).
    UserError where it describes another process than scaled-linear betas with epsilon prediction.
    Source: Ho et al. 2020, eq. 4; betas as in Rombach et al. 2022 (scaled linear).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        expected = {
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon",
            "trained_betas": None,
            "rescale_betas_zero_snr": False,
        }
        for key, value in expected.items():
            if config.get(key, value) != value:
                raise UserError(
                    f"scheduler config: {key} is {config[key]!r}, training knows only {value!r}; "
                    "take a model with SDXL's schedule"
                )
        self.steps: int = config["num_train_timesteps"]
        root_betas = torch.linspace(
            config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, self.steps
        )
        self.alphas_cumprod = torch.cumprod(1.0 - root_betas**2, dim=0)  # [steps], fp32

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t for fp32 latents and noise [n,4,h,w] and timesteps int64 [n] in [0, steps)."""
        abar = self.alphas_cumprod.to(latents.device)[timesteps].view(-1, 1, 1, 1)
        return abar.sqrt() * latents + (1.0 - abar).sqrt() * noise


class Noised(NamedTuple):
    """A batch as a U-Net takes it, with the noise that it has to find."""

    noisy: Tensor  # z_t, fp32 [n, 4, h, w]
    noise: Tensor  # eps, fp32 [n, 4, h, w]
    timesteps: Tensor  # t, int64 [n]
    text: Tensor  # [n, L, D]
    pooled: Tensor  # [n, P]
    time_ids: Tensor  # fp32 [n, 6]


def predict(unet: nn.Module, batch: Noised, dtype: torch.dtype) -> Tensor:
    """The U-Net's prediction of eps, fp32 [n,4,h,w]; its inputs are given in `dtype`."""
    return unet(
        batch.noisy.to(dtype),
        batch.timesteps,
        encoder_hidden_states=batch.text.to(dtype),
        added_cond_kwargs={
            "text_embeds": batch.pooled.to(dtype),
            "time_ids": batch.time_ids.to(dtype),
        },
    ).sample.float()


def _check_dropout(caption_dropout: float) -> None:
    if not 0.0 <= caption_dropout <= 1.0:
        raise UserError(f"caption dropout {caption_dropout}: it must lie between 0 and 1")


class Denoising(nn.Module):
    """L_task alone: ||eps - eps_S(z_t, t, c)||^2, for a U-Net of SDXL's kind.

    unet: what is trained, float32. conditioner: the frozen text side.
    base: pipeline folder that `export` copies, with its U-Net replaced; it must exist (UserError).
    caption_dropout: share of samples whose text is replaced by the zeros that the pipeline uses
      for an empty negative prompt, so that guidance works; 0 to 1, else UserError.
    draw, prompts: how and what `preview` draws; without `draw` there is no preview.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        conditioner: TextConditioner,
        schedule: NoiseSchedule,
        base: str | Path,
        *,
        caption_dropout: float = 0.1,
        draw: Draw | None = None,
        prompts: Sequence[str] = (),
    ) -> None:
        super().__init__()
        _check_dropout(caption_dropout)
        if draw is not None and not prompts:
            raise UserError("previews need prompts: give at least one, or no way to draw")
        self.base = Path(base)
        if not (self.base / "model_index.json").is_file():
            raise UserError(f"{base}: not a pipeline folder (no model_index.json)")
        self.trainable = unet
        self.schedule = schedule
        self.caption_dropout = caption_dropout
        self.prompts = tuple(prompts)
        self._draw = draw
        # Frozen things are no submodules: they have no place in state dicts or in .train().
        self._frozen: dict[str, Any] = {"conditioner": conditioner}

    @property
    def device(self) -> torch.device:
        return next(self.trainable.parameters()).device

    def noised(self, batch: dict[str, Any], generator: torch.Generator) -> Noised:
        """Draws eps, t and the dropped captions, in this order and from `generator` only.

        batch: {"latents": float [n,4,h,w] scaled as the U-Net sees them, "captions": n strings,
        "time_ids": float [n,6]}. The draws are made on the generator's device: a CPU generator
        gives the same ones whatever device trains.
        """
        latents = batch["latents"].to(self.device, torch.float32)
        captions = list(batch["captions"])
        count = len(captions)
        assert latents.shape[0] == count, (latents.shape, count)
        drawn_on = generator.device
        noise = torch.randn(latents.shape, generator=generator, device=drawn_on)
        timesteps = torch.randint(
            self.schedule.steps, (count,), generator=generator, device=drawn_on
        )
        dropped = torch.rand(count, generator=generator, device=drawn_on) < self.caption_dropout
        noise, timesteps = noise.to(self.device), timesteps.to(self.device)
        text, pooled = self._condition(captions, dropped.to(self.device))
        return Noised(
            noisy=self.schedule.add_noise(latents, noise, timesteps),
            noise=noise,
            timesteps=timesteps,
            text=text,
            pooled=pooled,
            time_ids=batch["time_ids"].to(self.device, torch.float32),
        )

    @torch.no_grad()
    def _condition(self, captions: list[str], dropped: Tensor) -> tuple[Tensor, Tensor]:
        conditioner: TextConditioner = self._frozen["conditioner"]
        with torch.autocast(self.device.type, enabled=False):  # as exact as in generation
            text, pooled = (value.to(self.device) for value in conditioner(captions))
        no_text, no_pooled = (value.to(self.device) for value in conditioner.zeros(len(captions)))
        return (
            torch.where(dropped[:, None, None], no_text, text),
            torch.where(dropped[:, None], no_pooled, pooled),
        )

    def losses(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """{"task", "loss"}: fp32 scalars; `batch` as in `noised`."""
        noised = self.noised(batch, generator)
        task = F.mse_loss(predict(self.trainable, noised, torch.float32), noised.noise)
        return {"task": task, "loss": task}

    def preview(self, trainable: nn.Module) -> Image.Image | None:
        """A sheet of the task's prompts drawn with `trainable`, always from the same noise."""
        if self._draw is None:
            return None
        with torch.no_grad():
            return self._draw(trainable, self.prompts, PREVIEW_SEED)

    def export(self, trainable: nn.Module, folder: str | Path) -> None:
        """Writes a pipeline folder: `base` with the weights and config of `trainable` as U-Net.

        The folder appears under its name only when it is whole; an earlier one is replaced. The
        base's model card stays behind: the run writes another (`koala.card`).
        """
        assert isinstance(trainable, UNet2DConditionModel)
        folder = Path(folder)
        assert folder.resolve() != self.base.resolve(), "the base would be replaced"
        part = folder.with_name(f".{folder.name}.part")
        old = folder.with_name(f".{folder.name}.old")
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.base, part, ignore=shutil.ignore_patterns("unet", card.FILE))
        trainable.save_pretrained(part / "unet", safe_serialization=True)
        config_file = part / "unet" / "config.json"
        config = json.loads(config_file.read_text())
        config.pop("_name_or_path", None)  # where the weights once lay on this disk
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if folder.exists():
            os.rename(folder, old)
        os.rename(part, folder)
        shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class DistillationSettings:
    """What researchers vary. A weight of 0 means that the term is not computed at all.

    task_weight, output_weight, feature_weight: w_task, w_out, w_feat; finite, 0 or more. The
      paper prints none; 1/1/1 is our reading.
    taps: features of L_featKD; empty exactly when feature_weight is 0.
    depth_rule: how transformer blocks are paired: "bottom" (the paper's best), "interleave", "up".
    normalise: divide each tap's error by the mean square of the teacher's feature in the batch
      (LAPTOP-Diff, 2404.11098), so that no tap outweighs the others by its scale.
    caption_dropout: as in `Denoising`.
    UserError on anything else, also on a setting that would have no effect.
    """

    task_weight: float = 1.0
    output_weight: float = 1.0
    feature_weight: float = 1.0
    taps: tuple[Tap, ...] = PAPER_TAPS
    depth_rule: str = "bottom"
    normalise: bool = False
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        weights = {
            "task_weight": self.task_weight,
            "output_weight": self.output_weight,
            "feature_weight": self.feature_weight,
        }
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"{name} {weight}: it must be a finite number, 0 or more")
        if not any(weights.values()):
            raise UserError("all loss weights are 0: give at least one a value above 0")
        if self.depth_rule not in DEPTH_RULES:
            raise UserError(f"depth rule {self.depth_rule!r}: choose from {', '.join(DEPTH_RULES)}")
        _check_dropout(self.caption_dropout)
        if self.feature_weight > 0 and not self.taps:
            raise UserError(
                f"feature_weight {self.feature_weight} without taps: give taps, or weight 0"
            )
        if self.feature_weight == 0:
            unused = {
                "taps": bool(self.taps),
                "normalise": self.normalise,
                "depth_rule": self.depth_rule != "bottom",
            }
            for name in (name for name, given in unused.items() if given):
                raise UserError(
                    f"{name} is given but feature_weight is 0, so it has no effect: "
                    "leave it out, or give feature_weight a value above 0"
                )

    @property
    def learns_from_teacher(self) -> bool:
        """Whether any term compares with the teacher."""
        return self.output_weight > 0 or self.feature_weight > 0


def teacher_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware computes in it, else float32."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


class Distillation(Denoising):
    """L_task + L_outKD + L_featKD (KOALA A.5), each a mean squared error in fp32:

        L_outKD  = ||eps_T - eps_S||^2
        L_featKD = sum over taps of ||f_T - f_S||^2

    student: trained, float32. teacher: frozen, evaluated without gradient in `teacher_dtype`; it
    follows the student to its device. Both see the same z_t, t and text. Other arguments as in
    `Denoising`. UserError where the student is no cut of the teacher or a tap does not exist.
    """

    def __init__(
        self,
        student: UNet2DConditionModel,
        teacher: UNet2DConditionModel,
        conditioner: TextConditioner,
        schedule: NoiseSchedule,
        settings: DistillationSettings,
        base: str | Path,
        *,
        draw: Draw | None = None,
        prompts: Sequence[str] = (),
    ) -> None:
        assert student is not teacher, "the teacher must be a model of its own"
        super().__init__(
            student,
            conditioner,
            schedule,
            base,
            caption_dropout=settings.caption_dropout,
            draw=draw,
            prompts=prompts,
        )
        self.settings = settings
        self.points = tap_points(student, settings.taps)
        self.teacher_points = paired_points(student, teacher, self.points, settings.depth_rule)
        self._frozen["teacher"] = teacher.requires_grad_(False).eval()
        self._place_teacher()

    def _place_teacher(self) -> None:
        self._frozen["teacher"].to(self.device, teacher_dtype(self.device))

    def _apply(self, *args: Any, **kwargs: Any) -> Distillation:
        super()._apply(*args, **kwargs)  # what .to() and .cuda() call: the teacher comes along
        self._place_teacher()
        return self

    def losses(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """The computed ones of {"task", "out", "feat"}, unweighted, and their weighted "loss"."""
        settings = self.settings
        noised = self.noised(batch, generator)
        prediction, features = self._forward(self.trainable, noised, torch.float32, self.points)
        terms: dict[str, tuple[float, Tensor]] = {}
        if settings.task_weight > 0:
            terms["task"] = settings.task_weight, F.mse_loss(prediction, noised.noise)
        if settings.learns_from_teacher:
            target, teacher_features = self._teach(noised)
            if settings.output_weight > 0:
                terms["out"] = settings.output_weight, F.mse_loss(prediction, target)
            if settings.feature_weight > 0:
                errors = self._tap_errors(features, teacher_features)
                terms["feat"] = settings.feature_weight, torch.stack(errors).sum()
        losses = {name: term for name, (_, term) in terms.items()}
        losses["loss"] = torch.stack([weight * term for weight, term in terms.values()]).sum()
        return losses

    @torch.no_grad()
    def tap_losses(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """Each tap's part of "feat" by the student's module path, without gradient."""
        noised = self.noised(batch, generator)
        _, features = self._forward(self.trainable, noised, torch.float32, self.points)
        _, teacher_features = self._teach(noised)
        errors = self._tap_errors(features, teacher_features)
        return dict(zip(self.points, errors, strict=True))

    @staticmethod
    def _forward(
        unet: nn.Module, noised: Noised, dtype: torch.dtype, points: Sequence[str]
    ) -> tuple[Tensor, list[Tensor]]:
        with Features(unet, points) as features:
            prediction = predict(unet, noised, dtype)
        return prediction, features.values

    @torch.no_grad()
    def _teach(self, noised: Noised) -> tuple[Tensor, list[Tensor]]:
        teacher: UNet2DConditionModel = self._frozen["teacher"]
        return self._forward(teacher, noised, teacher.dtype, self.teacher_points)

    def _tap_errors(self, ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
        errors = []
        for f_s, f_t in zip(ours, theirs, strict=True):
            error = F.mse_loss(f_s.float(), f_t.float())
            errors.append(error / f_t.float().square().mean() if self.settings.normalise else error)
        return errors
