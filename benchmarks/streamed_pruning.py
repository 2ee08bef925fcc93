"""Memory and time of `koala compress --prune` and `koala convert --weights int4` on a whole SDXL.

    python -m benchmarks.random_sdxl SDXL
    python -m benchmarks.streamed_pruning --folder SDXL --scratch DIR

prunes a fifth of a random SDXL by one prompt of 256 x 256 pixels in one step, and stores a whole
one in 4 bits, each in a process of its own; `--what` measures one of them anew. Takes up to 30 GB
below DIR. Peak memory is of the whole process in each part of its work, above an interpreter that
has imported torch and does nothing. The record is `streamed_pruning.json` beside this file. Time is
of this little calibration. What a longer one takes besides is its evaluations: each is drawn, run
forward and backward for the sensitivities, and run forward for the moments.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.memory_use import idle_with_torch, peak
from benchmarks.record import keep
from koala.utils.device import hardware

RECORD = Path(__file__).with_suffix(".json")
BOUND = 3072  # MiB above an idle interpreter


def pruned(model: Path, out: Path) -> None:
    """Prunes, and prints what each part of the work took, as JSON."""
    from koala.generation.calibration import calibration
    from koala.generation.pruning import prune_model

    parts: list[dict[str, float | str]] = []
    began = [time.perf_counter(), time.process_time()]

    def ended(what: str) -> None:
        if parts:
            now = (time.perf_counter(), time.process_time())
            wall, processor = (round(a - b, 1) for a, b in zip(now, began, strict=True))
            parts[-1] |= {"peak_mib": peak(), "seconds": wall, "processor_seconds": processor}
            print(parts[-1], file=sys.stderr, flush=True)
        began[:] = time.perf_counter(), time.process_time()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is of what follows
        parts.append({"part": what})

    made = prune_model(
        model,
        0.2,
        lambda folder, pipeline: calibration(pipeline, ["a fox"], size="256x256", steps=1),
        out,
        say=ended,
    )
    ended("end")
    print(json.dumps({"line": made.line(), "parts": parts[:-1]}))


def quantised(model: Path, out: Path) -> None:
    """Quantises, and prints the same."""
    from koala.generation.quantised_folder import write_quantised

    began = time.perf_counter(), time.process_time()
    line = write_quantised(model, out).line()
    now = time.perf_counter(), time.process_time()
    wall, processor = (round(a - b, 1) for a, b in zip(now, began, strict=True))
    part = {"part": "int4", "peak_mib": peak(), "seconds": wall, "processor_seconds": processor}
    print(json.dumps({"line": line, "parts": [part]}))


WHAT = {"pruned": pruned, "quantised": quantised}


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, required=True, help="a full-size SDXL")
    parser.add_argument("--scratch", type=Path, help="a folder for the files (default: temporary)")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--only", choices=WHAT, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.only:
        WHAT[o.only](o.folder, o.scratch)
        return
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record |= {
        "command": "python -m benchmarks.streamed_pruning --folder SDXL",
        "hardware": hardware(),
        "idle_with_torch_mib": idle_with_torch(),
        "bound_mib": BOUND,
    }
    with tempfile.TemporaryDirectory(dir=o.scratch) as scratch:
        for what in o.what:
            out = Path(scratch) / what
            command = [sys.executable, "-m", "benchmarks.streamed_pruning", "--only", what]
            command += ["--folder", str(o.folder), "--scratch", str(out)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            line = done.stdout.splitlines()[-1]
            record[what] = json.loads(line.replace(f"{scratch}/", ""))
    keep(RECORD, record)
    parts = [part for what in WHAT if what in record for part in record[what]["parts"]]
    if max(part["peak_mib"] for part in parts) > record["idle_with_torch_mib"] + BOUND:
        sys.exit(f"over the bound of {BOUND} MiB")


if __name__ == "__main__":
    main()
