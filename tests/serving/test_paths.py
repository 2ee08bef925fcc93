"""Paths, hosts and headers as programs and proxies write them, and answers in their own schema."""

import contextlib
import http.client
import json
import socket
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koala.serving.paths import OTHERS, own_path
from koala.serving.settings import Limits
from toy_server import ASKED, DRAW, running


@pytest.fixture(scope="module")
def server(pipeline, tmp_path_factory):
    limits = Limits(max_batch=2, rate=0)
    with running(pipeline, tmp_path_factory.mktemp("data"), limits) as found:
        yield found


def ask(server, path, body=None, method=None, **headers):
    """(status, headers, answer)."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    sent = None if body is None else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method or ("GET" if sent is None else "POST"), path, sent, named)
    answer = connection.getresponse()
    text = answer.read()
    return answer.status, answer.headers, json.loads(text) if text else None


def sent_as_it_is(server, text: str) -> bytes:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(text.replace("\n", "\r\n").encode())
        parts = []
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                parts.append(part)
        return b"".join(parts)


# --- paths ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/v1/models/", "//v1/models", "/v1//models", "/models", "/openai/v1/models",
     "/api/v1/models", "/v1/v1/models", "/openai/models", "http://127.0.0.1/v1/models",
     "/openai/deployments/toy/models?api-version=2025-01-01"],
)  # fmt: skip
def test_a_path_has_many_spellings(server, path):
    assert ask(server, path)[2]["object"] == "list"


@pytest.mark.parametrize("path", ["/images/generations", "/openai/v1/images/generations/"])
def test_what_draws_has_them_too(server, path):
    assert ask(server, path, ASKED)[0] == 200


@pytest.mark.parametrize(("own", "others"), OTHERS.items())
def test_health_is_asked_for_by_many_names(server, own, others):
    expected = ask(server, own)[2]
    for other in others:
        assert ask(server, other)[2] == expected


@given(st.text("/v1apiopen\\.%", max_size=30))
def test_a_path_stays_as_it_is_once_it_is_ours(path):
    found = own_path(f"/{path}")
    assert found.startswith("/") and "//" not in found
    assert own_path("/sdapi/v1/txt2img") == "/sdapi/v1/txt2img"


@pytest.mark.parametrize("path", ["/koala/v1/models", "/v1/models"])
def test_a_proxy_may_show_the_server_below_a_path(pipeline, tmp_path, path):
    told = {"root_path": "/koala", "trusted_proxies": ("127.0.0.1",)}
    with running(pipeline, tmp_path, Limits(max_batch=2), **told) as server:
        assert ask(server, path)[2]["object"] == "list"
        assert ask(server, "/koalas/v1/models")[0] == 404
        forwarded = {"X_Forwarded_Proto": "https", "X_Forwarded_Host": "art.example"}
        body = {**ASKED, "response_format": "url"}
        url = ask(server, DRAW, body, **forwarded)[2]["data"][0]["url"]
        assert url.startswith("https://art.example/koala/v1/images/files/")
        origin = {"Origin": "https://art.example"}
        assert ask(server, DRAW, ASKED, **origin, **forwarded)[0] == 200
        assert ask(server, DRAW, ASKED, **origin)[0] == 403


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/chat/completions", "draws images, by POST to /v1/images/generations"),
        ("/chat/completions", "draws images"),
        ("/v1/embeddings", "draws images"),
        ("/x" * 5000, "GET /openapi.json lists what is"),
        ("/%0a%00", r"'/\n\x00' is not here"),
    ],
)
def test_what_is_not_here_is_told_with_what_is(server, path, words):
    status, _, answer = ask(server, path, ASKED)
    message = answer["error"]["message"]
    assert status == 404 and words in message and len(message) < 300 and "\n" not in message


def test_a_wrong_method_is_told_with_the_right_one(server):
    for method in ("GET", "PUT", "DELETE", "HEAD"):
        status, headers, answer = ask(server, DRAW, method=method)
        assert status == 405 and headers["Allow"] == "POST"
        assert method == "HEAD" or "it takes POST" in answer["error"]["message"]
    status, headers, _ = ask(server, DRAW, method="OPTIONS")
    assert status == 204 and headers["Allow"] == "POST, OPTIONS"


# --- hosts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["localhost.:8000", "LocalHost:8000", "koala.localhost", "127.0.0.2", "192.168.1.4:8000",
     "0.0.0.0:8000", "[::1]:8000", "[::ffff:127.0.0.1]", ""],
)  # fmt: skip
def test_addresses_and_names_of_loopback_are_no_attack(server, host):
    assert ask(server, "/v1/models", Host=host)[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("rebound.example", 403), ("localhost.example", 403), ("127.0.0.1.example", 403),
     ("other", 403), ("rebound.example@localhost", 400), ("localhost:port", 400)],
)  # fmt: skip
def test_other_names_are(server, host, status):
    assert ask(server, "/v1/models", Host=host)[0] == status


def test_http_1_0_needs_no_host(server):
    assert b"200 OK" in sent_as_it_is(server, "GET /v1/models HTTP/1.0\n\n")


def test_two_requests_may_come_at_once(server):
    one = "GET /health HTTP/1.1\nHost: localhost\n"
    answer = sent_as_it_is(server, f"{one}\n{one}Connection: close\n\n")
    assert answer.count(b"200 OK") == 2


def test_a_client_may_wait_to_be_told_to_go_on(server):
    body = json.dumps(ASKED)
    head = f"Host: localhost\nContent-Length: {len(body)}\nExpect: 100-continue\nConnection: close"
    answer = sent_as_it_is(server, f"POST {DRAW} HTTP/1.1\n{head}\n\n{body}")
    assert answer.startswith(b"HTTP/1.1 100") and b"200 OK" in answer


# --- headers --------------------------------------------------------------------------------


def test_every_answer_names_its_request(server):
    given_id = ask(server, "/health", X_Request_Id="mine-1")[1]["X-Request-Id"]
    assert given_id == "mine-1"
    for path, headers in (("/health", {}), ("/x", {"X_Request_Id": "a b"}), (DRAW, {})):
        assert len(ask(server, path, **headers)[1]["X-Request-Id"]) == 32
    assert ask(server, DRAW, {"prompt": 1})[1]["X-Request-Id"]


def test_errors_of_a1111s_api_are_where_its_tools_look(server):
    for path, body in (("/sdapi/v1/txt2img", {"prompt": ""}), ("/sdapi/v1/nothing", None)):
        answer = ask(server, path, body)[2]
        assert answer["detail"] == answer["errors"] == answer["error"]["message"]
    assert set(ask(server, DRAW, {"prompt": ""})[2]) == {"error"}


@pytest.mark.parametrize("name", ["api_key", "x_api_key"])
def test_a_key_may_have_a_header_of_its_own(pipeline, tmp_path, name):
    (tmp_path / "keys").write_text("k" * 20)
    with running(pipeline, tmp_path / "data", api_key_file=tmp_path / "keys") as server:
        assert ask(server, "/v1/models", **{name: "k" * 20})[0] == 200
        assert ask(server, "/v1/models", **{name: "wrong"})[0] == 401
        assert ask(server, "/healthz")[0] == ask(server, "//health")[0] == 200


def test_a_fault_of_our_own_is_one_line_that_pages_elsewhere_may_read(pipeline, tmp_path):
    told = {"allow_origins": ("https://page.example",)}
    with running(pipeline, tmp_path, Limits(max_batch=2), **told) as server:
        del server.app.state.gallery
        answer = ask(server, "/v1/gallery", Origin="https://page.example")
        assert answer[0] == 500 and answer[1]["X-Request-Id"]
        assert answer[1]["Access-Control-Allow-Origin"] == "https://page.example"
        assert answer[2]["error"]["message"].startswith("internal server error")
