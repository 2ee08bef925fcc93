"""Runs at a glance: what their folders say of losses, speed and time left, and a plot of them.

Reads only what a training writes for a person to read (`koala.distillation.records`), so a run can
be looked at while it trains, on any machine that sees its folder. Loads no torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from koala.distillation.records import FILES
from koala.errors import UserError
from koala.utils.atomic import new_file
from koala.utils.extras import require

RECENT = 10  # lines that the speed is the mean of
PANELS = ("loss", "validation", "grad_norm", "samples_per_second")  # of a plot
_HEAD = ("run", "samples", "of", "loss", "validation", "samples/s", "left", "written")


@dataclass(frozen=True)
class RunState:
    """A run as its folder tells; None: it has not said yet."""

    name: str  # its folder's path, from the one that was asked for
    samples: int  # of the whole run
    seen: int
    loss: float | None  # of the last line of stats.jsonl
    validation: float | None
    samples_per_second: float | None
    seconds_left: float | None
    seconds_since: float | None  # since the last line
    finished: bool

    def cells(self) -> tuple[str, ...]:
        """For a table."""
        left = "finished" if self.finished else duration(self.seconds_left)
        since = "-" if self.seconds_since is None else f"{duration(self.seconds_since)} ago"
        return (
            self.name, f"{self.seen:,}", f"{self.samples:,}", _number(self.loss),
            _number(self.validation), _number(self.samples_per_second), left, since,
        )  # fmt: skip


def list_runs(folder: str | Path) -> list[RunState]:
    """The runs at and below a folder, by name. UserError if there are none."""
    folder = Path(folder)
    found = [_state(run, folder) for run in _runs(folder)]
    if not found:
        raise UserError(f"{folder} has no runs: give the --out of a training, or a folder of them")
    return found


def table(runs: Sequence[RunState]) -> str:
    """The runs as lines of text."""
    rows = [_HEAD, *(run.cells() for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *rest in rows:
        cells = [
            name.ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def as_json(runs: Sequence[RunState]) -> list[dict[str, Any]]:
    return [asdict(run) for run in runs]


def plot(folder: str | Path, out: Path) -> None:
    """Writes a PNG with a panel for each of `PANELS`, in which every run is a line."""
    require("--plot", "benchmark", "matplotlib")
    from matplotlib.figure import Figure

    folder = Path(folder)
    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = dict(zip(PANELS, figure.subplots(2, 2).flat, strict=True))
    for run in _runs(folder):
        lines = {group: _lines(run / file) for group, file in FILES.items()}
        for name, panel in panels.items():
            group, key = ("validation", "loss") if name == "validation" else ("train", name)
            points = [(line["samples"], line[key]) for line in lines[group] if key in line]
            panel.plot(*zip(*points, strict=True) if points else ((), ()), label=_name(run, folder))
    for name, panel in panels.items():
        panel.set(title=name.replace("_", " "), xlabel="samples")
        if name != "samples_per_second":
            panel.set_yscale("log")
    panels["loss"].legend(fontsize="small")
    with new_file(out) as part:
        figure.savefig(part, format="png", dpi=120)


def _runs(folder: Path) -> Iterator[Path]:
    for path, names, files in os.walk(folder):
        names[:] = sorted(n for n in names if not n.startswith(".") and n != "checkpoints")
        if "run.json" in files:
            yield Path(path)


def _name(run: Path, folder: Path) -> str:
    return folder.absolute().name if run == folder else run.relative_to(folder).as_posix()


def _state(run: Path, folder: Path) -> RunState:
    samples = json.loads((run / "run.json").read_text("utf-8"))["samples"]
    lines = _lines(run / FILES["train"])
    last = lines[-1] if lines else {}
    seen = int(last.get("samples", 0))
    rates = [line["samples_per_second"] for line in lines[-RECENT:] if "samples_per_second" in line]
    rate = sum(rates) / len(rates) if rates else None
    validated = _lines(run / FILES["validation"])
    since = time.time() - (run / FILES["train"]).stat().st_mtime if lines else None
    return RunState(
        name=_name(run, folder),
        samples=samples,
        seen=seen,
        loss=last.get("loss"),
        validation=validated[-1]["loss"] if validated else None,
        samples_per_second=rate,
        seconds_left=(samples - seen) / rate if rate else None,
        seconds_since=since,
        finished=seen >= samples,
    )


def _lines(file: Path) -> list[dict[str, float]]:
    """The whole lines of a JSONL file; a training may be writing the last."""
    if not file.is_file():
        return []
    text = file.read_text("utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """Seconds in the largest unit that fits, as in "3.2 h"; "-" for None."""
    if seconds is None:
        return "-"
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.0f} s"
