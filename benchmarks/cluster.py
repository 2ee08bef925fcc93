"""The Lightning recipe at toy size on a cluster that one machine plays: does it train the same?

Two nodes of four processes, started by torchrun on loopback (gloo), each node with a cold cache of
its own; a single-file teacher; five aspect buckets. A run on eight processes is killed, and resumed
by four in one node. Its losses must be those of one process within 1e-5, and every sample must be
seen once. Replicas (DDP) and shards (FSDP2) each play.

`python -m benchmarks.cluster --out benchmarks/cluster.json [--nodes 2] [--processes 4]`
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from benchmarks.record import keep
from koala.architectures.config import unet_config
from koala.architectures.table import get
from koala.checkpoints.bundled import BUNDLED
from koala.checkpoints.convert import convert
from koala.distillation.settings import SHARDINGS
from koala.utils.device import hardware

BOUND = 1e-5  # of a loss, relative
PIXELS = 512  # the least with several buckets
SIZES = ((512, 512), (448, 576), (576, 448), (384, 640), (640, 384))  # width, height: a bucket each
IMAGES = 8  # of each size
BATCH, STEPS = 8, 6
TERMS = ("task", "out", "feat", "loss", "grad_norm")
# What every run is given; the rate is low, so that AdamW's division by small gradients, which makes
# more of rounding than there is, stays out of the losses.
SETTINGS = (
    f"training.samples={BATCH * STEPS}", f"training.batch={BATCH}", f"training.log_every={BATCH}",
    "training.preview_every=1000000", "training.validate_every=0", "training.save_every=0",
    "training.lr=1e-6", f"pixels={PIXELS}", "hardware.compile=",
    "settings.normalise=true", "settings.feature_weight=0.05",
)  # fmt: skip


def desk(folder: Path) -> tuple[Path, Path]:
    """A single-file teacher with random weights, and prepared images of five buckets."""
    model = shutil.copytree(BUNDLED / "koala-mini", folder / "model")
    shutil.rmtree(model / "unet")
    torch.manual_seed(0)
    narrow = replace(get("sdxl-mini"), widths=(32, 32, 32), heads=(1, 1, 1))
    UNet2DConditionModel(**unet_config(narrow)).save_pretrained(model / "unet")
    convert(model, "single-file", folder / "teacher.safetensors")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for n in range(IMAGES * len(SIZES)):
        width, height = SIZES[n % len(SIZES)]
        noise = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"{n:03d}.png")
        (folder / "images" / f"{n:03d}.txt").write_text(f"a fox, number {n}")
    prepare = ["prepare", folder / "images", "--model", model, "--out", folder / "data"]
    start([*prepare, "--size", PIXELS, "--held-out", "0", "--workers", "1"], folder).wait()
    return folder / "teacher.safetensors", folder / "data"


def start(command: Sequence[object], cache: Path, *torchrun: object) -> subprocess.Popen:
    """A `koala` command with a cache of its own, by torchrun if there are options for it."""
    by_torchrun = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    words = [str(word) for word in [sys.executable, *by_torchrun, "-m", "koala", *command]]
    environment = {**os.environ, "KOALA_CACHE": str(cache / "packages"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for torchrun, and then for its processes, which have sessions of their own."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(child), signal.SIGKILL)


def cluster(command: Sequence[object], folder: Path, nodes: int, processes: int) -> list:
    """One torchrun a node; every node has a cold cache."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for node in range(nodes):
        cache = Path(tempfile.mkdtemp(prefix=f"node-{node}-", dir=folder))
        options = (
            "--nnodes", nodes, "--node-rank", node, "--nproc-per-node", processes,
            "--master-addr", "127.0.0.1", "--master-port", port,
        )  # fmt: skip
        started.append(start(command, cache, *options))
    return started


def command_of(folder: Path, run: Path, sharding: str | None) -> list[object]:
    chosen = [f"hardware.sharding={sharding}"] if sharding else []
    return [
        "distill", "koala-lightning-700m", "--teacher", folder / "teacher.safetensors", "--data",
        folder / "data", "--out", run, "--device", "cpu", "--set", *SETTINGS,
        f"hardware.accumulate={1 if sharding else 4}", *chosen,
    ]  # fmt: skip


def play(folder: Path, sharding: str, nodes: int, processes: int) -> tuple[Path, int]:
    """A run on all nodes that is killed once it has saved, then resumed on one.

    Its folder, and the samples seen when it was killed.
    """
    run = folder / sharding
    command = command_of(folder, run, sharding)
    first = cluster(command, folder, nodes, processes)
    while not any(int(path.name) >= 3 * BATCH for path in run.glob("checkpoints/0*")):
        if any(process.poll() is not None for process in first):
            raise SystemExit(f"{run}: the first part ended before it was killed")
        time.sleep(0.05)
    for process in first:
        kill(process)
    killed = max(int(path.name) for path in run.glob("checkpoints/0*"))
    if killed >= BATCH * STEPS:
        raise SystemExit(f"{run}: the first part was killed too late, after its last step")
    (second,) = cluster(command, folder, 1, processes)
    if second.wait():
        raise SystemExit(f"{run}: the second part failed")
    return run, killed


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


def compared(run: Path, plain: Path) -> dict[str, float]:
    """The greatest relative difference of each term over the steps, and the samples seen."""
    ours, theirs = losses(run), losses(plain)
    seen = [line["samples"] for line in ours]
    if seen != [line["samples"] for line in theirs] or any(
        b - a != BATCH for a, b in pairwise(seen)
    ):
        raise SystemExit(f"{run}: samples were lost or repeated: {seen}")
    pairs = list(zip(ours, theirs, strict=True))
    greatest = {
        term: max(abs(a[term] - b[term]) / abs(b[term]) for a, b in pairs) for term in TERMS
    }
    return {"samples": seen[-1], **greatest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the record, a JSON file")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--processes", type=int, default=4, help="of each node")
    parser.add_argument("--shardings", nargs="+", choices=SHARDINGS, default=[*SHARDINGS])
    o = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        desk(folder)
        plain = folder / "one"
        if start(command_of(folder, plain, None), folder).wait():
            raise SystemExit("the run in one process failed")
        differences, killed = {}, {}
        for sharding in o.shardings:
            run, killed[sharding] = play(folder, sharding, o.nodes, o.processes)
            differences[sharding] = compared(run, plain)
    record = {
        "command": "python -m benchmarks.cluster",
        "hardware": hardware(),
        "nodes": o.nodes,
        "processes_a_node": o.processes,
        "buckets": len(SIZES),
        "samples": BATCH * STEPS,
        "killed_after_samples": killed,
        "resumed_by_processes": o.processes,
        "bound": BOUND,
        "greatest_relative_difference": differences,
        "seconds": round(time.monotonic() - begun),
    }
    keep(o.out, record)
    worst = max(value[term] for value in differences.values() for term in TERMS)
    if worst > BOUND:
        raise SystemExit(f"losses differ by {worst:.2g}, more than {BOUND:g}")


if __name__ == "__main__":
    main()
