"""Checkpoints of a training: everything that going on from there needs, and nothing half-written.

A checkpoint is a folder `checkpoints/<samples seen>` with `state.safetensors` (weights, EMA,
optimiser) and `state.json` (samples seen, the log's open sums). It is written beside its name and
renamed when whole, so whatever has the name can be trusted. The last two are kept.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from koala.distillation.ema import EMA
from koala.errors import Failure

KEPT = 2


def newest(run: Path) -> Path | None:
    """The checkpoint to go on from, or None at the beginning."""
    found = _whole(run / "checkpoints")
    return found[-1] if found else None


def _whole(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name.isdigit())


def save(
    run: Path,
    seen: int,
    module: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    log: dict[str, Any],
) -> None:
    """Writes the state after `seen` samples; Failure where the disk does not take it."""
    folder = run / "checkpoints" / f"{seen:012d}"
    part = folder.with_name(f".{folder.name}.part")
    for leftover in folder.parent.glob(".*"):  # of a run that was killed while it wrote
        shutil.rmtree(leftover)
    tensors = {f"weights.{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    try:
        part.mkdir(parents=True)
        on_cpu = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(on_cpu, part / "state.safetensors")
        (part / "state.json").write_text(json.dumps({"samples": seen, "log": log}))
        for path in (part / "state.safetensors", part / "state.json", part):
            _to_disk(path)
        os.rename(part, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise Failure(
            f"{folder}: cannot write the checkpoint ({error}); run again to go on from the last one"
        ) from error
    for old in _whole(folder.parent)[:-KEPT]:
        going = old.with_name(f".{old.name}.old")  # never half of one under a checkpoint's name
        os.rename(old, going)
        shutil.rmtree(going)


def _to_disk(path: Path) -> None:
    """Waits until the file or folder would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(
    checkpoint: Path, module: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]]:
    """Restores the state; returns the samples seen and the log's open sums.

    Failure when the files are damaged.
    """
    try:
        tensors = load_file(checkpoint / "state.safetensors")
        about = json.loads((checkpoint / "state.json").read_text())
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise Failure(
            f"{checkpoint}: the checkpoint is damaged ({error}); remove this folder and run again "
            "to go on from the one before"
        ) from error
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "ema": {}, "optimizer": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    module.load_state_dict(parts["weights"])
    ema.load_state_dict(parts["ema"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in parts["optimizer"].items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return about["samples"], about["log"]
