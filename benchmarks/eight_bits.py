"""One evaluation of KOALA-700M's U-Net on a CPU in each precision, 8-bit products among them.

`python -m benchmarks.eight_bits [--case CASE] [--pixels 512] [--out benchmarks/eight_bits.json]`

Random weights, two rows. W8A8 is NNCF's quantisation of weights and activations, run by OpenVINO
with the CPU's 8-bit products (VNNI or AMX); it is calibrated by random inputs, which is enough for
speed and says nothing of likeness. Every way has a process of its own, so that its peak memory is
its own, and the ways take turns. Seconds are those of the processor on one thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.record import command, keep
from koala.architectures.table import get
from koala.benchmark.cases import CASES
from koala.benchmark.measure import GB, peak_bytes
from koala.benchmark.models import new_unet
from koala.generation.runtime import openvino, pytorch
from koala.generation.runtime.backends import example
from koala.utils.device import hardware

STOCK = "torch fp32"
WAYS = (STOCK, "torch bf16", "openvino fp32", "openvino bf16", "openvino int8")
ROUNDS, RUNS = 2, 3


def evaluation(way: str, case: str, pixels: int) -> dict[str, float]:
    """Median processor seconds of one evaluation, and the process's peak memory in GB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # so that the cache knows the quantised model again
    engine, precision = way.split()
    dtype = torch.bfloat16 if way == "torch bf16" else torch.float32
    unet = new_unet(get(CASES[case].architecture), torch.device("cpu"), dtype)
    asked = example(unet, side=pixels // 8)
    if engine == "torch":
        predict = pytorch.predictor(unet.to(memory_format=torch.channels_last))
    else:
        samples = [example(unet, 2, side=pixels // 16)] if precision == "int8" else []
        predict = openvino.predictor(unet, precision, samples)
    predict(*asked)  # converts, compiles and packs
    seconds = []
    for _ in range(RUNS):
        start = time.process_time()
        predict(*asked)
        seconds.append(time.process_time() - start)
    peak = peak_bytes(torch.device("cpu")) or 0
    return {"processor_s": statistics.median(seconds), "peak_gb": peak / GB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="koala-turbo-700m", choices=list(CASES))
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/eight_bits.json"))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    asked = ["--case", options.case, "--pixels", str(options.pixels)]
    if options.way:
        with torch.inference_mode():
            print(json.dumps(evaluation(options.way, options.case, options.pixels)))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
    with tempfile.TemporaryDirectory() as cache:  # gigabytes, of weights that nobody draws with
        for way in ROUNDS * list(options.ways):
            words = [sys.executable, "-m", "benchmarks.eight_bits", *asked, "--way", way]
            env = os.environ | {"KOALA_CACHE": cache}
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=env)
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(way, runs[way][-1], flush=True)
    found = {}
    for way, of in runs.items():
        seconds = statistics.median(run["processor_s"] for run in of)
        found[way] = {
            "processor_s": round(seconds, 2),
            "peak_gb": round(max(run["peak_gb"] for run in of), 2),
        }
    for of in found.values() if STOCK in found else ():
        of["times_faster"] = round(found[STOCK]["processor_s"] / of["processor_s"], 2)
    record = {
        "command": command("eight_bits"),
        "hardware": hardware(),
        "threads": 1,
        "model": f"{options.case}, random weights",
        "pixels": options.pixels,
        "rows": 2,
        "rounds": ROUNDS,
        "ways": found,
    }
    keep(options.out, record)


if __name__ == "__main__":
    main()
