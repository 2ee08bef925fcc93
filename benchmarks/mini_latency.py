"""What one image of the bundled few-step model costs, beside its parent's, drawn in turns.

`python -m benchmarks.mini_latency [--out benchmarks/mini_latency.json]`

Both draw as they are made for, with the back end that `koala.load` takes; the few-step model also
with the tiny decoder. `python -m benchmarks.start` has the memory.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import keep
from koala.benchmark.ratio import ratio
from koala.checkpoints.bundled import DEFAULT
from koala.generation import load
from koala.utils.device import hardware

RUNS = 40
PARENT = "koala-mini"
WITH_TINY = f"{DEFAULT}, tiny decoder"


class Timed:
    """A model's images, and the seconds of each, of which the decoder takes a part."""

    def __init__(self, model: str, decode: str | None = None) -> None:
        self.pipeline = load(model, "cpu", decode=decode)
        self.seconds: list[float] = []
        self.decoding: list[float] = []
        self._decode = self.pipeline.decode
        self.pipeline.decode = self._timed

    def _timed(self, latents: Any) -> Any:
        start = time.perf_counter()
        decoded = self._decode(latents)
        self.decoding.append(time.perf_counter() - start)
        return decoded

    def draw(self, seed: int) -> None:
        start = time.perf_counter()
        self.pipeline("a fox, noto style", seed=seed)
        self.seconds.append(time.perf_counter() - start)

    def figures(self) -> dict[str, Any]:
        later = self.seconds[1:]  # the first compiles
        return {
            "image_s": round(statistics.median(later), 4),
            "least_s": round(min(later), 4),
            "greatest_s": round(max(later), 4),
            "decoder_s": round(statistics.median(self.decoding[1:]), 4),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/mini_latency.json"))
    options = parser.parse_args()
    models = {name: Timed(name) for name in (PARENT, DEFAULT)}
    models[WITH_TINY] = Timed(DEFAULT, "tiny")
    for seed in range(RUNS + 1):
        for model in models.values():
            model.draw(seed)
    parent = models[PARENT].seconds[1:]
    faster = {name: ratio(parent, models[name].seconds[1:]).text() for name in (DEFAULT, WITH_TINY)}
    record = {
        "command": "python -m benchmarks.mini_latency",
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "images of each": RUNS,
        "models": {name: model.figures() for name, model in models.items()},
        "times faster": faster,
    }
    keep(options.out, record)


if __name__ == "__main__":
    main()
