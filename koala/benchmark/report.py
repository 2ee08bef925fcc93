"""The benchmark report as Markdown, CSV, JSON and a plot."""

import csv
import io
import json
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from koala.benchmark.cases import CASES, GPUS, Subject
from koala.benchmark.measure import Ceilings, Timing
from koala.utils import markdown
from koala.utils.atomic import new_file


@dataclass(frozen=True)
class BenchmarkRow:
    """One model with one engine. `picture` is None if it ran out of memory."""

    name: str
    engine: str  # "diffusers" or "koala"
    weights: str  # "random" or "real"
    pixels: int
    steps: int
    guidance: float
    picture: Timing | None = None  # one whole image
    unet: Timing | None = None  # 25 evaluations with guidance
    peak_gb: float | None = None  # above the memory in use before loading
    budgets: dict[int, float | None] | None = None  # GB -> seconds; None: out of memory
    floor: float | None = None  # seconds of the arithmetic at the measured ceiling

    @classmethod
    def out_of_memory(cls, engine: str, chosen: Subject) -> "BenchmarkRow":
        case, weights = chosen.case, "random" if chosen.random else "real"
        return cls(case.name, engine, weights, case.pixels, case.steps, case.guidance)

    def line(self) -> str:
        """For a person, while others are still measured."""
        return f"{self.name}  {self.engine}  {self.cells()['picture s']} s"

    def cells(self) -> dict[str, Any]:
        """Column -> text; "" where nothing was measured."""
        image, unet = self.picture, self.unet
        cells = {
            "model": self.name,
            "engine": self.engine,
            "weights": self.weights,
            "pixels": self.pixels,
            "steps": self.steps,
            "guidance": self.guidance,
            "picture s": "OOM" if image is None else f"{image.median:.3f}",
            "least": "" if image is None else f"{image.least:.3f}",
            "greatest": "" if image is None else f"{image.greatest:.3f}",
            "U-Net 25 steps s": "" if unet is None else f"{unet.median:.3f}",
            "peak GB": "" if self.peak_gb is None else f"{self.peak_gb:.2f}",
        }
        if image is not None and self.floor is not None:
            cells["x roofline"] = f"{image.median / self.floor:.2f}"
        for budget, seconds in (self.budgets or {}).items():
            cells[f"in {budget} GB"] = "OOM" if seconds is None else f"{seconds:.3f}"
        return cells


@dataclass(frozen=True)
class BenchmarkReport:
    """The rows of one run, and the ceilings measured with them."""

    hardware: str
    device: str
    ceilings: Ceilings
    rows: list[BenchmarkRow]
    left_out: list[str]  # cases skipped when time ran out

    def ratios(self) -> dict[str, float]:
        """Model -> stock diffusers' seconds divided by ours."""
        seconds: dict[str, dict[str, float]] = {}
        for row in self.rows:
            if row.picture is not None:
                seconds.setdefault(row.name, {})[row.engine] = row.picture.median
        return {
            name: both["diffusers"] / both["koala"]
            for name, both in seconds.items()
            if len(both) == 2
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values, with the published figures."""
        published = {
            row.name: dict(zip(GPUS, CASES[row.name].published, strict=True))
            for row in self.rows
            if row.name in CASES
        }
        return {**asdict(self), "times_faster": self.ratios(), "published": published}

    def table(self) -> str:
        """The rows as a Markdown table, followed by the hardware, ceilings and ratios."""
        names, rows = self._cells()
        cells = ([row.get(name, "") for name in names] for row in rows)
        lines = [markdown.table(names, cells), "", f"{self.hardware}; device {self.device}."]
        lines.append(
            f"Ceilings of this run: {self.ceilings.flops / 1e12:.3g} TFLOP/s "
            f"({self.ceilings.dtype} matrix product), {self.ceilings.bytes / 1e9:.0f} GB/s (copy)."
        )
        for name, ratio in self.ratios().items():
            lines.append(f"{name}: {ratio:.2f} times as fast as stock diffusers.")
        if any(row.weights == "random" for row in self.rows):
            lines.append("Random weights do not change speed and memory.")
        if self.left_out:
            lines.append(f"Skipped, out of time: {', '.join(self.left_out)}.")
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """The rows as CSV with a header."""
        names, rows = self._cells()
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def _cells(self) -> tuple[list[str], list[dict[str, Any]]]:
        """The names of all columns, and the cells of the rows."""
        rows = [row.cells() for row in self.rows]
        return list(dict.fromkeys(name for row in rows for name in row)), rows


def write(report: BenchmarkReport, out: Path) -> None:
    """Writes benchmark.json, .csv, .md and, with matplotlib, .png into the folder `out`."""
    for name, text in (
        ("benchmark.json", json.dumps(report.as_dict(), indent=1) + "\n"),
        ("benchmark.csv", report.csv()),
        ("benchmark.md", report.table()),
    ):
        with new_file(out / name) as part:
            part.write_text(text)
    if report.rows and find_spec("matplotlib"):
        plot(report, out / "benchmark.png")


def plot(report: BenchmarkReport, file: Path) -> None:
    """Plots seconds per image (bars) and peak memory (dots) of both engines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.name for row in report.rows))
    figure = Figure(figsize=(max(6.0, 1.4 * len(names)), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    seconds = figure.subplots()
    memory = seconds.twinx()
    for shift, engine, colour in ((-0.2, "diffusers", "#b9b9c6"), (0.2, "koala", "#d0493e")):
        rows = [row for row in report.rows if row.engine == engine]
        drawn = [row for row in rows if row.picture is not None]
        places = [names.index(row.name) + shift for row in drawn]
        medians = [row.picture.median for row in drawn if row.picture]
        bars = seconds.bar(places, medians, 0.38, color=colour, label=engine)
        seconds.bar_label(bars, fmt="%.3g", fontsize=7)
        dots = [(x, row.peak_gb) for x, row in zip(places, drawn, strict=True) if row.peak_gb]
        memory.scatter(
            [x for x, _ in dots], [y for _, y in dots], color=colour, edgecolors="black", zorder=3
        )
        for row in rows:
            if row.picture is None:
                seconds.text(names.index(row.name) + shift, 0, "OOM", ha="center", va="bottom")
    seconds.set_xticks(range(len(names)), names, rotation=25, ha="right", fontsize=8)
    seconds.set_ylabel("seconds per image (bars)")
    memory.set_ylabel("peak memory, GB (dots)")
    memory.set_ylim(bottom=0)
    figure.legend(*seconds.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(report.hardware, fontsize=8)
    with new_file(file) as part:
        figure.savefig(part, format="png", dpi=120)
