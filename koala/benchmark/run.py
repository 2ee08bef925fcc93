"""The benchmark: what a person gets from each way to draw a model, beside stock diffusers.

All ways have the same weights and, where memory allows, take turns, so that the ratios hold on a
machine that does other work too. The report is written after every model: an interrupted run keeps
its results.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from koala.benchmark import measure
from koala.benchmark.cases import ROUNDS, check
from koala.benchmark.measure import Timing
from koala.benchmark.plot import plot
from koala.benchmark.report import BenchmarkReport, BenchmarkRow
from koala.benchmark.turns import Turns
from koala.benchmark.ways import DEFAULT, PYTORCH, STOCK, ways_of
from koala.generation.runtime.dtypes import check_dtype, torch_dtype
from koala.utils.atomic import write_text
from koala.utils.device import hardware, pick_device
from koala.utils.threads import available_cores


def benchmark(
    names: Sequence[str],
    out: Path,
    device: str | None = None,
    dtype: str | None = None,
    rounds: int = ROUNDS,
    backend: str | None = None,
    compiled: bool = False,
    graphs: bool = False,
    seconds: float | None = None,
    threads: Sequence[int] = (),
    on_row: Callable[[BenchmarkRow], None] = lambda row: None,
) -> BenchmarkReport:
    """Measures models (table cases or any model) and writes the report into a new folder.

    Each way draws at most `rounds` images. `seconds`: for all; a model whose turn comes later is
    left out. `threads`: on a CPU, by default one and then all. Without names, measures the whole
    table. Writes benchmark.json, .csv, .md and .png, and calls `on_row` with each row. Defaults:
    the best device, fp32 on the CPU and fp16 elsewhere. UserError for unknown models, bad options
    and a folder that is not new.
    """
    subjects = check(names, out, device, dtype, rounds, backend, compiled, graphs, threads)
    place = pick_device(device)
    on_cpu = place.type == "cpu"
    dtype = dtype or ("fp32" if on_cpu else "fp16")
    check_dtype(torch_dtype(dtype), place)
    counts = threads or sorted({1, available_cores()})
    start = time.monotonic()
    reached = measure.ceilings(place, torch_dtype(dtype))
    report = BenchmarkReport(hardware(), str(place), reached, [], [])
    planned = [(one, count) for one in subjects for count in (counts if on_cpu else [None])]
    for done, (chosen, count) in enumerate(planned):
        left = float("inf") if seconds is None else start + seconds - time.monotonic()
        if left < 0:
            report.left_out.append(chosen.case.name)
            continue
        until = time.monotonic() + left / (len(planned) - done)
        ways = ways_of(chosen, on_cpu, backend, compiled, graphs)
        for row in _rows(Turns(chosen, ways, place, dtype, count, rounds, until), reached.flops):
            report.rows.append(row)
            on_row(row)
        write(report, out)
    write(report, out)
    return report


def _rows(turns: Turns, flops_per_second: float) -> Iterator[BenchmarkRow]:
    """One row for each way; ours by PyTorch only where that is not the default."""
    found = turns.measured()
    stock, case = found[STOCK], turns.chosen.case
    for way in turns.ways:
        one = found[way.name]
        if way.name == PYTORCH and DEFAULT in found and found[DEFAULT].backend == "torch":
            continue
        times = one.beside(stock) if way.name != STOCK and one.images and stock.images else None
        yield BenchmarkRow(
            name=case.name,
            way=way.name,
            backend=one.backend,
            exact=way.exact,
            threads=turns.threads,
            weights="real" if turns.chosen.folder else "random",
            pixels=case.pixels,
            steps=case.steps,
            guidance=case.guidance,
            image=Timing.of(one.seconds) if one.images else None,
            cpu_seconds=Timing.of([image.cpu_seconds for image in one.images]).median
            if one.images
            else None,
            times_faster=times,
            unet=one.unet,
            peak_gb=one.peak_gb,
            budgets=one.budgets,
            floor=None if one.flops is None else one.flops / flops_per_second,
        )


def write(report: BenchmarkReport, out: Path) -> None:
    """Writes benchmark.json, .csv, .md and, with matplotlib, .png into the folder `out`."""
    for name, text in (
        ("benchmark.json", json.dumps(report.as_dict(), indent=1) + "\n"),
        ("benchmark.csv", report.csv()),
        ("benchmark.md", report.table()),
    ):
        write_text(out / name, text)
    if report.rows and find_spec("matplotlib"):
        plot(report, out / "benchmark.png")
