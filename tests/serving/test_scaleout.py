"""Many engines behind one server: fed in order, fed again when one dies, found by size.

By itself (`make test`): a cluster is many processes.
"""

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]'")

from benchmarks.scaleout import engines  # noqa: E402
from koala.cli.serve import SERVE  # noqa: E402
from koala.errors import Failure, UserError  # noqa: E402
from koala.generation import Late, load  # noqa: E402
from koala.serving.meta_pipeline import load_meta_pipeline  # noqa: E402
from koala.serving.ray.remote_engine import DEATHS, RemoteEngine  # noqa: E402
from koala.serving.ray.replicas import ReplicaUpdate, rank_replicas  # noqa: E402
from koala.serving.settings import Scale  # noqa: E402
from toy import toy_pipeline  # noqa: E402

SIZE = "16x16"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy_pipeline(tmp_path_factory.mktemp("toy") / "toy", architecture="koala")


def test_replicas_are_a_number_or_two():
    assert Scale.parse("2") == Scale(2, 2) and Scale.parse("1-4") == Scale(1, 4)
    for text in ("0", "4-1", "", "1-", "two", "0-3"):
        with pytest.raises(UserError, match="--replicas"):
            Scale.parse(text)


def test_the_pages_commands_are_commands():
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    commands = re.findall(r"koala serve (--replicas .*?) +#", page)
    scales = [SERVE.parse(shlex.split(command)).replicas for command in commands]
    assert [Scale.parse(scale) for scale in scales] == [Scale(4, 4), Scale(1, 8), Scale(16, 16)]


def test_a_meta_pipeline_checks_requests_as_the_model_does(model):
    asked = {"size": SIZE, "seed": 3, "number": 2, "steps": 4, "scheduler": "dpm++2m"}
    own, other = load(model, "cpu"), load_meta_pipeline(str(model))
    assert other.requests("a (b:1.2)", **asked) == own.requests("a (b:1.2)", **asked)
    assert other.unet.device.type == "meta"
    with pytest.raises(UserError):
        other.requests("a", size="17x16")


def test_sizes_share_replicas_until_others_have_much_less_to_do():
    def first(under_way, size="64x64"):
        return rank_replicas("ab", under_way, size, penalty=4)[0]

    assert first([]) == "a"
    assert first([("b", "64x64")]) == "b"
    assert first([("b", "32x32")]) == "a"
    assert first([("a", "32x32")] * 4 + [("b", "64x64")] * 7) == "b"
    assert first([("b", "64x64")] * 5) == "a"


# --- the remote engine, over scripted replicas ----------------------------------------------


class Gone(Exception):
    """A replica died."""


@dataclass
class Scripted:
    """Replicas by a script: what each attempt at a picture tells, or raises."""

    script: list
    places: int = 1

    def __post_init__(self):
        self.asked, self.left, self.go_on = [], [], threading.Event()

    def capacity(self):
        return self.places

    def lost(self, error):
        return isinstance(error, Gone)

    @contextlib.asynccontextmanager
    async def draw(self, request, size, seconds):
        self.asked.append((request.settings.seed, size))
        told = self.script.pop(0) if self.script else [ReplicaUpdate(image="a picture")]

        async def updates():
            for one in told:
                while one is None and not self.go_on.is_set():
                    await asyncio.sleep(0.01)
                if isinstance(one, Exception):
                    raise one
                if one is not None:
                    yield one

        try:
            yield updates()
        finally:
            self.left.append(request.settings.seed)


@contextlib.contextmanager
def remote_engine(*script, **told):
    scripted = Scripted(list(script), **told)
    running = RemoteEngine(scripted, order=lambda ticket: ticket.number).start()
    try:
        yield running, scripted
    finally:
        scripted.go_on.set()
        running.close()


@pytest.fixture(scope="module")
def requests(model):
    return load_meta_pipeline(str(model)).requests("a", size=SIZE, steps=4, seed=0, number=4)


def test_every_step_is_told_once_though_a_replica_dies(requests):
    steps, begun = [], []
    with remote_engine(
        [ReplicaUpdate(), ReplicaUpdate(2), Gone()],
        [ReplicaUpdate(), ReplicaUpdate(1), ReplicaUpdate(4), ReplicaUpdate(image="a picture")],
    ) as (
        running,
        scripted,
    ):
        ticket = running.submit(
            requests[0], lambda progress: steps.append(progress.done), lambda: begun.append(1)
        )
        assert ticket.result(30) == "a picture"
    assert steps == [1, 2, 3, 4] and begun == [1]
    assert scripted.asked == [(0, SIZE)] * 2


def test_what_every_replica_dies_of_is_given_up(requests):
    with (
        remote_engine(*[[Gone()] for _ in range(DEATHS)]) as (running, scripted),
        pytest.raises(Failure, match="replicas died"),
    ):
        running.submit(requests[0]).result(30)
    assert len(scripted.asked) == DEATHS


def test_a_images_own_failure_is_its_own_and_frees_its_place(requests):
    with remote_engine([ReplicaUpdate(error=Failure("no"))]) as (running, _):
        first, second = (running.submit(request) for request in requests[:2])
        with pytest.raises(Failure, match="no"):
            first.result(30)
        assert second.result(30) == "a picture"


def test_cancelling_reaches_the_replica_and_what_waits(requests):
    with remote_engine([ReplicaUpdate(), None]) as (running, scripted):
        begun = threading.Event()
        first = running.submit(requests[0], on_start=begun.set)
        waits, last = (running.submit(request) for request in requests[1:3])
        assert begun.wait(30) and running.waiting() == [waits, last]
        waits.cancel()
        first.cancel()
        assert last.result(30) == "a picture"
        for gone in (first, waits):
            with pytest.raises(CancelledError):
                gone.result(30)
    assert scripted.asked == [(0, SIZE), (2, SIZE)] and scripted.left == [0, 2]


def test_deadlines_hold_while_a_image_waits(requests):
    with remote_engine([ReplicaUpdate(), None]) as (running, _):
        held = running.submit(requests[0])
        late = running.submit(requests[1], deadline=time.monotonic() + 0.1)
        with pytest.raises(Late):
            late.result(30)
        assert not held.done()


# --- the whole, on a cluster of this machine ---------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def asked(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_jobs_outlive_a_replica(model, tmp_path):
    port, url = (found := free_port()), f"http://127.0.0.1:{found}"
    command = [
        sys.executable, "-m", "koala", "serve", "--model", str(model), "--replicas", "2",
        "--device", "cpu", "--port", str(port), "--data", str(tmp_path / "data"), "--rate", "0",
        "--max-batch", "2",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        late = threading.Timer(300, server.kill)
        late.start()
        try:
            assert server.stderr is not None
            assert any("is ready on" in line for line in server.stderr)
            order = {"prompt": "a", "size": SIZE, "steps": 40, "guidance": 1.0}
            jobs = [asked(f"{url}/v1/jobs", {**order, "seed": seed})["id"] for seed in range(16)]
            while not asked(f"{url}/v1/gallery")["data"]:
                time.sleep(0.05)
            both = engines(server.pid)
            assert len(both) == 2
            os.kill(both[0], signal.SIGKILL)
            end = time.monotonic() + 60
            while any(
                asked(f"{url}/v1/jobs/{job}")["status"] in ("queued", "running") for job in jobs
            ):
                assert time.monotonic() < end, "the jobs were not done"
                time.sleep(0.2)
            found = [asked(f"{url}/v1/jobs/{job}") for job in jobs]
            assert [job["status"] for job in found] == ["done"] * len(jobs)
            assert [len(job["pictures"]) for job in found] == [1] * len(jobs)
            answer = asked(f"{url}/v1/images/generations", {**order, "seed": 5, "steps": 2})
            assert answer["data"][0]["b64_json"]
        finally:
            late.cancel()
            server.send_signal(signal.SIGTERM)
            try:
                rest = server.communicate(timeout=60)[1]
            except subprocess.TimeoutExpired:
                server.kill()
                raise
    assert server.returncode == 0 and "stopping" in rest
