"""The training loop of every model: VAE, text encoders, teacher, student.

The task defines the named losses, the data a batch as a function of the sample's number, and the
layout the distribution over processes. The loop owns the order of events, optimiser, EMA,
checkpoints and records. Randomness is a function of (seed, sample number), so a run that is stopped
and resumed ends in the same weights, bit for bit on a CPU; with another number of processes or
another division of the batch, up to rounding.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from koala.distillation import checkpoint
from koala.distillation.ema import EMA
from koala.distillation.forward_process import generators_at
from koala.distillation.optimizers import new_optimizer, set_rate, trained_parameters
from koala.distillation.parallel import Layout
from koala.distillation.precision import LossScale, computing
from koala.distillation.records import Log, Record
from koala.distillation.settings import Training
from koala.distillation.throughput import Meter
from koala.errors import UserError
from koala.utils.atomic import claim, new_file
from koala.utils.device import compute_dtype
from koala.utils.progress import progress

VALIDATION_SEED = 2**40  # of the validation's noise and timesteps: the same in every run


class Task(Protocol):
    """The interface of a task; see `koala.distillation.tasks`."""

    @property
    def trainable(self) -> nn.Module: ...
    def losses(
        self, batch: dict[str, Any], generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]: ...
    def preview(self, trainable: nn.Module) -> Image.Image | None: ...
    def export(self, trainable: nn.Module, folder: Path) -> None: ...


@runtime_checkable
class TaskWithCritic(Task, Protocol):
    """A task with a second trainable network, which judges the student and is not exported.

    By turns a step trains one of the two (`Training.critic_updates`).
    """

    @property
    def critic(self) -> nn.Module: ...
    def critic_losses(
        self, batch: dict[str, Any], generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]: ...


class Data(Protocol):
    """An endless, ordered stream of samples.

    `batch(first, count, rank, world)` is the rank-th of `world` equal, contiguous parts of the
    samples first..first+count-1.
    """

    def batch(self, first: int, count: int, rank: int, world: int) -> dict[str, Any]: ...


def train(
    task: Task,
    data: Data,
    settings: Training,
    run: Path,
    note: dict[str, Any] | None = None,
    *,
    layout: Layout | None = None,
    validation: Sequence[dict[str, Any]] = (),
    loggers: Sequence[str] = (),
    flops: float | None = None,
    optimizer: Callable[[list[Any], Training], torch.optim.Optimizer] | None = None,
) -> nn.Module:
    """Trains to the end, from the newest checkpoint in `run` if any; returns the EMA weights.

    run: folder for `run.json` (settings and `note`), `stats.jsonl`, `previews/`, `checkpoints/`,
      and `validation.jsonl` if there are batches for `validation`, of the data's format.
    layout: of several processes, or of other hardware (`koala.distillation.parallel`); None: this
      process and the task's device.
    loggers: "tensorboard", "wandb". flops: of one sample's step, to show the share of the peak.
    optimizer: of the trained parameters and the settings; None: the settings'.

    SIGTERM and Ctrl-C save and stop; a second one stops at once. UserError if the folder belongs
    to a run with other settings, or a setting is invalid; Failure if a loss or the gradient is not
    finite (the last good checkpoint is kept), or the run was stopped before its end.
    """
    module = task.trainable.train()
    critic = task.critic.train() if isinstance(task, TaskWithCritic) else None
    layout = layout or Layout(dtype=compute_dtype(next(module.parameters()).device))
    world, parts = layout.world, layout.hardware.accumulate
    micro = layout.hardware.micro_batch(settings.batch, world.size)
    _check(settings, layout, validation, critic)
    with world.together():
        if world.first:
            claim(run / "run.json", {**asdict(settings), **(note or {})})
    world.check_shared(run / "run.json")
    averages = [EMA(module, length, layout.hardware.ema_on_cpu) for length in settings.half_lives]
    if optimizer is not None:
        chosen = optimizer([*trained_parameters(module).values()], settings)
    else:
        chosen = new_optimizer(settings, module, critic)
    state = checkpoint.State(module, averages, chosen, critic)
    last = checkpoint.newest(run)
    seen, open_sums = checkpoint.load(last, state) if last else (0, None)
    log, meter, scale = Log(open_sums), Meter(world, seen, flops), LossScale(layout.dtype)
    with world.together():
        record = Record(run, seen, loggers) if world.first else None
    saved = time.monotonic()
    with (
        progress(run.name, settings.samples, "samples", seen, silent=not world.first) as advance,
        _stop_requested() as stop_requested,
        checkpoint.Saver(run, settings, world.first) as saver,
    ):
        while seen < settings.samples:
            # One step.
            batch = data.batch(seen, settings.batch, world.rank, world.size)
            first = seen + world.rank * parts * micro
            of_critic = settings.moves_critic(seen)
            moving = critic if of_critic and critic is not None else module
            while True:
                generators = generators_at(settings.seed, first, parts * micro)
                sums = gradients(task, layout, batch, generators, of_critic, scale.value)
                scale.divide(moving.parameters())
                norm = nn.utils.clip_grad_norm_(moving.parameters(), settings.clip)
                sums["grad_norm"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
                save_due = time.monotonic() - saved > settings.save_every
                wishes = [float(stop_requested()), float(save_due and world.first)]
                values, (stop, save) = _agree(layout, sums, wishes)
                if not scale.overflowed(values["grad_norm"]):
                    break
                chosen.zero_grad(set_to_none=True)
            if of_critic:
                values = {f"critic_{name}": value for name, value in values.items()}
            _check_finite(layout, values, seen, run)
            log.add(values)
            set_rate(chosen, settings.lr_at(seen))
            chosen.step()
            chosen.zero_grad(set_to_none=True)
            seen += settings.batch
            for average in averages:
                average.update(module, settings.batch, seen)

            # Records, previews, checkpoints.
            done = seen >= settings.samples
            due = _due(seen, settings)
            if done or due(settings.log_every):
                means = log.means()
                pace = {"lr": settings.lr_at(seen - settings.batch), **meter.read(seen)}
                if record:
                    record.write("train", seen, {**means, **pace, "seconds": log.seconds})
            advance(settings.batch, f"loss {log.latest:.4f} {meter.note}".strip())
            if validation and (done or due(settings.validate_every)):
                means = _validate(task, layout, averages[0], validation, micro)
                if record:
                    record.write("validation", seen, means)
            if done or due(settings.preview_every):
                image = _preview(task, averages[0])
                if record and image is not None:
                    _write_image(image, run / "previews" / f"{seen:012d}.png")
            if done or stop or save or due(settings.keep_every):
                with world.together():
                    saver.save(seen, state, log.open_sums())
                    if done or stop:
                        saver.wait()
                saved = time.monotonic()
            if stop and not done:
                raise world.failure(f"{run}: stopped after {seen} samples; run again to continue")
    averages[0].copy_to(module)
    return module.eval()


def gradients(
    task: Task,
    layout: Layout,
    batch: dict[str, Any],
    generators: Sequence[torch.Generator],
    of_critic: bool = False,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Accumulates the gradients of a batch, part by part; returns the means of its losses.

    batch: this process's share of a step. generators: one per sample. of_critic: the gradients of
    the task's critic, not of the student. scale: a factor of the gradients.
    """
    compute = task.losses
    if of_critic:
        assert isinstance(task, TaskWithCritic)
        compute = task.critic_losses
    device = next(task.trainable.parameters()).device
    parts, sums = layout.hardware.accumulate, dict[str, Tensor]()
    micro = len(generators) // parts
    for part in range(parts):
        own = generators[part * micro : (part + 1) * micro]
        with layout.computing(last=part == parts - 1):
            with computing(device, layout.dtype):
                losses = compute(_cut(batch, part, micro), own)
            (losses["loss"] / parts * scale).backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach().float() / parts
    return sums


def _check(
    settings: Training,
    layout: Layout,
    validation: Sequence[dict[str, Any]],
    critic: nn.Module | None,
) -> None:
    if bool(settings.critic_updates) != (critic is not None):
        raise UserError(
            "critic_lr and critic_updates have no effect: this task trains one network; leave them "
            "out"
            if critic is None
            else "this task trains a second network: give critic_lr and critic_updates"
        )
    if settings.optimizer == "adamw-8bit" and layout.hardware.sharding == "fsdp":
        raise UserError(
            "optimizer adamw-8bit does not support sharding=fsdp: its moments are not sharded; "
            "use adamw"
        )
    if bool(settings.validate_every) != bool(validation):
        raise UserError(
            f"validate_every is {settings.validate_every} but there are "
            f"{'some' if validation else 'no'} validation samples: give both or neither"
        )


def _cut(batch: dict[str, Any], part: int, size: int) -> dict[str, Any]:
    """The part-th `size` samples of a batch."""
    return {name: column[part * size : (part + 1) * size] for name, column in batch.items()}


def _due(seen: int, settings: Training) -> Callable[[int], bool]:
    """Whether the step that ended after `seen` samples passed a multiple of a number; 0: never."""
    return lambda every: every > 0 and seen // every > (seen - settings.batch) // every


def _agree(
    layout: Layout, values: dict[str, Tensor], wishes: list[float]
) -> tuple[dict[str, float], list[bool]]:
    """Means over the processes, and whether any process has each wish, in one all-reduce.

    All processes thus stop and save after the same step.
    """
    stacked = torch.stack([value.detach().float() for value in values.values()])
    vector = layout.world.mean(torch.cat([stacked.cpu(), torch.tensor(wishes)])).tolist()
    numbers = dict(zip(values, vector[: len(values)], strict=True))
    return numbers, [number > 0 for number in vector[len(values) :]]


def _check_finite(layout: Layout, values: dict[str, float], seen: int, run: Path) -> None:
    """Raises Failure naming the first tap, term or norm that is not finite, and their number."""
    bad = [name for name, number in values.items() if not math.isfinite(number)]
    if bad:
        others = f" (and {len(bad) - 1} more are not finite)" if len(bad) > 1 else ""
        raise layout.world.failure(
            f"{run}: {bad[0]!r} is {values[bad[0]]} after {seen} samples{others}; the last "
            "checkpoint is kept: lower the learning rate and start a new run"
        )


@torch.no_grad()
def _validate(
    task: Task, layout: Layout, average: EMA, validation: Sequence[dict[str, Any]], size: int
) -> dict[str, float]:
    """Means of the averaged weights' losses on the validation samples, always with the same noise.

    In the training's precision. Every process computes all of it, since sharded models need every
    process. size: samples computed at once.
    """
    lengths = [len(next(iter(batch.values()))) for batch in validation]
    device, sums = next(task.trainable.parameters()).device, dict[str, float]()
    first = 0  # sample of all
    with _averaged(task.trainable, average):
        for batch, length in zip(validation, lengths, strict=True):
            for part in range(-(-length // size)):
                number = min(size, length - part * size)
                with computing(device, layout.dtype):
                    losses = task.losses(
                        _cut(batch, part, size), generators_at(VALIDATION_SEED, first, number)
                    )
                first += number
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + value.item() * number / sum(lengths)
    return sums


@contextmanager
def _averaged(module: nn.Module, average: EMA) -> Iterator[None]:
    """The module with the averaged weights, for a moment, and eager: not worth compiling."""
    average.swap(module)
    module.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        average.swap(module)
        module.train()


def _preview(task: Task, average: EMA) -> Image.Image | None:
    """A preview drawn with the averaged weights."""
    with _averaged(task.trainable, average):
        return task.preview(task.trainable)


def _write_image(image: Image.Image, path: Path) -> None:
    with new_file(path) as part:
        image.save(part, format="PNG")


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Lets SIGTERM and Ctrl-C request that the loop saves and stops."""
    asked = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(number, before[signal.Signals(number)])

    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in signals}
    for number in signals:
        signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
