"""The measurement: every model with stock diffusers and with ours, one after the other.

Both sides draw with the same weights in the same process, so that ratios hold even where
machines do not. Every picture has a prompt of its own, so that nobody's memo saves the text
encoders. What has been measured is written after every row: a run that is cut short leaves what
it had.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from koala.architectures.config import from_unet_config
from koala.architectures.flops import flops
from koala.benchmark import measure
from koala.benchmark.cases import BUDGETS, Subject, check
from koala.benchmark.measure import GB, Ceilings, Timing
from koala.benchmark.models import build, stock
from koala.benchmark.report import Report, Row, write
from koala.generation.denoise import predictor
from koala.generation.loader import set_runtime
from koala.generation.pipeline import Pipeline
from koala.generation.runtime.backends import example
from koala.generation.runtime.dtypes import check_dtype, torch_dtype
from koala.utils.device import hardware, pick_device

UNET_STEPS = 25  # of the U-Net alone, as published
Draw = Callable[[], object]


@dataclass(frozen=True)
class Options:
    """How everything is measured."""

    device: torch.device
    dtype: torch.dtype
    runs: int = 5  # pictures timed of each
    backend: str | None = None  # of ours
    compiled: bool = False  # ours, by torch.compile
    graphs: bool = False  # ours, replayed from CUDA graphs
    seconds: float | None = None  # no new model is begun after so many

    @property
    def budgets(self) -> tuple[int, ...]:
        """Memory budgets in GB that the device's allocator can be held to."""
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
    on_row: Callable[[Row], None] = lambda row: None,
) -> Report:
    """Measures models (cases of the published table, or one's own) into the new folder `out`.

    No names means the whole table. Writes benchmark.json, .csv, .md and .png; `on_row` is told
    each row. By default on the best device, in fp32 on a processor and fp16 elsewhere.
    UserError for what is unknown, not there, or no new folder.
    """
    subjects = check(names, out, device, dtype, runs, backend, compiled, graphs)
    place = pick_device(device)
    precision = torch_dtype(dtype or ("fp32" if place.type == "cpu" else "fp16"))
    check_dtype(precision, place)
    options = Options(place, precision, runs, backend, compiled, graphs, seconds)
    start = time.monotonic()
    reached = measure.ceilings(place, precision)
    report = Report(hardware(), str(place), reached, [], [])
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


def _rows(chosen: Subject, options: Options, reached: Ceilings) -> Iterator[Row]:
    """Two rows, stock diffusers' and ours; what does not fit into the device's memory says so."""
    device = options.device
    measure.release(device)
    before = measure.resident_bytes(device)
    try:
        pipeline = build(chosen, device, options.dtype)
    except torch.OutOfMemoryError:
        yield from (Row.out_of_memory(engine, chosen) for engine in ("diffusers", "koala"))
        return
    floor = picture_flops(pipeline, chosen) / reached.flops
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
            yield Row.out_of_memory(engine, chosen)


def _ours(pipeline: Pipeline, options: Options) -> Pipeline:
    pipeline.unet.to(memory_format=torch.channels_last)
    backend = options.backend or "remembered"
    set_runtime(pipeline, backend, options.compiled, options.graphs)
    return pipeline


def _row(
    engine: str,
    chosen: Subject,
    pipeline: Pipeline,
    draw: Draw,
    options: Options,
    before: int | None,
) -> Row:
    device, case = options.device, chosen.case
    picture = measure.timing(draw, options.runs, device)
    peak = measure.peak_bytes(device)
    return Row(
        name=case.name,
        engine=engine,
        weights="random" if chosen.random else "real",
        pixels=case.pixels,
        steps=case.steps,
        guidance=case.guidance,
        picture=picture,
        unet=_unet_seconds(engine, chosen, pipeline, options),
        peak_gb=None if peak is None or before is None else (peak - before) / GB,
        budgets={budget: _under(budget, draw, device) for budget in options.budgets},
    )


def _stock_draw(pipe, chosen: Subject) -> Draw:
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
def _unet_seconds(engine: str, chosen: Subject, pipeline: Pipeline, options: Options) -> Timing:
    """25 evaluations with guidance and nothing else; the middle of at most three such runs."""
    predict = predictor(pipeline.unet) if engine == "diffusers" else pipeline.predict
    side = chosen.case.pixels // pipeline.factor
    asked = example(pipeline.unet, 2, side, pipeline.conditioner.tokens)

    def steps() -> None:
        for _ in range(UNET_STEPS):
            predict(*asked)

    return measure.timing(steps, min(3, options.runs), options.device)


def _under(budget: int, draw: Draw, device: torch.device) -> float | None:
    """Seconds of a picture when the allocator gets no more than `budget` GB; None: did not fit."""
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


def picture_flops(pipeline: Pipeline, chosen: Subject) -> int:
    """Operations of one picture: every evaluation of the U-Net, and the decoder."""
    case = chosen.case
    arch = from_unet_config(pipeline.unet.config)
    one = flops(arch, case.pixels, case.pixels, pipeline.conditioner.tokens)
    with torch.device("meta"):
        vae = type(pipeline.vae).from_config(pipeline.vae.config)
        side = case.pixels // pipeline.factor
        latents = torch.empty(1, pipeline.unet.config.in_channels, side, side)
    with FlopCounterMode(display=False) as counter:
        vae.decode(latents)
    return case.steps * case.rows * one + counter.get_total_flops()
