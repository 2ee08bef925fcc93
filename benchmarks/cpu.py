"""Whole pictures on a processor: stock diffusers in fp32 beside ours, the same weights, one run.

`python -m benchmarks.cpu [--out benchmarks/cpu] [--skip-full-size]`

First the bundled model through `koala benchmark --backend auto`. Then KOALA-700M at full size with
random weights, 512 x 512 pixels, 10 steps, guidance 3.5: each way in a process of its own, so that
its peak memory is its own; the ways take turns, round after round, so that a machine that changes
its speed changes it for all. What is approximate has its approximation in its name.
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
from typing import Any

import torch
from diffusers import AutoencoderTiny, EulerDiscreteScheduler, StableDiffusionXLPipeline

from koala.benchmark.measure import GB, peak_bytes
from koala.benchmark.models import build, stock, subject
from koala.benchmark.run import benchmark
from koala.generation.arrangement import load_within
from koala.generation.backends import equip
from koala.generation.decode import TINY
from koala.generation.pipeline import load
from koala.output import new_file
from koala.processor import hardware

CASE = "koala-turbo-700m"
VRAM = 5.0  # GiB that our plan may take: 6 GB with the interpreter and its libraries
CUT = {"guidance_until": 0.5}
WAYS: dict[str, dict[str, Any]] = {  # what each asks of us beside prompt, steps, guidance and size
    "diffusers fp32": {},
    "koala fp32": {"plan": {"weights": "fp32"}},
    "koala fp32, guided half way": {"plan": {"weights": "fp32"}, "ask": CUT},
    "koala fp32, guided half way, tiny decode": {
        "plan": {"weights": "fp32", "decode": "tiny"}, "ask": CUT,
    },
    "koala bf16": {"plan": {"weights": "bf16"}},
    "koala bf16, guided half way, tiny decode": {
        "plan": {"weights": "bf16", "decode": "tiny"}, "ask": CUT,
    },
    "koala openvino fp32": {"backend": "openvino"},
    "koala openvino bf16": {"backend": "openvino", "dtype": torch.bfloat16},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/cpu"), help="new folder")
    parser.add_argument("--model", help="a folder to draw with, not a random KOALA-700M")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--runs", type=int, default=20, help="pictures of the bundled model")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--skip-full-size", action="store_true")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(draw(options.way, Path(options.model), options.pixels)))
        return
    report = benchmark(["koala-mini"], options.out, "cpu", runs=options.runs, backend="auto")
    print(report.table())
    if not options.skip_full_size:
        full_size(options)


def full_size(options: argparse.Namespace) -> None:
    """Every way in every round; written after each round."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.model or write_random(Path(temporary) / CASE))
        measured: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
        for _ in range(options.rounds):
            for way in options.ways:
                measured[way].append(apart(way, folder, options.pixels))
                print(f"{way}: {measured[way][-1]}", flush=True)
            table = {
                way: {
                    "picture_s": statistics.median(run["seconds"] for run in runs),
                    "peak_gb": max(run["peak_gb"] for run in runs),
                    "runs": runs,
                }
                for way, runs in measured.items()
            }
            figures = {
                "command": "python -m benchmarks.cpu",
                "hardware": hardware(),
                "threads": torch.get_num_threads(),
                "model": options.model or f"{CASE}, random weights",
                "pixels": options.pixels,
                "ways": table,
            }
            with new_file(options.out / "full_size.json") as part:
                part.write_text(json.dumps(figures, indent=1) + "\n")


def apart(way: str, folder: Path, pixels: int) -> dict[str, float]:
    """`draw` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cpu", "--way", way]
    command += ["--model", str(folder), "--pixels", str(pixels)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])


def draw(way: str, folder: Path, pixels: int) -> dict[str, float]:
    """Seconds of one picture, after one of a single step that warms up; peak memory in GB."""
    asked = WAYS[way]
    if way.startswith("diffusers"):
        pipe = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        pipe.scheduler = EulerDiscreteScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing"
        )
        pipe.set_progress_bar_config(disable=True)

        def picture(steps: int) -> None:
            pipe(
                "a fox", num_inference_steps=steps, guidance_scale=3.5, height=pixels, width=pixels
            )
    else:
        if "plan" in asked:
            ours, _ = load_within(
                folder, "cpu", VRAM, size=(pixels, pixels), **asked["plan"], say=print
            )
        else:
            ours = load(folder, "cpu", asked.get("dtype"))
            equip(ours, asked["backend"])

        def picture(steps: int) -> None:
            ours("a fox", steps=steps, size=(pixels, pixels), seed=0, **asked.get("ask", {}))

    picture(1)
    start = time.perf_counter()
    picture(10)
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 3), "peak_gb": round(peak_bytes(torch.device("cpu")) / GB, 2)}


def write_random(folder: Path) -> Path:
    """KOALA-700M with random weights and a random tiny autoencoder, as a model folder in fp16."""
    pipeline = build(subject(CASE), torch.device("cpu"), torch.float16)
    stock(pipeline).save_pretrained(folder)
    AutoencoderTiny().half().save_pretrained(folder / TINY)
    return folder


if __name__ == "__main__":
    main()
