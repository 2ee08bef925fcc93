"""The tasks: their losses equal a direct computation, and the teacher stays out of everything."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from koala.checkpoints.load import load_scheduler_config
from koala.checkpoints.pipeline_files import BETAS
from koala.checkpoints.prediction import VELOCITY, Prediction
from koala.checkpoints.sampling import Sampling, of_config
from koala.distillation.forward_process import NoiseSchedule, generators_at
from koala.distillation.settings import PAPER_TAPS, DistillationSettings, Tap
from koala.distillation.tasks import Denoising, Distillation
from koala.errors import UserError
from koala.text_conditioning import TextConditioner
from toy import toy_scheduler, toy_unet

CAPTIONS = ["a red fox", "two green apples", "a drum"]
PLAIN = {"num_train_timesteps": 1000, "timestep_spacing": "trailing", **BETAS}
SCHEDULE = NoiseSchedule(dict(toy_scheduler().config))
NO_FEATURES = {"feature_weight": 0.0, "taps": ()}


@pytest.fixture(scope="module")
def conditioner(base: Path) -> TextConditioner:
    return TextConditioner.from_folder(base)


def unet(architecture: str, seed: int) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return toy_unet(architecture)


def batch() -> dict:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 3)
    return {"latents": latents, "captions": CAPTIONS, "time_ids": time_ids}


def seeded(seed: int = 1, count: int = 3) -> list[torch.Generator]:
    return generators_at(seed, 0, count)


Make = Callable[..., Distillation]


@pytest.fixture
def distillation(base: Path, conditioner: TextConditioner) -> Make:
    def make(
        student: UNet2DConditionModel | None = None,
        teacher: UNet2DConditionModel | None = None,
        **settings: object,
    ) -> Distillation:
        student = student or unet("koala", 1)
        teacher = teacher or unet("sdxl", 2)
        chosen = DistillationSettings(**settings)  # type: ignore[arg-type]
        return Distillation(student, teacher, conditioner, SCHEDULE, chosen, base)

    return make


def by_hand(
    conditioner: TextConditioner, caption_dropout: float = 0.1
) -> tuple[tuple, dict, torch.Tensor]:
    """Arguments of a U-Net and the noise to find, for `batch()` and `seeded()`."""
    given, draws = batch(), []
    for g in seeded():
        noise = torch.randn(4, 8, 8, generator=g)
        draws.append((noise, torch.randint(1000, (), generator=g), torch.rand((), generator=g)))
    noise, t, share = (torch.stack(column) for column in zip(*draws, strict=True))
    dropped = share < caption_dropout
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    noisy = scheduler.add_noise(given["latents"], noise, t)
    text, pooled = conditioner(CAPTIONS)
    text[dropped], pooled[dropped] = 0, 0
    added = {"text_embeds": pooled, "time_ids": given["time_ids"]}
    return (noisy, t), {"encoder_hidden_states": text, "added_cond_kwargs": added}, noise


def recomputed(model: UNet2DConditionModel, path: str, args: tuple, kwargs: dict) -> torch.Tensor:
    """Output of one module of `model`, called by hand on what it is given in a forward pass."""
    module, given = model.get_submodule(path), []
    handle = module.register_forward_pre_hook(
        lambda _, a, k: given.append((a, k)), with_kwargs=True
    )
    model(*args, **kwargs)
    handle.remove()
    output = module(*given[0][0], **given[0][1])
    return output[0] if isinstance(output, tuple) else output


# --- losses --------------------------------------------------------------------------------


def test_task_loss_is_the_error_of_the_predicted_noise(
    base: Path, conditioner: TextConditioner
) -> None:
    model = unet("koala", 1)
    losses = Denoising(model, conditioner, SCHEDULE, base).losses(batch(), seeded())
    args, kwargs, noise = by_hand(conditioner)
    expected = (model(*args, **kwargs).sample - noise).square().mean()
    torch.testing.assert_close(losses["task"], expected, rtol=1e-6, atol=0)
    assert set(losses) == {"task", "loss"}
    assert torch.equal(losses["loss"], losses["task"])


@pytest.mark.parametrize("normalise", [False, True])
@torch.no_grad()
def test_distillation_losses_equal_a_direct_computation(
    distillation: Make, conditioner: TextConditioner, normalise: bool
) -> None:
    task = distillation(task_weight=0.5, output_weight=2.0, feature_weight=3.0, normalise=normalise)
    losses = task.losses(batch(), seeded())
    student, teacher = unet("koala", 1), unet("sdxl", 2)
    args, kwargs, noise = by_hand(conditioner)
    eps_s, eps_t = student(*args, **kwargs).sample, teacher(*args, **kwargs).sample
    block = "transformer_blocks.0.attn1"
    pairs = {
        f"down_blocks.1.attentions.0.{block}": f"down_blocks.1.attentions.0.{block}",
        f"down_blocks.2.attentions.0.{block}": f"down_blocks.2.attentions.0.{block}",
        f"up_blocks.0.attentions.0.{block}": f"up_blocks.0.attentions.0.{block}",
        f"up_blocks.0.attentions.1.{block}": f"up_blocks.0.attentions.2.{block}",
        f"up_blocks.1.attentions.0.{block}": f"up_blocks.1.attentions.0.{block}",
        f"up_blocks.1.attentions.1.{block}": f"up_blocks.1.attentions.2.{block}",
        "down_blocks.0": "down_blocks.0",
        "up_blocks.2": "up_blocks.2",
    }
    errors = {}
    for ours, theirs in pairs.items():
        f_s = recomputed(student, ours, args, kwargs)
        f_t = recomputed(teacher, theirs, args, kwargs)
        each = (f_s - f_t).square().flatten(1).mean(1)
        scale = f_t.square().flatten(1).mean(1) if normalise else torch.ones(3)
        errors[ours] = (each / scale).mean()
    expected = {
        "task": (eps_s - noise).square().mean(),
        "out": (eps_s - eps_t).square().mean(),
        "feat": sum(errors.values()),
        **{f"tap {path}": value for path, value in errors.items()},
    }
    expected["loss"] = 0.5 * expected["task"] + 2.0 * expected["out"] + 3.0 * expected["feat"]
    assert set(losses) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=2e-5, atol=1e-9)


@torch.no_grad()
def test_a_guided_teacher_is_what_the_pipeline_draws_with(
    distillation: Make, conditioner: TextConditioner
) -> None:
    weights = {"task_weight": 0.0, "min_snr": 1.0, "min_snr_out": True, "caption_dropout": 0.0}
    losses = distillation(guidance=3.5, **weights).losses(batch(), seeded())
    student, teacher = unet("koala", 1), unet("sdxl", 2)
    args, with_text, _ = by_hand(conditioner, caption_dropout=0.0)
    added = with_text["added_cond_kwargs"]
    without = {
        "encoder_hidden_states": torch.zeros_like(with_text["encoder_hidden_states"]),
        "added_cond_kwargs": {**added, "text_embeds": torch.zeros_like(added["text_embeds"])},
    }

    def guided(of: Callable[[dict], torch.Tensor]) -> torch.Tensor:
        return of(without) + 3.5 * (of(with_text) - of(without))

    target = guided(lambda given: teacher(*args, **given).sample)
    errors = (student(*args, **with_text).sample - target).square().flatten(1).mean(1)
    expected = (errors * SCHEDULE.min_snr_weights(args[1], 1.0)).mean()
    torch.testing.assert_close(losses["out"], expected, rtol=2e-5, atol=0)
    path = "up_blocks.2"
    feature = guided(lambda given: recomputed(teacher, path, args, given))
    expected = (recomputed(student, path, args, with_text) - feature).square().mean()
    torch.testing.assert_close(losses[f"tap {path}"], expected, rtol=2e-5, atol=0)


def test_a_student_of_a_guided_teacher_says_that_it_needs_no_guidance(
    distillation: Make, tmp_path: Path
) -> None:
    for guidance, steps, known in (
        (2.0, 10, Sampling(guidance=1.0)), (2.0, 4, Sampling(4, guidance=1.0)), (None, 10, None),
    ):  # fmt: skip
        task = distillation(guidance=guidance, steps=steps, caption_dropout=0.0)
        task.export(task.trainable, tmp_path / "out")
        config = load_scheduler_config(tmp_path / "out")
        assert of_config(config) == known
        StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")


def test_a_student_equal_to_its_teacher_has_no_distillation_loss(distillation: Make) -> None:
    teacher = unet("sdxl", 2)
    losses = distillation(copy.deepcopy(teacher), teacher).losses(batch(), seeded())
    assert losses["out"].item() == 0.0
    assert losses["feat"].item() == 0.0
    assert torch.equal(losses["loss"], losses["task"])


def test_a_weight_of_0_leaves_its_term_out(distillation: Make) -> None:
    whole = distillation().losses(batch(), seeded())
    for settings, terms in (
        ({"task_weight": 0.0}, {"out", "feat"}),
        ({"output_weight": 0.0}, {"task", "feat"}),
        (NO_FEATURES, {"task", "out"}),
        ({**NO_FEATURES, "output_weight": 0.0}, {"task"}),
    ):
        losses = distillation(**settings).losses(batch(), seeded())
        assert {name for name in losses if not name.startswith("tap ")} == {*terms, "loss"}
        assert ("feat" in terms) == any(name.startswith("tap ") for name in losses)
        for name in terms:
            torch.testing.assert_close(losses[name], whole[name], rtol=1e-6, atol=0)


def test_task_loss_alone_runs_no_teacher_and_equals_denoising(
    distillation: Make, base: Path, conditioner: TextConditioner
) -> None:
    teacher = unet("sdxl", 2)
    calls: list[int] = []
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    task = distillation(teacher=teacher, output_weight=0.0, **NO_FEATURES)
    losses = task.losses(batch(), seeded())
    alone = Denoising(unet("koala", 1), conditioner, SCHEDULE, base).losses(batch(), seeded())
    assert calls == []
    assert torch.equal(losses["loss"], alone["loss"])
    distillation(teacher=teacher, task_weight=0.0, **NO_FEATURES).losses(batch(), seeded())
    assert calls == [1]


def test_features_reach_only_the_weights_before_them(distillation: Make) -> None:
    taps = (Tap("lf", ("DW-1",)),)
    task = distillation(task_weight=0.0, output_weight=0.0, taps=taps)
    task.losses(batch(), seeded())["loss"].backward()
    student = task.trainable
    assert student.down_blocks[0].downsamplers[0].conv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in student.up_blocks.parameters())


def test_min_snr_weighs_the_task_loss_and_no_other(
    distillation: Make, conditioner: TextConditioner
) -> None:
    plain = distillation().losses(batch(), seeded())
    weighed = distillation(min_snr=0.5).losses(batch(), seeded())
    args, kwargs, noise = by_hand(conditioner)
    with torch.no_grad():
        errors = (unet("koala", 1)(*args, **kwargs).sample - noise).square().flatten(1).mean(1)
    abar = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    snr = (abar.alphas_cumprod / (1 - abar.alphas_cumprod))[args[1]]
    weights = torch.minimum(snr, torch.tensor(0.5)) / snr
    assert (weights < 1).any()
    torch.testing.assert_close(weighed["task"], (weights * errors).mean(), rtol=1e-5, atol=0)
    for name in set(plain) - {"task", "loss"}:
        assert torch.equal(plain[name], weighed[name])


def test_a_loss_is_the_mean_of_what_each_sample_gives_alone(distillation: Make) -> None:
    task, whole, parts = distillation(normalise=True, min_snr=5.0), batch(), []
    for i in range(3):
        one = {name: column[i : i + 1] for name, column in whole.items()}
        parts.append(task.losses(one, generators_at(1, i, 1)))
    for name, value in task.losses(whole, seeded()).items():
        alone = torch.stack([part[name] for part in parts]).mean()
        torch.testing.assert_close(value, alone, rtol=1e-5, atol=1e-9)


def test_prepared_embeddings_are_taken_as_they_are(
    base: Path, conditioner: TextConditioner
) -> None:
    task = Denoising(unet("koala", 1), conditioner, SCHEDULE, base, caption_dropout=0.0)
    text, pooled = conditioner(CAPTIONS)
    other = {**batch(), "captions": ["nothing"] * 3, "text": 2 * text, "pooled": 3 * pooled}
    noised, _ = task.noised(other, seeded())
    assert torch.equal(noised.text, 2 * text)
    assert torch.equal(noised.pooled, 3 * pooled)


# --- the frozen side -----------------------------------------------------------------------


def test_images_are_encoded_as_they_come(base: Path, conditioner: TextConditioner) -> None:
    """The same noise, timesteps and captions as with latents; the draw is each sample's own."""
    given = batch()
    mean, deviation = given["latents"], torch.full_like(given["latents"], 1e-3)
    seen: list[torch.Tensor] = []

    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(pixels)
        return mean, deviation

    task = Denoising(unet("koala", 1), conditioner, SCHEDULE, base, encode=encode)
    prepared, expected = task.noised(given, seeded())
    given["pixels"] = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    del given["latents"]
    noised, target = task.noised(given, seeded())
    assert torch.equal(target, expected)
    assert torch.equal(noised.timesteps, prepared.timesteps)
    assert torch.equal(noised.text, prepared.text)
    assert 0 < (noised.noisy - prepared.noisy).abs().max() < 6e-3
    assert torch.equal(noised.noisy, task.noised(given, seeded())[0].noisy)
    assert seen[0].shape == (3, 3, 64, 64) and -1 <= seen[0].min() < seen[0].max() <= 1


def test_the_teacher_is_frozen_and_no_part_of_the_task(distillation: Make) -> None:
    teacher = unet("sdxl", 2)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    task = distillation(teacher=teacher)
    task.train()
    optimiser = torch.optim.AdamW(task.parameters(), lr=1e-3)
    task.losses(batch(), seeded())["loss"].backward()
    optimiser.step()
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert all(p.grad is not None for p in task.trainable.parameters())
    student_names = {f"trainable.{name}" for name in unet("koala", 1).state_dict()}
    assert set(task.state_dict()) == student_names


def test_the_teacher_follows_the_student_to_its_device(distillation: Make) -> None:
    teacher = unet("sdxl", 2)
    task = distillation(teacher=teacher).to("meta")
    assert task.device.type == "meta"
    assert all(p.device.type == "meta" for p in teacher.parameters())


# --- randomness and captions ---------------------------------------------------------------


def test_losses_depend_on_the_generator_and_not_on_the_global_state(distillation: Make) -> None:
    task = distillation(caption_dropout=0.5)
    torch.manual_seed(1)
    first = task.losses(batch(), seeded(3))
    torch.manual_seed(2)
    again, other = task.losses(batch(), seeded(3)), task.losses(batch(), seeded(4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["loss"], other["loss"])


@pytest.mark.parametrize(("dropout", "kept"), [(0.0, 1.0), (1.0, 0.0)])
def test_dropped_captions_are_the_zeros_of_the_conditioner(
    base: Path, conditioner: TextConditioner, dropout: float, kept: float
) -> None:
    task = Denoising(unet("koala", 1), conditioner, SCHEDULE, base, caption_dropout=dropout)
    noised, _ = task.noised(batch(), seeded())
    text, pooled = conditioner(CAPTIONS)
    assert torch.equal(noised.text, kept * text)
    assert torch.equal(noised.pooled, kept * pooled)


def test_captions_are_dropped_one_by_one_and_whole(
    base: Path, conditioner: TextConditioner
) -> None:
    task = Denoising(unet("koala", 1), conditioner, SCHEDULE, base, caption_dropout=0.5)
    once = batch()
    many = {
        "latents": once["latents"].repeat(40, 1, 1, 1),
        "captions": once["captions"] * 40,
        "time_ids": once["time_ids"].repeat(40, 1),
    }
    noised, _ = task.noised(many, seeded(count=120))
    text_gone = (noised.text == 0).flatten(1).all(1)
    pooled_gone = (noised.pooled == 0).all(1)
    assert torch.equal(text_gone, pooled_gone)
    assert 40 <= text_gone.sum().item() <= 80


# --- schedule ------------------------------------------------------------------------------


def test_the_forward_process_is_that_of_diffusers_bit_for_bit() -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.equal(SCHEDULE.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_v_and_its_weights_are_those_of_diffusers(zero_snr: bool) -> None:
    config = {**PLAIN, **Prediction(VELOCITY, zero_snr).config}
    ours, theirs = NoiseSchedule(config), DDPMScheduler.from_config(config)
    assert ours.alphas_cumprod.isfinite().all() and ours.alphas_cumprod.min() > 0
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    t = torch.tensor([0, 500, 999])
    for own, other in (
        (ours.add_noise(latents, noise, t), theirs.add_noise(latents, noise, t)),
        (ours.target(latents, noise, t), theirs.get_velocity(latents, noise, t)),
    ):  # diffusers' last abar is 0 with zero terminal SNR, ours 2**-24
        torch.testing.assert_close(own, other, atol=2e-3, rtol=0)
        torch.testing.assert_close(own[:2], other[:2], atol=1e-5, rtol=0)
    snr = ours.alphas_cumprod / (1 - ours.alphas_cumprod)
    every = torch.arange(1000)
    expected = torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)
    torch.testing.assert_close(ours.min_snr_weights(every, 5.0), expected, rtol=1e-4, atol=1e-7)


def test_a_model_of_v_is_taught_v(base: Path, conditioner: TextConditioner) -> None:
    schedule = NoiseSchedule({**toy_scheduler().config, **Prediction(VELOCITY).config})
    task = Denoising(unet("koala", 1), conditioner, schedule, base)
    _, target = task.noised(batch(), seeded())
    args, kwargs, noise = by_hand(conditioner)
    expected = DDPMScheduler.from_config(PLAIN).get_velocity(batch()["latents"], noise, args[1])
    torch.testing.assert_close(target, expected)
    with torch.no_grad():
        prediction = unet("koala", 1)(*args, **kwargs).sample
    losses = task.losses(batch(), seeded())
    torch.testing.assert_close(losses["task"].detach(), (prediction - expected).square().mean())


@pytest.mark.parametrize(
    ("key", "value"), [("prediction_type", "sample"), ("beta_schedule", "linear")]
)
def test_another_forward_process_is_refused(key: str, value: str) -> None:
    with pytest.raises(UserError, match=f"'{value}'"):
        NoiseSchedule({**toy_scheduler().config, key: value})


# --- settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_weight": -1.0}, "task_weight -1.0: it must be a finite number"),
        ({"output_weight": float("nan")}, "output_weight nan: it must be a finite"),
        ({"task_weight": 0, "output_weight": 0, **NO_FEATURES}, "all loss weights are 0"),
        ({"feature_weight": 0.0}, "taps is given but feature_weight is 0"),
        ({**NO_FEATURES, "normalise": True}, "normalise is given but feature_weight is 0"),
        ({**NO_FEATURES, "depth_rule": "up"}, "depth_rule is given but feature_weight is 0"),
        ({"taps": ()}, "feature_weight 1.0 without taps"),
        ({"depth_rule": "top"}, "'top': choose bottom, interleave, up"),
        ({"caption_dropout": 1.5}, "caption dropout 1.5: it must be between 0 and 1"),
        ({"min_snr": 0.0}, "min_snr 0.0: it must be above 0"),
        ({"min_snr": 5.0, "task_weight": 0.0}, "min_snr 5.0 is given but task_weight is 0"),
        ({"min_snr_out": True}, "min_snr_out has no effect without min_snr"),
        ({"guidance": 1.0, "caption_dropout": 0.0}, "guidance 1.0: it must be above 1"),
        ({"steps": 4}, "steps 4 without guidance has no effect"),
        ({"guidance": 3.5, "steps": 11, "caption_dropout": 0.0}, "steps 11: .* in 1 to 10"),
        ({"guidance": 3.5}, "caption_dropout 0.1 with guidance: .* set it to 0"),
        (
            {"guidance": 3.5, "output_weight": 0.0, **NO_FEATURES},
            "guidance is the teacher's, but no loss term compares with it",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DistillationSettings(**settings)


@pytest.mark.parametrize("rule", ["bottom", "interleave", "up"])
def test_every_depth_rule_is_a_setting(distillation: Make, rule: str) -> None:
    task = distillation(depth_rule=rule, taps=PAPER_TAPS)
    assert task.losses(batch(), seeded())["feat"].isfinite()
    deep = task.pairs["down_blocks.2.attentions.0.transformer_blocks.0.attn1"]
    assert f"transformer_blocks.{1 if rule == 'up' else 0}." in deep


def test_a_teacher_of_another_width_is_refused(distillation: Make) -> None:
    config = dict(unet("sdxl", 2).config)
    config["block_out_channels"] = (16, 32, 64)
    wider = UNet2DConditionModel.from_config(config)
    with pytest.raises(UserError, match="cannot inherit from"):
        distillation(teacher=wider)


def test_a_base_that_is_no_pipeline_is_refused_before_training(
    tmp_path: Path, conditioner: TextConditioner
) -> None:
    with pytest.raises(UserError, match=r"no model_index\.json"):
        Denoising(unet("koala", 1), conditioner, SCHEDULE, tmp_path)


# --- preview and export --------------------------------------------------------------------


def test_previews_draw_the_given_weights_from_the_same_noise(
    base: Path, conditioner: TextConditioner
) -> None:
    drawn: list[tuple] = []

    def draw(model: torch.nn.Module, prompts: object, seed: int) -> Image.Image:
        drawn.append((model, prompts, seed, torch.is_grad_enabled()))
        return Image.new("RGB", (8, 8))

    task = Denoising(
        unet("koala", 1), conditioner, SCHEDULE, base, draw=draw, prompts=["a fox", "a drum"]
    )
    average = unet("koala", 9)
    assert task.preview(average) is not None
    task.preview(average)
    assert drawn == [(average, ("a fox", "a drum"), 0, False)] * 2
    assert Denoising(average, conditioner, SCHEDULE, base).preview(average) is None
    with pytest.raises(UserError, match="previews need prompts"):
        Denoising(average, conditioner, SCHEDULE, base, draw=draw)


def test_export_is_the_base_with_the_trained_unet(
    base: Path, conditioner: TextConditioner, tmp_path: Path
) -> None:
    task = Denoising(unet("koala", 1), conditioner, SCHEDULE, base)
    folder, average = tmp_path / "out" / "student", unet("koala", 9)
    average.register_to_config(_name_or_path="/somewhere/private")
    task.export(unet("koala", 8), folder)
    task.export(average, folder)  # a finished run that is run again
    assert sorted(path.name for path in folder.parent.iterdir()) == ["student"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    for name, value in pipeline.unet.state_dict().items():
        assert torch.equal(value, average.state_dict()[name])
    assert "_name_or_path" not in json.loads((folder / "unet" / "config.json").read_text())
    others = [path.relative_to(base) for path in base.rglob("*") if path.is_file()]
    for path in (path for path in others if path.parts[0] != "unet"):
        assert (folder / path).read_bytes() == (base / path).read_bytes()
