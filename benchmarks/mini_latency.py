"""What one picture of the bundled model costs: seconds, and memory of the whole process.

`python -m benchmarks.mini_latency [--model M] [--out benchmarks/mini_latency.json]`
"""

import argparse
import json
import os
import platform
import resource
import statistics
import time
from pathlib import Path

import torch

from koala.generation import load
from koala.utils.device import hardware

RUNS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="koala-mini")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/mini_latency.json"))
    options = parser.parse_args()
    start = time.perf_counter()
    pipeline = load(options.model, "cpu")
    loading = time.perf_counter() - start
    seconds = []
    for seed in range(RUNS + 1):
        start = time.perf_counter()
        pipeline("a fox, noto style", seed=seed)
        seconds.append(time.perf_counter() - start)
    first, *later = seconds
    figures = {
        "command": "python -m benchmarks.mini_latency",
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_s": round(loading, 3),
        "first_picture_s": round(first, 3),
        "picture_s": {
            "median": round(statistics.median(later), 3),
            "least": round(min(later), 3),
            "greatest": round(max(later), 3),
            "runs": RUNS,
        },
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
