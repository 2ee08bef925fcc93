"""What a dry run foretells, held against what happens: memory on the CPU, and the arithmetic."""

import gc
import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import scaling
from koala import recipes
from koala.architectures.config import from_unet_config
from koala.architectures.layout import parameters
from koala.architectures.table import student_of
from koala.benchmark.models import new_vae
from koala.checkpoints.bundled import BUNDLED
from koala.checkpoints.convert import convert
from koala.checkpoints.validate import read_tensors
from koala.cli import main
from koala.distillation.loop import train
from koala.distillation.parallel import World, lay_out
from koala.distillation.settings import (
    DistillationSettings,
    Hardware,
    StepSettings,
    Tap,
    Training,
)
from koala.distillation.taps import regions
from koala.errors import UserError
from koala.recipes import cost, gpus
from koala.recipes.calibrate import measured
from koala.recipes.cost import estimate
from koala.recipes.memory import (
    META,
    TrainingSetup,
    batch_of,
    blank_unet,
    device_memory,
    main_memory,
    optimiser_bytes,
    task_of,
)
from toy import toy_unet

GIB = 2**30
memory_of = cache(device_memory)
TRAINING = Training(samples=16, batch=8, lr=1e-4, ema_half_life=8, ema_others=(16,))
BY_TURNS = replace(TRAINING, samples=32, critic_lr=1e-4, critic_updates=1)  # 2 steps of each


def toy_plan(**changes) -> TrainingSetup:
    """A toy student and teacher at 128 px, on the CPU."""
    teacher = from_unet_config(dict(toy_unet("sdxl").config))
    student = student_of(teacher, "koala-700m")
    settings = DistillationSettings()
    plan = TrainingSetup(
        student, teacher, settings, TRAINING, Hardware(), 1, pixels=128, on_gpu=False
    )
    return replace(plan, **changes)


class Zeros:
    """The plan's own batch, whatever is asked for."""

    def __init__(self, plan: TrainingSetup) -> None:
        whole = replace(plan, hardware=replace(plan.hardware, accumulate=1))
        self.whole = batch_of(whole, torch.device("cpu"))

    def batch(self, first: int, count: int, rank: int, world: int) -> dict:
        return self.whole


def allocated_peak(plan: TrainingSetup, run: Path) -> int:
    """Bytes of torch's allocator in a real training's two steps, at most, its models included.

    On the CPU a checkpoint is written from a second copy there, so the step must take more than
    that: the pictures are large for so small a model.
    """
    data = Zeros(plan)
    gc.collect()  # what earlier tests left must not be counted, nor go meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        torch.empty(1)  # says how much there was before
        student = blank_unet(plan.student).to_empty(device="cpu")
        teacher = None if plan.teacher is None else blank_unet(plan.teacher).to_empty(device="cpu")
        for unet in (student, teacher):
            for parameter in unet.parameters() if unet is not None else ():
                torch.nn.init.normal_(parameter, std=0.02)
        task = task_of(plan, student, teacher)
        train(task, data, plan.training, run, layout=lay_out(task, plan.hardware, World()))
    profiled.export_chrome_trace(str(run / "trace.json"))
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    totals = [event["args"]["Total Allocated"] for event in memory]
    return max(totals) - totals[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hardware": Hardware(accumulate=2, checkpointing=True), "pixels": 256},
        {"teacher": None, "settings": None},
        {"settings": StepSettings("mmd", 2, taps=(Tap("lf"),))},
        {"settings": StepSettings("dmd", 2, guidance=2.0), "training": BY_TURNS},
        {"settings": StepSettings("progressive", 2, substeps=2)},
    ],
    ids=[
        "at once",
        "in parts and computed again",
        "without a teacher",
        "mmd",
        "dmd",
        "progressive",
    ],
)
def test_memory_is_what_the_allocator_says(changes, tmp_path):
    plan = toy_plan(**changes)
    expected = sum(memory_of(plan).values())
    assert allocated_peak(plan, tmp_path) == pytest.approx(expected, rel=0.1)


def test_parts_of_the_memory():
    plan = toy_plan()
    memory, numbers = memory_of(plan), parameters(plan.student)
    assert memory["weights"] == 4 * numbers
    assert memory["optimiser"] == 8 * numbers
    assert memory["averages"] == 2 * 4 * numbers
    assert memory["teacher"] == 4 * parameters(plan.teacher)
    again = memory_of(replace(plan, hardware=Hardware(checkpointing=True)))
    assert again["activations"] < 0.7 * memory["activations"]
    halves = memory_of(replace(plan, hardware=Hardware(accumulate=2)))
    assert halves["gradients"] == 4 * numbers
    assert halves["activations"] == pytest.approx(memory["activations"] / 2, rel=0.1)


def test_shards_and_main_memory_take_their_part():
    plan = toy_plan(world=4)
    whole = memory_of(plan)
    sharded = Hardware(sharding="fsdp", teacher="sharded", ema_on_cpu=True)
    apart = memory_of(replace(plan, hardware=sharded))
    assert apart["optimiser"] == whole["optimiser"] // 4
    assert "averages" not in apart
    assert apart["weights"] > whole["weights"] // 4  # and what is gathered at the moment
    assert main_memory(replace(plan, hardware=sharded))["averages"] == whole["averages"]
    offloaded = main_memory(replace(plan, hardware=Hardware(teacher="offloaded")))
    assert offloaded == {
        "a checkpoint while it is written": 5 * whole["gradients"],
        "teacher": 2 * parameters(plan.teacher),
    }
    in_8_bits = replace(plan, training=replace(plan.training, optimizer="adamw-8bit"))
    moments = memory_of(in_8_bits)["optimiser"]
    assert moments < whole["optimiser"]
    assert main_memory(in_8_bits) == {
        "a checkpoint while it is written": 3 * whole["gradients"] + moments
    }


def test_a_gpu_computes_in_bf16():
    cpu, gpu = (memory_of(toy_plan(on_gpu=on_gpu)) for on_gpu in (False, True))
    assert gpu["teacher"] == cpu["teacher"] // 2
    assert 0.4 < gpu["activations"] / cpu["activations"] < 0.9  # norms stay in fp32
    matrices = sum(p.numel() for p in blank_unet(toy_plan().student).parameters() if p.ndim > 1)
    assert gpu["bf16 copies of weights"] >= 2 * matrices


def test_images_that_a_training_encodes_are_reckoned():
    """As the counter has it, of SDXL's VAE and of the family's own."""
    big, small = (cost._setup(recipes.get(n), None, 1, True, None)
                  for n in ("koala-lightning-700m", "koala-mini"))  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        new_vae(META, torch.float32).encode(torch.empty(1, 3, 1024, 1024, device=META))
    assert cost._encoding(None, big) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert 0 < cost._encoding(None, small) < 1e10


def test_moments_in_8_bits():
    assert optimiser_bytes([8192, 100], "adamw") == 8 * 8292
    assert optimiser_bytes([8192, 100], "adamw-8bit") == 2 * (8192 + 4 * 32) + 8 * 100


def test_everything_is_found_on_the_meta_device():
    assert blank_unet(toy_plan().student).device == META
    assert batch_of(toy_plan(), META)["latents"].shape == (8, 4, 16, 16)


# --- the whole estimate ---------------------------------------------------------------------


def test_the_arithmetic_of_a_named_card():
    recipe = recipes.get("koala-mini")
    one, eight = (estimate(recipe, card="h100", processes=n) for n in (1, 8))
    assert (one.student, one.teacher, one.taps) == ("koala-mini", "sdxl-mini", {"sa": 6, "lf": 2})
    rate = 0.35 * 989e12 / (one.tflop_a_sample * 1e12)
    assert one.samples_per_second == pytest.approx(rate)
    assert one.days == pytest.approx(recipe.training.samples / rate / 86_400)
    assert eight.device_hours == pytest.approx(one.device_hours)
    assert eight.days == pytest.approx(one.days / 8)
    assert eight.micro_batch == one.micro_batch // 8
    assert "assumed" in one.basis and "assumed" in one.text()
    seconds = replace(one, days=90 / 86_400, device_hours=0.025)
    assert "whole run     1.5 min, 0.025 device-hours (estimate)" in seconds.text()


def test_advice():
    recipe = recipes.get("koala-mini")
    divided = replace(recipe, hardware=Hardware(accumulate=4))
    assert "hardware.accumulate=1 would fit" in estimate(divided, card="3060").advice
    plan = toy_plan()
    memory = memory_of(plan)
    least = sum(memory.values()) - 0.6 * memory["activations"]
    assert cost._advice(plan, memory, least / GIB) == (
        "does not fit: --set hardware.accumulate=4 would"
    )
    too_little = memory["weights"] / GIB
    assert "ema_on_cpu" in cost._advice(plan, memory, too_little)
    assert "--text" in cost._advice(plan, {**memory, "text encoders": 1}, too_little)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("koala-lightning-700m-24gb", "4090"),
        ("koala-lightning-700m-12gb", "3060"),
        ("koala-lightning-440m-8gb", "4060"),
    ],
)
def test_the_recipes_of_small_cards_fit(name, card):
    found = estimate(recipes.get(name), card=card)
    assert 0.75 * found.room < found.total < found.room
    assert "does not fit" not in found.advice


def test_a_trial_measures_or_says_why_not():
    plan, cpu = toy_plan(), torch.device("cpu")
    speed = measured(plan, cpu, memory=1, flops=10**9)
    assert "measured" in speed.basis and speed.flops > 0
    assert "does not fit" in measured(plan, cpu, memory=2**60, flops=10**9).basis
    assert "too long" in measured(plan, cpu, memory=1, flops=10**18).basis


def test_the_command(capsys):
    given = ["distill", "koala-mini", "--dry-run", "--card", "4090", "--set", "training.batch=32"]
    assert main([*given, "--set", "training.lr=1e-4", "--json"]) == 0  # both are heard
    shown = json.loads(capsys.readouterr().out)
    assert shown["student"]["training"]["batch"] == shown["cost"]["batch"] == 32
    assert shown["student"]["training"]["lr"] == 1e-4
    stored = read_tensors(BUNDLED / "koala-mini", "unet").values()
    assert shown["cost"]["trained"] == sum(math.prod(tensor.shape) for tensor in stored)
    assert main(given) == 0
    assert "parameters trained" in capsys.readouterr().out


def test_what_the_command_refuses(capsys):
    for given, said in (
        (["--dry-run", "--card", "voodoo"], "h200"),
        (["--dry-run", "--card", "h200", "--gpus", "0"], "1 or more"),
        (["--dry-run", "--card", "h200", "--gpus", "5"], "does not divide"),
        (["--dry-run", "--card", "h200", "--set", "hardware.sharding=fsdp"], "--gpus N"),
        (["--card", "h200"], "--dry-run"),
    ):
        assert main(["distill", "koala-mini", *given]) == 2
        assert said in capsys.readouterr().err


def test_a_recipe_without_a_u_net_is_shown_without_a_cost():
    shown = cost.dry_run(recipes.get("mini-base"), card="h200")
    assert shown.cost is None and "cost" not in shown.as_dict()
    assert "(no estimate: this recipe trains no U-Net)" in shown.text()


def test_only_u_nets_are_reckoned():
    with pytest.raises(UserError, match="U-Nets"):
        estimate(recipes.get("mini-base"), card="h200")


def test_the_pages_table_is_the_scripts():
    page = Path(__file__).parents[2] / "docs" / "training.md"
    assert scaling.table() in page.read_text()


def test_what_is_compiled_is_bounded_and_said():
    eager = estimate(recipes.get("koala-mini"), card="h100")
    assert eager.compilations == 0 and "compiled" not in eager.text()
    plan = toy_plan(hardware=Hardware(compile="inductor"))
    student, teacher = (len(regions(blank_unet(arch))) for arch in (plan.student, plan.teacher))
    assert cost._compilations(plan) == student + teacher
    by_turns = replace(plan, settings=StepSettings("dmd"), training=BY_TURNS)
    assert cost._compilations(by_turns) == 2 * (student + teacher) + teacher
    compiled = replace(recipes.get("koala-mini"), hardware=Hardware(compile="inductor"))
    shown = estimate(compiled, card="h100")
    assert f"at most {shown.compilations} blocks, once for all sizes of images" in shown.text()


def test_gpus_without_bf16_have_names_too():
    assert {"t4", "v100", "2080ti"} <= gpus.GPUS.keys()


def test_a_card_may_be_given_by_its_numbers():
    assert gpus.get("35TFLOP,16GB") == gpus.get("35tflops,16GiB") == gpus.Gpu(16.0, 35.0)
    for card, said in (("0TFLOP,16GB", "both numbers must be above 0"), ("35,16", "35TFLOP,16GB")):
        with pytest.raises(UserError, match=said):
            gpus.get(card)
    assert gpus.get("NVIDIA GeForce RTX 4090") == gpus.get("rtx4090") == gpus.get("4090")
    assert gpus.get("A100 40GB") == gpus.get("a100-40gb")


def test_a_single_files_teacher_is_its_own(tmp_path):
    file = tmp_path / "mini.safetensors"
    convert("koala-mini", "single-file", file)
    lightning = recipes.get("koala-mini-lightning")  # which keeps its teacher's size
    found = [estimate(lightning, teacher=str(t), card="a100") for t in ("koala-mini", file)]
    assert found[0].memory == found[1].memory and found[0].tflop_a_sample == found[1].tflop_a_sample
