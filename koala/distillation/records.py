"""The records of a run: `stats.jsonl`, `validation.jsonl`, and loggers.

The JSON lines are always written; loggers (TensorBoard, wandb) get the same numbers on request.
Only the first process of a run writes.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from koala.errors import unknown
from koala.utils.atomic import write_text
from koala.utils.extras import require

LOGGERS = ("tensorboard", "wandb")
FILES = {"train": "stats.jsonl", "validation": "validation.jsonl"}


class Logger(Protocol):
    """A further destination of the numbers."""

    def log(self, group: str, seen: int, values: dict[str, float]) -> None: ...


class TensorBoard:
    """Event files in the run's folder `tensorboard/`."""

    def __init__(self, run: Path, seen: int) -> None:
        require("--log tensorboard", "tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run / "tensorboard", purge_step=seen + 1)

    def log(self, group: str, seen: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, seen)
        self._writer.flush()


class Wandb:
    """The run at Weights & Biases, in the project "koala"; a resumed run continues there."""

    def __init__(self, run: Path, seen: int) -> None:
        require("--log wandb", "wandb", "wandb")
        import wandb

        settings = (run / "run.json").read_text("utf-8")
        self._run = wandb.init(
            project="koala",
            name=run.name,
            id=hashlib.sha256(f"{run.absolute()} {settings}".encode()).hexdigest()[:16],
            resume="allow",
            dir=run,
            config=json.loads(settings),
        )

    def log(self, group: str, seen: int, values: dict[str, float]) -> None:
        self._run.log({f"{group}/{name}": value for name, value in values.items()}, step=seen)


def check_loggers(names: Sequence[str]) -> None:
    """UserError for a name that is none of `LOGGERS`."""
    for name in names:
        if name not in LOGGERS:
            raise unknown("--log logger", name, LOGGERS)


def open_loggers(names: Sequence[str], run: Path, seen: int) -> list[Logger]:
    """The loggers of these names; UserError for unknown names and missing packages.

    seen: samples that the run has seen; later values in a logger are overwritten.
    """
    kinds: dict[str, Callable[[Path, int], Logger]] = {
        "tensorboard": TensorBoard,
        "wandb": Wandb,
    }
    check_loggers(names)
    return [kinds[name](run, seen) for name in names]


class Lines:
    """A JSONL file with one line per group of samples, in order."""

    def __init__(self, path: Path, seen: int) -> None:
        """Removes lines beyond the samples `seen`: they will be written again."""
        self.path = path
        if path.exists():
            text = path.read_text("utf-8")
            whole = text[: text.rfind("\n") + 1].splitlines()  # a kill may truncate the last line
            kept = [line for line in whole if json.loads(line)["samples"] <= seen]
            write_text(path, "".join(f"{line}\n" for line in kept))

    def write(self, seen: int, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"samples": seen, **values}) + "\n")


class Record:
    """Everything that a run records: a file of lines per group, and loggers."""

    def __init__(self, run: Path, seen: int, loggers: Sequence[str]) -> None:
        self._lines = {group: Lines(run / file, seen) for group, file in FILES.items()}
        self._loggers = open_loggers(loggers, run, seen)

    def write(self, group: str, seen: int, values: dict[str, float]) -> None:
        """group: "train" or "validation"."""
        self._lines[group].write(seen, values)
        for logger in self._loggers:
            logger.log(group, seen, values)


class Log:
    """Means of every named loss since the previous line.

    Each over the steps that computed it. The sums of the next line are stored in checkpoints, so a
    resumed run writes the same lines as an uninterrupted one.
    """

    def __init__(self, open_sums: dict[str, Any] | None) -> None:
        state = open_sums or {"sums": {}, "counts": {}, "seconds": 0.0}
        self.latest = math.nan
        self.sums: dict[str, float] = dict(state["sums"])
        counts = state.get("counts")  # checkpoints before 0.2.0 have one count for all
        self.counts: dict[str, int] = dict(counts or dict.fromkeys(self.sums, state.get("count")))
        self._started = time.monotonic() - state["seconds"]

    @property
    def seconds(self) -> float:
        """Seconds of training since the start, without pauses between runs."""
        return time.monotonic() - self._started

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.latest = values.get("loss", self.latest)

    def open_sums(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "counts": dict(self.counts), "seconds": self.seconds}

    def means(self) -> dict[str, float]:
        """Returns the means and starts the next line."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means
