"""Who may ask, how often and how much; and pictures that are forged."""

import contextlib
import http.client
import io
import json
import random
import socket
import struct
import time
import zlib
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from koala.errors import UserError
from koala.generation.image_files import open_image
from koala.serving.admission import Busy
from koala.serving.keys import ApiKeys
from koala.serving.security import RateLimiter
from koala.serving.settings import Limits, Options
from koala.serving.uploads import mask_of_transparency, open_upload
from toy_server import ASKED, DRAW, running

KEYS = ("first-key-0123456789", "other-key-0123456789")


@pytest.fixture(scope="module")
def open_server(pipeline, tmp_path_factory):
    limits = Limits(max_batch=2, upload_bytes=10_000, rate=0)
    with running(pipeline, tmp_path_factory.mktemp("open"), limits) as found:
        yield found


@pytest.fixture(scope="module")
def locked(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("locked")
    file = folder / "keys"
    file.write_text("# of this test\n\n" + "\n".join(KEYS) + "\n")
    limits = Limits(max_batch=2, rate=1, burst=3)
    with running(pipeline, folder / "data", limits, api_key_file=file) as found:
        yield found


def ask(server, path: str, body: object = None, **headers: str):
    """(status, headers, body) of a POST where there is a body, else of a GET."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    kind = {} if sent is None else {"Content-Type": "application/json"}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if sent is None else "POST", path, sent, {**kind, **named})
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def code(answer) -> str:
    return json.loads(answer[2])["error"]["code"]


# --- keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/v1/gallery", "/x"])
@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEYS[0]}"}]
)
def test_where_there_are_keys_one_is_needed(locked, path, headers):
    answer = ask(locked, path, **headers)
    assert answer[0] == 401 and code(answer) == "invalid_api_key"
    assert answer[1]["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json"])
@pytest.mark.parametrize("key", KEYS)
def test_every_key_opens(locked, path, key):
    assert ask(locked, path, Authorization=f"Bearer {key}")[0] == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/"])
def test_health_and_the_page_are_open(locked, path):
    assert ask(locked, path)[0] == 200


def test_rates_are_each_clients_own_and_say_when_to_come_back(locked):
    headers, start = {"Authorization": f"Bearer {KEYS[0]}"}, time.monotonic()
    answers = [ask(locked, DRAW, ASKED, **headers) for _ in range(4)]
    assert [answer[0] for answer in answers] == [200, 200, 200, 429]
    waited = time.monotonic() - start  # of the minute until the next
    assert code(answers[3]) == "rate"
    assert 60 - waited <= int(answers[3][1]["Retry-After"]) <= 60
    assert ask(locked, DRAW, ASKED, Authorization=f"Bearer {KEYS[1]}")[0] == 200


@pytest.mark.parametrize(("proxies", "second"), [(("127.0.0.0/8",), 200), (("10.0.0.1",), 429)])
def test_only_a_trusted_proxy_says_who_asks(pipeline, tmp_path, proxies, second):
    limits = Limits(max_batch=2, rate=1, burst=1)
    with running(pipeline, tmp_path, limits, trusted_proxies=proxies) as server:
        for client, status in (("10.0.0.8", 200), ("10.0.0.9", second)):
            assert ask(server, DRAW, ASKED, X_Forwarded_For=client)[0] == status


def test_keys_have_a_least_length_and_are_read_once(tmp_path):
    file = tmp_path / "keys"
    for text, words in (("# none\n", "contains no key"), ("short\n", "is too short")):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            ApiKeys.read(file)
    with pytest.raises(UserError, match="cannot be read"):
        ApiKeys.read(tmp_path / "nothing")


@given(st.lists(st.floats(0, 30), max_size=60))
def test_a_bucket_gives_no_more_than_its_burst_and_its_rate(pauses):
    now = [0.0]
    rates, taken = RateLimiter(Limits(rate=60, burst=5), lambda: now[0]), 0
    for pause in pauses:
        now[0] += pause
        with contextlib.suppress(Busy):
            rates.take("a")
            taken += 1
    assert taken <= 5 + now[0] + 1e-6


# --- other sites ----------------------------------------------------------------------------


def test_other_sites_and_forged_names_are_not_answered(open_server):
    own = urlsplit(open_server.url).netloc
    assert ask(open_server, DRAW, ASKED, Origin=f"http://{own}")[0] == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        answer = ask(open_server, DRAW, ASKED, Origin=origin)
        assert answer[0] == 403 and code(answer) == "origin"
    answer = ask(open_server, "/v1/models", Host="rebound.example")
    assert answer[0] == 403 and code(answer) == "host"
    assert "access-control-allow-origin" not in ask(open_server, "/v1/models")[1]


@pytest.mark.parametrize("host", ["[", "[::1", "a]b", "[v1.x]"])
def test_a_host_that_is_no_name_is_the_clients_mistake(open_server, host):
    assert ask(open_server, "/v1/models", Host=host)[0] in (400, 403)
    assert ask(open_server, "/v1/models", Origin=f"http://{host}")[0] == 403


@pytest.fixture(scope="module")
def everywhere(pipeline, tmp_path_factory):
    """As on 0.0.0.0, with a name and a page allowed."""
    told = {"host": "0.0.0.0", "allow_hosts": ("pictures.example",)}
    told["allow_origins"] = ("https://page.example",)
    with running(pipeline, tmp_path_factory.mktemp("wide"), Limits(max_batch=2), **told) as found:
        yield found


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("192.168.1.5:8000", 200),
        ("[fe80::1]:8000", 200),
        ("koala:8000", 200),  # a container's name: no DNS of an attacker's answers for it
        (socket.gethostname(), 200),
        ("pictures.example", 200),
        ("rebound.example", 403),
        ("host.docker.internal", 403),
    ],
)
def test_on_every_address_names_are_checked_too(everywhere, host, status):
    assert ask(everywhere, "/v1/models", Host=host)[0] == status


def test_a_page_elsewhere_may_be_allowed_by_name(everywhere):
    answer = ask(everywhere, DRAW, ASKED, Origin="https://page.example")
    assert answer[0] == 200
    assert answer[1]["access-control-allow-origin"] == "https://page.example"
    assert answer[1]["vary"] == "Origin"
    assert ask(everywhere, DRAW, ASKED, Origin="http://page.example")[0] == 403
    connection = http.client.HTTPConnection(urlsplit(everywhere.url).netloc, timeout=60)
    headers = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST",
               "Access-Control-Request-Headers": "authorization"}  # fmt: skip
    connection.request("OPTIONS", DRAW, headers=headers)
    answer = connection.getresponse()
    assert (
        answer.status == 204 and answer.headers["access-control-allow-headers"] == "authorization"
    )


def test_with_keys_an_allowed_page_reads_answers_and_still_needs_its_key(pipeline, tmp_path):
    (tmp_path / "keys").write_text(KEYS[0])
    told = {"api_key_file": tmp_path / "keys", "allow_origins": ("https://page.example",)}
    with running(pipeline, tmp_path / "data", Limits(max_batch=2), **told) as server:
        answer = ask(server, "/v1/models", Origin="https://page.example")
        assert answer[0] == 401 and "access-control-allow-origin" in answer[1]
        key = {"Authorization": f"Bearer {KEYS[0]}"}
        assert ask(server, "/v1/models", Origin="https://page.example", **key)[0] == 200
        answer = ask(server, "/v1/models", Origin="https://other.example", **key)
        assert "access-control-allow-origin" not in answer[1]


# --- bodies ---------------------------------------------------------------------------------


def test_a_body_is_bounded_whether_its_length_is_told_or_not(open_server):
    large = json.dumps({"prompt": "a" * 20_000}).encode()
    answer = ask(open_server, DRAW, large)
    assert answer[0] == 413 and code(answer) == "too_large"
    connection = http.client.HTTPConnection(urlsplit(open_server.url).netloc, timeout=60)
    chunks = (large[i : i + 4096] for i in range(0, len(large), 4096))
    connection.request("POST", DRAW, chunks, encode_chunked=True)
    assert connection.getresponse().status == 413
    assert ask(open_server, DRAW, ASKED)[0] == 200


@pytest.mark.parametrize(
    ("path", "method", "status"), [("/nothing", "GET", 404), (DRAW, "GET", 405)]
)
def test_what_is_not_there_is_told_in_the_same_shape(open_server, path, method, status):
    answer = ask(open_server, path)
    assert answer[0] == status and json.loads(answer[2])["error"]["message"]


def test_the_document_describes_our_errors(open_server):
    document = json.loads(ask(open_server, "/openapi.json")[2])
    for operation in (o for path in document["paths"].values() for o in path.values()):
        assert "422" not in operation["responses"] and "default" in operation["responses"]
    fields = document["components"]["schemas"]["GenerationRequest"]
    assert fields["additionalProperties"] is False and "lora" in fields["properties"]


# --- pictures -------------------------------------------------------------------------------


def saved(kind: str, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, "teal").save(file, kind)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of some bytes that says it holds so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_usual_images_are_read(kind):
    assert open_upload(saved(kind), 64).size == (8, 8)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (saved("PNG", (9, 8)), "is 9x8: allowed are 64 pixels"),
        (bomb(50_000, 50_000), "allowed are 64 pixels"),
        (saved("GIF"), "cannot be read"),
        (saved("TIFF"), "cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "cannot be read"),
        (saved("JPEG")[:-40], "cannot be read"),
        (saved("PNG")[:44], "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_others_are_refused(data, words):
    with pytest.raises(UserError, match=words):
        open_upload(data, 64)


def test_a_jpeg_of_thousands_of_scans_is_refused_before_they_are_read():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(file, "JPEG", progressive=True)
    data = file.getvalue()
    end, tables = data.rindex(b"\xff\xd9"), data.rindex(b"\xff\xc4")
    scan = data[tables:end]  # goes over all pixels once more
    assert open_upload(data[:end] + scan * 20 + data[end:], 64).size == (8, 8)
    for more in (scan * 500, b"\xff\xfe\0\2" * 10_000):
        with pytest.raises(UserError, match="too many scans or segments: allowed are 100"):
            open_upload(data[:end] + more + data[end:], 64)
    # What follows the end, as a film in a telephone's picture, is not looked at.
    assert open_upload(data + scan * 500, 64).size == (8, 8)


@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.data())
def test_forged_bytes_are_refused_or_read(kind, data):
    content = bytearray(saved(kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UserError):
        assert open_upload(bytes(content), 10_000).width > 0


@pytest.mark.parametrize("seed", range(40))
def test_a_jpeg_with_random_exif_is_refused_or_read(seed):
    noise, file = random.Random(seed), io.BytesIO()
    tags = [struct.pack(">HHI", 0x0112, noise.randrange(14), noise.randrange(4)) for _ in range(3)]
    entries = b"".join(tag + noise.randbytes(4) for tag in tags)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x03" + entries + noise.randbytes(seed)
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=exif)
    with contextlib.suppress(UserError):
        assert open_upload(file.getvalue(), 64).size == (8, 8)


def test_exif_that_is_none_is_not_read_twice():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=b"Exif\0\0MM\x9br\x9f\x85tI" + b"a" * 40)
    image = open_upload(file.getvalue(), 64)
    assert "exif" not in image.info and open_image(image).size == (8, 8)
    copied = Image.open(io.BytesIO(file.getvalue())).copy()
    with pytest.raises(UserError, match="the image cannot be read"):
        open_image(copied)


def test_a_mask_is_light_where_it_was_transparent():
    mask = Image.new("RGBA", (4, 1))
    mask.putdata([(9, 9, 9, 255), (9, 9, 9, 0), (9, 9, 9, 127), (9, 9, 9, 128)])
    file = io.BytesIO()
    mask.save(file, "PNG")
    ours = Image.open(io.BytesIO(mask_of_transparency(file.getvalue(), 64)))
    assert list(ours.tobytes()) == [0, 255, 255, 0]
    with pytest.raises(UserError, match="no transparency"):
        mask_of_transparency(saved("PNG"), 64)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)],
)
def test_what_loopback_is(host, expected):
    assert Options(host=host).on_loopback is expected
