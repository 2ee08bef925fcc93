"""Twenty thousand requests that nobody should send: no 500, no crash, nothing that stays behind.

`OMP_NUM_THREADS=1 python -m benchmarks.serving_fuzz [--number 20000] [--seed 1] [--minutes M]`

The whole application with a real model, asked in-process through ASGI, sixteen requests at a
time, a tenth of whose clients hang up early. Needs schemathesis
(`pip install schemathesis==4.32.5`). Exits with 1 if anything was found.
"""

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import koala
from benchmarks.forged import Shot, produce
from benchmarks.memory_use import release, resident
from koala.generation import Pipeline
from koala.serving.app import create_app
from koala.serving.image_request import ImageRequest
from koala.serving.jobs.database import Database
from koala.serving.service import Service
from koala.serving.settings import Limits, Options
from koala.utils.device import hardware

AT_ONCE = 16
LONGEST = 600.0  # seconds that one request may take, on a machine that others use, too
SAMPLES = 20  # of memory, over the run
LEAST_FOR_SLOPE = 10
MOST_GROWTH = 0.5  # KiB a request, in the second half, that is still called flat
UNAVAILABLE = (501, 503, 504)  # not here, busy or late, which are answers too
LIMITS = Limits(max_batch=8, steps=10, images=2, size=64 * 64, rate=0, upload_pixels=2**20)


class Range:
    """The application under fire, and what was found."""

    def __init__(self, pipeline: Pipeline, folder: Path) -> None:
        options = Options(data=folder, limits=LIMITS, gallery_bytes=32 * 2**20)
        self.service = Service(pipeline, LIMITS)
        self.database = Database(folder)
        self.app = create_app(self.service, self.database, options)
        self.statuses: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.faults: list[str] = []
        self.memory: list[tuple[int, float]] = []  # requests, MiB

    async def fire(self, number: int, seed: int, seconds: float) -> None:
        """All shots, from a process that makes them; no more after so many seconds."""
        end = time.monotonic() + seconds
        spawn = multiprocessing.get_context("spawn")
        line: multiprocessing.Queue[Shot | None] = spawn.Queue(64)
        maker = spawn.Process(
            target=produce, args=(self.app.openapi(), number, seed, line), daemon=True
        )
        maker.start()
        coming: asyncio.Queue[Shot | None] = asyncio.Queue(64)
        workers = [asyncio.create_task(self._work(coming)) for _ in range(AT_ONCE)]
        every = max(1, number // SAMPLES)
        for i in range(number):
            if time.monotonic() > end:
                maker.kill()
                break
            await coming.put(await asyncio.to_thread(line.get, True, LONGEST))
            if (i + 1) % every == 0:
                release()
                self.memory.append((i + 1, resident()))
                print(f"{i + 1:6} {self.memory[-1][1]:7.1f} MiB {dict(self.statuses)}", flush=True)
        for _ in workers:
            await coming.put(None)
        await asyncio.gather(*workers)
        maker.join(LONGEST)

    async def _work(self, coming: "asyncio.Queue[Shot | None]") -> None:
        while (shot := await coming.get()) is not None:
            self.kinds[shot.kind] += 1
            try:
                status, body = await asyncio.wait_for(ask(self.app, shot), LONGEST)
            except TimeoutError:
                self._fault(shot, "no answer", b"")
                continue
            except Exception as error:
                self._fault(shot, repr(error), b"")
                continue
            self.statuses[str(status)] += 1
            hung_up = shot.patience is not None and not status
            if not hung_up and (found := wrong(status, body, shot)):
                self._fault(shot, found, body)

    def _fault(self, shot: Shot, what: str, body: bytes) -> None:
        said = f"{what}: {shot.method} {shot.target[:200]} {shot.body[:300]!r} {body[:200]!r}"
        self.faults.append(said)
        print(said, file=sys.stderr, flush=True)

    async def settle(self) -> None:
        """Until nothing waits: what is left of jobs is cancelled after a while."""
        end = time.monotonic() + 60
        while self.service.metrics.registry.get_sample_value("koala_active_pictures"):
            await asyncio.sleep(0.1)
            if time.monotonic() > end:
                for job in self.database.rows("SELECT id FROM jobs WHERE status = 'open'"):
                    await asyncio.to_thread(self.app.state.jobs.cancel, job["id"])
        await asyncio.sleep(1)


def wrong(status: int, body: bytes, shot: Shot) -> str | None:
    """What is wrong with an answer, if anything is."""
    if status == 422 or (status >= 500 and status not in UNAVAILABLE):
        return f"status {status}"
    if status >= 400 and shot.method != "HEAD":
        try:
            said = json.loads(body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            return f"status {status} without a reason"
        return None if isinstance(said, str) and said else f"status {status}, empty reason"
    return None


async def ask(app: Any, shot: Shot) -> tuple[int, bytes]:
    """Status and body; 0 where the client hung up before there was one."""
    path, _, query = shot.target.partition("?")
    names = {name for name, _ in shot.headers}
    headers = [*shot.headers, *([] if b"host" in names else [(b"host", b"127.0.0.1")])]
    address = f"127.0.0.{1 + hash(shot.body) % 250}"
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": shot.method, "scheme": "http", "path": unquote(path),
        "raw_path": path.encode("utf-8", "replace"), "root_path": "",
        "query_string": query.encode("utf-8", "replace"), "headers": headers,
        "client": (address, 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    answered, body = asyncio.Event(), bytearray()
    status, sent = [0], [False]

    async def receive() -> dict[str, Any]:
        if not sent[0]:
            sent[0] = True
            return {"type": "http.request", "body": shot.body, "more_body": False}
        wait = 5.0 if shot.patience is None else shot.patience
        if shot.patience is not None or shot.target.endswith("/events"):
            await asyncio.sleep(wait)
        else:
            await answered.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            status[0] = message["status"]
        else:
            body.extend(message.get("body", b""))
            if not message.get("more_body"):
                answered.set()

    await app(scope, receive, send)
    return status[0], bytes(body)


async def run(
    pipeline: Pipeline, folder: Path, number: int, seed: int, seconds: float
) -> dict[str, Any]:
    """Fires, and says what was found."""
    range_ = Range(pipeline, folder)
    await asyncio.to_thread(range_.service.start)
    probe = ImageRequest("a fox", size="64x64", seed=7, steps=3)
    before = await asyncio.to_thread(lambda: range_.service.submit(probe).result())
    async with range_.app.router.lifespan_context(range_.app):
        start = time.monotonic()
        open_before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        await range_.fire(number, seed, seconds)
        took = time.monotonic() - start
        await range_.settle()
        after = await asyncio.to_thread(lambda: range_.service.submit(probe).result())
        await range_.settle()
        left = {
            "pictures": range_.service.metrics.registry.get_sample_value("koala_active_pictures"),
            "tasks": len(asyncio.all_tasks()) - 1,
            "files": len(os.listdir("/proc/self/fd")) - open_before,
            "threads": threading.active_count() - threads,
        }
    range_.service.close()
    range_.database.close()
    gc.collect()
    same = after.images[0].tobytes() == before.images[0].tobytes()
    return {
        "requests": sum(range_.kinds.values()), "of kind": dict(range_.kinds),
        "seconds": round(took, 1),
        "answers by status (0: the client hung up)": dict(sorted(range_.statuses.items())),
        "faults": range_.faults[:50], "the same picture before and after": same,
        "left behind": left, "memory, MiB by requests": range_.memory,
        "growth in the second half, KiB a request": growth(range_.memory),
    }  # fmt: skip


def growth(memory: list[tuple[int, float]]) -> float:
    """KiB a request from the median of the third quarter to that of the last."""
    if len(memory) < LEAST_FOR_SLOPE:
        return 0.0
    half = memory[len(memory) // 2 :]
    middle = len(half) // 2
    first, last = (
        sorted(m for _, m in part)[len(part) // 2] for part in (half[:middle], half[middle:])
    )
    requests = (half[-1][0] - half[0][0]) / 2
    return round((last - first) * 1024 / requests, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="koala-mini")
    parser.add_argument("--device", default=None)
    parser.add_argument("--number", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=120.0, help="at most")
    parser.add_argument("--note", default="", help="what else the record should say")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/serving_fuzz.json"))
    options = parser.parse_args()
    pipeline = koala.load(options.model, options.device)
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(
            run(pipeline, Path(folder), options.number, options.seed, 60 * options.minutes)
        )
    figures = {
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.serving_fuzz "
        f"--number {options.number} --seed {options.seed}",
        "hardware": hardware(), "model": options.model, "note": options.note, **found,
    }  # fmt: skip
    options.out.write_text(json.dumps(figures, indent=1, default=str) + "\n")
    good = not found["faults"] and found["the same picture before and after"]
    good = good and found["growth in the second half, KiB a request"] <= MOST_GROWTH
    sys.exit(0 if good and found["left behind"]["pictures"] == 0 else 1)


if __name__ == "__main__":
    main()
