"""Whole pictures on a processor: stock diffusers in fp32 beside ours, the same weights, one run.

`python -m benchmarks.cpu [--out benchmarks/cpu] [--only mini | --only full-size]`

First the bundled model by `koala benchmark`: as by default, and in every other way. Then KOALA-700M
at full size, random weights, 512 x 512 pixels, 10 steps, guidance 3.5: each way in a process of its
own, so that its peak memory is its own; the ways take turns, round after round, so that a machine
that changes its speed changes it for all. What is approximate has its approximation in its name,
and its cost in likeness in the table of `python -m benchmarks.fidelity`.

For a machine that does nothing else. Beside the seconds stand those of the processor, which other
work changes less.

The ways through OpenVINO are left out unless they are named: a first image takes 12.7 GB
(`python -m benchmarks.conversion`).
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

from benchmarks.record import command
from koala.benchmark.cases import subject
from koala.benchmark.measure import GB, peak_bytes
from koala.benchmark.models import build, stock
from koala.benchmark.run import benchmark
from koala.generation.decode import TINY
from koala.generation.loader import load
from koala.utils.atomic import check_new, write_text
from koala.utils.device import hardware, has_bf16

CASE = "koala-turbo-700m"
STOCK = "diffusers fp32"
VRAM = 6.5  # GiB that our process may take: all networks stay in memory
FEWER = 3.7  # GiB, which are less than 4 GB: networks take turns
STEPS = 10
MINI = "mini"  # folder of the bundled model's report
CUT = {"guidance_until": 0.5}
EXACT = {"plan": {"weights": "fp32"}}
TINY_FP32 = {"plan": {"weights": "fp32", "decode": "tiny"}}
ROUNDED = {"plan": {"weights": "bf16"}}
TINY_BF16 = {"plan": {"weights": "bf16", "decode": "tiny"}}
FEW = {"plan": {"weights": "bf16", "decode": "tiny", "vram": FEWER}, "steps": 4}
IN_FEW_STEPS = "koala bf16, 4 steps without guidance, tiny decode"
WAYS: dict[str, dict[str, Any]] = {  # what each asks of us beside prompt, steps, guidance and size
    STOCK: {},
    "koala fp32": EXACT,
    "koala fp32, tiny decode": TINY_FP32,
    "koala fp32, guided half way": EXACT | {"ask": CUT},
    "koala fp32, guided half way, tiny decode": TINY_FP32 | {"ask": CUT},
    "koala bf16": ROUNDED,
    "koala bf16, tiny decode": TINY_BF16,
    "koala bf16, guided half way, tiny decode": TINY_BF16 | {"ask": CUT},
    IN_FEW_STEPS: FEW | {"ask": {"guidance": 1}},
    "koala openvino fp32": {"backend": "openvino"},
    "koala openvino bf16": {"backend": "openvino-bf16"},
}
LARGE = tuple(way for way in WAYS if "openvino" in way)


def default_ways() -> list[str]:
    """All but those that are too large, and bf16 only where the processor has it."""
    return [way for way in WAYS if way not in LARGE and (has_bf16() or "bf16" not in way)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/cpu"), help="new folder")
    parser.add_argument("--model", help="a folder to draw with, not a random KOALA-700M")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=240, help="for the bundled model")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=default_ways())
    parser.add_argument("--only", choices=("mini", "full-size"), help="one half; default: both")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_random(options.write)
    elif options.way:
        print(json.dumps(draw(options.way, Path(options.model), options.pixels)))
    else:
        check_new(options.out)
        if options.only != "full-size":
            bundled(options)
        if options.only != "mini":
            print(table(full_size(options)))


def bundled(options: argparse.Namespace) -> None:
    """The bundled model by `koala benchmark`."""
    report = benchmark(["koala-mini"], options.out / MINI, "cpu", seconds=options.seconds)
    print(report.table(), flush=True)


def full_size(options: argparse.Namespace) -> dict[str, Any]:
    """Every way in every round; written after each round."""
    figures: dict[str, Any] = {
        "command": command("cpu"),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "model": options.model or f"{CASE}, random weights",
        "pixels": options.pixels,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model
        if folder is None:
            folder = str(Path(temporary) / CASE)
            in_a_process("--write", folder)  # so that its memory is given back
        measured: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
        for _ in range(options.rounds):
            for way in options.ways:
                asked = ("--way", way, "--model", folder, "--pixels", str(options.pixels))
                measured[way].append(json.loads(in_a_process(*asked).splitlines()[-1]))
                print(f"{way}: {measured[way][-1]}", flush=True)
            figures["ways"] = summary(measured)
            write_text(options.out / "full_size.json", json.dumps(figures, indent=1) + "\n")
    return figures


def summary(measured: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Medians of each way's rounds, and how many times faster than stock diffusers it is."""
    ways: dict[str, dict[str, Any]] = {}
    for way, runs in measured.items():
        ways[way] = {
            "picture_s": statistics.median(run["seconds"] for run in runs),
            "processor_s": statistics.median(run["processor_seconds"] for run in runs),
            "peak_gb": max(run["peak_gb"] for run in runs),
            "runs": runs,
        }
    for found in ways.values() if STOCK in ways else ():
        for seconds in ("picture_s", "processor_s"):
            ratio = ways[STOCK][seconds] / found[seconds]
            found[f"times_faster_{seconds.removesuffix('_s')}"] = round(ratio, 2)
    return ways


def table(figures: dict[str, Any]) -> str:
    """The ways as a Markdown table."""
    lines = [
        "| way | picture s | times faster | by processor s | peak GB |",
        "|---|---|---|---|---|",
    ]
    for way, found in figures["ways"].items():
        ratios = (found.get(f"times_faster_{of}", "") for of in ("picture", "processor"))
        cells = (way, f"{found['picture_s']:.2f}", *map(str, ratios), f"{found['peak_gb']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_a_process(*arguments: str) -> str:
    """What this script prints with these arguments, in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.cpu", *arguments]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    return done.stdout


def draw(way: str, folder: Path, pixels: int) -> dict[str, float]:
    """Seconds of one picture, after one of a single step that warms up; peak memory in GB.

    The peak is that of the whole process, with loading.
    """
    asked = WAYS[way]
    if way == STOCK:
        pipe = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        pipe.scheduler = EulerDiscreteScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing"
        )
        pipe.set_progress_bar_config(disable=True)

        def image(steps: int) -> None:
            pipe(
                "a fox", num_inference_steps=steps, guidance_scale=3.5, height=pixels, width=pixels
            )
    else:
        if "plan" in asked:
            planned = {"vram": VRAM, "size": (pixels, pixels), **asked["plan"]}
            ours = load(folder, "cpu", **planned, say=print)
        else:
            ours = load(folder, "cpu", backend=asked["backend"])

        def image(steps: int) -> None:
            ours("a fox", steps=steps, size=(pixels, pixels), seed=0, **asked.get("ask", {}))

    image(1)
    start, worked = time.perf_counter(), time.process_time()
    image(asked.get("steps", STEPS))
    seconds, processor = time.perf_counter() - start, time.process_time() - worked
    peak = peak_bytes(torch.device("cpu"))
    return {
        "seconds": round(seconds, 3),
        "processor_seconds": round(processor, 3),
        "peak_gb": round((peak or 0) / GB, 2),
    }


def write_random(folder: Path) -> Path:
    """KOALA-700M with random weights and a random tiny autoencoder, as a model folder in fp16."""
    pipeline = build(subject(CASE), torch.device("cpu"), torch.float16)
    stock(pipeline).save_pretrained(folder)
    AutoencoderTiny().half().save_pretrained(folder / TINY)
    return folder


if __name__ == "__main__":
    main()
