"""The section of `benchmarks.gpu` that fits a training into 12, 24 and 80 GB.

Each recipe's hardware is tried with more samples at once until the budget is full, and its peak is
held against what the dry run foretells; last, what the dry run's trial takes to be the rate.
"""

import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu_foretold import Foretold
from benchmarks.gpu_run import Rows, Run
from benchmarks.gpu_training import CUTS, Ours, Scene, plan_of
from koala.benchmark import measure
from koala.benchmark.measure import GB
from koala.distillation.settings import Hardware
from koala.errors import UserError
from koala.recipes import paper
from koala.recipes.calibrate import measured

RECIPES = {  # by budget in GB
    12: "koala-lightning-700m-12gb",
    24: "koala-lightning-700m-24gb",
    80: "koala-lightning-700m",
}
TRIES = 6  # of sizes


def memory(run: Run) -> Rows:
    """Peak by budget with as many samples at once as fit, and the dry run's; then its trial."""
    scene = Scene.of(run)
    with Foretold(run.toy) as foretold:
        for recipe in RECIPES.values():
            foretold.begin(plan_of(scene, *_asked(scene, recipe)))
        for budget, recipe in RECIPES.items():
            if run.left < 0:
                return
            measure.release(scene.device)
            row = {"vram_gb": budget, "recipe": recipe}
            try:
                with _HeldTo(budget, scene.device):
                    row |= largest(scene, budget, recipe, foretold)
            except (torch.OutOfMemoryError, UserError) as error:
                row["refused"] = str(error)[:200]
            yield row
        measure.release(scene.device)
        plan = plan_of(scene, CUTS[0], Hardware(), 1)
        speed = measured(plan, scene.device, foretold.bytes(plan), scene.flops(CUTS[0]))
        rate = speed.flops / scene.flops(CUTS[0])
        yield {"vram_gb": "all", "recipe": "the trial of --dry-run", "samples_per_s": rate,
               "basis": speed.basis}  # fmt: skip


def _asked(scene: Scene, recipe: str) -> tuple[str, Hardware, int, str]:
    """Student, hardware, samples a step and optimiser: two parts, whose gradients are kept."""
    preset = paper.PRESETS[recipe]
    hardware = replace(paper.HARDWARE[preset.hardware], accumulate=2, compile="")
    eight = preset.hardware in paper.EIGHT_BIT
    if scene.device.type == "cpu":  # the teacher is in main memory anyway
        hardware, eight = replace(hardware, teacher="whole"), False
    return preset.cut, hardware, 2, "adamw-8bit" if eight else "adamw"


def largest(scene: Scene, budget: int, recipe: str, foretold: Foretold) -> dict[str, Any]:
    """One model, tried with more and more samples at once from what the dry run calls fitting."""
    cut, hardware, batch, optimizer = _asked(scene, recipe)
    stored = paper.HARDWARE[paper.PRESETS[recipe].hardware].stored_text
    work = Ours(scene, cut, hardware, batch, optimizer=optimizer, stored_text=stored)
    text = 0 if stored else sum(p.nbytes for e in work.text.encoders for p in e.parameters())
    parts = foretold.parts(work.plan)
    room = budget * GB - beyond(scene.device) - text - sum(parts.values())
    size = 1 if scene.toy else max(1, 1 + int(room / parts["activations"]))
    fitted: dict[int, tuple[int, float]] = {}
    tried: set[int] = set()
    while size > 0 and size not in tried and len(tried) < (1 if scene.toy else TRIES):
        tried.add(size)
        found = peak_of(work, size, scene.device)
        if found is not None:
            fitted[size] = found
        size += -1 if found is None else 1
    if not fitted:
        return {"refused": f"not even {min(tried)} at once"}
    best = max(fitted)
    peak, rate = fitted[best]
    work.resize(2 * best, 2)
    expected = foretold.bytes(work.plan)
    return {
        "at_once": best, "planned_gb": expected / GB, "measured_gb": (peak - text) / GB,
        "of_plan": (peak - text) / expected, "text_side_gb": text / GB,
        "beyond_the_allocator_gb": beyond(scene.device) / GB, "samples_per_s": rate,
    }  # fmt: skip


def peak_of(work: Ours, size: int, device: torch.device) -> tuple[int, float] | None:
    """(most bytes of tensors, samples a second) with so many at once; None: they do not fit."""
    work.resize(2 * size, 2)
    try:
        work.step()  # makes the optimiser's moments
        measure.synchronize(device)
        measure.reset_peak(device)
        start = time.perf_counter()
        work.step()
        measure.synchronize(device)
        return measure.peak_bytes(device) or 0, work.batch / (time.perf_counter() - start)
    except torch.OutOfMemoryError:
        work.optimizer.zero_grad(set_to_none=True)
        measure.release(device)
        return None


def beyond(device: torch.device) -> int:
    """Bytes of the device that its allocator does not hold: context and libraries."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


class _HeldTo:
    """Lets the allocator have no more than it would on a card of so many GB."""

    def __init__(self, budget: float, device: torch.device):
        self.budget, self.device = budget, device

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            share = min(1.0, (self.budget * GB - beyond(self.device)) / total)
            torch.cuda.set_per_process_memory_fraction(share, self.device)

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
