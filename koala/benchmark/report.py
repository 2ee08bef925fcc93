"""The benchmark report as Markdown, CSV and JSON."""

import csv
import io
from dataclasses import asdict, dataclass, field
from typing import Any

from koala.benchmark.cases import CASES, GPUS
from koala.benchmark.measure import Ceilings, Timing
from koala.benchmark.ratio import Ratio
from koala.benchmark.ways import DEFAULT
from koala.utils import markdown
from koala.utils.counted import counted


@dataclass(frozen=True)
class BenchmarkRow:
    """One model drawn in one way. `image` is None if it ran out of memory."""

    name: str
    way: str  # of `koala.benchmark.ways`
    backend: str  # what ran the U-Net
    exact: bool  # what stock diffusers draws, but for rounding
    threads: int | None  # on a CPU
    weights: str  # "random" or "real"
    pixels: int
    steps: int
    guidance: float
    image: Timing | None = None  # one whole image
    cpu_seconds: float | None = None  # of all threads, the median
    times_faster: Ratio | None = None  # than stock diffusers
    unet: Timing | None = None  # 25 evaluations with guidance
    peak_gb: float | None = None  # of the process on a CPU, of the allocator on a GPU
    budgets: dict[int, float | None] = field(default_factory=dict)  # GB -> seconds; None: OOM
    floor: float | None = None  # seconds of the arithmetic at the measured ceiling

    @property
    def label(self) -> str:
        """The way, what runs it by default, and whether it is approximate."""
        backend = f" ({self.backend})" if self.way == DEFAULT else ""
        return f"{self.way}{backend}{'' if self.exact else ', approximate'}"

    def line(self) -> str:
        """For a person, while others are still measured."""
        threads = "" if self.threads is None else f"  {counted(self.threads, 'thread')}"
        return f"{self.name}  {self.label}{threads}  {self.cells()['image s']} s"

    def claim(self) -> str | None:
        """How many times as fast as stock diffusers it was; None for stock diffusers itself."""
        found = self.times_faster
        if found is None:
            return None
        where = "" if self.threads is None else f" on {counted(self.threads, 'thread')}"
        verdict = found.verdict()
        return (
            f"{self.name}, {self.label}: {found.text()} times as fast as stock diffusers{where}, "
            f"{found.pairs} pairs" + ("" if verdict == "faster" else f": {verdict}") + "."
        )

    def cells(self) -> dict[str, Any]:
        """Column -> text; "" where nothing was measured."""
        image, unet = self.image, self.unet
        cells = {
            "model": self.name,
            "way": self.label,
            "threads": "" if self.threads is None else self.threads,
            "weights": self.weights,
            "pixels": self.pixels,
            "steps": self.steps,
            "guidance": self.guidance,
            "image s": "OOM" if image is None else f"{image.median:.3f}",
            "least": "" if image is None else f"{image.least:.3f}",
            "greatest": "" if image is None else f"{image.greatest:.3f}",
            "CPU s": "" if self.cpu_seconds is None else f"{self.cpu_seconds:.3f}",
            "times faster": "" if self.times_faster is None else self.times_faster.text(),
            "U-Net 25 steps s": "" if unet is None else f"{unet.median:.3f}",
            "peak GB": "" if self.peak_gb is None else f"{self.peak_gb:.2f}",
        }
        if image is not None and self.floor is not None:
            cells["x roofline"] = f"{image.median / self.floor:.2f}"
        for budget, seconds in self.budgets.items():
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

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values, with the published figures."""
        published = {
            row.name: dict(zip(GPUS, CASES[row.name].published, strict=True))
            for row in self.rows
            if row.name in CASES
        }
        return {**asdict(self), "published": published}

    def table(self) -> str:
        """The rows as a Markdown table, followed by the hardware, ceilings and claims."""
        names, rows = self._cells()
        cells = ([row.get(name, "") for name in names] for row in rows)
        lines = [markdown.table(names, cells), "", f"{self.hardware}; device {self.device}."]
        lines.append(
            f"Ceilings of this run: {self.ceilings.flops / 1e12:.3g} TFLOP/s "
            f"({self.ceilings.dtype} matrix product), {self.ceilings.bytes / 1e9:.0f} GB/s (copy)."
        )
        lines += [claim for row in self.rows if (claim := row.claim())]
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
