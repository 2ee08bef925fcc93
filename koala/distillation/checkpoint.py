"""Checkpoints of a training: everything needed to resume it.

A checkpoint is a folder `checkpoints/<samples seen>` with `state.safetensors` (weights, averages,
optimiser) and `state.json` (samples seen, the log's open sums). It is written atomically. Tensors
are stored whole and in fp32 (the codes of 8-bit moments as bytes) even if they are sharded, so any
number of processes can resume.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from koala.distillation.dtensor import local, part_of, whole
from koala.distillation.ema import EMA
from koala.distillation.optimizers import make_moments, plain_parts, trained_parameters
from koala.distillation.settings import Training
from koala.errors import Failure, UserError
from koala.utils.atomic import new_folder

TORCHRUN_WAITS = 30  # seconds from torchrun's SIGTERM to its SIGKILL


@dataclass(frozen=True)
class State:
    """The state that a step changes."""

    module: nn.Module
    averages: list[EMA]
    optimizer: torch.optim.Optimizer
    critic: nn.Module | None = None  # trained beside the module, and not averaged

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        found = trained_parameters(self.module)
        if self.critic is not None:
            critic = trained_parameters(self.critic)
            found |= {f"critic.{name}": parameter for name, parameter in critic.items()}
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, local tensor, tensor with its sharding) of everything that is saved."""
        parameters = self.parameters()
        for name, parameter in parameters.items():
            yield f"weights.{name}", parameter, parameter
        for average in self.averages:
            for name, weight in average.state_dict().items():
                yield f"ema.{average.half_life}.{name}", weight, parameters[name]
        for name, parameter in parameters.items():
            for key, moment in self.optimizer.state.get(parameter, {}).items():
                if not isinstance(moment, Tensor):
                    raise UserError(
                        f"{type(self.optimizer).__name__} keeps {key} as {type(moment).__name__}: "
                        "an optimiser's state must be tensors, so that a run can be resumed"
                    )
                for part, value in plain_parts(moment).items():
                    yield f"optimizer.{name}.{key}{part}", value, value


def newest(run: Path) -> Path | None:
    """The newest checkpoint, or None."""
    found = _whole(run / "checkpoints")
    return found[-1] if found else None


def _whole(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name.isdigit())


class Saver:
    """Writes checkpoints while the training goes on.

    Processes wait for each other only while shards are gathered, however slow the disk is. The
    first process holds the state in main memory until it is written, and one state at a time.
    """

    def __init__(self, run: Path, settings: Training, write: bool) -> None:
        self._run, self._settings, self._write = run, settings, write
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._told = False

    def save(self, seen: int, state: State, log: dict[str, Any]) -> None:
        """Begins to write; every process must call this. Failure if the one before failed."""
        self.wait()
        tensors = _gathered(state, self._write)
        if self._write:
            work = (self._run, seen, tensors, log, self._settings)
            self._writing = self._thread.submit(self._timed, *work)

    def wait(self) -> None:
        """Waits until what was begun is written; Failure if it cannot be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def _timed(self, *work: Any) -> None:
        start = time.monotonic()
        _write(*work)
        seconds = time.monotonic() - start
        if seconds > TORCHRUN_WAITS / 2 and "TORCHELASTIC_RUN_ID" in os.environ and not self._told:
            self._told = True
            print(
                f"koala: {self._run}: a checkpoint took {seconds:.0f} s to write, and torchrun "
                f"kills its processes {TORCHRUN_WAITS} s after a SIGTERM: a stop may lose what "
                "came after the last checkpoint (training.save_every)",
                file=sys.stderr,
            )


def _gathered(state: State, keep: bool) -> dict[str, Tensor]:
    """The whole state in main memory; nothing, where it is not kept."""
    tensors = {}
    for name, tensor, like in state.tensors():
        if keep or isinstance(like, DTensor):
            value = whole(tensor, like)
            if keep:
                tensors[name] = value
    return tensors


def _write(
    run: Path, seen: int, tensors: dict[str, Tensor], log: dict[str, Any], settings: Training
) -> None:
    folder = run / "checkpoints" / f"{seen:012d}"
    for leftover in folder.parent.glob(".*"):  # of a run killed while writing
        shutil.rmtree(leftover)
    try:
        with new_folder(folder) as part:
            save_file(tensors, part / "state.safetensors")
            (part / "state.json").write_text(json.dumps({"samples": seen, "log": log}), "utf-8")
    except (UserError, Failure, SafetensorError) as error:
        raise Failure(
            f"{folder}: cannot write the checkpoint ({error}); run again to resume"
        ) from error
    _rotate(folder.parent, settings)


def _rotate(folder: Path, settings: Training) -> None:
    for old in _whole(folder)[: -settings.keep]:
        if settings.keep_every and int(old.name) % settings.keep_every < settings.batch:
            continue  # the first one at or after a multiple
        going = old.with_name(f".{old.name}.old")  # never a partial checkpoint under a final name
        os.rename(old, going)
        shutil.rmtree(going)


@torch.no_grad()
def load(checkpoint: Path, state: State) -> tuple[int, dict[str, Any]]:
    """Restores the state; returns the samples seen and the log's open sums.

    Failure if the files are damaged.
    """
    try:
        with safe_open(checkpoint / "state.safetensors", "pt") as file:
            saved = set(file.keys())
            named = state.parameters().items()
            moments = [key.split(".") for key in saved if key.startswith("optimizer.")]
            owners = {".".join(parts[1:n]) for parts in moments for n in range(len(parts))}
            moving = [value for name, value in named if name in owners]
            make_moments(state.optimizer, moving)
            for name, tensor, like in state.tensors():
                local(tensor).copy_(part_of(file.get_tensor(name), like))
        about = json.loads((checkpoint / "state.json").read_text("utf-8"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise Failure(
            f"{checkpoint}: the checkpoint is damaged ({error}); remove this folder and run again "
            "to resume from the one before"
        ) from error
    return about["samples"], about["log"]


def average(run: Path, half_life: int) -> dict[str, Tensor]:
    """The averaged weights of that half-life in a run's newest checkpoint, fp32, by name."""
    checkpoint = newest(run)
    assert checkpoint is not None, "the run has no checkpoint"
    prefix = f"ema.{half_life}."
    with safe_open(checkpoint / "state.safetensors", "pt") as file:
        names = {name for name in set(file.keys()) if name.startswith(prefix)}
        return {name.removeprefix(prefix): file.get_tensor(name) for name in sorted(names)}
