"""How long a drawing takes from the command to the PNG: with PyTorch, and from an OpenVINO form.

`python -m benchmarks.start [--model M] [--runs 5] [--out benchmarks/start.json]`

Each way is run in a process of its own, in turns, after one run that fills the caches, that of
Python's bytecode among them. Peak memory is the process's largest resident size. With PyTorch also
beside an endless loop on each core, with threads that sleep while they wait and with spinning ones.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.busy import busy
from benchmarks.record import keep
from koala.checkpoints.bundled import DEFAULT
from koala.generation import form
from koala.utils.device import hardware
from koala.utils.threads import available_cores

WAITING = {"sleeping": "PASSIVE", "spinning": "ACTIVE"}  # OMP_WAIT_POLICY
WAYS = {"PyTorch": "torch", "without PyTorch": "openvino"}
_COUNT = """
import sys
from koala.cli import main
status = main(sys.argv[1:])
print(len(sys.modules), "torch" in sys.modules)
sys.exit(status)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/start.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for backend in WAYS.values():  # converts, and fills the caches
            _drawn(options.model, backend, folder)
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(options.runs):
            for way, backend in WAYS.items():
                runs[way].append(_drawn(options.model, backend, folder))
        with busy(available_cores()):
            beside: dict[str, list[float]] = {name: [] for name in WAITING}
            for _ in range(3):
                for name, policy in WAITING.items():
                    command = _command(options.model, "torch", folder)
                    beside[name].append(used_by(command, OMP_WAIT_POLICY=policy)["seconds"])
        counts = {way: _modules(options.model, backend, folder) for way, backend in WAYS.items()}
    record = {
        "hardware": hardware(),
        "model": options.model,
        "runs": options.runs,
        "ways": {
            way: {
                "seconds": statistics.median(run["seconds"] for run in of),
                "processor seconds": statistics.median(run["processor"] for run in of),
                "peak MB": statistics.median(run["peak"] for run in of),
                **counts[way],
            }
            for way, of in runs.items()
        },
        "PyTorch beside busy cores, seconds": {
            name: statistics.median(seconds) for name, seconds in beside.items()
        },
    }
    keep(options.out, record)


def _command(model: str, backend: str, folder: str) -> list[str]:
    named = [] if form.is_form(model) else ["--backend", backend]
    asked = ["generate", "a fox, noto style", "--seed", "7", "--model", model, "--out", folder]
    return [*asked, *named]


def _drawn(model: str, backend: str, folder: str) -> dict[str, float]:
    """One drawing in a process of its own."""
    return used_by(_command(model, backend, folder))


def used_by(command: list[str], **variables: str) -> dict[str, float]:
    """Seconds, processor seconds and peak MB of `koala COMMAND` in a process of its own."""
    start = time.perf_counter()
    keeping = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(
        [sys.executable, "-m", "koala", *command],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=keeping | variables,
    )  # fmt: skip
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return {
        "seconds": seconds,
        "processor": used.ru_utime + used.ru_stime,
        "peak": _megabytes(used),
    }


def _megabytes(used: resource.struct_rusage) -> float:
    return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def _modules(model: str, backend: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, "-c", _COUNT, *_command(model, backend, folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    count, torch = ran.stdout.splitlines()[-1].split()
    return {"modules": int(count), "imports torch": torch == "True"}


if __name__ == "__main__":
    main()
