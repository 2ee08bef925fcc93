"""Memory plans of a full-size SDXL on a CPU, held to what the process took.

    python -m benchmarks.random_sdxl SDXL
    python -m benchmarks.held_plans --folder SDXL

draws one image of 256 x 256 pixels in one step with `koala generate --vram`, in a process of its
own for each budget, and writes `held_plans.json` beside this file: what was planned, and the peak
of the whole process, from its start until it ends.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import keep
from koala.utils.device import hardware

BUDGETS = (4, 6, 13)  # GiB
PLANNED = re.compile(r"memory plan for .*: ([\d.]+) of [\d.]+ GiB")


def drawn(folder: Path, budget: int, out: Path) -> dict[str, float | str]:
    """One image within `budget` GiB."""
    command = [
        sys.executable, "-m", "koala", "generate", "a lighthouse", "--model", str(folder),
        "--vram", str(budget), "--device", "cpu", "--size", "256x256", "--steps", "1",
        "--out", str(out / f"{budget}.png"),
    ]  # fmt: skip
    start = time.perf_counter()
    with open(out / "said.txt", "w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        said.seek(0)
        printed = said.read()
    if status:
        raise SystemExit(f"koala generate --vram {budget} failed: {printed}")
    planned = PLANNED.search(printed)
    assert planned, printed
    rows = [line for line in printed.splitlines() if line.startswith(("U-Net", "VAE"))]
    return {
        "budget_gib": budget,
        "planned_gib": float(planned[1]),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
        "plan": "; ".join(" ".join(row.split()) for row in rows),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, required=True, help="a full-size SDXL")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as place:
        rows = [drawn(folder, budget, Path(place)) for budget in BUDGETS]
    command = "python -m benchmarks.held_plans --folder SDXL"
    record = {"command": command, "hardware": hardware(), "rows": rows}
    keep(Path(__file__).with_suffix(".json"), record)


if __name__ == "__main__":
    main()
