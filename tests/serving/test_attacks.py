"""What brought a server down, with the server's bounds, while others ask for its health.

One process serves and attacks, so times are bounds on a hang rather than on speed.
"""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import uvicorn
from PIL import Image

from koala.generation import load
from koala.serving import bodies
from koala.serving.connections import bounded
from koala.serving.settings import Limits
from toy import toy_pipeline
from toy_server import running

MIB = 2**20
SECONDS = 20.0  # within which an answer must come, on a machine that does much else


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = toy_pipeline(tmp_path_factory.mktemp("toy") / "toy", architecture="koala")
    limits = Limits(max_batch=2, rate=0)
    with running(load(folder, "cpu"), tmp_path_factory.mktemp("data"), limits) as found:
        yield found


def ask(server, path, body=None, timeout=SECONDS):
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=timeout)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json"}
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def connect(server):
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=60)


def draws(server):
    body = json.dumps({"prompt": "a", "size": "16x16", "steps": 1}).encode()
    return ask(server, "/v1/images/generations", body)[0] == 200


def peak() -> float:
    """Bytes of memory this process has ever held."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", text)[1]) * 1024


def forget_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


needs_peak = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")


# --- bodies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/images/generations", "/sdapi/v1/txt2img"])
def test_an_object_of_millions_of_keys_is_refused_unread(server, path):
    keys = b",".join(b'"%d":1' % i for i in range(1_500_000))
    before = time.process_time()
    status, answer = ask(server, path, b'{"prompt":"a",' + keys + b"}")
    assert status == 413 and len(answer) < 1000
    assert time.process_time() - before < 5  # 25 when all were validated


def test_a_list_of_many_loras_is_refused_in_a_line(server):
    many = [{"name": "x"}] * 10_000
    for path in ("/v1/jobs", "/v1/images/generations"):
        status, answer = ask(server, path, json.dumps({"prompt": "a", "lora": many}).encode())
        assert status == 400 and len(answer) < 1000


def test_a_body_without_images_is_small_and_one_with_an_image_may_be_large(server):
    large = json.dumps({"prompt": "a", "note": "b" * 2 * MIB}).encode()
    assert ask(server, "/v1/images/generations", large)[0] == 413
    assert ask(server, "/sdapi/v1/png-info", large)[0] == 400  # read, and found to lack its image


def test_prompts_of_commas_are_no_attack(server):
    body = {"prompt": "a," * 4000, "negative_prompt": ":," * 4000, "size": "16x16", "steps": 1}
    assert ask(server, "/v1/images/generations", json.dumps(body).encode())[0] == 200


def test_stalled_bodies_are_counted_as_they_arrive():
    limits = Limits(upload_bytes=MIB)
    held = bodies.Bodies(limits)

    async def stalled():
        parts = iter([{"body": b"a" * 1024, "more_body": True}] * 1000)

        async def receive():
            if (part := next(parts, None)) is None:
                await asyncio.Event().wait()
            return {"type": "http.request", **part}

        return await held.read("/v1/jobs", bodies.Headers({}), receive)

    async def attack():
        tasks = [asyncio.create_task(stalled()) for _ in range(60)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(0.1)
        kept = held._bytes
        refused = sum(task.done() and "memory" in str(task.exception().reason) for task in tasks)
        small = [{"type": "http.request", "body": b"{}"}]

        async def one():
            return small.pop()

        assert await held.read("/v1/jobs", bodies.Headers({}), one) == b"{}"
        held.release(2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return kept, refused

    kept, refused = asyncio.run(attack())
    assert kept <= bodies.BODIES * MIB and refused >= 50
    assert held._bytes == 0


def test_a_body_that_stalls_is_given_up(server, monkeypatch):
    monkeypatch.setattr(bodies, "STALL_SECONDS", 0.2)
    with connect(server) as stalled:
        stalled.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\n{")
        assert b" 408 " in stalled.recv(100)


# --- images ---------------------------------------------------------------------------------


@needs_peak
def test_images_of_sixteen_million_pixels_are_decoded_one_by_one(server):
    file = io.BytesIO()
    Image.new("RGB", (4096, 4096)).save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    job = {"prompt": "a", "size": "16x16", "steps": 1, "image": image, "strength": 1.0}
    idle = forget_peak()
    with ThreadPoolExecutor(10) as pool:
        body = json.dumps(job).encode()
        answers = [pool.submit(ask, server, "/v1/jobs", body, 300) for _ in range(10)]
        assert ask(server, "/health")[0] == 200 and draws(server)
        assert all(answer.result()[0] == 202 for answer in answers)
    assert peak() - idle < 768 * MIB  # two at once: an upload, and a job that is drawn


# --- connections ----------------------------------------------------------------------------


@contextlib.contextmanager
def small_server(most, header_seconds):
    """A server with so many connections, that answers "ok"."""

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
        )
        await send({"type": "http.response.body", "body": b"ok"})

    http = bounded(most, header_seconds)
    server = uvicorn.Server(uvicorn.Config(app, http=http, lifespan="off", log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        server.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield server
        server.should_exit = True
        thread.join(30)


def closed(connection) -> bool:
    """Waits for the server to close a connection."""
    connection.settimeout(SECONDS)
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(1000):
            pass
    return True


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\na",
    ],
)
def test_connections_that_send_nothing_or_half_make_room(sent):
    with small_server(most=20, header_seconds=60) as server, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(server)) for _ in range(60)]
        for each in idle:
            with contextlib.suppress(OSError):
                each.sendall(sent)
        for _ in range(3):
            assert ask(server, "/")[1] == b"ok"
        assert all(closed(each) for each in idle[:30])
        assert len(server.server_state.connections) <= 20


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nHo", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"]
)
def test_connections_that_send_nothing_or_half_time_out(sent):
    with small_server(most=20, header_seconds=0.3) as server, connect(server) as idle:
        idle.sendall(sent)
        if sent.endswith(b"\r\n\r\n"):  # answered, and then silent
            assert b"200 OK" in idle.recv(1000)
            idle.sendall(b"GET")
        assert closed(idle)


def test_a_connection_is_kept_from_one_request_to_the_next():
    with small_server(most=2, header_seconds=60) as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=SECONDS)
        with contextlib.closing(connection):
            for _ in range(3):
                connection.request("POST", "/", b"a" * 200_000)
                assert connection.getresponse().read() == b"ok"
            assert len(server.server_state.connections) == 1
