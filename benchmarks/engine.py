"""What steps, pixels, guidance and company cost: ratios of processor seconds, one after the other.

`OMP_NUM_THREADS=1 python -m benchmarks.engine [--model M] [--out benchmarks/engine.json]`

Each case is timed next to the plain one (a picture of 10 steps), in turns, so that what else the
machine does weighs on both alike; the figures are medians of the ratios.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import koala
from benchmarks.record import keep
from koala.generation import Pipeline
from koala.utils.device import hardware

ROUNDS = 7
CASES: dict[str, dict[str, Any]] = {  # "sides": of the model's own size
    "5 steps": {"steps": 5},
    "20 steps": {"steps": 20},
    "4 times the pixels": {"sides": 2},
    "16 times the pixels": {"sides": 4},
    "no guidance": {"guidance": 1.0},
    "guidance until half": {"guidance_until": 0.5},
    "8 pictures": {"number": 8},
    "8 pictures, strict": {"number": 8, "strict": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="koala-mini")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/engine.json"))
    options = parser.parse_args()
    pipeline = koala.load(options.model, "cpu")
    _seconds(pipeline)  # the first call prepares much
    plain: list[float] = []
    ratios = {}
    for name, asked in CASES.items():
        pairs = [(_seconds(pipeline), _seconds(pipeline, **asked)) for _ in range(ROUNDS)]
        plain += [one for one, _ in pairs]
        ratios[name] = round(statistics.median(other / one for one, other in pairs), 2)
        print(f"{name:24} {ratios[name]:6.2f}", flush=True)
    figures = {
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.engine",
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "model": options.model,
        "pixels": pipeline.unet.config.sample_size * pipeline.factor,
        "processor seconds of one picture, 10 steps": round(statistics.median(plain), 3),
        "times that": ratios,
    }
    keep(options.out, figures)


def _seconds(pipeline: Pipeline, sides: int = 1, **asked: Any) -> float:
    side = sides * pipeline.unet.config.sample_size * pipeline.factor
    start = time.process_time()
    pipeline("a fox, noto style", seed=1, size=(side, side), **asked)
    return time.process_time() - start


if __name__ == "__main__":
    main()
