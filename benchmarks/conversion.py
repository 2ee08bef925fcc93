"""What OpenVINO takes at full size: to convert KOALA-700M, in float32 and with its U-Net in 4 bits,
and to draw a first image with it.

`python -m benchmarks.conversion [--folder FOLDER] [--out benchmarks/conversion.json]`

Random weights, stored in fp16, 512 x 512 pixels, 4 steps. Every command has a process of its own,
whose peak memory is its largest resident size, and a cache that is empty at first. It takes 25 GB
of disk. FOLDER: keeps the model, or has it from an earlier run.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.cpu import CASE
from benchmarks.record import keep
from benchmarks.start import used_by
from koala.utils.device import hardware

DRAWN = ["--size", "512x512", "--steps", "4", "--seed", "7"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/conversion.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "koala-700m"
        form, int4 = str(Path(scratch) / "form"), str(Path(scratch) / "int4")
        if not folder.exists():
            written = [sys.executable, "-m", "benchmarks.cpu", "--write", str(folder)]
            subprocess.run(written, check=True)
        draw = ["generate", "a fox", *DRAWN, "--out", scratch, "--model"]
        export = ["export", str(folder), "--to", "openvino", "--out"]
        commands = {
            "export": [*export, form],
            "first image of the form": [*draw, form],  # compiles
            "export in int4": [
                "export",
                str(folder),
                "--to",
                "openvino",
                "--dtype",
                "int4",
                "--out",
                int4,
            ],
            "first image of the form in int4": [*draw, int4],
        }
        taken = {}
        for name, command in commands.items():
            taken[name] = used_by(command, KOALA_CACHE=str(Path(scratch) / "cache"))
            print(name, taken[name], flush=True)
    record = {
        "command": "python -m benchmarks.conversion",
        "hardware": hardware(),
        "model": f"{CASE}, random weights",
        "commands": {
            name: {
                "seconds": round(one["seconds"], 1),
                "processor seconds": round(one["processor"], 1),
                "peak GB": round(one["peak"] / 1e3, 2),
            }
            for name, one in taken.items()
        },
    }
    keep(options.out, record)


if __name__ == "__main__":
    main()
