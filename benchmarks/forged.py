"""Requests that nobody should send: by the server's own OpenAPI document, and forged by hand.

Made in a process of its own, so that what the maker holds in memory is not taken for the server's.
"""

import base64
import io
import json
import multiprocessing
import random
import struct
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

JSON = "application/json"
SIDE = 64  # pixels of the pictures that are good


@dataclass(frozen=True)
class Shot:
    """One request, as it goes to the application."""

    kind: str  # who made it: "schema", "twisted" or "image"
    method: str
    target: str  # path and query
    headers: list[tuple[bytes, bytes]]
    body: bytes
    patience: float | None = None  # seconds after which the client hangs up


def produce(
    document: dict[str, Any], number: int, seed: int, line: "multiprocessing.Queue[Shot | None]"
) -> None:
    """Puts `number` shots on the line, three tenths of them by the document; then None."""
    chance = random.Random(seed)
    by_schema, by_image = 3 * number // 10, 3 * number // 10
    schema = from_document(document, by_schema, seed)
    left = {"schema": by_schema, "image": by_image, "twisted": number - by_schema - by_image}
    makers: dict[str, Callable[[], Shot]] = {
        "schema": lambda: next(schema),
        "twisted": lambda: twisted(chance),
        "image": lambda: with_image(chance),
    }
    while any(left.values()):
        kind = chance.choices(list(left), list(left.values()))[0]
        left[kind] -= 1
        line.put(makers[kind]())
    line.put(None)


# --- by the document ------------------------------------------------------------------------


def from_document(document: dict[str, Any], number: int, seed: int) -> Iterator[Shot]:
    """Schemathesis' cases for every operation: what the schema allows, and what it does not."""
    import schemathesis
    from hypothesis.errors import Unsatisfiable

    schema = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations()]
    strategies = [
        operation.as_strategy(generation_mode=mode)
        for operation in operations
        for mode in schemathesis.GenerationMode
    ]
    each, chance, given = 1 + number // len(strategies), random.Random(seed), 0
    while given < number:
        seed += 1
        kept = []
        for strategy in strategies:
            try:
                cases = _drawn(strategy, min(each, 25), seed)
            except Unsatisfiable:  # an operation without parameters cannot be called wrongly
                continue
            if len(cases) == min(each, 25):  # there are more of them
                kept.append(strategy)
            for case in cases:
                given += 1
                yield _shot(case, chance)
        strategies = kept


def _drawn(strategy: Any, number: int, seed_of: int) -> list[Any]:
    from hypothesis import HealthCheck, Phase, given, seed, settings

    cases: list[Any] = []

    @seed(seed_of)
    @settings(
        max_examples=number, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def take(case: Any) -> None:
        cases.append(case)

    take()
    return cases


def _shot(case: Any, chance: random.Random) -> Shot:
    import requests

    told = case.as_transport_kwargs(base_url="http://127.0.0.1")
    try:
        ready = requests.Request(**told).prepare()
    except (ValueError, requests.RequestException):  # not even HTTP: as plain JSON instead
        ready = requests.Request(told["method"], "http://127.0.0.1/v1/jobs", json={}).prepare()
    body = ready.body or b""
    parts = urlsplit(ready.url)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    names = {name: value for name, value in ready.headers.items() if name == "Content-Type"}
    headers = [_header(name, value) for name, value in names.items()]
    data = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    return Shot("schema", ready.method, target, headers, data, _patience(chance))


def _header(name: str, value: str | bytes) -> tuple[bytes, bytes]:
    text = value if isinstance(value, bytes) else value.encode("latin-1", "replace")
    return name.lower().encode("latin-1", "replace"), text


def _patience(chance: random.Random) -> float | None:
    """One client in ten hangs up early."""
    return chance.choice((0.0, 0.01, 0.1)) if chance.random() < 0.1 else None


# --- good requests with something wrong ------------------------------------------------------

BAD = (
    None, True, "", " ", "x" * 100_000, "\x00", "\ud800", "é\u202e", "null", "../../etc/passwd",
    "file:///etc/passwd", "http://127.0.0.1/", -1, 0, 1, 3.5, 10**30, -(10**30), 1e308, -1e-308,
    float("nan"), float("inf"), [], {}, [[]], [None], {"a": {}}, "64x64x64", "0x0", "-64x64",
    "99999x99999", "64X64 ", "٦٤x٦٤", "63x65", "(((((", "(a:1e9)", "[a:b:0.5]", "a:" * 500,
    "%s%n{}", "' OR 1=1 --", [{"name": "../x", "scale": 1}], [{"name": "a"}] * 100, 2**63, 2**64,
)  # fmt: skip


def _good(chance: random.Random) -> tuple[str, dict[str, Any]]:
    """A path, and a body that it takes."""
    steps, seed = chance.randint(1, 3), chance.randrange(1000)
    asked = {"prompt": "a fox", "steps": steps, "seed": seed, "negative_prompt": "blur"}
    ours = {"n": 1, "size": f"{SIDE}x{SIDE}", "guidance": 2.0, "scheduler": "euler"}
    stream = {"stream": True, "partial_images": 2, "output_format": "webp"}
    return chance.choice(
        [
            ("/v1/images/generations", asked | ours),
            ("/v1/images/generations", asked | ours | stream),
            ("/v1/jobs", asked | ours | {"priority": "batch", "deadline": 20.0}),
            ("/sdapi/v1/png-info", {"image": "data:image/png;base64,x"}),
            ("/sdapi/v1/extra-single-image", {"image": "x", "upscaling_resize": 2.0}),
            ("/sdapi/v1/options", {"CLIP_stop_at_last_layers": 2}),
            ("/sdapi/v1/txt2img", asked | {"sampler_name": "DPM++ 2M Karras", "enable_hr": True}),
            ("/sdapi/v1/txt2img", asked | {"width": SIDE, "height": SIDE, "cfg_scale": 2.0}),
        ]
    )


def twisted(chance: random.Random) -> Shot:
    """A good request, but for one thing or two."""
    path, asked = _good(chance)
    method, headers = "POST", [(b"content-type", JSON.encode())]
    for _ in range(chance.choice((0, 1, 1, 1, 2))):
        name = chance.choice([*asked, "image", "lora", "model", "strength", "something_else"])
        asked[name] = chance.choice(BAD)
    if chance.random() < 0.1:
        asked.pop(chance.choice(list(asked)))
    body = json.dumps(asked).encode()
    match chance.randrange(14):
        case 0:
            body = body[: chance.randrange(len(body))]
        case 1:
            at = chance.randrange(len(body))
            body = body[:at] + bytes([chance.randrange(256)]) + body[at + 1 :]
        case 2:
            deep = chance.choice((10, 1_000, 100_000))
            body = chance.choice((b"[" * deep, b'{"prompt":' * deep, b"[" * deep + b"]" * deep))
            if chance.random() < 0.2:  # many keys, or many LoRAs
                keys = {f"k{i}": 0 for i in range(deep)}
                body = json.dumps(chance.choice((keys, {"prompt": "a", "lora": [keys]}))).encode()
        case 3:
            headers = [(b"content-type", chance.choice((b"text/plain", b"image/png", b"", b"x")))]
        case 4:
            method = chance.choice(("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE"))
        case 5:
            path = chance.choice(_PATHS) + chance.choice(("", "/", "?limit=-1", "?before=%00"))
        case 6:
            headers.append(chance.choice(_HEADERS))
    return Shot("twisted", method, path, headers, body, _patience(chance))


_PATHS = (
    "/v1/gallery/..%2f..%2fkoala.sqlite", "/v1/gallery/%00/image", "/v1/gallery/" + "f" * 32,
    "/v1/gallery/" + "F" * 32 + "/image", "/v1/jobs/" + "0" * 32 + "/events", "/page/../../app.py",
    "/page/%2e%2e/%2e%2e/app.py", "/page//etc/passwd", "/" + "a" * 5000, "//", "/v1", "/v1/models/",
    "/v1/models/%ff%fe", "/docs", "/openapi.json", "/sdapi/v1/progress?skip_current_image=x",
    "/v1/jobs?limit=99999999999999999999", "/v1/gallery?before=zz", "/metrics", "/ready",
)  # fmt: skip
_HEADERS = (
    (b"authorization", b"Bearer \xff"), (b"content-length", b"-5"), (b"origin", b"http://evil"),
    (b"content-encoding", b"gzip"), (b"range", b"bytes=0-"), (b"accept", b"\x00"),
    (b"host", b"evil.example"), (b"host", b"["), (b"host", b"[::1"), (b"origin", b"http://["),
    (b"x-forwarded-for", b"\xff, 10.0.0.1"), (b"content-length", b"99999999999"),
    (b"x-a", b"a" * 60_000),
)  # fmt: skip


# --- forged pictures ------------------------------------------------------------------------


def with_image(chance: random.Random) -> Shot:
    """A request with a picture that is good, broken, or something else altogether."""
    data = image(chance)
    mask = image(chance) if chance.random() < 0.3 else None
    text = base64.b64encode(data).decode()
    if chance.random() < 0.2:
        text = f"data:{chance.choice(('image/png', 'text/html', ''))};base64,{text}"
    plain = {"prompt": "a fox", "steps": chance.randint(1, 3), "seed": 1}
    kind = chance.randrange(3)
    if kind == 0:
        return _edit(plain, data, mask, chance)
    if kind == 1:
        asked = {**plain, "image": text, "strength": 0.5, "size": f"{SIDE}x{SIDE}"}
        path, name = "/v1/jobs", "mask"
    else:
        asked = {**plain, "init_images": [text], "denoising_strength": 0.5, "width": SIDE}
        path, name = "/sdapi/v1/img2img", "mask"
    if mask is not None:
        asked[name] = base64.b64encode(mask).decode()
    body = json.dumps(asked).encode()
    return Shot("image", "POST", path, [(b"content-type", JSON.encode())], body, _patience(chance))


def _edit(asked: dict[str, Any], data: bytes, mask: bytes | None, chance: random.Random) -> Shot:
    """The same as a form, which may be broken as well."""
    mark = uuid.UUID(int=chance.getrandbits(128)).hex
    fields = [(name, None, str(value).encode()) for name, value in asked.items()]
    fields += [(chance.choice(("image", "image", "image[]", "file")), "../a.png", data)]
    fields += [] if mask is None else [("mask", "m.png", mask)]
    if chance.random() < 0.1:
        fields += chance.choice(([fields[0]], [fields[-1]], [("a", None, b"b")] * 100))
    parts = []
    for name, file, value in fields:
        called = "" if file is None else f'; filename="{file}"'
        parts.append(f'--{mark}\r\nContent-Disposition: form-data; name="{name}"{called}\r\n\r\n')
        parts[-1] = parts[-1].encode() + value + b"\r\n"
    body = b"".join(parts) + f"--{mark}--\r\n".encode()
    if chance.random() < 0.1:
        body = body[: chance.randrange(len(body))]
    kind = f"multipart/form-data; boundary={mark if chance.random() < 0.95 else 'other'}"
    headers = [(b"content-type", kind.encode())]
    return Shot("image", "POST", "/v1/images/edits", headers, body, _patience(chance))


def image(chance: random.Random) -> bytes:
    """Bytes that may be a picture."""
    side = chance.choice((1, 7, SIDE, SIDE, SIDE, 300))
    mode = chance.choice(("RGB", "RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"))
    kind = chance.choice(("PNG", "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"))
    file = io.BytesIO()
    try:
        Image.effect_noise((side, side), 50).convert("RGB").convert(mode).save(file, kind)
    except (OSError, ValueError):  # a mode that the format has no place for
        Image.new("RGB", (side, side)).save(file, "PNG")
    data = file.getvalue()
    match chance.randrange(10):
        case 0 | 1:
            return data[: chance.randrange(len(data))]
        case 2 | 3:
            broken = bytearray(data)
            for _ in range(chance.randint(1, 20)):
                broken[chance.randrange(len(broken))] = chance.randrange(256)
            return bytes(broken)
        case 4:
            return bomb(*chance.choice(((50_000, 50_000), (2**31 - 1, 1), (0, 0), (30_000, 500))))
        case 5:
            return chance.choice(_NO_IMAGES)
        case 6:
            return data + chance.randbytes(1000)
        case 7:
            file = io.BytesIO()
            exif = b"Exif\x00\x00" + chance.choice((b"II*\x00", b"MM")) + chance.randbytes(200)
            Image.new("RGB", (side, side)).save(file, "JPEG", exif=exif)
            return file.getvalue()
    return data


_NO_IMAGES = (
    b"", b"\x00", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n", b"GIF89a",
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x00\x00\x00\x00WEBP", b"%!PS-Adobe-3.0 EPSF-3.0",
    b"BM", b"II*\x00", b"{}", b"PK\x03\x04", b"\x1f\x8b" * 500, b"P6 9999999 9999999 255\n",
)  # fmt: skip


@cache
def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that says it is large, with a text that unpacks to many."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(min(width * height, 1_000_000)), 9)
    said = b"Comment\x00\x00" + zlib.compress(bytes(30_000_000), 9)
    chunks = ((b"IHDR", head), (b"zTXt", said), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
