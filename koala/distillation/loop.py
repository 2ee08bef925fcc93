"""The training loop, one for everything that learns: VAE, text side, teacher, student.

What is learnt is the task's business (named losses), what is learnt from the data's (a batch is a
function of the sample's number); here are order, optimiser, EMA, checkpoints and what one sees
while it runs. Randomness is a function of (seed, samples seen), so a run that is stopped and
started again by the same command ends in the same weights, bit for bit on a CPU.
"""

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from koala.distillation import checkpoint
from koala.distillation.ema import EMA
from koala.distillation.settings import Training
from koala.errors import Failure, UserError
from koala.progress import progress


class Task(Protocol):
    """What the loop asks of a task; see `koala.distillation.tasks`."""

    trainable: nn.Module

    def losses(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]: ...
    def preview(self, trainable: nn.Module) -> Image.Image | None: ...
    def export(self, trainable: nn.Module, folder: Path) -> None: ...


class Data(Protocol):
    """An endless, ordered stream: `batch(first, count)` is samples first..first+count-1."""

    def batch(self, first: int, count: int) -> dict[str, Any]: ...


def train(
    task: Task, data: Data, settings: Training, run: Path, note: dict[str, Any] | None = None
) -> nn.Module:
    """Trains to the end, going on from the newest checkpoint in `run`; returns the EMA weights.

    run: folder for `run.json` (settings and `note`), `stats.jsonl`, `previews/`, `checkpoints/`.
    SIGTERM and Ctrl-C save and stop (a second one ends at once). UserError when the folder belongs
    to a run with other settings; Failure when a loss or the gradient is not finite (the last good
    checkpoint stays), or when the run was stopped before its end.
    """
    _claim(run, {**asdict(settings), **(note or {})})
    module = task.trainable.train()
    device = next(module.parameters()).device
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    ema = EMA(module, settings.ema_half_life)
    last = checkpoint.newest(run)
    seen, open_sums = checkpoint.load(last, module, ema, optimizer) if last else (0, None)
    log = _Log(run / "stats.jsonl", seen, open_sums)
    saved = time.monotonic()
    with (
        progress(run.name, settings.samples, "samples", seen) as advance,
        _stop_requested() as stop_requested,
    ):
        while seen < settings.samples:
            batch = data.batch(seen, settings.batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                losses = task.losses(batch, generator_at(settings.seed, seen))
            losses["loss"].backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
            log.add(_finite({**losses, "grad_norm": norm}, seen, run))
            for group in optimizer.param_groups:
                group["lr"] = settings.lr_at(seen)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen += settings.batch
            ema.update(module, settings.batch, seen)

            done, stop = seen >= settings.samples, stop_requested()
            if done or _crossed(seen, settings.batch, settings.log_every):
                log.write(seen, settings.lr_at(seen - settings.batch))
            advance(settings.batch, f"loss {log.latest:.4f}")
            if done or _crossed(seen, settings.batch, settings.preview_every):
                _preview(task, ema, module, run / "previews" / f"{seen:012d}.png")
            if done or stop or time.monotonic() - saved > settings.save_every:
                checkpoint.save(run, seen, module, ema, optimizer, log.open_sums())
                saved = time.monotonic()
            if stop and not done:
                raise Failure(f"{run}: stopped after {seen} samples; run again to go on")
    ema.copy_to(module)
    return module.eval()


def generator_at(seed: int, seen: int) -> torch.Generator:
    """CPU generator of the step that begins after `seen` samples.

    torch's CPU generator reads only the lower 32 bits of its seed, so both numbers are hashed into
    that many.
    """
    digest = hashlib.blake2b(f"{seed} {seen}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _crossed(seen: int, batch: int, every: int) -> bool:
    """Whether the last batch passed a multiple of `every`."""
    return seen // every > (seen - batch) // every


def _claim(run: Path, settings: dict[str, Any]) -> None:
    path, wanted = run / "run.json", json.loads(json.dumps(settings))
    if path.exists():
        found = json.loads(path.read_text())
        for k in sorted({*found, *wanted}):
            if found.get(k) != wanted.get(k):
                raise UserError(
                    f"{run} holds a run with {k}={found.get(k)!r}, now it is {wanted.get(k)!r}; "
                    "take another --out, or remove the folder"
                )
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(wanted, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{run}: cannot be written ({error.strerror}); take another --out"
        ) from error


def _replace(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def _finite(values: dict[str, Tensor], seen: int, run: Path) -> dict[str, float]:
    """The values as numbers, by one transfer from the device; Failure on the first that is none."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    numbers = dict(zip(values, stacked.tolist(), strict=True))
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise Failure(
                f"{run}: {name!r} is {number} after {seen} samples; the last checkpoint is kept: "
                "lower the learning rate and begin a new run"
            )
    return numbers


def _preview(task: Task, ema: EMA, module: nn.Module, path: Path) -> None:
    """Draws with the averaged weights, then puts the trained ones back."""
    kept = {k: v.clone() for k, v in module.state_dict().items()}
    ema.copy_to(module)
    image = task.preview(module.eval())
    module.load_state_dict(kept)
    module.train()
    if image is not None:
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        image.save(part, format="PNG")
        os.replace(part, path)


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """SIGTERM and Ctrl-C ask the loop to save and stop, instead of dying between checkpoints."""
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


class _Log:
    """`stats.jsonl`: means of every named loss since the line before.

    A line's "seconds" are of training since its very beginning, without pauses between runs.
    The sums of the line that is not yet written go into checkpoints, so that the lines of a
    resumed run are those of an uninterrupted one.
    """

    def __init__(self, path: Path, seen: int, open_sums: dict[str, Any] | None) -> None:
        state = open_sums or {"sums": {}, "count": 0, "seconds": 0.0}
        self.path, self.latest = path, math.nan
        self.sums: dict[str, float] = state["sums"]
        self.count: int = state["count"]
        self.started = time.monotonic() - state["seconds"]
        if path.exists():
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1].splitlines()  # a kill may have cut the last line
            # Lines after the checkpoint will be written again.
            kept = [line for line in whole if json.loads(line)["samples"] <= seen]
            _replace(path, "".join(f"{line}\n" for line in kept))

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1
        self.latest = values["loss"]

    def open_sums(self) -> dict[str, Any]:
        seconds = time.monotonic() - self.started
        return {"sums": dict(self.sums), "count": self.count, "seconds": seconds}

    def write(self, seen: int, lr: float) -> None:
        means = {name: total / self.count for name, total in self.sums.items()}
        line = {"samples": seen, **means, "lr": lr, "seconds": time.monotonic() - self.started}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.sums, self.count = {}, 0
