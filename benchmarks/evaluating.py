"""How long `koala evaluate` scores, beside the time that it draws: offline metrics, several models.

The same command runs twice: whole, and once more on the pictures that are there, with nothing of
their scores. The first time less the second is the drawing. Scoring, which includes the start of
the command, the real pictures, the judge's training and the report, must take at most `BOUND` times
as long.

`python -m benchmarks.evaluating --data data --out benchmarks/evaluating.json`; `data` are the
illustrations of `koala prepare`. Needs the extra `evaluate`.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import keep
from koala.utils.device import hardware

BOUND = 1.2  # of the drawing's time
STEPS = (10, 8, 6, 4)  # of each row, so that none has pictures of another


def timed(command: list[str]) -> float:
    """Seconds that the command takes. SystemExit if it fails."""
    begun = time.monotonic()
    if subprocess.run(command).returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="prepared illustrations")
    parser.add_argument("--model", default="koala-mini", help="of every row")
    parser.add_argument("--count", type=int, default=1_000, help="prompts")
    parser.add_argument("--out", type=Path, required=True, help="the record, a JSON file")
    o = parser.parse_args()
    names = [f"{steps}-steps" for steps in STEPS]
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "report"
        command = [
            sys.executable, "-m", "koala", "evaluate", *(f"{row}={o.model}" for row in names),
            "--pictures", str(o.data), "--count", str(o.count), "--seeds", "0",
            "--steps", str(STEPS[0]), *(f"{r}={s}" for r, s in zip(names, STEPS, strict=True)),
            "--out", str(report),
        ]  # fmt: skip
        whole = timed(command)
        shutil.rmtree(report / "scores")
        scoring = timed(command)
    drawing = whole - scoring
    record = {
        "command": f"python -m benchmarks.evaluating --model {Path(o.model).name} "
        f"--count {o.count}",
        "hardware": hardware(),
        "rows": len(names),
        "seconds": {"whole": whole, "scoring": scoring, "drawing": drawing},
        "scoring_over_drawing": scoring / drawing,
        "bound": BOUND,
    }
    keep(o.out, record)
    if scoring > BOUND * drawing:
        raise SystemExit(f"scoring took {scoring / drawing:.2f} of the drawing, above {BOUND}")


if __name__ == "__main__":
    main()
