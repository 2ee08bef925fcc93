"""The section of `benchmarks.gpu` on what a training waits for beside its steps.

Start: the imports in a new process, models on the device, the first step. Shapes: the first step at
each of several buckets, with blocks compiled for all sizes and compiled for one. Saving: how long
the loop stands still for a checkpoint, and how long its writing goes on beside it.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_run import Row, Rows, Run
from benchmarks.gpu_training import CUTS, Ours, Scene
from koala.architectures.table import FACTOR
from koala.benchmark import measure
from koala.distillation import checkpoint, parallel
from koala.distillation.settings import Hardware
from koala.distillation.taps import regions

BUCKETS = ((1024, 1024), (896, 1152), (1152, 896), (768, 1344))  # height, width: of SDXL's list
TOY_BUCKETS = ((64, 128),)  # each is compiled anew
IMPORTS = "import koala.recipes.train, torch; torch.zeros(1, device='{device}')"


def starting(run: Run) -> Rows:
    """Start, warm-up of shapes, and saving, of the 700M with one sample at once."""
    scene, cut = Scene.of(run), CUTS[0]
    program = IMPORTS.format(device=run.device)
    started = partial(subprocess.check_call, [sys.executable, "-c", program])
    # A rehearsal tries the program in this process, which has imported it all.
    begun = partial(exec, program) if run.toy else started
    yield _timed("imports and device, in a new process", run, begun)
    work: list[Ours] = []
    yield _timed("models made on the device", run, lambda: work.append(_ours(scene, cut)))
    yield _timed("first step, eager", run, work[0].step)
    yield from saving(work[0], run)
    work.clear()
    measure.release(run.device)
    for dynamic in (True,) if run.toy else (True, False):  # a rehearsal finds the graphs once
        if run.left > 0:
            yield from shapes(_ours(scene, cut), run, dynamic)
        torch.compiler.reset()
        measure.release(run.device)


def shapes(work: Ours, run: Run, dynamic: bool) -> Rows:
    """The first and the second step at each bucket, compiled."""
    for network in (work.task.trainable, work.task.teacher):
        assert network is not None
        parallel._compile(regions(network), work.scene.compiler, dynamic=dynamic)
    for height, width in TOY_BUCKETS if run.toy else BUCKETS:
        if run.left < 0:
            return
        work.data["latents"] = torch.randn(work.batch, 4, height // FACTOR, width // FACTOR)
        how = "for all sizes" if dynamic else "for one size"
        row = _timed(f"{height} x {width}, compiled {how}", run, work.step)
        yield row | {"again_s": _timed("", run, work.step)["seconds"]}


def saving(work: Ours, run: Run) -> Rows:
    """What a checkpoint holds up, and what it takes."""
    state = checkpoint.State(work.task.trainable, [work.average], work.optimizer)
    with (
        tempfile.TemporaryDirectory() as folder,
        checkpoint.Saver(Path(folder), work.training, write=True) as saver,
    ):
        yield _timed("the loop, for a checkpoint", run, lambda: saver.save(1, state, {}))
        yield _timed("its writing, beside the loop", run, saver.wait)


def _ours(scene: Scene, cut: str) -> Ours:
    return Ours(scene, cut, Hardware(), 1)


def _timed(what: str, run: Run, work: Callable[[], object]) -> Row:
    measure.synchronize(run.device)
    start = time.perf_counter()
    work()
    measure.synchronize(run.device)
    return {"what": what, "seconds": time.perf_counter() - start}
