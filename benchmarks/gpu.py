"""Every figure that needs a GPU, of training and of drawing, in one run of under nine minutes.

`python -m benchmarks.gpu [--out benchmarks/gpu] [--seconds 520] [--sections training ladder ...]`

Sections, in order of worth: a training's samples a second against the way public scripts do it and
the card's peak; the ladder of optimisations of a picture against its roofline; a training's memory
on cards of 12, 24 and 80 GB beside what `--dry-run` foretells; its start, the warm-up of compiled
shapes, what a checkpoint holds up; few steps with a tiny decoder;
throughput by batch; a picture's memory by budget; `koala prepare` and the loader; growth with
steps and pixels; and the published table in what time is left. Each section has its share of the
time, and what one leaves goes to those that follow. Every row is written as soon as it is measured:
a run cut short leaves what it had. A section that fails says so in its place and the next one
begins. Weights are random.

Rehearsal without a GPU: `python -m benchmarks.gpu --device cpu --model koala-mini --toy`.
"""

import argparse
import time
import traceback
from pathlib import Path

import torch

from benchmarks import gpu_drawing, gpu_fitting, gpu_preparing, gpu_starting, gpu_training
from benchmarks.gpu_run import Row, Run, Section, rounded
from koala.benchmark import measure
from koala.benchmark.cases import subject
from koala.utils.device import hardware, pick_device

SECTIONS = {
    "training": Section(160, gpu_training.training),
    "ladder": Section(100, gpu_drawing.ladder),
    "training_memory": Section(60, gpu_fitting.memory),
    "starting": Section(35, gpu_starting.starting),
    "few_steps": Section(30, gpu_drawing.few_steps),
    "throughput": Section(40, gpu_drawing.throughput),
    "memory": Section(40, gpu_drawing.memory),
    "preparing": Section(20, gpu_preparing.preparing),
    "growth": Section(15, gpu_drawing.growth),
    "table": Section(20, gpu_drawing.table),
}
LEAST = 1 / 3  # of a section's seconds: with less it is not begun


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu"), help="new folder")
    parser.add_argument("--model", default="koala-lightning-700m", help="what is to draw")
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--seconds", type=float, default=520, help="of the whole run")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=[])
    parser.add_argument("--toy", action="store_true", help="a rehearsal: one run, small sizes")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    device = pick_device(options.device)
    ceilings = measure.ceilings(device, torch.bfloat16)
    run = Run(subject(options.model), device, options.out, options.toy, ceilings)
    run.figures = {
        "command": "python -m benchmarks.gpu",
        "hardware": hardware(),
        "device": str(device),
        "model": options.model,
        "weights": "random" if run.chosen.random else "real",
        "ceilings": vars(ceilings),
        "sections": {},
    }
    failed = []
    names = options.sections or list(SECTIONS)
    for number, name in enumerate(names):
        left = start + options.seconds - time.monotonic()
        wanted = [SECTIONS[other].seconds for other in names[number:]]
        if not section(run, name, left * wanted[0] / sum(wanted)):
            failed.append(name)
    run.figures["seconds"] = round(time.monotonic() - start, 1)
    run.save()
    run.plot()
    print(f"{options.out / 'gpu.json'}: {run.figures['seconds']} s")
    return 1 if failed else 0


def section(run: Run, name: str, seconds: float) -> bool:
    """Runs one section for so long at most, row by row; False if it failed."""
    wanted = SECTIONS[name]
    done: list[Row] = []
    entry: dict = {"rows": done}
    run.figures["sections"][name] = entry
    if not run.toy and seconds < LEAST * wanted.seconds:
        entry["left_out"] = f"{seconds:.0f} s were left to it, it needs about {wanted.seconds}"
        return True
    start = time.monotonic()
    run.until = start + seconds
    try:
        for row in wanted.rows(run):
            done.append({key: rounded(value) for key, value in row.items()})
            print(name, done[-1], flush=True)
            run.save()
            if run.left < 0:
                entry["cut_short"] = f"its {seconds:.0f} s were over"
                break
    except Exception as error:  # the others are to be measured all the same
        traceback.print_exc()
        entry["failed"] = repr(error)[:500]
    entry["seconds"] = round(time.monotonic() - start, 1)
    run.save()
    torch.compiler.reset()
    measure.release(run.device)
    return "failed" not in entry


if __name__ == "__main__":
    raise SystemExit(main())
