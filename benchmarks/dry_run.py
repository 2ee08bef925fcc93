"""A dry run's memory against a real training's on the CPU: in all, and part by part.

`python -m benchmarks.dry_run CASE [--bf16]` trains two steps of random models, watches torch's
allocator, and prints what `koala distill --dry-run` foretells beside what was there: in fp32, or
with `--bf16` as a GPU computes under autocast, by the same casts and the same rules
(`koala.recipes.memory`) of real numbers, so that the allocator sees activations and copies of
weights in bf16. What only a GPU has (its context, libraries' workspaces, its own attention kernels,
gaps of the caching allocator) cannot be seen here. `benchmarks/dry_run.json` keeps the figures.
"""

import argparse
import gc
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.record import keep_as
from koala.architectures.layout import parameters
from koala.architectures.table import get, student_of
from koala.distillation.ema import EMA
from koala.distillation.forward_process import generators_at
from koala.distillation.optimizers import new_optimizer
from koala.distillation.parallel import World, lay_out
from koala.distillation.settings import DistillationSettings, Hardware, Training
from koala.distillation.taps import regions
from koala.recipes.memory import (
    OVERHEAD,
    TrainingSetup,
    _Autocast,
    _Ledger,
    _within,
    batch_of,
    blank_unet,
    device_memory,
    task_of,
)
from koala.utils.device import hardware

SDXL = get("sdxl")
QUARTER = replace(SDXL, name="a quarter of SDXL's width", widths=(80, 160, 320), heads=(2, 4, 8),
                  context=512, pooled=320, groups=16)  # fmt: skip
HALF = replace(SDXL, name="half of SDXL's width", widths=(160, 320, 640), heads=(5, 10, 20),
               context=1024, pooled=640)  # fmt: skip
PARTS, AGAIN = Hardware(accumulate=2), Hardware(checkpointing=True)
CASES = {  # teacher, student's cut, pixels, samples a step, hardware
    "mini": (get("sdxl-mini"), "koala-700m", 128, 8, Hardware()),
    "mini-1b": (get("sdxl-mini"), "koala-1b", 128, 8, PARTS),
    "quarter": (QUARTER, "koala-700m", 512, 4, Hardware()),
    "quarter-1b": (QUARTER, "koala-1b", 512, 2, PARTS),
    "quarter-again": (QUARTER, "koala-700m", 512, 4, AGAIN),
    "half": (HALF, "koala-700m", 256, 2, Hardware()),
}


def plan_of(case: str, bf16: bool) -> TrainingSetup:
    """The case as the dry run sees it."""
    teacher, cut, pixels, batch, machine = CASES[case]
    training = Training(batch, batch, lr=1e-5, ema_half_life=1000)
    return TrainingSetup(
        student_of(teacher, cut), teacher, DistillationSettings(), training, machine, 1, pixels,
        on_gpu=bf16,
    )  # fmt: skip


def trained(plan: TrainingSetup) -> dict[str, int]:
    """Bytes by part at the fullest moment of the second step, as the allocator has them."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        torch.empty(1)  # says how much there was before
        student, teacher = (_random(blank_unet(a)) for a in (plan.student, plan.teacher) if a)
        task = task_of(plan, student, teacher)
        if plan.on_gpu:
            nn.Module.to(teacher, torch.bfloat16)
        autocast = _Autocast(_Ledger()) if plan.on_gpu else None
        for region in regions(student) if autocast else ():  # one computed again casts again
            region.compute = partial(_within, [autocast], region.compute)
        lay_out(task, plan.hardware, World())
        optimizer = new_optimizer(plan.training, student)
        average = EMA(student, plan.training.ema_half_life)
        for seen in (0, plan.training.batch):
            _step(task, plan, autocast, seen)
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(student, plan.training.batch, seen + plan.training.batch)
    parts = {
        "weights": sum(p.nbytes for p in student.parameters()),
        "optimiser": sum(v.nbytes for s in optimizer.state.values() for v in s.values()),
        "averages": sum(v.nbytes for v in average.state_dict().values()),
        "teacher": sum(p.nbytes for p in teacher.parameters()),
    }
    peak = _peak(profiled)
    return {**parts, "what a step makes": peak - sum(parts.values()), "in all": peak}


def _step(task: Any, plan: TrainingSetup, autocast: _Autocast | None, seen: int) -> None:
    """Forward and backward, in parts where there are some."""
    micro = plan.micro_batch
    for part in range(plan.hardware.accumulate):
        draws = generators_at(0, seen + part * micro, micro)
        if autocast is None:
            task.losses(batch_of(plan, torch.device("cpu")), draws)["loss"].backward()
            continue
        autocast._copies = {}
        loss = _within([autocast], task.losses, batch_of(plan, torch.device("cpu")), draws)["loss"]
        autocast.forget()
        loss.backward()


def _peak(profiled: profile) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    totals = [event["args"]["Total Allocated"] for event in memory]
    return max(totals) - totals[0]


def _random(unet: nn.Module) -> Any:
    unet = unet.to_empty(device="cpu")
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.02)
    return unet


def compared(case: str, bf16: bool) -> dict[str, Any]:
    """Foretold and measured, in MiB, and their ratio."""
    plan = plan_of(case, bf16)
    foretold = device_memory(plan)
    foretold["context and workspaces"] = foretold.get("context and workspaces", 0) - (
        OVERHEAD if bf16 else 0
    )
    made = ("gradients", "bf16 copies of weights", "activations")
    told = {name: foretold[name] for name in ("weights", "optimiser", "averages", "teacher")}
    told["what a step makes"] = sum(foretold.get(name, 0) for name in made)
    told["in all"] = sum(foretold.values())
    there = trained(plan)
    mib = {name: [round(told[name] / 2**20, 1), round(there[name] / 2**20, 1)] for name in told}
    ratio = {name: round(there[name] / told[name], 3) for name in told}
    return {"foretold_and_measured_mib": mib, "measured_of_foretold": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--bf16", action="store_true", help="cast as a GPU's autocast does")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/dry_run.json"))
    options = parser.parse_args()
    name = options.case + (" --bf16" if options.bf16 else "")
    teacher, cut, pixels, batch, machine = CASES[options.case]
    figures = {
        "command": f"python -m benchmarks.dry_run {name}",
        "hardware": hardware(),
        "teacher": f"{teacher.name}, {parameters(teacher):,} parameters",
        "student": f"{cut}, {parameters(student_of(teacher, cut)):,} parameters",
        "pixels": pixels,
        "samples": f"{batch} in {machine.accumulate}",
        "checkpointing": machine.checkpointing,
        **compared(options.case, options.bf16),
    }
    keep_as(name, options.out, figures)


if __name__ == "__main__":
    main()
