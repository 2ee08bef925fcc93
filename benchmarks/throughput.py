"""Several images at once on a CPU: one process a core, compared with one process, and with threads.

`python -m benchmarks.throughput [--model MODEL] [--out benchmarks/throughput.json]`

Each process draws with one thread, as `koala serve --replicas` and `torchrun -m koala evaluate` do.
Rounds take turns, so that a machine that changes its speed changes it for all: one process alone,
all processes at once, and one process with a thread a core. For a machine that does nothing else.
"""

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from benchmarks.record import command, keep
from koala.benchmark.cases import subject
from koala.benchmark.drawer import RemoteDrawer
from koala.benchmark.ratio import ratio
from koala.benchmark.ways import DEFAULT, Way
from koala.checkpoints.bundled import DEFAULT as MODEL
from koala.utils.device import hardware
from koala.utils.threads import available_cores

ROUNDS = 20
IMAGES = 4  # of each process in a round


def seconds_of(drawers: Sequence[RemoteDrawer]) -> float:
    """Wall seconds in which each of them draws its images, all at once."""

    def drawn(drawer: RemoteDrawer) -> None:
        for _ in range(IMAGES):
            drawer.draw()

    start = time.perf_counter()
    with ThreadPoolExecutor(len(drawers)) as pool:
        list(pool.map(drawn, drawers))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/throughput.json"))
    options = parser.parse_args()
    cores = available_cores()
    chosen, place = subject(options.model), torch.device("cpu")
    alone: list[float] = []
    together: list[float] = []
    threaded: list[float] = []
    with ExitStack() as stack:

        def drawer(threads: int) -> RemoteDrawer:
            made = RemoteDrawer(chosen, Way(DEFAULT), place, "fp32", threads)
            return stack.enter_context(closing(made))

        drawers = [drawer(1) for _ in range(cores)]
        wide = drawer(cores)
        for _ in range(ROUNDS):
            alone.append(seconds_of(drawers[:1]))
            together.append(seconds_of(drawers))
            threaded.append(seconds_of([wide]))
        backend = wide.backend
    record = {
        "command": command("throughput"),
        "hardware": hardware(),
        "model": options.model,
        "backend": backend,
        "cores": cores,
        "rounds": ROUNDS,
        "images a second of one process": round(IMAGES * ROUNDS / sum(alone), 2),
        "one process a core, times one process": ratio(
            [cores * one for one in alone], together
        ).text(),
        "a thread a core, times one process": ratio(alone, threaded).text(),
    }
    keep(options.out, record)


if __name__ == "__main__":
    main()
