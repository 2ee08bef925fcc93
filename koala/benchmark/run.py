"""The benchmark: each model with stock diffusers and with our pipeline, one after the other.

Both use the same weights in the same process, so that the ratios are comparable across machines.
Each image has a new prompt, so that no cache skips the text encoders. The report is written after
every row: an interrupted run keeps its results.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from koala.architectures.config import from_unet_config
from koala.architectures.flops import flops
from koala.benchmark import measure
from koala.benchmark.cases import BUDGETS, Subject, check
from koala.benchmark.measure import GB, Ceilings, Timing
from koala.benchmark.models import build, stock
from koala.benchmark.report import BenchmarkReport, BenchmarkRow, write
from koala.generation.loader import set_runtime
from koala.generation.pipeline import Pipeline
from koala.generation.runtime.backends import example
from koala.generation.runtime.dtypes import check_dtype, torch_dtype
from koala.generation.runtime.pytorch import predictor
from koala.utils.device import hardware, pick_device

UNET_STEPS = 25  # of the U-Net alone, as published
Draw = Callable[[], object]


@dataclass(frozen=True)
class BenchmarkOptions:
    """The settings of a run."""

    device: torch.device
    dtype: torch.dtype
    runs: int = 5  # timed images of each model and engine
    backend: str | None = None  # of our pipeline
    compiled: bool = False  # our pipeline, with torch.compile
    graphs: bool = False  # our pipeline, with CUDA graphs
    seconds: float | None = None  # no further model starts after this time

    @property
    def budgets(self) -> tuple[int, ...]:
        """Memory budgets in GB that the CUDA allocator can be limited to."""
        if self.device.type != "cuda":
            return ()
        total = torch.cuda.get_device_properties(self.device).total_memory
        return tuple(budget for budget in BUDGETS if budget * GB < total)


def benchmark(
    names: Sequence[str],
    out: Path,
    device: str | None = None,
    dtype: str | None = None,
    runs: int = 5,
    backend: str | None = None,
    compiled: bool = False,
    graphs: bool = False,
    seconds: float | None = None,
    on_row: Callable[[BenchmarkRow], None] = lambda row: None,
) -> BenchmarkReport:
    """Measures models (table cases or any model) and writes the report into a new folder.

    Without names, measures the whole table. Writes benchmark.json, .csv, .md and .png, and calls
    `on_row` with each row. Defaults: the best device, fp32 on the CPU and fp16 elsewhere.
    UserError for unknown models, bad options and a folder that is not new.
    """
    subjects = check(names, out, device, dtype, runs, backend, compiled, graphs)
    place = pick_device(device)
    precision = torch_dtype(dtype or ("fp32" if place.type == "cpu" else "fp16"))
    check_dtype(precision, place)
    options = BenchmarkOptions(place, precision, runs, backend, compiled, graphs, seconds)
    start = time.monotonic()
    reached = measure.ceilings(place, precision)
    report = BenchmarkReport(hardware(), str(place), reached, [], [])
    for chosen in subjects:
        if seconds is not None and time.monotonic() - start > seconds:
            report.left_out.append(chosen.case.name)
            continue
        for row in _rows(chosen, options, reached):
            report.rows.append(row)
            on_row(row)
            write(report, out)
    write(report, out)
    return report


def _rows(chosen: Subject, options: BenchmarkOptions, reached: Ceilings) -> Iterator[BenchmarkRow]:
    """The rows of stock diffusers and of our pipeline."""
    device = options.device
    measure.release(device)
    before = measure.resident_bytes(device)
    try:
        pipeline = build(chosen, device, options.dtype)
    except torch.OutOfMemoryError:
        yield from (BenchmarkRow.out_of_memory(engine, chosen) for engine in ("diffusers", "koala"))
        return
    floor = image_flops(pipeline, chosen) / reached.flops
    draws = {
        "diffusers": lambda: _stock_draw(stock(pipeline), chosen),
        "koala": lambda: _our_draw(_ours(pipeline, options), chosen),
    }
    for engine, make in draws.items():
        measure.release(device)
        measure.reset_peak(device)
        try:
            row = _row(engine, chosen, pipeline, make(), options, before)
            yield replace(row, floor=floor)
        except torch.OutOfMemoryError:
            yield BenchmarkRow.out_of_memory(engine, chosen)


def _ours(pipeline: Pipeline, options: BenchmarkOptions) -> Pipeline:
    pipeline.unet.to(memory_format=torch.channels_last)
    set_runtime(pipeline, options.backend, options.compiled, options.graphs)
    return pipeline


def _row(
    engine: str,
    chosen: Subject,
    pipeline: Pipeline,
    draw: Draw,
    options: BenchmarkOptions,
    before: int | None,
) -> BenchmarkRow:
    device, case = options.device, chosen.case
    image = measure.timing(draw, options.runs, device)
    peak = measure.peak_bytes(device)
    return BenchmarkRow(
        name=case.name,
        engine=engine,
        weights="random" if chosen.random else "real",
        pixels=case.pixels,
        steps=case.steps,
        guidance=case.guidance,
        picture=image,
        unet=_unet_seconds(engine, chosen, pipeline, options),
        peak_gb=None if peak is None or before is None else (peak - before) / GB,
        budgets={budget: _under(budget, draw, device) for budget in options.budgets},
    )


def _stock_draw(pipe: Callable[..., Any], chosen: Subject) -> Draw:
    case, numbers = chosen.case, count()
    return lambda: pipe(
        prompt=f"a fox, number {next(numbers)}",
        num_inference_steps=case.steps,
        guidance_scale=case.guidance,
        height=case.pixels,
        width=case.pixels,
    )


def _our_draw(pipeline: Pipeline, chosen: Subject) -> Draw:
    case, numbers = chosen.case, count()
    return lambda: pipeline(
        f"a fox, number {next(numbers)}",
        steps=case.steps,
        guidance=case.guidance,
        size=(case.pixels, case.pixels),
    )


@torch.inference_mode()
def _unet_seconds(
    engine: str, chosen: Subject, pipeline: Pipeline, options: BenchmarkOptions
) -> Timing:
    """Times 25 U-Net evaluations with guidance, in at most three runs."""
    predict = predictor(pipeline.unet) if engine == "diffusers" else pipeline.predict
    side = chosen.case.pixels // pipeline.factor
    inputs = example(pipeline.unet, 2, side, pipeline.conditioner.tokens)

    def steps() -> None:
        for _ in range(UNET_STEPS):
            predict(*inputs)

    return measure.timing(steps, min(3, options.runs), options.device)


def _under(budget: int, draw: Draw, device: torch.device) -> float | None:
    """Seconds per image with the allocator limited to `budget` GB; None: out of memory."""
    total = torch.cuda.get_device_properties(device).total_memory
    measure.release(device)
    torch.cuda.set_per_process_memory_fraction(budget * GB / total, device)
    try:
        return measure.timing(draw, 1, device).median
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        measure.release(device)


def image_flops(pipeline: Pipeline, chosen: Subject) -> int:
    """Operations of one image: all U-Net evaluations, and the decoder."""
    case = chosen.case
    arch = from_unet_config(pipeline.unet.config)
    one = flops(arch, case.pixels, case.pixels, pipeline.conditioner.tokens)
    with torch.device("meta"):
        vae = type(pipeline.vae).from_config(pipeline.vae.config)
        side = case.pixels // pipeline.factor
        latents = torch.empty(1, pipeline.unet.config.in_channels, side, side)
    assert isinstance(vae, AutoencoderKL)
    with FlopCounterMode(display=False) as counter:
        vae.decode(latents)
    return case.steps * case.rows * one + counter.get_total_flops()
