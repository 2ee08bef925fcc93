"""The loop: stopped and started again it ends in the same weights; nothing is half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from koala.distillation import checkpoint
from koala.distillation.ema import EMA
from koala.distillation.forward_process import generators_at
from koala.distillation.loop import train
from koala.distillation.settings import Training
from koala.errors import Failure, UserError
from toy_training import SETTINGS, SignalledStream, Stream, toy_task


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(toy_task(base), Stream(), SETTINGS, run)
    return run


class SpoiltStream(Stream):
    """Latents are not a number from sample `at` on."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def batch(self, first: int, count: int, rank: int = 0, world: int = 1) -> dict:
        batch = super().batch(first, count, rank, world)
        if first >= self.at:
            batch["latents"][0] = float("nan")
        return batch


def stats(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("samples_per_second", "memory_gib", "seconds"):
            del line[name]
    return lines


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def state(run: Path, seen: int = 40) -> bytes:
    """Weights, EMA and optimiser as they lie on the disk."""
    return (run / "checkpoints" / f"{seen:012d}" / "state.safetensors").read_bytes()


def assert_same_end(run: Path, whole: Path) -> None:
    assert checkpoints(run) == checkpoints(whole) == ["000000000036", "000000000040"]
    assert state(run) == state(whole)
    assert stats(run) == stats(whole)


# --- resuming ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_run_again_equals_uninterrupted_bit_for_bit(
    base: Path, whole: Path, tmp_path: Path, number: int
) -> None:
    run, settings = tmp_path / "run", replace(SETTINGS, save_every=10**6)
    before, handler = SignalledStream(28, number), signal.getsignal(number)
    with pytest.raises(Failure, match="stopped after 32 samples; run again to continue"):
        train(toy_task(base), before, settings, run)
    assert checkpoints(run) == ["000000000032"]
    assert signal.getsignal(number) == handler
    after = Stream()
    module = train(toy_task(base), after, settings, run)
    assert before.asked + after.asked == list(range(40))
    assert state(run) == state(whole)
    assert stats(run) == stats(whole)
    averaged = load_file(run / "checkpoints" / "000000000040" / "state.safetensors")
    for name, value in module.state_dict().items():
        assert torch.equal(value, averaged[f"ema.32.{name}"])
    assert not module.training


def test_lines_after_the_checkpoint_are_written_once_and_a_cut_line_does_no_harm(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Failure):
        train(toy_task(base), SignalledStream(20, signal.SIGTERM), SETTINGS, run)
    assert checkpoints(run) == ["000000000020", "000000000024"]
    (run / "checkpoints" / "000000000024").rename(tmp_path / "lost")
    with (run / "stats.jsonl").open("a") as file:
        file.write('{"samples": 3')
    train(toy_task(base), Stream(), SETTINGS, run)
    assert_same_end(run, whole)
    assert [line["samples"] for line in stats(run)] == [12, 24, 36, 40]


def test_killed_at_any_moment_and_run_again_ends_in_the_same_weights(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "toy_training.py"),
        str(base),
        str(run),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (run / "checkpoints").exists():  # begun; now anything may be half done
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(int.from_bytes(os.urandom(1), "little") / 255 * 0.5)
    process.kill()
    process.wait()
    train(toy_task(base), Stream(), SETTINGS, run)
    assert_same_end(run, whole)


def test_a_finished_run_does_not_train_again(base: Path, whole: Path) -> None:
    kept, stream = state(whole), Stream()
    module = train(toy_task(base), stream, SETTINGS, whole)
    assert stream.asked == []
    assert state(whole) == kept
    ema = load_file(whole / "checkpoints" / "000000000040" / "state.safetensors")
    assert torch.equal(module.state_dict()["conv_in.weight"], ema["ema.32.conv_in.weight"])


# --- checkpoints ---------------------------------------------------------------------------


def test_what_was_half_written_is_no_checkpoint_and_goes_at_the_next_one(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Failure):
        train(toy_task(base), SignalledStream(12, signal.SIGTERM), SETTINGS, run)
    for name in (".000000000020.part", ".000000000004.old"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "state.safetensors").write_bytes(state(run, 16)[:1000])
    newest = checkpoint.newest(run)
    assert newest is not None
    assert newest.name == "000000000016"
    train(toy_task(base), Stream(), SETTINGS, run)
    assert_same_end(run, whole)


def test_a_damaged_checkpoint_is_named(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Failure):
        train(toy_task(base), SignalledStream(4, signal.SIGTERM), SETTINGS, run)
    file = run / "checkpoints" / "000000000008" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Failure, match=r"000000000008: the checkpoint is damaged .* remove this"):
        train(toy_task(base), Stream(), SETTINGS, run)


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    state = checkpoint.State(module, [EMA(module, 10)], torch.optim.AdamW(module.parameters()))
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with checkpoint.Saver(tmp_path, SETTINGS, write=True) as saver:
        saver.save(8, state, {})
        with pytest.raises(Failure, match="000000000008: cannot write the checkpoint"):
            saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_checkpoint_too_slow_for_torchruns_patience_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "TORCHRUN_WAITS", 0)  # any checkpoint is
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    module = nn.Linear(2, 2)
    state = checkpoint.State(module, [EMA(module, 10)], torch.optim.AdamW(module.parameters()))
    for by_torchrun, told in ((False, 0), (True, 1)):
        if by_torchrun:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        with checkpoint.Saver(tmp_path / str(told), SETTINGS, write=True) as saver:
            for seen in (8, 16):
                saver.save(seen, state, {})
        assert capsys.readouterr().err.count("a stop may lose") == told


def test_checkpoints_at_multiples_stay_for_good(base: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, save_every=10**6, keep=1, keep_every=14)
    train(toy_task(base), Stream(), settings, tmp_path / "run")
    # 14, 28 lie within the batches that end at 16, 28.
    assert checkpoints(tmp_path / "run") == ["000000000016", "000000000028", "000000000040"]


def test_every_average_is_kept_by_its_half_life(base: Path, whole: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, ema_others=(1, 512))
    module = train(toy_task(base), Stream(), settings, tmp_path / "run")
    averages = {length: checkpoint.average(tmp_path / "run", length) for length in (32, 1, 512)}
    names = module.state_dict().keys()
    assert all(average.keys() == names for average in averages.values())
    alone = checkpoint.average(whole, 32)
    assert all(torch.equal(averages[32][name], alone[name]) for name in names)
    assert all(torch.equal(averages[32][name], module.state_dict()[name]) for name in names)
    assert not torch.equal(averages[1]["conv_in.weight"], averages[32]["conv_in.weight"])


# --- failures ------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_by_name_and_keeps_the_last_good_state(
    base: Path, tmp_path: Path
) -> None:
    run, task = tmp_path / "run", toy_task(base)
    with pytest.raises(Failure, match=r"'task' is nan after 20 samples \(and 2 more are not"):
        train(task, SpoiltStream(20), SETTINGS, run)
    assert checkpoints(run) == ["000000000016", "000000000020"]
    good = load_file(run / "checkpoints" / "000000000020" / "state.safetensors")
    assert all(value.isfinite().all() for value in good.values())
    for name, value in task.trainable.state_dict().items():
        assert torch.equal(value, good[f"weights.{name}"])


class Kink:
    """sqrt(w^2) at w = 0: the loss is finite and its gradient is not."""

    def __init__(self) -> None:
        linear = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(linear.weight)
        self.weight = linear.weight
        self.trainable: nn.Module = linear

    def losses(self, batch: dict, generators: list[torch.Generator]) -> dict[str, torch.Tensor]:
        loss = self.weight.square().sum().sqrt()
        return {"kink": loss, "loss": loss}

    def preview(self, trainable: nn.Module) -> Image.Image | None:
        return Image.new("RGB", (4, 4), "white")

    def export(self, trainable: nn.Module, folder: Path) -> None:
        raise NotImplementedError


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(tmp_path: Path) -> None:
    task = Kink()
    with pytest.raises(Failure, match="'grad_norm' is nan after 0 samples"):
        train(task, Stream(), SETTINGS, tmp_path / "run")
    assert task.weight.item() == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 2e-3}, r"lr=0.001, now it is 0.002; take another --out"),
        ({"batch": 8}, r"batch=4, now it is 8"),
        ({"samples": 80}, r"samples=40, now it is 80"),
    ],
)
def test_a_changed_setting_is_refused_by_name(
    base: Path, whole: Path, change: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(toy_task(base), Stream(), replace(SETTINGS, **change), whole)


def test_a_changed_note_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    run, note = tmp_path / "run", {"teacher": "a", "taps": ("sa", "lf")}
    with pytest.raises(Failure):
        train(toy_task(base), SpoiltStream(0), SETTINGS, run, note)
    with pytest.raises(UserError, match="teacher='a', now it is 'b'"):
        train(toy_task(base), Stream(), SETTINGS, run, {**note, "teacher": "b"})
    with pytest.raises(Failure):  # the same note is the same run
        train(toy_task(base), SpoiltStream(0), SETTINGS, run, note)


def test_a_run_folder_that_cannot_be_made_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*run.json: Not a directory"):
        train(toy_task(base), Stream(), SETTINGS, tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch is 0: it must be above 0"),
        ({"lr": float("nan")}, "lr is nan: it must be above 0"),
        ({"seed": -1}, "seed is -1: it must be 0 or more"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"samples": 42}, "42 samples are not a multiple of the batch 4: use 44"),
        ({"keep": 0}, "keep is 0: it must be above 0"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd': choose adamw, adamw-8bit"),
        ({"ema_others": (0,)}, r"half-lives are \(32, 0\): each must be above 0"),
        ({"ema_others": (32,)}, r"half-lives are \(32, 32\): name each once"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SETTINGS, **change)


# --- randomness and rate -------------------------------------------------------------------


def test_every_seed_and_every_step_has_noise_of_its_own() -> None:
    drawn = {
        torch.randn(1, generator=generators_at(seed, seen, 1)[0]).item()
        for seed in (0, 1, 2, 2**32)
        for seen in (0, 4, 2**32)
    }
    assert len(drawn) == 12
    again = torch.randn(3, generator=generators_at(5, 8, 1)[0])
    assert torch.equal(again, torch.randn(3, generator=generators_at(5, 6, 3)[2]))


def test_the_learning_rate_warms_up_and_falls_to_0() -> None:
    settings = Training(samples=100, batch=10, lr=1.0, warmup=40, decay=True)
    assert [settings.lr_at(seen) for seen in (0, 10, 30, 50)] == [0.25, 0.5 * 0.9, 0.7, 0.5]
    assert replace(settings, decay=False).lr_at(90) == 1.0
