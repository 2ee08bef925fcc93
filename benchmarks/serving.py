"""What step-level batching is worth: latency and throughput under load, against static batches.

`OMP_NUM_THREADS=1 python -m benchmarks.serving [--model M] [--rounds 3] [--requests 160]`
`OMP_NUM_THREADS=1 python -m benchmarks.serving --soak [--minutes 10]`

Both ways of batching draw the same pictures at the same Poisson arrivals with the same engine, in
turns, at 80% of what full batches of 8 gave just before: by the engine's own time
(`benchmarks.batching`), and with --live as the server draws them, by the clock on the wall, which
needs a machine that is at its disposal. With --soak: `benchmarks.soak`.
"""

import argparse
import base64
import contextlib
import http.client
import itertools
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
import uvicorn

import koala
from benchmarks import batching, soak
from benchmarks.batching import BATCH, LOAD, PROMPT, WINDOW
from benchmarks.record import command, keep
from koala.generation import Pipeline
from koala.serving.app import create_app
from koala.serving.image_request import ImageRequest
from koala.serving.jobs.database import Database
from koala.serving.service import Event, Service
from koala.serving.settings import Limits, Options
from koala.utils.device import hardware

PAIRS = 30  # of requests, through HTTP and without
LIMITS = Limits(max_batch=BATCH, rate=0, queue=10_000, client_queue=10_000, pixels=2**40)


def order(i: int) -> ImageRequest:
    """The i-th picture of a load: all of one kind, as static batches need it."""
    return ImageRequest(PROMPT, seed=i)


# --- two ways of batching -------------------------------------------------------------------

Submit = Callable[[int], "Future[Any]"]


def by_steps(service: Service) -> Submit:
    """Each joins at the next step."""
    return lambda i: service.submit(order(i)).futures()[0]


class Static:
    """Batches that are filled, or waited for so long, and drawn to their end one after another."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._line: SimpleQueue[tuple[int, Future[Any]]] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def __call__(self, i: int) -> "Future[Any]":
        done: Future[Any] = Future()
        self._line.put((i, done))
        return done

    def _work(self) -> None:
        while True:
            batch = [self._line.get()]
            end = time.monotonic() + WINDOW
            while len(batch) < BATCH:
                try:
                    batch.append(self._line.get(timeout=max(0.0, end - time.monotonic())))
                except Empty:
                    break
            submissions = [self.service.submit(order(i)) for i, _ in batch]
            for submission, (_, done) in zip(submissions, batch, strict=True):
                done.set_result(submission.result())


def load(submit: Submit, arrivals: list[float]) -> dict[str, Any]:
    """Submits at the given times (seconds from now) and waits; latencies and throughput."""
    ends, futures = [0.0] * len(arrivals), []
    start = time.monotonic()

    def note(i: int) -> Callable[["Future[Any]"], None]:
        def noted(_: "Future[Any]") -> None:
            ends[i] = time.monotonic() - start

        return noted

    for i, when in enumerate(arrivals):
        time.sleep(max(0.0, start + when - time.monotonic()))
        futures.append(submit(i))
        futures[-1].add_done_callback(note(i))
    for future in futures:
        future.result()
    time.sleep(0.05)  # callbacks of the last
    latencies = sorted(end - when for end, when in zip(ends, arrivals, strict=True))
    return {
        "median": statistics.median(latencies),
        "p95": latencies[int(0.95 * len(latencies))],
        "throughput": len(arrivals) / (max(ends) - arrivals[0]),
    }


def capacity(service: Service) -> float:
    """Pictures a second in full batches, one after the other."""
    found = []
    for _ in range(3):
        start = time.monotonic()
        for submission in [service.submit(order(i)) for i in range(BATCH)]:
            submission.result()
        found.append(BATCH / (time.monotonic() - start))
    return statistics.median(found)


def poisson(service: Service, rounds: int, requests: int) -> dict[str, Any]:
    """Rounds of both ways at the same arrivals; figures are medians of the rounds."""
    static, steps, found = Static(service), by_steps(service), []
    for seed in range(rounds):
        able = capacity(service)
        chance, now, arrivals = random.Random(seed), 0.0, []
        for _ in range(requests):
            now += chance.expovariate(LOAD * able)
            arrivals.append(now)
        ways = [("static", static), ("steps", steps)]
        one = {name: load(way, arrivals) for name, way in (ways if seed % 2 else ways[::-1])}
        one["capacity"] = able
        one["full"] = {name: load(way, [0.0] * 8 * BATCH)["throughput"] for name, way in ways}
        found.append(one)
        print(json.dumps(one), flush=True)
    return {
        "arrivals": f"Poisson, {LOAD:.0%} of capacity, {requests} pictures a round",
        "rounds": _rounded(found),
        "steps to static, median of rounds": _rounded(
            {
                **{
                    name: statistics.median(
                        one["steps"][name] / one["static"][name] for one in found
                    )
                    for name in ("median", "p95", "throughput")
                },
                "throughput when all are there at once": statistics.median(
                    one["full"]["steps"] / one["full"]["static"] for one in found
                ),
            }
        ),
    }


# --- one request ----------------------------------------------------------------------------


@contextlib.contextmanager
def answering(service: Service, folder: Path) -> Iterator[http.client.HTTPConnection]:
    """A connection to a real server over the service, on loopback."""
    with contextlib.closing(Database(folder)) as database:
        app = create_app(service, database, Options(data=folder, limits=LIMITS))
        server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_level="warning", timeout_keep_alive=600)
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            yield connection
        finally:
            connection.close()
            server.should_exit = True
            thread.join(30)


def alone(service: Service, connection: http.client.HTTPConnection) -> dict[str, Any]:
    """One request at a time, through HTTP and to the engine itself, in turns."""

    def by_http(i: int) -> None:
        body = json.dumps({"prompt": order(i).prompt, "seed": i})
        connection.request(
            "POST", "/v1/images/generations", body, {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        data = json.loads(answer.read())
        assert answer.status == 200 and base64.b64decode(data["data"][0]["b64_json"])

    def by_engine(i: int) -> None:
        service.submit(order(i)).result()

    def seconds(draw: Callable[[int], None], i: int) -> float:
        start = time.perf_counter()
        draw(i)
        return time.perf_counter() - start

    pairs = []
    for i in range(PAIRS + 1):
        ways = [by_http, by_engine]
        took = {way: seconds(way, i) for way in (ways if i % 2 else ways[::-1])}
        pairs.append((took[by_http], took[by_engine]))
    pairs = pairs[1:]
    return _rounded(
        {
            "engine, seconds": statistics.median(engine for _, engine in pairs),
            "HTTP, seconds": statistics.median(through for through, _ in pairs),
            "ratio, median of pairs": statistics.median(a / b for a, b in pairs),
            "ratio of the quickest": min(a for a, _ in pairs) / min(b for _, b in pairs),
            "pairs": PAIRS,
        }
    )


def first_preview(service: Service, connection: http.client.HTTPConnection) -> dict[str, Any]:
    """When a stream's first partial picture is there, in steps after the drawing began."""
    steps: list[float] = []

    def noted(event: Event) -> None:
        if event.kind in ("started", "step"):
            steps.append(time.perf_counter())

    service.submit(order(0), noted).result()
    throughput = statistics.median(b - a for a, b in itertools.pairwise(steps))
    found = []
    for i in range(10):
        asked = {"prompt": order(i).prompt, "seed": i, "stream": True, "partial_images": 2}
        start = time.perf_counter()
        connection.request(
            "POST",
            "/v1/images/generations",
            json.dumps(asked),
            {"Content-Type": "application/json"},
        )
        answer = connection.getresponse()
        while b"partial_image" not in answer.readline():
            pass
        found.append((time.perf_counter() - start) / throughput)
        answer.read()
    return {
        "made after steps": 2,
        "at the client after so many steps' time, median": round(statistics.median(found), 2),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def measure(pipeline: Pipeline, rounds: int, requests: int, live: bool) -> dict[str, Any]:
    """All of it on one service."""
    replayed = batching.compare(pipeline, rounds, requests)
    service = Service(pipeline, LIMITS)
    service.start()
    with tempfile.TemporaryDirectory() as folder, answering(service, Path(folder)) as connection:
        found = {
            "one request": alone(service, connection),
            "first preview": first_preview(service, connection),
            "under load": _rounded(replayed),
            **({"under load, live": poisson(service, rounds, requests)} if live else {}),
        }
        service.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="koala-mini")
    parser.add_argument("--device", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--live", action="store_true", help="through the server, too")
    parser.add_argument("--soak", action="store_true", help="64 clients at once, for --minutes")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--note", default="", help="what else the record should say")
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    if o.soak:
        found = soak.run(o.model, o.device, 60 * o.minutes)
    else:
        found = measure(koala.load(o.model, o.device), o.rounds, o.requests, o.live)
    figures = {
        "command": f"OMP_NUM_THREADS=1 {command('serving')}",
        "hardware": hardware(), "threads": torch.get_num_threads(), "model": o.model,
        "note": o.note, **found,
    }  # fmt: skip
    usual = Path("benchmarks/serving_soak.json" if o.soak else "benchmarks/serving.json")
    keep((o.out or usual), figures)


if __name__ == "__main__":
    main()
