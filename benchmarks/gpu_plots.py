"""The plots of `benchmarks.gpu`, one picture of all that was measured.

`python -m benchmarks.gpu_plots FOLDER` makes it again from FOLDER/gpu.json, as where the machine
that measured had no matplotlib.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from koala.utils.atomic import new_file

RED, GREY = "#d0493e", "#b9b9c6"


def bars(axes: Axes, rows: list[dict[str, Any]], names: list[str], value: str, unit: str) -> None:
    """One bar a row, from top to bottom, with its figure beside."""
    heights = [row[value] for row in rows]
    drawn = axes.barh(range(len(rows)), heights, color=[GREY, *[RED] * (len(rows) - 1)])
    axes.bar_label(drawn, fmt="%.3g", fontsize=7, padding=2)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_xlim(right=1.15 * max(heights))


def training(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Samples a second by rung."""
    names = [f"{row['way']} ({row['student']}, {row['share_of_peak']:.0%})" for row in rows]
    bars(axes, rows, names, "samples_per_s", "training samples/s (share of the peak)")


def ladder(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Seconds a picture by rung."""
    bars(axes, rows, [row["rung"] for row in rows], "picture_s", "seconds a picture")


def training_memory(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Foretold and measured, by budget."""
    for shift, value, colour in ((-0.2, "planned_gb", GREY), (0.2, "measured_gb", RED)):
        places = [place + shift for place in range(len(rows))]
        label = "dry run" if value == "planned_gb" else "measured"
        axes.bar(places, [row[value] for row in rows], 0.38, color=colour, label=label)
    names = [f"{row['vram_gb']} GB, {row['at_once']} at once" for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=7)
    axes.set_ylabel("a training's memory, GB")
    axes.legend(fontsize=7)


def throughput(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Pictures a second by batch."""
    axes.plot([r["batch"] for r in rows], [r["pictures_per_s"] for r in rows], "o-", color=RED)
    axes.set_xlabel("batch")
    axes.set_ylabel("pictures/s")


def memory(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Seconds against peak of a picture, by budget."""
    for row in rows:
        axes.scatter(row["peak_gb"], row["picture_s"], color=RED)
        axes.annotate(f"  {row['mode']}", (row["peak_gb"], row["picture_s"]), fontsize=7)
    axes.set_xlabel("a picture's peak memory, GB")
    axes.set_ylabel("seconds a picture")


def growth(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Seconds by the work of a picture: steps times pixels."""
    work = [row["steps"] * (row["pixels"] / 1024) ** 2 for row in rows]
    axes.scatter(work, [row["picture_s"] for row in rows], color=RED)
    axes.set_xlabel("steps x megapixels")
    axes.set_ylabel("seconds a picture")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


# Section: what draws it, and a figure that rows must have for it.
PANELS = {
    "training": (training, "samples_per_s"),
    "ladder": (ladder, "picture_s"),
    "training_memory": (training_memory, "measured_gb"),
    "throughput": (throughput, "pictures_per_s"),
    "memory": (memory, "picture_s"),
    "growth": (growth, "picture_s"),
}


def plot(figures: dict[str, Any], file: Path) -> None:
    """Draws every panel for which there is a row; nothing where there is none."""
    sections = figures["sections"]
    panels = [
        (draw, rows)
        for name, (draw, needed) in PANELS.items()
        if (rows := [r for r in sections.get(name, {"rows": []})["rows"] if r.get(needed)])
    ]
    if not panels:
        return
    figure = Figure(figsize=(13, 4 * -(-len(panels) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (draw, rows) in enumerate(panels, 1):
        draw(figure.add_subplot(-(-len(panels) // 2), 2, place), rows)
    figure.suptitle(figures["hardware"], fontsize=8)
    with new_file(file) as part:
        figure.savefig(part, format="png", dpi=110)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    plot(json.loads((folder / "gpu.json").read_text()), folder / "gpu.png")
