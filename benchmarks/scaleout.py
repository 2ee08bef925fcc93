"""Two engines behind one server, and one of them killed: what it brings, and what it costs.

`OMP_NUM_THREADS=1 python -m benchmarks.scaleout [--model M] [--replicas 2] [--jobs 64]`

`koala serve` by itself and with `--replicas`, one after the other, are each given jobs at once;
then again, while one engine is killed. Needs the extra `ray` and a core or a GPU for each.
"""

import argparse
import contextlib
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import psutil

from benchmarks.record import keep
from benchmarks.soak import served
from koala.utils.device import hardware

LONGEST = 600.0  # seconds that all jobs may take


def engines(pid: int) -> list[int]:
    """The processes of a server's replicas; Ray names its workers by what they do."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            name = " ".join(child.cmdline())
            if name.startswith("ray::") and "koala" in name and "replicas" in name:
                found.append(child.pid)
    return sorted(found)


def jobs(url: str, number: int, kill: int | None = None) -> dict[str, Any]:
    """So many jobs at once, each of one picture; `kill`: the server's process id."""
    with httpx2.Client(base_url=url, timeout=120) as client:
        start, killed, back = time.monotonic(), None, None
        ids = []
        for seed in range(number):
            answer = client.post("/v1/jobs", json={"prompt": "a fox, noto style", "seed": seed})
            assert answer.status_code == 202, answer.text
            ids.append(answer.json()["id"])
        while True:
            found = [client.get(f"/v1/jobs/{id}").json() for id in ids]
            done = sum(job["status"] not in ("queued", "running") for job in found)
            now = time.monotonic() - start
            if kill is not None and killed is None and done >= number // 4:
                before = engines(kill)
                os.kill(before[0], signal.SIGKILL)
                killed = now
            elif kill is not None and killed is not None and back is None:
                back = now if len(engines(kill)) == len(before) else None
            if done == number or now > LONGEST:
                break
            time.sleep(0.2)
        return {
            "jobs": number, "done": sum(job["status"] == "done" for job in found),
            "pictures": sum(len(job["pictures"]) for job in found),
            "pictures a second": round(number / now, 3),
            **({} if killed is None else {
                "killed after seconds": round(killed, 1),
                "a new engine's process there after seconds more":
                    None if back is None else round(back - killed, 1),
            }),
        }  # fmt: skip


def measure(model: str, device: str | None, replicas: int, number: int) -> dict[str, Any]:
    """Without and with replicas."""
    found: dict[str, Any] = {}
    for name, more in (("one engine", []), ("replicas", ["--replicas", str(replicas)])):
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            with served(model, device, Path(folder), "--max-batch", "8", *more) as (url, pid):
                found[name] = {"ready after seconds": round(time.monotonic() - start, 1)}
                jobs(url, 16)  # all that happens once
                found[name] |= jobs(url, number)
                if more:
                    found["one of them killed"] = jobs(url, number, kill=pid)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="koala-mini")
    parser.add_argument("--device", default=None)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--note", default="", help="what else the record should say")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/scaleout.json"))
    o = parser.parse_args()
    figures = {
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.scaleout "
        f"--replicas {o.replicas} --jobs {o.jobs}",
        "hardware": hardware(), "model": o.model, "note": o.note,
        **measure(o.model, o.device, o.replicas, o.jobs),
    }  # fmt: skip
    keep(o.out, figures)


if __name__ == "__main__":
    main()
