"""The sections of `benchmarks.gpu` that draw: speed against diffusers and the roofline, memory."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from benchmarks.gpu_run import Rows, Run
from koala.benchmark import measure
from koala.benchmark.cases import CASES, Subject
from koala.benchmark.drawer import image_flops
from koala.benchmark.measure import GB
from koala.benchmark.models import build, stock
from koala.benchmark.run import benchmark
from koala.errors import UserError
from koala.generation.decode import tiny
from koala.generation.engine import Engine
from koala.generation.loader import load
from koala.generation.pipeline import Pipeline
from koala.generation.runtime.backends import example
from koala.generation.runtime.compile import compile_blocks, fuse_projections, graphed
from koala.generation.runtime.pytorch import predictor


def ladder(run: Run) -> Rows:
    """One optimisation after the other, each on top of those before."""
    half = torch.float32 if run.toy else torch.float16
    pipeline = build(run.chosen, run.device, half)
    floor = image_flops(pipeline, run.chosen) / run.ceilings.flops
    plain = stock_drawn(run, pipeline)
    yield {"rung": "stock diffusers", **plain, "x_roofline": plain["picture_s"] / floor}
    pipeline.unet.to(memory_format=torch.channels_last)
    yield {"rung": "ours", **drawn(run, pipeline, floor)}
    tokens, side = pipeline.conditioner.tokens, run.chosen.case.pixels // pipeline.factor
    del pipeline
    exact = pipeline_in(run, run.chosen, torch.float32)
    asked = example(exact.unet, 2, side, tokens)
    expected = evaluated(exact, asked)
    del exact
    pipeline = pipeline_in(run, run.chosen, torch.bfloat16)
    for name, climb in RUNGS:
        start = time.monotonic()
        climb(run, pipeline)
        draw(run, pipeline)
        first = time.monotonic() - start
        error = (evaluated(pipeline, asked) - expected).norm() / expected.norm()
        row = drawn(run, pipeline, floor)
        yield {"rung": name, **row, "noise_error": float(error), "first_picture_s": first}


def graphs(run: Run, pipeline: Pipeline) -> None:
    """Evaluations from CUDA graphs, captured anew: the U-Net has changed."""
    pipeline.predict = predictor(pipeline.unet)
    if run.device.type == "cuda":
        pipeline.predict = graphed(pipeline.predict, run.device)


def compiled(run: Run, pipeline: Pipeline) -> None:
    """Compiled blocks, where it is worth it: a processor takes minutes and gains nothing."""
    if run.device.type == "cuda":
        compile_blocks(pipeline.unet)
        compile_blocks(pipeline.vae.decoder)
    graphs(run, pipeline)


RUNGS: tuple[tuple[str, Callable[[Run, Pipeline], object]], ...] = (
    ("bf16", lambda run, pipeline: None),
    ("+ fused projections", lambda run, pipeline: fuse_projections(pipeline.unet)),
    ("+ CUDA graphs", graphs),
    ("+ VAE in channels_last", lambda run, p: p.vae.to(memory_format=torch.channels_last)),
    ("+ compiled blocks", compiled),
)


def few_steps(run: Run) -> Rows:
    """4 steps without guidance and a tiny decoder, which draw in the least time."""
    chosen = replace(run.chosen, case=replace(run.chosen.case, steps=4, guidance=0.0))
    dtype = torch.float32 if run.toy else torch.bfloat16
    pipeline = pipeline_in(run, chosen, dtype)
    small = AutoencoderTiny().to(run.device, dtype).eval().requires_grad_(False)
    arithmetic = image_flops(pipeline, chosen)
    yield {"decode": "full", **drawn(run, pipeline, arithmetic / run.ceilings.flops, 4, 0.0)}
    pipeline.decode = tiny(small)
    yield {"decode": "tiny", **drawn(run, pipeline, None, 4, 0.0)}
    if run.device.type == "cuda":
        compile_blocks(pipeline.unet)
        pipeline.predict = graphed(predictor(pipeline.unet), run.device)
        yield {"decode": "tiny, compiled, graphs", **drawn(run, pipeline, None, 4, 0.0)}


def throughput(run: Run) -> Rows:
    """Pictures a second through the engine, by rows in its batch."""
    pipeline = fast(run)
    floor = image_flops(pipeline, run.chosen) / run.ceilings.flops
    for batch in (1, 2) if run.toy else (1, 2, 4, 8, 16, 32):
        if run.left < 0:
            return
        count = max(2 * batch, 4) if not run.toy else batch

        def work(batch: int = batch, count: int = count) -> None:
            engine = Engine(pipeline, max_batch=batch)
            tickets = [engine.submit(request) for request in requests(run, pipeline, count)]
            while engine.turn():
                pass
            for ticket in tickets:
                ticket.result()

        found = measured(run, work, runs=1)
        rate = count / found["picture_s"]
        yield {
            "batch": batch, "pictures_per_s": rate, "x_roofline": 1 / (rate * floor),
            "peak_gb": found["peak_gb"],
        }  # fmt: skip


def memory(run: Run) -> Rows:
    """Peak and seconds by budget, beside what the plan foretold."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = run.chosen.folder or Path(temporary) / "model"
        if run.chosen.folder is None:
            stock(build(run.chosen, run.device, torch.float16)).save_pretrained(folder)
            measure.release(run.device)
        pixels = run.chosen.case.pixels
        # At 3 GiB two ways fit: text encoders that stream, or 8 bits for everything.
        asked = [("free", None), (8.0, None), (4.0, None), (3.0, None), (3.0, "int8"), (2.0, None)]
        for budget, weights in asked[:1] if run.toy else asked:
            if run.device.type == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0, run.device)
            measure.release(run.device)
            try:
                pipeline = load(
                    folder, run.device, vram=budget, size=(pixels, pixels), weights=weights,
                    say=print,
                )  # fmt: skip
            except UserError as error:  # nothing fits: the message names what would
                yield {"vram_gib": budget, "refused": str(error)}
                continue
            plan, row = pipeline.plan, drawn(run, pipeline, None)
            yield {
                "vram_gib": budget, "mode": plan.mode.summary(), "planned_gb": plan.peak / GB,
                **row,
            }  # fmt: skip
            del pipeline
        if run.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, run.device)


def growth(run: Run) -> Rows:
    """Seconds by steps and by pixels: both should grow in proportion."""
    pipeline = fast(run)
    native = run.chosen.case.pixels
    for steps in (1, 2) if run.toy else (5, 10, 20, 40):
        yield {"steps": steps, "pixels": native, **drawn(run, pipeline, None, steps)}
    for pixels in (native,) if run.toy else (512, 768, 1024, 1280):
        found = measured(run, lambda pixels=pixels: draw(run, pipeline, size=(pixels, pixels)))
        yield {"steps": steps_of(run), "pixels": pixels, **found}


def table(run: Run) -> Rows:
    """The published comparison, by `koala.benchmark`, in what time is left."""
    names = [run.chosen.case.name] if run.chosen.case.name in CASES else [str(run.chosen.folder)]
    if not run.toy:
        names = list(CASES)
    cuda = run.device.type == "cuda"
    report = benchmark(
        names, run.out / "table", str(run.device), rounds=1 if run.toy else 6, graphs=cuda,
        backend=None if cuda else "torch", seconds=max(0.0, run.left - 25),
        threads=[1] if run.toy else [],
    )  # fmt: skip
    yield from (row.cells() for row in report.rows)


# --- what they share ------------------------------------------------------------------------


def pipeline_in(run: Run, chosen: Subject, dtype: torch.dtype) -> Pipeline:
    """Ours with all its parts in `dtype`: the same weights for the same model."""
    pipeline = build(chosen, run.device, torch.float16 if chosen.folder is None else torch.float32)
    torch.nn.Module.to(pipeline.unet, dtype)
    torch.nn.Module.to(pipeline.vae, dtype)
    for encoder in pipeline.conditioner.encoders:
        encoder.to(dtype)
    return pipeline


def fast(run: Run) -> Pipeline:
    """Ours as one would serve it: bf16, compiled, replayed from graphs."""
    if run.device.type != "cuda":
        return pipeline_in(run, run.chosen, torch.float32)
    pipeline = pipeline_in(run, run.chosen, torch.bfloat16)
    pipeline.vae.to(memory_format=torch.channels_last)
    fuse_projections(pipeline.unet)
    compiled(run, pipeline)
    return pipeline


def stock_drawn(run: Run, pipeline: Pipeline) -> dict[str, Any]:
    """Figures of a picture by stock diffusers, with the same components."""
    case, pipe = run.chosen.case, stock(pipeline)
    asked = {"num_inference_steps": steps_of(run), "guidance_scale": case.guidance}
    size = {"height": case.pixels, "width": case.pixels}
    return measured(run, lambda: pipe("a fox", **asked, **size))


@torch.inference_mode()
def evaluated(pipeline: Pipeline, asked: tuple) -> Tensor:
    return pipeline.predict(*asked)


def steps_of(run: Run) -> int:
    return 2 if run.toy else run.chosen.case.steps


def requests(run: Run, pipeline: Pipeline, number: int, **asked: Any) -> list:
    case = run.chosen.case
    given = {"steps": steps_of(run), "guidance": case.guidance, "size": (case.pixels, case.pixels)}
    return pipeline.requests("a fox", number=number, seed=0, **(given | asked))


def draw(run: Run, pipeline: Pipeline, **asked: Any) -> None:
    pipeline.draw(requests(run, pipeline, 1, **asked))


def drawn(
    run: Run,
    pipeline: Pipeline,
    floor: float | None,
    steps: int | None = None,
    guidance: float | None = None,
) -> dict[str, Any]:
    """Figures of one picture, with the roofline's seconds beside where they are given."""
    asked = {"steps": steps, "guidance": guidance}
    given = {key: value for key, value in asked.items() if value is not None}
    found = measured(run, lambda: draw(run, pipeline, **given))
    return found | ({} if floor is None else {"x_roofline": found["picture_s"] / floor})


def measured(run: Run, work: Callable[[], object], runs: int | None = None) -> dict[str, Any]:
    """Seconds with their spread, and the most memory that tensors took meanwhile."""
    measure.release(run.device)
    measure.reset_peak(run.device)
    seconds = measure.timing(work, runs or run.runs, run.device)
    peak = measure.peak_bytes(run.device)
    return {
        "picture_s": seconds.median,
        "spread": seconds.spread,
        "peak_gb": None if peak is None else peak / GB,
    }
