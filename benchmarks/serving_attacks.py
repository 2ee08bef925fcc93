"""What brought koala 0.1.0 down, sent to a real server: does it still answer, and draw?

`OMP_NUM_THREADS=1 python -m benchmarks.serving_attacks`

Each attack runs for some seconds against `koala serve` of its own on loopback. Meanwhile one client
asks for `/health`, and another for pictures. Exits with 1 if a health took longer than `SLOWEST`, a
picture failed, or the server's memory rose by more than `MOST_GROWTH`. On a machine that others
use, the times say as much about them.
"""

import argparse
import base64
import contextlib
import io
import json
import resource
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image

from benchmarks.memory_use import peak, resident
from benchmarks.record import keep
from benchmarks.soak import served
from koala.utils.device import hardware

SECONDS = 15.0  # of each attack
SLOWEST, MOST_GROWTH = 1.0, 1024.0  # seconds; MiB
FILES = 1024  # that a server may have open, as most systems have it
JSON = {"Content-Type": "application/json"}
Attack = Callable[[str, threading.Event], None]


def large_images(url: str, over: threading.Event) -> None:
    """Jobs with small files of many pixels, ten at a time."""
    file = io.BytesIO()
    Image.new("RGB", (4096, 4096)).save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    body = {"prompt": "a", "size": "64x64", "steps": 2, "image": image, "strength": 0.5}
    posts(url, json.dumps(body).encode(), over, 10)


def huge_object(url: str, over: threading.Event) -> None:
    """30 MiB of keys that nobody knows."""
    keys = b",".join(b'"%d":1' % i for i in range(2_500_000))
    posts(url, b'{"prompt":"a",' + keys + b"}", over, 2)


def many_loras(url: str, over: threading.Event) -> None:
    """A list of 1.3 million."""
    body = b'{"prompt":"a","lora":[' + b"{}," * 1_300_000 + b"{}]}"
    posts(url, body, over, 2)


def posts(url: str, body: bytes, over: threading.Event, at_once: int) -> None:
    def post() -> None:
        with httpx2.Client(base_url=url, timeout=120) as client:
            while not over.is_set():
                with contextlib.suppress(httpx2.HTTPError):  # refused while it is still sent
                    client.post("/v1/jobs", content=body, headers=JSON)

    threads = [threading.Thread(target=post) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def stalled_bodies(url: str, over: threading.Event) -> None:
    """60 uploads that stop at 31 of 32 MiB."""
    head = b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    sent = head + b"Content-Length: %d\r\n\r\n" % 2**25 + b" " * (31 * 2**20)
    hold(url, sent, 60, over)


def silent_connections(url: str, over: threading.Event) -> None:
    """1,100 that send nothing, or half a header."""
    hold(url, b"GET / HTTP/1.1\r\nHo", 1100, over)


def hold(url: str, sent: bytes, number: int, over: threading.Event) -> None:
    """Opens connections, again where they were closed, and sends each the same."""
    host, port = url.removeprefix("http://").split(":")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number + FILES, hard))  # of ours
    with contextlib.ExitStack() as stack:
        while not over.is_set():
            for _ in range(number):
                with contextlib.suppress(OSError):
                    one = stack.enter_context(socket.create_connection((host, int(port)), 5))
                    one.settimeout(5)
                    one.sendall(sent)
                if over.is_set():
                    break
            over.wait(5)
            stack.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))


ATTACKS: tuple[Attack, ...] = (
    large_images, huge_object, many_loras, stalled_bodies, silent_connections,
)  # fmt: skip


def under(attack: Attack, model: str) -> dict[str, Any]:
    """What others see of a server that is attacked."""
    over = threading.Event()
    with tempfile.TemporaryDirectory() as folder, served(model, None, Path(folder)) as (url, pid):
        asked = {"prompt": "a fox", "size": "64x64", "steps": 3}
        httpx2.post(f"{url}/v1/images/generations", json=asked, timeout=60)
        idle = resident(pid)
        attacker = threading.Thread(target=attack, args=(url, over))
        health, drawn, failed = [], [], 0
        attacker.start()
        end = time.monotonic() + SECONDS
        with httpx2.Client(base_url=url, timeout=60) as client:
            while time.monotonic() < end:
                begun = time.monotonic()
                client.get("/health").raise_for_status()
                health.append(time.monotonic() - begun)
                begun = time.monotonic()
                answer = client.post("/v1/images/generations", json=asked)
                failed += answer.status_code != 200
                drawn.append(time.monotonic() - begun)
        over.set()
        attacker.join()
        return {
            "what": " ".join((attack.__doc__ or "").split()),
            "healths": len(health), "slowest health, seconds": round(max(health), 3),
            "pictures": len(drawn), "slowest picture, seconds": round(max(drawn), 2),
            "pictures that failed": failed, "idle, MiB": round(idle),
            "above idle at the peak, MiB": round(peak(pid) - idle),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="koala-mini")
    parser.add_argument("--note", default="", help="what else the record should say")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/serving_attacks.json"))
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))  # of the servers
    rows = {attack.__name__: under(attack, options.model) for attack in ATTACKS}
    for name, row in rows.items():
        print(name, row, flush=True)
    figures = {
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.serving_attacks",
        "hardware": hardware(), "model": options.model, "note": options.note, "attacks": rows,
    }  # fmt: skip
    keep(options.out, figures)
    good = all(
        row["slowest health, seconds"] <= SLOWEST
        and row["pictures that failed"] == 0
        and row["above idle at the peak, MiB"] <= MOST_GROWTH
        for row in rows.values()
    )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
