"""`koala serve` as a process, and its page of the documentation, typed in from top to bottom."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from koala.cli import main
from koala.serving.settings import (
    Limits,
    Options,
    check,
    data_folder,
    hosts,
    limits_of,
    origins,
    root_path,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text()
ALONE = re.sub(r"## Many GPUs\n.*?(?=^## )", "", PAGE, flags=re.DOTALL | re.MULTILINE)


def serving(do: Callable[[], object], port: int, *arguments: str) -> int:
    """The exit status of `koala serve` in this process, told to stop after `do` on a thread.

    Raises what `do` raised.
    """
    failed: list[BaseException] = []

    def work() -> None:
        until(lambda: get(port, "/ready")[0] == 200)
        try:
            do()
        except BaseException as error:
            failed.append(error)
        os.kill(os.getpid(), signal.SIGTERM)  # its handler has stood since before it was ready

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    status = main(["serve", "--port", str(port), "--max-batch", "2", *arguments])
    thread.join(60)
    if failed:
        raise failed[0]
    return status


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def get(port: int, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """(status, body); status 0 where nobody answers."""
    kind = {"Content-Type": "application/json"} if body else {}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, kind)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


class Client(threading.Thread):
    """Somebody who waits for pictures."""

    def __init__(self, port: int, **asked: object) -> None:
        super().__init__(daemon=True)
        self.port, self.asked = port, {"prompt": "a fox", "size": "16x16", **asked}
        self.status = 0
        self.start()

    def run(self) -> None:
        body = json.dumps(self.asked).encode()
        self.status = get(self.port, "/v1/images/generations", body)[0]


def active(port: int) -> float:
    text = get(port, "/metrics")[1].decode()
    return float(re.search(r"^koala_active_pictures (.*)$", text, re.MULTILINE)[1])


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


@pytest.fixture
def data(tmp_path, monkeypatch) -> None:
    """A folder of this test's own, for data and for the reader."""
    monkeypatch.setenv("KOALA_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


def test_it_finishes_what_is_under_way_and_ends_with_status_0(data, capsys):
    port, clients = free_port(), []

    def draw() -> None:
        clients.append(Client(port, steps=60))
        until(lambda: active(port) == 1)

    assert serving(draw, port) == 0
    clients[0].join(60)
    assert clients[0].status == 200
    assert "stopping: no new requests" in capsys.readouterr().err


def test_a_second_signal_ends_it_at_once(data, capsys):
    port, clients = free_port(), []

    def draw() -> None:
        clients.extend(Client(port, steps=200, n=10) for _ in range(2))
        until(lambda: active(port) >= 1)
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: get(port, "/ready")[0] == 503)

    assert serving(draw, port) == 0
    for client in clients:
        client.join(60)
    assert [client.status for client in clients] == [503, 503]


def test_the_page_works(data, signing_files, tmp_path, capsys):
    """Every command and every line of Python; each `koala serve` takes the last one's place.

    But for several engines, which tests/serving/test_scaleout.py has.
    """
    for file, name in zip(signing_files, ("key.pem", "certificates.pem"), strict=True):
        shutil.copy(file, name)
    port, names = free_port(), {}
    parts: list[tuple[str, list[Callable[[], object]]]] = []  # a server, and what is asked of it
    answers: list[str] = []

    def of_last_job(line: str) -> str:
        ids = [
            found for answer in answers for found in re.findall(r'"id": ?"([0-9a-f]{32})"', answer)
        ]
        return line.replace("/ID/", f"/{ids[0]}/") if "/ID/" in line else line

    for language, block in re.findall(r"```(sh|python)\n(.*?)```", ALONE, re.DOTALL):
        block = block.replace(":8000", f":{port}").replace("\\\n", " ")
        if language == "python":
            code = compile(block, "serving.md", "exec")
            parts[-1][1].append(lambda code=code: exec(code, names))
            continue
        for line in block.splitlines():
            if line.startswith("koala serve"):
                parts.append((line, []))
            elif line.startswith("curl "):
                line = line.replace("curl ", "curl --silent --show-error --fail-with-body ")
                parts[-1][1].append(lambda line=line: answers.append(shell(of_last_job(line))))
            elif not line.startswith("pip "):  # before the server that it is for
                shell(line.replace("python ", f"{shlex.quote(sys.executable)} "))
    for line, todo in parts:
        do = lambda todo=todo: [each() for each in todo]  # noqa: E731
        assert serving(do, port, *shlex.split(line, comments=True)[2:]) == 0
    assert len(parts) == 7 and len(answers) == 9
    assert json.loads((tmp_path / "answer.json").read_text())["seed"] == 7
    assert len(names["answer"].data) == 2 and names["edited"].size == "128x128"
    assert names["event"].type == "image_generation.completed"
    assert "warning" not in capsys.readouterr().err


def shell(line: str) -> str:
    """What a command prints."""
    done = subprocess.run(["bash", "-c", line], check=True, capture_output=True, timeout=120)
    return done.stdout.decode(errors="replace")


def test_the_pages_figures_are_those_of_the_records():
    def record(name: str) -> dict:
        return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())

    serving, soak = record("serving"), record("serving_soak")
    by_steps = "steps to static, median of rounds"
    ratios = serving["under load"][by_steps]
    few = record("serving_few_steps")["under load"][by_steps]
    kill, fuzz = record("serving_kill"), record("serving_fuzz")
    memory = soak["memory, MiB"]
    attacks = record("serving_attacks")["attacks"].values()
    figures = [
        f"{ratios['median']:.2f} times",
        f"{ratios['throughput']:.2f} times",
        f"{few['median']:.2f} times",
        f"{few['throughput']:.2f} times",
        f"{serving['one request']['ratio, median of pairs']:.2f} times",
        f"{serving['first preview']['made after steps']} steps",
        str(soak["errors"]),
        f"{soak['against solo runs']['largest difference']} of 255",
        f"{memory['after a fifth']:,.0f} and {memory['at the end']:,.0f} MiB",
        str(len(fuzz["faults"])),
        f"{fuzz['growth in the second half, KiB a request']:.1f} KiB a request",
        str(sum(kill["faults"].values())),
        f"{max(one['slowest health, seconds'] for one in attacks):.1f} s",
        str(sum(one["pictures that failed"] for one in attacks)),
        f"{max(one['above idle at the peak, MiB'] for one in attacks)} MiB",
    ]
    table = PAGE[PAGE.index("## How it holds up") :]
    assert re.findall(r"^\| .* \| ([^|]+) \| [^|]*\|$", table, re.MULTILINE) == figures
    assert kill["kills"] == 20 and fuzz["requests"] == 100_000
    assert soak["seconds"] >= 600 and soak["clients"] == 64


def test_what_replicas_bring_is_what_the_record_says():
    record = json.loads((ROOT / "benchmarks" / "scaleout.json").read_text())
    one, more, killed = (record[k] for k in ("one engine", "replicas", "one of them killed"))
    table = PAGE[PAGE.index("| | ready after |") :].split("\n\n")[0]
    cells = [[cell.strip() for cell in row.split("|")[2:4]] for row in table.splitlines()[2:]]
    assert cells == [
        [f"{one['ready after seconds']:.0f} s", f"{one['pictures a second']:.1f}"],
        [f"{more['ready after seconds']:.0f} s", f"{more['pictures a second']:.1f}"],
        ["", f"{killed['pictures a second']:.1f}"],
    ]
    assert f"{killed[next(k for k in killed if k.startswith('a new'))]} s later" in table
    assert all(part["done"] == part["jobs"] == 64 for part in (one, more, killed))


def test_without_keys_for_all_the_world_there_is_a_warning(data, capsys):
    assert serving(lambda: None, free_port(), "--host", "0.0.0.0") == 0
    assert "warning: everybody who reaches 0.0.0.0 can use" in capsys.readouterr().err


def test_the_pages_numbers_are_the_defaults():
    limits = Limits()
    for name, value in (
        ("queue_full", limits.queue), ("client_queue_full", limits.client_queue),
        ("memory", limits.pixels), ("too_large", limits.upload_bytes),
    ):  # fmt: skip
        assert re.search(rf"^\| `{name}`.* {value:,} \|$", PAGE, re.MULTILINE), name
    assert f"| {limits.rate:g}, {limits.burst} |" in PAGE
    assert f"at most {limits.steps} steps" in PAGE and f"1 to {limits.images};" in PAGE
    assert f"{limits.patience:g} seconds of waiting" in PAGE
    assert f"`--drain` seconds ({limits.drain:g})" in PAGE


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nothing-of-the-kind/x/y"], "nothing-of-the-kind"),
        (["--api-key-file", "nothing"], "the key file nothing cannot be read"),
        (["--lora-dir", "nothing"], "--lora-dir nothing is not a folder"),
        (["--lora-dir", ".", "--graphs"], "--lora-dir does not work with --graphs"),
        (["--vram", "1", "--compile"], "--compile has no effect"),
        (["--max-batch", "0"], "--max-batch is 0"),
        (["--queue", "-1"], "--queue is -1"),
        (["--rate", "nan"], "--rate is nan"),
        (["--max-size", "big"], "--max-size 'big'"),
        (["--max-size", "8x8"], "--max-size 8x8: the smallest image is 16x16"),
        (["--gallery-gib", "nan"], "--gallery-gib nan"),
        (["--gallery-gib", "inf"], "--gallery-gib inf"),
        (["--gallery-gib", "-1"], "--gallery-gib -1"),
        (["--gallery-days", "nan"], "--gallery-days nan"),
        (["--gallery-days", "0"], "--gallery-days 0"),
        (["--quality-steps", "low=4,low=5"], "low is named twice"),
        (["--allow-host", "http://a.example"], "--allow-host 'http://a.example': give a name"),
        (["--allow-host", "a.example:80"], "--allow-host 'a.example:80': give a name"),
        (["--allow-origin", "a.example"], "--allow-origin 'a.example': give scheme and host"),
        (["--root-path", "koala"], "--root-path 'koala': give a path"),
        (["--port", "70000"], "cannot listen at port 70000"),
        (["--host", "192.0.2.1"], "cannot listen at port 8000 of 192.0.2.1"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_begins(
    arguments, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KOALA_DATA", str(tmp_path / "data"))
    assert main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error.splitlines()[-1] and "Traceback" not in error


def test_names_and_origins_are_compared_as_browsers_send_them():
    assert hosts("Host.Docker.Internal., *,[::1]") == ("host.docker.internal", "*", "::1")
    assert origins("https://A.example:443/, http://b:80,http://c:443") == (
        "https://a.example", "http://b", "http://c:443",
    )  # fmt: skip
    assert root_path("/koala/") == "/koala" and root_path("/") == root_path(None) == ""


def test_a_port_that_is_taken_is_a_mistake(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KOALA_DATA", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen at port" in capsys.readouterr().err


def test_data_lie_where_the_user_keeps_such_things(monkeypatch, tmp_path):
    monkeypatch.delenv("KOALA_DATA", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert data_folder() == tmp_path / "koala"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_folder() == tmp_path / ".local" / "share" / "koala"


def test_a_size_becomes_a_number_of_pixels():
    assert limits_of("64x32").size == 2048 and limits_of(None).size is None
    check(Options(limits=limits_of("64x32", queue=3)))
