"""The same arrivals drawn in two ways, on a clock that counts the engine's own time alone.

The engine is turned by hand: each turn moves the clock on by what it took, in processor seconds on
a CPU, and where there is nothing to do the clock goes to the next arrival. So what else a machine
does weighs on neither way, and waiting costs nothing. Of the server only the engine is in it.
"""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from koala.generation import Engine, Pipeline, Request, Ticket

BATCH = 8  # pictures of a static batch, and that the engine holds
WINDOW = 2.0  # seconds that a static batch waits to be full
LOAD = 0.8  # of capacity
PROMPT = "a fox, noto style"


class Bench:
    """An engine and its clock, in seconds."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.engine = pipeline, Engine(pipeline, max_batch=BATCH)
        self.now = 0.0
        self._clock = time.perf_counter if pipeline.device.type == "cuda" else time.process_time

    def turn(self) -> None:
        """One step of what is there."""
        start = self._clock()
        self.engine.turn()
        if self.pipeline.device.type == "cuda":
            torch.cuda.synchronize()
        self.now += self._clock() - start

    def submit(self, i: int) -> Ticket:
        """The i-th picture of a load: all of one kind, as static batches need it."""
        request: Request = self.pipeline.requests(PROMPT, seed=i)[0]
        return self.engine.submit(request)

    def capacity(self, batches: int = 5) -> float:
        """Pictures a second in full batches."""
        found = []
        for _ in range(batches):
            start, tickets = self.now, [self.submit(i) for i in range(BATCH)]
            while not all(ticket.done() for ticket in tickets):
                self.turn()
            found.append(BATCH / (self.now - start))
        return statistics.median(found)


def by_steps(bench: Bench, arrivals: list[float]) -> list[float]:
    """Each joins at the next step after it came; when each was done."""
    ends, live, i = [0.0] * len(arrivals), {}, 0
    while i < len(arrivals) or live:
        if not live:
            bench.now = max(bench.now, arrivals[i])
        while i < len(arrivals) and arrivals[i] <= bench.now:
            live[i], i = bench.submit(i), i + 1
        bench.turn()
        for each in [one for one, ticket in live.items() if ticket.done()]:
            ends[each] = bench.now
            live.pop(each).result()
    return ends


def static(bench: Bench, arrivals: list[float]) -> list[float]:
    """Batches that are full, or have waited for so long; when each was done."""
    ends, i = [0.0] * len(arrivals), 0
    while i < len(arrivals):
        opened = max(bench.now, arrivals[i])
        last = opened + WINDOW
        batch = [j for j in range(i, min(i + BATCH, len(arrivals))) if arrivals[j] <= last]
        full = len(batch) == BATCH
        bench.now = max(opened, arrivals[batch[-1]]) if full else last
        tickets = [bench.submit(j) for j in batch]
        while not all(ticket.done() for ticket in tickets):
            bench.turn()
        for j, ticket in zip(batch, tickets, strict=True):
            ends[j] = bench.now
            ticket.result()
        i += len(batch)
    return ends


WAYS: dict[str, Callable[[Bench, list[float]], list[float]]] = {"static": static, "steps": by_steps}


def compare(pipeline: Pipeline, rounds: int, images: int) -> dict[str, Any]:
    """Rounds of both ways at the same Poisson arrivals, and the medians of their ratios."""
    found, bench = [], Bench(pipeline)
    bench.capacity(1)  # what happens once
    for seed in range(rounds):
        able, chance, when = bench.capacity(), random.Random(seed), 0.0
        gaps = [chance.expovariate(LOAD * able) for _ in range(images)]
        arrivals = [when := when + gap for gap in gaps]
        one: dict[str, Any] = {"capacity": able}
        for name in sorted(WAYS, reverse=bool(seed % 2)):
            bench.now = 0.0
            ends = WAYS[name](bench, arrivals)
            took = sorted(end - came for end, came in zip(ends, arrivals, strict=True))
            one[name] = {
                "median": statistics.median(took),
                "p95": took[int(0.95 * len(took))],
                "throughput": images / (max(ends) - arrivals[0]),
            }
        found.append(one)
        print(one, flush=True)
    ratios = {
        name: statistics.median(one["steps"][name] / one["static"][name] for one in found)
        for name in ("median", "p95", "throughput")
    }
    clock = "seconds" if pipeline.device.type == "cuda" else "processor seconds"
    return {
        "arrivals": f"Poisson, {LOAD:.0%} of full batches' pace; {images} pictures a round",
        "clock": clock, "rounds": found, "steps to static, median of rounds": ratios,
    }  # fmt: skip
