"""What one sees of a run while it trains: lines, loggers, validation, the bar, previews."""

import importlib.util
import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from koala.distillation.forward_process import generators_at
from koala.distillation.loop import VALIDATION_SEED, train
from koala.errors import Failure, UserError
from toy_training import SETTINGS, SignalledStream, Stream, toy_task

LOGGERS = ("tensorboard", "wandb")
INSTALLED = [name for name in LOGGERS if importlib.util.find_spec(name) is not None]
MISSING = [
    (name, rf"--log {name}: {name} is not installed; run pip install -e '\.\[{name}\]'")
    for name in LOGGERS
    if name not in INSTALLED
]


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, whose samples it is also validated with."""
    run = tmp_path_factory.mktemp("whole") / "run"
    settings = replace(SETTINGS, validate_every=20)
    train(toy_task(base), Stream(), settings, run, validation=VALIDATION)
    return run


VALIDATION = [Stream().batch(100, 6), Stream().batch(110, 3)]  # of two buckets


def stats(run: Path, file: str = "stats.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def test_the_log_holds_means_of_every_named_loss(whole: Path) -> None:
    line = stats(whole)[0]
    assert list(line) == [
        *("samples", "task", "loss", "grad_norm", "lr"),
        *("samples_per_second", "memory_gib", "seconds"),
    ]
    assert line["task"] == line["loss"]
    assert line["lr"] == SETTINGS.lr
    assert line["seconds"] > 0


def test_validation_is_always_on_the_same_noise(base: Path, whole: Path) -> None:
    lines = stats(whole, "validation.jsonl")
    assert [line["samples"] for line in lines] == [20, 40]
    tensors = load_file(whole / "checkpoints" / "000000000040" / "state.safetensors")
    task = toy_task(base)
    mean = "ema.32."  # what is exported
    weights = {k.removeprefix(mean): v for k, v in tensors.items() if k.startswith(mean)}
    task.trainable.load_state_dict(weights)
    with torch.no_grad():
        first, second = (
            task.losses(batch, generators_at(VALIDATION_SEED, at, count))
            for batch, at, count in zip(VALIDATION, (0, 6), (6, 3), strict=True)
        )
    assert lines[-1].keys() == {"samples", *first}
    for name in first:
        mean = (6 * first[name].item() + 3 * second[name].item()) / 9
        assert lines[-1][name] == pytest.approx(mean, rel=1e-5)


@pytest.mark.skipif("tensorboard" not in INSTALLED, reason="tensorboard is not installed")
def test_tensorboard_shows_the_lines(base: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(toy_task(base), Stream(), SETTINGS, tmp_path / "run", loggers=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    lines = stats(tmp_path / "run")
    assert shown == pytest.approx({line["samples"]: line["loss"] for line in lines})


def test_the_bar_shows_rate_time_left_and_loss(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(Failure):
        train(toy_task(base), SignalledStream(28, signal.SIGTERM), SETTINGS, tmp_path / "run")
    shown = " ".join(capsys.readouterr().err.split())
    assert re.search(r"run .*32/40 [\d.]+ samples/s \d:\d\d:\d\d loss \d\.\d{4}", shown), shown


class Line:
    """A weight that learns to be 1."""

    def __init__(self) -> None:
        self.trainable: nn.Module = nn.Linear(1, 1, bias=False)

    def losses(self, batch: dict, generators: list[torch.Generator]) -> dict[str, torch.Tensor]:
        loss = (self.trainable.weight - 1).square().sum()
        return {"line": loss, "loss": loss}

    def preview(self, trainable: nn.Module) -> Image.Image:
        return Image.new("RGB", (4, 4), "white")

    def export(self, trainable: nn.Module, folder: Path) -> None:
        raise NotImplementedError


def test_previews_are_drawn_while_it_trains_and_at_the_end(tmp_path: Path) -> None:
    train(Line(), Stream(), SETTINGS, tmp_path / "run")
    drawn = sorted(path.name for path in (tmp_path / "run" / "previews").iterdir())
    assert drawn == ["000000000016.png", "000000000032.png", "000000000040.png"]


def test_validation_needs_samples_and_samples_need_validation(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="validate_every is 20 but there are no validation samples"):
        train(toy_task(base), Stream(), replace(SETTINGS, validate_every=20), tmp_path)
    with pytest.raises(UserError, match="validate_every is 0 but there are some validation"):
        train(toy_task(base), Stream(), SETTINGS, tmp_path, validation=VALIDATION)


@pytest.mark.parametrize(
    ("logger", "message"),
    [("print", "unknown --log logger 'print': choose tensorboard, wandb"), *MISSING],
)
def test_boards_that_are_not_there_are_refused_before_the_first_step(
    base: Path, tmp_path: Path, logger: str, message: str
) -> None:
    stream = Stream()
    with pytest.raises(UserError, match=message):
        train(toy_task(base), stream, SETTINGS, tmp_path / "run", loggers=[logger])
    assert stream.asked == []
