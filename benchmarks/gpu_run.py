"""What the sections of `benchmarks.gpu` share: the time that is left, and what is written.

`gpu.json` has everything, `gpu.csv` a line a figure, `gpu.md` a table a section, `gpu.png` plots.
"""

import csv
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from koala.benchmark.cases import Subject
from koala.benchmark.measure import Ceilings
from koala.utils.atomic import write_text

Row = dict[str, Any]
Rows = Iterator[Row]


@dataclass
class Run:
    """What every section needs to know."""

    chosen: Subject
    device: torch.device
    out: Path
    toy: bool
    ceilings: Ceilings
    until: float = 0.0  # time.monotonic() at which the section's time is over
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds of the section's time; a rehearsal has as many as it wants."""
        return 1e9 if self.toy else self.until - time.monotonic()

    @property
    def runs(self) -> int:
        """Pictures that are timed."""
        return 1 if self.toy else 10

    def save(self) -> None:
        """Writes what was measured so far, as text."""
        sections = self.figures["sections"]
        for name, text in (
            ("gpu.json", json.dumps(self.figures, indent=1) + "\n"),
            ("gpu.csv", as_csv(sections)),
            ("gpu.md", as_markdown(self.figures)),
        ):
            write_text(self.out / name, text)

    def plot(self) -> None:
        """Draws what was measured, where matplotlib is installed."""
        if find_spec("matplotlib"):
            from benchmarks.gpu_plots import plot

            plot(self.figures, self.out / "gpu.png")


@dataclass(frozen=True)
class Section:
    """A part of the run: its share of the time in seconds, enough on an H200, and what it does."""

    seconds: float
    rows: Callable[[Run], Rows]


def rounded(value: Any) -> Any:
    """Four digits are more than any of it is sure of."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def as_csv(sections: dict[str, Any]) -> str:
    """A line for each figure: section, number of the row, the row's first cell, name, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("section", "row", "of", "figure", "value"))
    for name, entry in sections.items():
        for number, row in enumerate(entry["rows"]):
            first, *others = row.items()
            writer.writerows((name, number, first[1], key, value) for key, value in others)
    return text.getvalue()


def as_markdown(figures: dict[str, Any]) -> str:
    """What it ran on, and a table for each section."""
    ceilings = figures["ceilings"]
    lines = [
        f"`{figures['command']}` on {figures['hardware']}.",
        f"A large product: {ceilings['flops'] / 1e12:.4g} TFLOP/s ({ceilings['dtype']}); a copy: "
        f"{ceilings['bytes'] / 1e9:.4g} GB/s, both in the same run. Weights: {figures['weights']}.",
    ]
    for name, entry in figures["sections"].items():
        lines += ["", f"## {name}", ""]
        columns = list(dict.fromkeys(key for row in entry["rows"] for key in row))
        if columns:
            lines += [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
        for row in entry["rows"]:
            lines.append(f"| {' | '.join(str(row.get(key, '')) for key in columns)} |")
        notes = {key: entry[key] for key in ("left_out", "cut_short", "failed") if key in entry}
        lines += [f"{key.replace('_', ' ')}: {value}" for key, value in notes.items()]
    return "\n".join(lines) + "\n"
