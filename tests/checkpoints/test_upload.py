"""--push-to-hub against a stand-in for the Hub on this machine: what is sent, and what is refused
before any work is done."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

TOKEN = "hf_stand_in"


class StandIn(BaseHTTPRequestHandler):
    """The answers that an upload asks of the Hub; every file may come within the commit."""

    server: "Hub"

    def do_GET(self) -> None:
        self.answer({"name": "ann", "type": "user"})  # whoami

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body)["name"])
            self.answer({"url": f"{self.server.address}/ann/small"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self.answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                }
            )
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.address}/ann/small/commit/1"
            self.answer({"commitUrl": url, "commitOid": "1" * 40, "hookOutput": ""})

    def answer(self, value: dict) -> None:
        allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
        content = json.dumps(value if allowed else {"error": "Invalid credentials"}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


class Hub(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), StandIn)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.created: list[str] = []
        self.files: dict[str, bytes] = {}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def koala(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess:
    """The command in a process of its own: huggingface_hub reads its settings when imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        [sys.executable, "-m", "koala", *arguments],
        env={**kept, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        capture_output=True,
        text=True,
    )


def compressing(teacher: Path, tmp_path: Path, target: str = "ann/small") -> list[str]:
    out = str(tmp_path / "student")
    return ["compress", str(teacher), "--to", "koala-700m", "--out", out, "--push-to-hub", target]


def test_the_whole_folder_is_uploaded(hub, toy_sdxl, tmp_path):
    done = koala(
        *compressing(toy_sdxl, tmp_path), home=tmp_path, HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN
    )
    assert done.returncode == 0, done.stderr
    assert f"uploaded: {hub.address}/ann/small" in done.stderr
    assert hub.created == ["small"]
    student = tmp_path / "student"
    files = {p.relative_to(student).as_posix(): p for p in student.rglob("*") if p.is_file()}
    assert hub.files.keys() == files.keys()
    card = hub.files.pop("README.md").decode()
    assert all(files[name].read_bytes() == content for name, content in hub.files.items())
    assert '"ann/small", torch_dtype' in card  # the snippet loads what was uploaded
    assert card == files["README.md"].read_text().replace('    ".",', '    "ann/small",').replace(
        "--model .", "--model ann/small"
    )


def test_a_single_file_is_uploaded(hub, toy_sdxl, tmp_path):
    out = tmp_path / "one.safetensors"
    given = ["convert", str(toy_sdxl), "--to", "single-file", "--out", str(out)]
    done = koala(
        *given, "--push-to-hub", "ann/one", home=tmp_path, HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN
    )
    assert done.returncode == 0, done.stderr
    assert hub.files == {"one.safetensors": out.read_bytes()}


@pytest.mark.parametrize(
    ("target", "token", "status", "said"),
    [
        ("small", TOKEN, 2, "must be ORG/NAME"),
        ("ann/a--b", TOKEN, 2, "ann/a--b"),
        ("ann/small", "", 2, "no token"),
        ("ann/small", "hf_wrong", 2, "401"),
    ],
)
def test_refused_before_the_work(target, token, status, said, hub, toy_sdxl, tmp_path):
    done = koala(
        *compressing(toy_sdxl, tmp_path, target),
        home=tmp_path,
        HF_ENDPOINT=hub.address,
        HF_TOKEN=token,
    )
    assert done.returncode == status
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "student").exists() and not hub.created


def test_no_network_is_a_failure_before_the_work(toy_sdxl, tmp_path):
    given = compressing(toy_sdxl, tmp_path)
    for environment in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        done = koala(*given, home=tmp_path, HF_TOKEN=TOKEN, **environment)
        assert done.returncode == 1
        assert "cannot be reached" in done.stderr and len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "student").exists()
