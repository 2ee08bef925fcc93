"""The benchmark as a figure: seconds and memory of each way, one panel for each model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from koala.benchmark.ways import STOCK
from koala.utils.atomic import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from koala.benchmark.report import BenchmarkReport, BenchmarkRow

_GREY, _RED, _PALE, _INK = "#b4b7c0", "#d0493e", "#eaa79f", "#22242b"
_BAR, _ROW = 0.62, 0.36  # thickness of a bar, and inches for each


def plot(report: BenchmarkReport, file: Path) -> None:
    """Draws all rows as horizontal bars; the whiskers are the range of the images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels: dict[tuple[str, int | None], list[BenchmarkRow]] = {}
    for row in report.rows:
        panels.setdefault((row.name, row.threads), []).append(row)
    heights = [len(rows) + 1.6 for rows in panels.values()]
    figure = Figure(figsize=(10, 1.0 + _ROW * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(panels), 2, squeeze=False, width_ratios=(2.6, 1), height_ratios=heights
    )
    for (seconds, memory), rows in zip(axes, panels.values(), strict=True):
        _seconds(seconds, rows)
        _memory(memory, rows)
    axes[-1][0].set_xlabel("seconds per image; whiskers: least and greatest", color=_INK)
    axes[-1][1].set_xlabel("peak memory, GB", color=_INK)
    kinds = {"stock diffusers": _GREY, "koala, the same image": _RED}
    if any(not row.exact for row in report.rows):
        kinds["koala, approximate"] = _PALE
    handles = [Patch(color=colour, label=kind) for kind, colour in kinds.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False)
    figure.supxlabel(report.hardware, fontsize=7, color=_INK)
    with new_file(file) as part:
        figure.savefig(part, format="png", dpi=150)


def _seconds(axes: Axes, rows: list[BenchmarkRow]) -> None:
    first = rows[0]
    threads = "" if first.threads is None else f", threads: {first.threads}"
    axes.set_title(
        f"{first.name}, {first.pixels} px, {first.steps} steps{threads}",
        loc="left", fontsize=11, fontweight="bold", color=_INK,
    )  # fmt: skip
    _bars(axes, rows, [row.image.median if row.image else 0 for row in rows])
    longest = max((row.image.greatest for row in rows if row.image), default=1)
    for place, row in enumerate(rows):
        if row.image is None:
            axes.text(0, place, " out of memory", va="center", fontsize=9, color=_INK)
            continue
        image = row.image
        axes.plot([image.least, image.greatest], [place, place], color=_INK, linewidth=1)
        ratio = "" if row.times_faster is None else f"   {row.times_faster.text()} times as fast"
        text = f"{image.median:.3g} s{ratio}"
        axes.text(image.greatest + 0.015 * longest, place, text, va="center", fontsize=9)
    axes.set_xlim(0, 1.75 * longest)


def _memory(axes: Axes, rows: list[BenchmarkRow]) -> None:
    peaks = [row.peak_gb or 0 for row in rows]
    bars = _bars(axes, rows, peaks)
    axes.bar_label(bars, [f" {peak:.2f}" if peak else "" for peak in peaks], fontsize=9)
    axes.set_yticklabels([])
    axes.set_xlim(0, 1.3 * max(peaks) or 1)


def _bars(axes: Axes, rows: list[BenchmarkRow], lengths: list[float]):  # type: ignore[no-untyped-def]  # matplotlib's
    colours = [_GREY if row.way == STOCK else _RED if row.exact else _PALE for row in rows]
    bars = axes.barh(range(len(rows)), lengths, _BAR, color=colours)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return bars
