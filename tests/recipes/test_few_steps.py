"""Recipes of students in few steps: what they cost is what they do, and the small card's fits."""

import json
from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from koala import recipes
from koala.architectures.config import from_unet_config
from koala.checkpoints.sampling import Sampling
from koala.distillation.forward_process import generators_at
from koala.distillation.settings import Hardware, StepSettings, Tap, Training
from koala.errors import UserError
from koala.recipes import cost, few_steps, gpus
from koala.recipes.cost import estimate
from koala.recipes.memory import (
    META,
    TrainingSetup,
    batch_of,
    blank_unet,
    device_memory,
    main_memory,
    task_of,
)
from koala.recipes.recipe import described
from toy import toy_unet

DMD = StepSettings("dmd", 3, guidance=2.0)
MMD = StepSettings("mmd", 3, taps=(Tap("lf"),))
PROGRESSIVE = StepSettings("progressive", 3, guidance=2.0, substeps=2)
TRAINING = Training(samples=16, batch=8, lr=1e-4)
BY_TURNS = replace(TRAINING, critic_lr=1e-4, critic_updates=1)


def toy_plan(settings: StepSettings, **changes) -> TrainingSetup:
    """A toy student of its teacher's size, at 128 px on the CPU."""
    arch = from_unet_config(dict(toy_unet("koala").config))
    training = BY_TURNS if settings.trains_critic else TRAINING
    plan = TrainingSetup(arch, arch, settings, training, Hardware(), 1, pixels=128, on_gpu=False)
    return replace(plan, **changes)


@pytest.mark.parametrize("name", few_steps.PRESETS)
def test_every_recipe_is_of_koalas_own_weights(name):
    recipe = recipes.get(name)
    size, steps = name.split("-")[2:4]
    assert (recipe.cut, recipe.teacher) == (None, f"etri-vilab/koala-lightning-{size}")
    steps = int(steps.removesuffix("step"))
    assert recipe.settings.sampling == Sampling(steps=steps, guidance=1.0)
    updates = recipe.training.samples // recipe.training.batch
    assert updates % (recipe.training.critic_updates + 1) == 0  # the last step is the student's
    assert not recipe.training.moves_critic(recipe.training.samples - recipe.training.batch)
    json.dumps(described(recipe))


def test_the_recipe_of_a_24_gb_card_fits():
    plan = cost._setup(recipes.get("koala-lightning-700m-4step-24gb"), None, 1, True, None)
    beside = cost._other_memory(cost._frozen(None, plan), on_gpu=True, text_stored=False)
    needed = (sum(device_memory(plan).values()) + sum(beside.values())) / 2**30
    assert 0.6 * gpus.get("4090").gib < needed < gpus.get("4090").gib
    assert main_memory(plan)["a checkpoint while it is written"] > 2 * 4 * 782_822_724


@pytest.mark.parametrize("settings", [MMD, DMD, PROGRESSIVE], ids=["mmd", "dmd", "progressive"])
def test_flops_are_those_that_are_counted(settings):
    """All but the backward pass of the first convolution, whose input has no gradient."""
    plan = toy_plan(settings)
    task = task_of(plan, blank_unet(plan.student), blank_unet(plan.teacher))
    computes = [task.losses, task.critic_losses] if settings.trains_critic else [task.losses]
    counted = []
    for compute in computes:
        with FlopCounterMode(display=False) as counter:
            batch = batch_of(plan, META)
            loss = compute(batch, generators_at(0, 0, plan.micro_batch))["loss"]
            loss.backward()
        counted.append(counter.get_total_flops() / plan.micro_batch)
    _, found = cost._flops(plan)
    assert sum(counted) / len(counted) == pytest.approx(found, rel=0.05)


def test_the_estimate_tells_the_critic_and_days():
    critic = ["training.critic_lr=4e-4", "training.critic_updates=3"]
    dmd = ["settings.method=dmd", "settings.substeps=none", *critic]
    recipe = recipes.configured("koala-mini-lightning", dmd)
    found = estimate(recipe, card="4090", teacher="koala-mini")
    assert (found.student, found.teacher, found.taps) == ("koala-mini", "koala-mini", {})
    assert found.memory["critic and its optimiser"] == pytest.approx(3 * found.memory["weights"])
    assert "critic and its optimiser" in found.text() and found.days > 0


def test_a_critic_is_divided_as_the_student_is():
    plan = toy_plan(DMD, world=4)
    whole, parts = (
        device_memory(replace(plan, hardware=Hardware(sharding=sharding)))
        for sharding in ("ddp", "fsdp")
    )
    assert parts["critic and its optimiser"] == whole["critic and its optimiser"] // 4
    assert whole["gradients"] == 2 * whole["weights"]  # of both, in buckets
    assert whole["critic and its optimiser"] == 3 * whole["weights"]


def test_methods_change_with_their_settings():
    changed = ["settings.method=mmd", "settings.guidance=none", "settings.taps=lf",
               "settings.substeps=none"]  # fmt: skip
    recipe = recipes.configured("koala-mini-lightning", changed)
    assert recipe.settings == StepSettings("mmd", 4, taps=(Tap("lf"),))
    with pytest.raises(UserError, match=r"guidance 3\.5 has no effect on method mmd"):
        recipes.configured("koala-mini-lightning", ["settings.method=mmd"])
