"""Hardware changes a training by rounding alone: processes, parts, shards, compiling, computing
again. Gradients are read from the moments in the checkpoint of a single step, with all taps on."""

import copy
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo.utils
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from koala.distillation import parallel
from koala.distillation.parallel import World, joined, lay_out
from koala.distillation.settings import PAPER_TAPS, PLAIN, Hardware
from koala.distillation.taps import Features, regions, tap_points
from koala.errors import FailedElsewhere, Failure, UserError
from koala.utils.device import has_bf16
from toy import TEXT_WIDTHS, toy_unet
from toy_training import (
    SETTINGS,
    STEP,
    SignalledStream,
    Stream,
    distil,
    gradient,
    norm,
    processes,
    state,
    toy_task,
)

TERMS = ("task", "out", "feat", "loss", "grad_norm")
GRADIENT_BOUND = 1e-5  # of the difference's norm, relative to the gradient's
# Runs of several steps: AdamW divides by the gradient's size, so rounding grows where it is small.
COURSE_BOUND = 1e-2  # of the difference's norm, relative to how far the weights have come


@pytest.fixture(scope="module")
def step(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step in one process, plainly."""
    run = tmp_path_factory.mktemp("step") / "run"
    distil(base, run, settings=STEP)
    return run


@pytest.fixture(scope="module")
def course(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps in one process, plainly; every checkpoint is kept."""
    run = tmp_path_factory.mktemp("course") / "run"
    distil(base, run, settings=COURSE)
    return run


COURSE = replace(SETTINGS, keep=100)


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Norm of the difference of two sets of tensors."""
    assert ours.keys() == theirs.keys()
    return sum((ours[name] - theirs[name]).square().sum().item() for name in ours) ** 0.5


def losses(run: Path, file: str) -> dict[str, float]:
    line = json.loads((run / file).read_text().splitlines()[0])
    return {k: v for k, v in line.items() if k.startswith("tap ") or k in TERMS}


def assert_same_step(run: Path, plain: Path) -> None:
    expected = gradient(plain)
    assert distance(gradient(run), expected) < GRADIENT_BOUND * norm(expected)
    assert losses(run, "stats.jsonl") == pytest.approx(losses(plain, "stats.jsonl"), rel=1e-5)
    # After the step, which divides small gradients by their size.
    validated = losses(plain, "validation.jsonl")
    assert losses(run, "validation.jsonl") == pytest.approx(validated, rel=1e-3)


def assert_same_course(run: Path, course: Path, seen: int) -> None:
    ours, theirs, start = state(run, seen), state(course, seen), toy_start()
    weights = {name: v for name, v in theirs.items() if name.startswith("weights.")}
    moved = distance(weights, start)
    assert moved > 0.1
    assert distance({name: ours[name] for name in weights}, weights) < COURSE_BOUND * moved
    averages = {name: v for name, v in theirs.items() if name.startswith("ema.")}
    assert distance({name: ours[name] for name in averages}, averages) < COURSE_BOUND * moved


def toy_start() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {f"weights.{name}": v for name, v in toy_unet("koala").state_dict().items()}


# --- one process ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hardware",
    [
        Hardware(accumulate=2),
        Hardware(accumulate=4, channels_last=False),
        Hardware(checkpointing=True),
        Hardware(ema_on_cpu=True),
    ],
)
def test_hardware_changes_a_step_by_rounding_alone(
    base: Path, step: Path, tmp_path: Path, hardware: Hardware
) -> None:
    distil(base, tmp_path / "run", hardware, settings=STEP)
    assert_same_step(tmp_path / "run", step)


def test_compiled_and_checkpointed_equals_eager_and_shapes_share_what_is_compiled() -> None:
    """By aot_eager, which traces forward and backward as inductor does and needs no compiler."""
    torch.manual_seed(1)
    eager = toy_unet("koala").train()
    compiled = copy.deepcopy(eager)
    found = regions(compiled)
    expected = _gradients(eager)
    torch._dynamo.utils.counters.clear()
    parallel._compile(found, "aot_eager", dynamic=False)
    parallel._checkpoint(found)
    ours = _gradients(compiled)
    assert distance(ours, expected) < GRADIENT_BOUND * norm(expected)
    frames = torch._dynamo.utils.counters["frames"]
    assert 0 < frames["ok"] == frames["total"] < len(found)


def test_buckets_share_what_is_compiled() -> None:
    """As many compilations for five sizes of images as for two of them."""
    torch.manual_seed(1)
    unet = toy_unet("koala").train()
    expected = [_gradients(copy.deepcopy(unet), size) for size in BUCKETS]
    parallel._compile(regions(unet), "aot_eager", dynamic=True)
    counts = []
    torch._dynamo.utils.counters.clear()
    for size, eager in zip(BUCKETS, expected, strict=True):
        unet.zero_grad()
        ours = _gradients(unet, size)
        assert distance(ours, eager) < GRADIENT_BOUND * norm(eager)
        counts.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert 0 < counts[1] == counts[-1]


BUCKETS = ((8, 8), (8, 16), (16, 8), (12, 16), (8, 20))


def _gradients(unet: UNet2DConditionModel, size: tuple[int, int] = (8, 8)) -> dict[str, Tensor]:
    """Of a loss over the output and every tap."""
    g = torch.Generator().manual_seed(0)
    features = Features(unet, tap_points(unet, PAPER_TAPS))
    with features.capture() as captured:
        output = unet(
            torch.randn(2, 4, *size, generator=g),
            torch.tensor([3, 700]),
            torch.randn(2, 5, unet.config.cross_attention_dim, generator=g),
            added_cond_kwargs={
                "text_embeds": torch.randn(2, TEXT_WIDTHS[1], generator=g),
                "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
            },
        ).sample
    loss = output.square().mean() + sum(value.square().mean() for value in captured.values())
    loss.backward()
    return {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}


def test_a_block_is_in_main_memory_except_while_it_computes() -> None:
    block = nn.Linear(4, 4).requires_grad_(False)
    resting = {name: p.data_ptr() for name, p in block.named_parameters()}
    seen: list[int] = []
    x = torch.randn(2, 4)
    expected = block(x)
    parallel._offload(block, torch.device("cpu"))
    block.register_forward_pre_hook(lambda module, _: seen.append(module.weight.data_ptr()))
    assert torch.equal(block(x), expected)
    assert seen != [resting["weight"]]
    assert {name: p.data_ptr() for name, p in block.named_parameters()} == resting


def test_moments_lie_as_the_weights_do_when_a_run_goes_on(
    base: Path, course: Path, tmp_path: Path
) -> None:
    """In channels_last: a fused optimiser pairs numbers by their place in memory."""
    run = tmp_path / "run"
    with pytest.raises(Failure, match="stopped after 24"):
        distil(base, run, settings=COURSE, data=SignalledStream(20, signal.SIGTERM))
    distil(base, run, settings=COURSE)
    ours, theirs = state(run, 40), state(course, 40)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


# --- several processes ---------------------------------------------------------------------

LAYOUTS = {
    "ddp": PLAIN,
    "parts": Hardware(accumulate=2, checkpointing=True),
    "fsdp": Hardware(sharding="fsdp"),
    "late": Hardware(sharding="fsdp", accumulate=2, reduce_last=True),
    "shards": Hardware(sharding="fsdp", teacher="sharded", checkpointing=True, accumulate=2),
}


IN_BF16 = {"low": Hardware(cpu_bf16=True), "low shards": Hardware(sharding="fsdp", cpu_bf16=True)}


def _work(rank: int, base: Path, folder: Path) -> None:
    """What each of two processes does: steps, a stop, going on in shards, failing together."""
    with joined("cpu") as world:
        for name, hardware in LAYOUTS.items():
            distil(base, folder / name, hardware, settings=STEP, world=world)
        for name, hardware in IN_BF16.items() if has_bf16() else ():
            distil(base, folder / name, hardware, settings=STEP, world=world)
        raised = []
        streams = []
        for run, at, hardware in (("stopped", 20, PLAIN), ("on", 24, LAYOUTS["fsdp"])):
            # Only the second process is told to stop.
            stream = SignalledStream(at, signal.SIGTERM) if rank else Stream()
            try:
                distil(base, folder / run, hardware, settings=COURSE, world=world, data=stream)
            except Failure as error:
                raised.append((type(error).__name__, str(error)))
            streams.append(stream.asked)
            with world.together():
                if world.first and run == "stopped":
                    shutil.copytree(folder / "stopped", folder / "on")
        try:
            with world.together():
                if rank:
                    raise UserError("the second process's mistake")
        except (UserError, Failure) as error:
            raised.append((type(error).__name__, str(error)))
        try:  # as if each machine had a disk of its own
            distil(base, folder / f"own-{rank}", settings=STEP, world=world)
        except (UserError, Failure) as error:
            raised.append((type(error).__name__, str(error)))
        told = {"raised": raised, "asked": streams}
        (folder / f"{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left."""
    folder = tmp_path_factory.mktemp("two")
    processes(_work, base, folder)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_equal_one(folder: Path, step: Path, name: str) -> None:
    assert_same_step(folder / name, step)
    assert len((folder / name / "stats.jsonl").read_text().splitlines()) == 1


@pytest.mark.skipif(not has_bf16(), reason="this CPU has no bf16 instructions")
def test_shards_are_gathered_in_the_precision_of_the_pass(folder: Path, step: Path) -> None:
    """In bf16, which changes what is computed by no more than autocast does."""
    exact, low, shards = (gradient(run) for run in (step, folder / "low", folder / "low shards"))
    assert 0 < distance(shards, low) < 2 * distance(low, exact) < 0.2 * norm(exact)


def test_a_signal_to_one_process_stops_all_after_the_same_step(folder: Path) -> None:
    told = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    for rank, kind in enumerate((Failure, FailedElsewhere)):
        for (name, message), seen in zip(told[rank]["raised"], (24, 28), strict=False):
            assert name == kind.__name__
            assert message.endswith(f"stopped after {seen} samples; run again to continue")
    asked = sorted(told[0]["asked"][0] + told[1]["asked"][0])
    assert asked == list(range(24))


def test_what_fails_in_one_process_fails_in_all_and_is_said_once(folder: Path) -> None:
    told = [json.loads((folder / f"{rank}.json").read_text())["raised"][2] for rank in (0, 1)]
    assert told == [
        ["FailedElsewhere", "process 1 failed"],
        ["UserError", "the second process's mistake"],
    ]


def test_machines_must_share_the_runs_folder(folder: Path) -> None:
    told = [json.loads((folder / f"{rank}.json").read_text())["raised"][3] for rank in (0, 1)]
    assert told[0] == ["FailedElsewhere", "process 1 failed"]
    assert told[1][0] == "UserError" and "all machines must share the folder --out" in told[1][1]


def test_a_run_goes_on_with_other_processes(folder: Path, course: Path, base: Path) -> None:
    assert_same_course(folder / "on", course, 28)  # replicas, then shards
    stream = Stream()
    distil(base, folder / "stopped", settings=COURSE, data=stream)
    assert stream.asked == list(range(24, 40))  # none lost, none twice
    assert_same_course(folder / "stopped", course, 40)


# --- what cannot be ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hardware", "message"),
    [
        (Hardware(accumulate=3), "a batch of 4 does not divide into 3 equal parts"),
        (Hardware(sharding="fsdp"), "sharding=fsdp needs several processes: start it with"),
        (Hardware(teacher="sharded"), "teacher=sharded needs several processes"),
        (Hardware(teacher="offloaded"), "on the CPU the teacher is in main memory anyway"),
        (Hardware(compile="fast"), "compile=fast: choose one of .*inductor"),
    ],
)
def test_hardware_that_cannot_be_is_refused_before_the_first_step(
    base: Path, tmp_path: Path, hardware: Hardware, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        distil(base, tmp_path / "run", hardware, settings=STEP)
    assert not (tmp_path / "run").exists()


def test_a_setting_for_a_teacher_needs_one(base: Path) -> None:
    with pytest.raises(UserError, match="teacher=offloaded: this training has no teacher"):
        lay_out(toy_task(base), Hardware(teacher="offloaded"), World())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulate": 0}, "accumulate is 0: it must be 1 or more"),
        ({"sharding": "zero"}, "unknown sharding 'zero': choose ddp, fsdp"),
        ({"reduce_last": True}, "reduce_last=true has no effect without sharding=fsdp and"),
        ({"teacher": "away"}, "unknown teacher 'away': choose whole, sharded, offloaded"),
    ],
)
def test_hardware_that_means_nothing_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Hardware(**change)
