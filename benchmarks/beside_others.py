"""How much longer a picture takes where other programs keep every core busy.

`python -m benchmarks.beside_others [--out benchmarks/beside_others.json]`

Threads that wait for each other by spinning take the cores from those that work: a picture can take
ten times as long then. Here each core has one endless loop beside koala, so with fair shares a
picture takes twice as long. Both back ends, alone and beside the loops, in turns.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.busy import busy
from benchmarks.record import keep
from koala.utils.threads import limit_threads, sleep_while_waiting

limit_threads()
sleep_while_waiting()  # as `koala serve` does, before PyTorch is there

from koala.benchmark.ratio import ratio  # noqa: E402 (after the threads)
from koala.generation import load  # noqa: E402
from koala.utils.device import hardware  # noqa: E402

MODEL = "koala-mini"
ROUNDS, EACH = 8, 4  # images of a round


def image_seconds(pipeline: Any, seed: int) -> float:
    """The median of a round."""
    seconds = []
    for i in range(EACH):
        start = time.perf_counter()
        pipeline("a fox, noto style", seed=seed + i)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/beside_others.json"))
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    rows = {}
    for backend in ("torch", "openvino"):
        pipeline = load(MODEL, "cpu", backend=backend)
        image_seconds(pipeline, 0)
        alone, beside = [], []
        for i in range(ROUNDS):
            alone.append(image_seconds(pipeline, i))
            with busy(cores):
                beside.append(image_seconds(pipeline, i))
        rows[backend] = {
            "alone_s": round(statistics.median(alone), 3),
            "beside_s": round(statistics.median(beside), 3),
            "times as long": ratio(beside, alone).text(),
        }
    record = {
        "command": "python -m benchmarks.beside_others",
        "hardware": hardware(),
        "model": MODEL,
        "loops": cores,
        "back ends": rows,
    }
    keep(options.out, record)


if __name__ == "__main__":
    main()
