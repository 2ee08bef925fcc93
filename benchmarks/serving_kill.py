"""A server, killed again and again while it is asked for jobs: is any lost or drawn twice?

`OMP_NUM_THREADS=1 python -m benchmarks.serving_kill [--kills 20] [--minutes 15]`

What `koala serve` runs, in processes that have their imports done, so that kills come often.
Four clients ask for jobs, some for pictures they wait for, and cancel some. The server is ended by
SIGKILL at random moments and started again on the same folder. After each kill, a copy of the
folder is opened and compared with what clients had been told; at the end, every job must have
ended once, with all of its pictures. Exits with 1 if anything was found.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import random
import re
import shutil
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.record import keep
from koala.serving.jobs.database import FILE, Database
from koala.serving.jobs.gallery import Gallery
from koala.serving.jobs.table import Job, JobTable
from koala.serving.run import serve
from koala.serving.settings import Limits, Options
from koala.utils.device import hardware

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["koala.serving.app"])
CLIENTS = 4
PAUSE = 1.0  # seconds between a client's requests, on average
WAITED_FOR = 0.2  # the share of requests that a client waits for instead of making them jobs
CANCELLED = 0.1  # of jobs
LIFE = (0.5, 4.0)  # seconds from ready to the kill
SIZES = ("64x64", "64x64", "96x64", "32x32")
LONGEST_END = 300.0  # seconds for what is left after the last kill
LARGE = 1 << 40
LOST, AGAIN, FILES = (
    "accepted jobs lost",
    "pictures with two results",
    "files that differ from rows",
)
BROKEN, SEEDS = "databases or pictures broken", "pictures with another seed than the job's"
REVIVED, STATUS = "jobs that ended twice", "ends by SIGTERM with another status than 0"
UNENDED = "jobs that failed or never ended"
FAULTS = (LOST, AGAIN, FILES, BROKEN, SEEDS, REVIVED, STATUS, UNENDED)


@dataclass
class Told:
    """What clients have been told."""

    url: str = ""
    accepted: dict[str, dict[str, Any]] = field(default_factory=dict)  # jobs by id
    cancelled: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    over: threading.Event = field(default_factory=threading.Event)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=15, help="no kill after so many")
    parser.add_argument("--model", default="koala-mini")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/serving_kill.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="koala-kill-") as folder:
        figures = run(options, Path(folder) / "data")
    keep(options.out, figures)
    sys.exit(any(figures["faults"].values()))


def run(options: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Kills, looks, and the figures."""
    begun, told = time.monotonic(), Told()
    random.seed(options.seed)
    left_open, jobs = list[int](), dict[str, Job]()
    faults = Counter(dict.fromkeys(FAULTS, 0))
    server = start(options.model, data, told)
    clients = [threading.Thread(target=ask, args=(told, i)) for i in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        while len(left_open) < options.kills and time.monotonic() - begun < 60 * options.minutes:
            time.sleep(random.uniform(*LIFE))
            server.kill()
            server.join()
            told.url = ""
            jobs = look(data, told, jobs, faults)
            left_open.append(sum(job.status == "open" for job in jobs.values()))
            print(f"kill {len(left_open)}: {len(jobs)} jobs, {left_open[-1]} open", flush=True)
            server = start(options.model, data, told)
        told.over.set()
        for client in clients:
            client.join()
        wait_for_the_rest(told)
    finally:
        told.over.set()
        server.terminate()
        server.join(120)
        faults[STATUS] += server.exitcode != 0
    jobs = look(data, told, jobs, faults)
    ends = Counter(job.status for job in jobs.values())
    faults[UNENDED] += ends["open"] + ends["failed"]
    return {
        "command": f"OMP_NUM_THREADS=1 python -m benchmarks.serving_kill --kills {options.kills}",
        "hardware": hardware(),
        "sqlite": sqlite3.sqlite_version,
        "model": options.model,
        "kills": len(left_open),
        "jobs accepted": len(told.accepted),
        "jobs kept whose client was cut off before it was told": len(jobs) - len(told.accepted),
        "jobs open at a kill, median and most": [statistics.median(left_open), max(left_open)],
        "jobs at the end": dict(sorted(ends.items())),
        "pictures of jobs": sum(len(job.ended) for job in jobs.values()),
        "requests that were waited for": told.counts["waited for"],
        "requests cut off by a kill": told.counts["cut off"],
        "answers": {name: n for name, n in sorted(told.counts.items()) if name.isdecimal()},
        "faults": dict(faults),
    }


def start(model: str, data: Path, told: Told) -> multiprocessing.process.BaseProcess:
    """A server that is ready."""
    hears, says = CONTEXT.Pipe(duplex=False)
    options = Options(model, port=0, data=data, limits=Limits(rate=0))
    server = CONTEXT.Process(target=run_server, args=(options, says))
    server.start()
    says.close()
    said: list[str] = []
    while not (found := re.search(r"is ready on (http://\S+)", "".join(said[-1:]))):
        try:
            said.append(hears.recv())
        except EOFError:
            raise SystemExit(f"the server did not start: {said}") from None
    told.url = found[1]
    return server


def run_server(options: Options, says: Connection) -> None:
    """In the server's process."""

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # nobody listens once it is ready
            says.send(line)

    serve(options, say)


# --- clients --------------------------------------------------------------------------------


def ask(told: Told, number: int) -> None:
    """One client: asks until it is told that it is over."""
    chance = random.Random(number)
    for i in itertools.count():
        if told.over.wait(chance.expovariate(1 / PAUSE)):
            return
        if not told.url:
            continue  # there is no server
        asked = {
            "prompt": f"a fox, noto style, {number} {i}",
            "n": chance.choice((1, 1, 2, 3)),
            "size": chance.choice(SIZES),
            "steps": chance.choice((4, 10, 20)),
        }
        try:
            if chance.random() < WAITED_FOR:
                told.counts["waited for"] += 1
                call(told, "POST", "/v1/images/generations", asked)
            elif job := call(told, "POST", "/v1/jobs", asked):
                told.accepted[job["id"]] = job
                if chance.random() < CANCELLED:
                    ended = call(told, "POST", f"/v1/jobs/{job['id']}/cancel")
                    if ended and ended["status"] == "cancelled":
                        told.cancelled.add(job["id"])
        except (OSError, ValueError):  # the server was killed before or while it answered
            told.counts["cut off"] += 1


def call(told: Told, method: str, path: str, body: object = None) -> Any:
    """The answer; None for one that is busy. OSError if there is none."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        told.url + path, data, {"Content-Type": "application/json"}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = json.loads(answer.read())
            told.counts[str(answer.status)] += 1
            return found
    except urllib.error.HTTPError as error:
        told.counts[str(error.code)] += 1
        if error.code not in (429, 503):
            raise SystemExit(f"{method} {path}: {error.code} {error.read()!r}") from None
        return None


def wait_for_the_rest(told: Told) -> None:
    """Until every accepted job has ended."""
    end = time.monotonic() + LONGEST_END
    left = set(told.accepted)
    while left:
        if time.monotonic() > end:
            raise SystemExit(f"{len(left)} jobs have not ended within {LONGEST_END:g} s")
        time.sleep(1)
        found = {id: call(told, "GET", f"/v1/jobs/{id}") for id in left}
        left = {id for id, job in found.items() if job["status"] in ("queued", "running")}


# --- what is on disk ------------------------------------------------------------------------


def look(data: Path, told: Told, before: dict[str, Job], faults: Counter[str]) -> dict[str, Job]:
    """All jobs in a copy of the folder, compared with what was told and seen before."""
    with tempfile.TemporaryDirectory(prefix="koala-look-") as folder:
        copy = Path(folder) / "data"
        shutil.copytree(data, copy)
        with contextlib.closing(Database(copy)) as database:
            gallery, table = Gallery(database, LARGE, LARGE), JobTable(database)
            jobs = {job.id: job for job in table.page(LARGE)}
            images = {one.id: one for one in gallery.page(LARGE)}
        files = {path.stem for path in gallery.folder.iterdir()}
        faults[FILES] += len(files ^ set(images))
        faults[BROKEN] += sum(not whole(gallery.folder / f"{id}.png") for id in files)
        with contextlib.closing(sqlite3.connect(copy / FILE)) as db:
            faults[BROKEN] += db.execute("PRAGMA integrity_check").fetchone()[0] != "ok"
    faults[LOST] += len(set(told.accepted) - set(jobs))
    for id, job in before.items():
        faults[AGAIN] += len(job.ended.items() - jobs[id].ended.items())
        faults[REVIVED] += job.status not in ("open", jobs[id].status)
    faults[REVIVED] += sum(jobs[id].status != "cancelled" for id in told.cancelled)
    for job in jobs.values():
        faults[UNENDED] += job.status == "done" and len(job.ended) < job.number
        for place, image in job.ended.items():
            found = images.get(image or "")
            faults[LOST] += found is None
            faults[SEEDS] += found is not None and (
                found.settings["seed"] != job.request["seed"] + place
            )
    return jobs


def whole(file: Path) -> bool:
    """Whether a picture can be read to its end."""
    try:
        with Image.open(file) as image:
            image.load()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
