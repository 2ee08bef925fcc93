"""Sixty-four clients at once for minutes: no error, flat memory, every picture the right one.

A real `koala serve` on loopback. Clients ask through OpenAI's API, streams and jobs, for sizes,
steps, guidance and samplers of many kinds, and a tenth think better of it. Afterwards each kind
is drawn alone and compared with all that the server gave.
"""

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

import koala
from benchmarks.memory_use import resident
from koala.serving.fit import shown
from koala.serving.image_request import ImageRequest
from koala.serving.service import Service
from koala.serving.settings import Limits, Options

CLIENTS = 64
CANCELLED = 0.1  # of the requests
EVERY = 5.0  # seconds between looks at the server's memory
SETTLED = 0.2  # of the run, before memory counts
TOLERANCE = 2  # of 255, of any value of any pixel
SIZES = ("64x64", "64x64", "64x64", "48x80", "96x64", "128x128")  # in 64ths of the native side
GUIDANCE = (1.0, 2.0, 3.5, 7.0)
SAMPLERS = ("euler", "euler", "dpm++2m", "ddim")
PROMPTS = (
    "a fox, noto style",
    "two (green:1.3) apples",
    "a blue car",
    "a tree on a hill",
    "an owl",
)
KINDS = 96  # different requests


def kinds(native: int) -> list[dict[str, Any]]:
    """What clients ask for: the fields that OpenAI's API and jobs share."""
    chance, made = random.Random(0), []
    for seed in range(KINDS):
        width, height = (int(side) * native // 64 for side in chance.choice(SIZES).split("x"))
        asked = {
            "prompt": chance.choice(PROMPTS), "size": f"{width}x{height}", "seed": seed,
            "steps": chance.randint(3, 12), "guidance": chance.choice(GUIDANCE),
            "scheduler": chance.choice(SAMPLERS),
        }  # fmt: skip
        if asked["guidance"] > 1 and chance.random() < 0.3:
            asked["negative_prompt"] = "blurry"
        made.append(asked)
    return made


def free_port() -> int:
    """One of loopback's; Ray takes no 0 for any."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@contextlib.contextmanager
def served(model: str, device: str | None, folder: Path, *more: str) -> Iterator[tuple[str, int]]:
    """`koala serve` in a process of its own: its address and process id."""
    command = [
        sys.executable, "-m", "koala", "serve", "--model", model, "--port", str(free_port()),
        "--data", str(folder), "--rate", "0", "--client-queue", "256", "--gallery-gib", "0.02",
        *([] if device is None else ["--device", device]), *more,
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr)
            if "is ready on" in line:
                break
        else:
            raise SystemExit("the server did not start")
        try:
            yield line.split()[-1], process.pid
        finally:
            process.terminate()
            for line in process.stderr:
                print(line, end="", file=sys.stderr)


class Crowd:
    """The clients, and what they saw."""

    def __init__(self, client: httpx2.AsyncClient, asked: list[dict[str, Any]]) -> None:
        self.client, self.asked = client, asked
        self.images: dict[int, dict[str, bytes]] = defaultdict(dict)  # by kind, then by hash
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []

    async def one(self, number: int, end: float) -> None:
        """A client: asks for one thing after the other."""
        chance = random.Random(number)
        ways = (self._direct, self._direct, self._stream, self._job)
        while time.monotonic() < end:
            kind, way = chance.randrange(len(self.asked)), chance.choice(ways)
            leaves = chance.uniform(0, 3) if chance.random() < CANCELLED else None
            try:
                data = await way(self.asked[kind], leaves)
            except Exception as error:
                self.errors.append(f"{way.__name__}: {error!r}")
                print(self.errors[-1], file=sys.stderr, flush=True)
                await asyncio.sleep(1)
                continue
            if data is None:
                self.counts["cancelled"] += 1
            else:
                self.counts[f"pictures by {way.__name__.removeprefix('_')}"] += 1
                with Image.open(io.BytesIO(data)) as image:
                    pixels = image.tobytes()
                self.images[kind][hashlib.sha256(pixels).hexdigest()] = data

    async def _direct(self, asked: dict[str, Any], leaves: float | None) -> bytes | None:
        try:
            async with asyncio.timeout(leaves):
                answer = await self.client.post("/v1/images/generations", json=asked)
        except TimeoutError:
            return None
        _check(answer, 200)
        return base64.b64decode(answer.json()["data"][0]["b64_json"])

    async def _stream(self, asked: dict[str, Any], leaves: float | None) -> bytes | None:
        body, previews = {**asked, "stream": True, "partial_images": 2}, 0
        try:
            async with (
                asyncio.timeout(leaves),
                self.client.stream("POST", "/v1/images/generations", json=body) as answer,
            ):
                if answer.status_code != 200:
                    await answer.aread()
                _check(answer, 200)
                async for line in answer.aiter_lines():
                    if line.startswith("data: "):
                        said = json.loads(line.removeprefix("data: "))
                        if said.get("type") == "image_generation.completed":
                            assert previews or asked["steps"] < 3, "no preview"
                            return base64.b64decode(said["b64_json"])
                        previews += 1
                        assert "error" not in said, line
        except TimeoutError:
            return None
        raise AssertionError("the stream ended without a picture")

    async def _job(self, asked: dict[str, Any], leaves: float | None) -> bytes | None:
        answer = await self.client.post("/v1/jobs", json=asked)
        _check(answer, 202)
        path, start = f"/v1/jobs/{answer.json()['id']}", time.monotonic()
        while True:
            if leaves is not None and time.monotonic() - start > leaves:
                leaves = None
                _check(await self.client.post(f"{path}/cancel"), 200)
            answer = await self.client.get(path)
            _check(answer, 200)
            job = answer.json()
            if job["status"] == "cancelled":
                return None
            if job["status"] not in ("queued", "running"):
                assert job["status"] == "done", job
                answer = await self.client.get(job["pictures"][0]["url"])
                _check(answer, 200)
                return answer.content
            await asyncio.sleep(0.2)


def _check(answer: httpx2.Response, wanted: int) -> None:
    assert answer.status_code == wanted, f"{answer.status_code}: {answer.text[:200]}"


async def crowd(
    url: str, pid: int, seconds: float, asked: list[dict[str, Any]]
) -> tuple[Crowd, list[tuple[float, float]]]:
    """All clients for so long; what they saw, and the server's memory (minutes, MiB)."""
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        found, start = Crowd(client, asked), time.monotonic()
        tasks = [asyncio.create_task(found.one(i, start + seconds)) for i in range(CLIENTS)]
        memory = []
        while not all(task.done() for task in tasks):
            await asyncio.wait(tasks, timeout=EVERY)
            memory.append(((time.monotonic() - start) / 60, resident(pid)))
            print(f"{memory[-1][0]:5.1f} min {memory[-1][1]:7.1f} MiB {dict(found.counts)}",
                  f"{len(found.errors)} errors", flush=True)  # fmt: skip
        await asyncio.gather(*tasks)
    return found, memory


def alone(model: str, device: str | None) -> Service:
    """What a server draws with, one image at a time."""
    service = Service(koala.load(model, device), Limits(max_batch=1), fit=Options(Path()).fit)
    service.start()
    return service


def compare(model: str, device: str | None, found: Crowd) -> dict[str, Any]:
    """Every picture beside that of its kind drawn alone."""
    service, worst, wrong, exact, seen = alone(model, device), [], [], 0, 0
    for kind, images in sorted(found.images.items()):
        drawn = service.submit(ImageRequest(**found.asked[kind])).result()
        own = np.asarray(shown(drawn.images[0], drawn.settings[0]), np.int16)
        for data in images.values():
            seen += 1
            with Image.open(io.BytesIO(data)) as image:
                worst.append(int(np.abs(np.asarray(image, np.int16) - own).max()))
            exact += worst[-1] == 0
            if worst[-1] > TOLERANCE:
                wrong.append({"asked": found.asked[kind], "difference": worst[-1]})
    service.close()
    return {
        "tolerance, of 255": TOLERANCE, "largest difference": max(worst, default=None),
        "kinds": len(found.images), "different pictures": seen, "equal in every bit": exact,
        "over the tolerance": wrong,
    }  # fmt: skip


def run(model: str, device: str | None, seconds: float) -> dict[str, Any]:
    """The whole soak."""
    unet = koala.load(model, device).unet  # for its size only
    asked = kinds(unet.config.sample_size * 8)
    del unet
    with tempfile.TemporaryDirectory() as folder, served(model, device, Path(folder)) as (url, pid):
        found, memory = asyncio.run(crowd(url, pid, seconds, asked))
    settled = [point for point in memory if point[0] >= SETTLED * seconds / 60]
    slope = statistics.linear_regression(*zip(*settled, strict=True)).slope if settled[1:] else None
    images = sum(number for name, number in found.counts.items() if name != "cancelled")
    return {
        "clients": CLIENTS, "seconds": seconds, "pictures": images,
        "cancelled": found.counts["cancelled"], "by": dict(found.counts),
        "errors": len(found.errors), "first errors": found.errors[:10],
        "memory, MiB": {
            "after a fifth": settled[0][1], "at the end": settled[-1][1],
            "slope, MiB a minute": None if slope is None else round(slope, 3),
            "minute by minute": {str(int(at)): round(held) for at, held in memory},
        },
        "against solo runs": compare(model, device, found),
    }  # fmt: skip
