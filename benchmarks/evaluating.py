"""How long `koala evaluate` scores, beside the time that it draws: offline metrics, several models.

The same command runs twice: whole, and once more on the pictures that are there, with nothing of
their scores. The first time less the second is the drawing. Scoring, which includes the start of
the command, the real pictures, the judge's training and the report, must take at most `BOUND` times
as long, by the processor's time, which other work on the machine changes least.

`python -m benchmarks.evaluating --data data --out benchmarks/evaluating.json`; `data` are the
illustrations of `koala prepare`. Needs the extra `evaluate`.
"""

import argparse
import resource
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


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds and processor seconds that the command takes. SystemExit if it fails."""
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    if subprocess.run(command).returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - begun, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="prepared illustrations")
    parser.add_argument("--model", default="koala-mini", help="of every row")
    parser.add_argument("--count", type=int, default=250, help="prompts")
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each prompt")
    parser.add_argument("--out", type=Path, required=True, help="the record, a JSON file")
    o = parser.parse_args()
    names = [f"{steps}-steps" for steps in STEPS]
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "report"
        seeds = map(str, range(o.seeds))
        command = [
            sys.executable, "-m", "koala", "evaluate", *(f"{row}={o.model}" for row in names),
            "--pictures", str(o.data), "--count", str(o.count), "--seeds", *seeds,
            "--steps", str(STEPS[0]), *(f"{r}={s}" for r, s in zip(names, STEPS, strict=True)),
            "--out", str(report),
        ]  # fmt: skip
        whole = timed(command)
        shutil.rmtree(report / "scores")
        scoring = timed(command)
    ratio = scoring[1] / (whole[1] - scoring[1])
    record = {
        "command": f"python -m benchmarks.evaluating --model {Path(o.model).name} "
        f"--count {o.count} --seeds {o.seeds}",
        "hardware": hardware(),
        "rows": len(names),
        "seconds": {"whole": whole[0], "scoring": scoring[0]},
        "processor_seconds": {"whole": whole[1], "scoring": scoring[1]},
        "scoring_over_drawing": ratio,
        "bound": BOUND,
    }
    keep(o.out, record)
    if ratio > BOUND:
        raise SystemExit(f"scoring took {ratio:.2f} of the drawing, above {BOUND}")


if __name__ == "__main__":
    main()
