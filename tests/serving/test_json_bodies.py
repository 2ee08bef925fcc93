"""Bodies as programs write them: any Content-Type, forms, packed, values as texts; and bad ones."""

import base64
import contextlib
import gzip
import http.client
import io
import json
import struct
import zlib
from urllib.parse import urlencode, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from koala.generation import load, read_settings
from koala.generation.image_files import LIGHT, as_grey
from koala.serving import json_bodies
from koala.serving.errors import ApiError
from koala.serving.fit import matched
from koala.serving.sampler_names import ALIASES, own_name
from koala.serving.settings import Limits
from toy import toy_pipeline
from toy_server import running

DRAW, TXT2IMG = "/v1/images/generations", "/sdapi/v1/txt2img"
ASKED = {"prompt": "a fox", "size": "16x16", "steps": 2, "seed": 1}
OF_A1111 = {"prompt": "a fox", "width": 16, "height": 16, "steps": 2, "seed": 1}
TEXT = json.dumps(ASKED)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = toy_pipeline(tmp_path_factory.mktemp("toy") / "toy", architecture="koala")
    limits = Limits(max_batch=4, rate=0, upload_bytes=100_000)
    data = tmp_path_factory.mktemp("data")
    with running(load(folder, "cpu"), data, limits, model_aliases=("gpt-image-1",)) as found:
        yield found


def post(server, path, body, **headers):
    """(status, answer) of a body of bytes, or of JSON."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", path, sent, named)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def settings(answer):
    """The settings of the one image of an answer."""
    status, body = answer
    assert status == 200, body
    (text,) = body["images"] if "images" in body else [one["b64_json"] for one in body["data"]]
    return read_settings(io.BytesIO(base64.b64decode(text)))


def refusal(answer):
    status, body = answer
    assert status == 400, body
    message = body["error"]["message"]
    assert "\n" not in message and len(message) < 300
    return message


# --- what a body is written in --------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [None, "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "application/json",
     "application/json; charset=utf-8", "application/vnd.api+json", "nonsense"],
)  # fmt: skip
def test_json_is_read_whatever_its_content_type(server, kind):
    headers = {} if kind is None else {"Content_Type": kind}
    assert settings(post(server, DRAW, TEXT.encode(), **headers)).seed == 1
    assert settings(post(server, TXT2IMG, OF_A1111, **headers)).seed == 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_at_the_start_says_the_encoding(server, encoding):
    assert settings(post(server, DRAW, TEXT.encode(encoding))).prompt == "a fox"


def test_fields_may_come_as_a_form(server):
    form = urlencode(ASKED).encode()
    kind = {"Content_Type": "application/x-www-form-urlencoded"}
    made = settings(post(server, DRAW, form, **kind))
    assert (made.width, made.steps, made.seed) == (16, 2, 1)
    assert "prompt is given twice" in refusal(post(server, DRAW, form + b"&prompt=b", **kind))


@pytest.mark.parametrize(
    ("packing", "pack"),
    [("gzip", gzip.compress), ("deflate", zlib.compress), ("x-gzip", gzip.compress)],
)
def test_packed_bodies_are_unpacked(server, packing, pack):
    body = pack(TEXT.encode())
    assert settings(post(server, DRAW, body, Content_Encoding=packing)).seed == 1
    told = refusal(post(server, DRAW, body[:-9], Content_Encoding=packing))
    assert "is not what its Content-Encoding says" in told
    bomb = pack(b" " * 50_000_000)
    assert len(bomb) < 100_000
    assert post(server, DRAW, bomb, Content_Encoding=packing)[0] == 413
    assert server.service.alive and settings(post(server, DRAW, ASKED)).seed == 1


def test_other_packings_are_refused_by_name(server):
    status, answer = post(server, DRAW, TEXT.encode(), Content_Encoding="br")
    assert status == 415 and "Content-Encoding 'br' is not known" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "the body is missing: send JSON"),
        (b"null", "no JSON object"),
        (b'["a"]', "no JSON object"),
        (b'{"prompt": "a",}', "at line 1, column 16"),
        (b"{'prompt': 'a'}", "double quotes at line 1, column 2"),
        (b'{"prompt": "caf\xe9"}', "no text in UTF-8"),
        (b'{"prompt": "a", "guidance": NaN}', "has NaN"),
        (b'{"prompt": "a", "guidance": -Infinity}', "has -Infinity"),
        (b'{"prompt": "a", "guidance": 1e400}', "has the number 1e400: it is too large"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "it is too long"),
        (b'{"prompt": "a", "prompt": "b"}', "has 'prompt' twice"),
        (b'{"prompt": "a", "lora": ' + b"[" * 20_000 + b"}", "nested too deeply"),
        (b'{"prompt": "a", "lora": ' + b"[" * 40 + b"]" * 40 + b"}", "nested too deeply"),
        (b'{"prompt": "\\ud800"}', "half a character"),
        (b'{"\\ud800": 1}', "half a character"),
    ],
)
def test_what_is_no_json_is_refused_with_its_place(server, body, words):
    for path in (DRAW, TXT2IMG, "/v1/images/edits", "/v1/jobs", "/v1/responses"):
        assert words in refusal(post(server, path, body))


@pytest.mark.parametrize("value", ['"\\ud800"', "NaN", "[" * 20 + "]" * 20])
def test_what_would_be_sent_back_can_be(server, value):
    body = f'{{"prompt": "a fox", "steps": 1, "override_settings": {{"x": {value}}}}}'
    assert post(server, TXT2IMG, body.encode())[0] in (200, 400)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)  # fmt: skip


@given(JSON)
def test_json_is_read_as_python_reads_it(value):
    text = json.dumps(value)
    assert json_bodies.parse(text) == json_bodies.parse(text.encode()) == json.loads(text)


@given(st.binary(max_size=60))
def test_any_bytes_are_json_or_refused(body):
    with contextlib.suppress(ApiError):
        json_bodies.parse(body)


# --- values ---------------------------------------------------------------------------------


def test_values_may_be_texts(server):
    asked = {"n": "1", "steps": "2", "guidance": "2.5", "seed": "5.0", "stream": "false"}
    made = settings(post(server, DRAW, {**ASKED, **asked}))
    assert (made.steps, made.guidance, made.seed) == (2, 2.5, 5)
    asked = {"steps": "2", "width": "16.0", "cfg_scale": "7.0", "batch_size": "1", "n_iter": "1.0"}
    made = settings(post(server, TXT2IMG, {**OF_A1111, **asked}))
    assert (made.width, made.steps, made.guidance) == (16, 2, 7)


@pytest.mark.parametrize("empty", [None, ""])
def test_fields_that_say_nothing_are_as_good_as_left_out(server, empty):
    names = ("n", "model", "quality", "user", "negative_prompt", "scheduler", "lora", "background",
             "response_format", "style", "stream", "output_format", "partial_images", "moderation",
             "output_compression", "guidance", "width", "height", "cfg_scale", "fit")  # fmt: skip
    assert settings(post(server, DRAW, {**dict.fromkeys(names, empty), **ASKED})).seed == 1
    names = ("negative_prompt", "sampler_name", "sampler_index", "scheduler", "cfg_scale",
             "batch_size", "n_iter", "override_settings", "alwayson_scripts", "styles",
             "enable_hr", "restore_faces", "tiling", "hr_scale", "denoising_strength",
             "script_args", "script_name", "send_images", "save_images", "eta")  # fmt: skip
    made = settings(post(server, TXT2IMG, {**dict.fromkeys(names, empty), **OF_A1111}))
    assert (made.seed, made.guidance) == (1, 3.5)


def test_a_prompt_is_never_left_out(server):
    assert "prompt is missing" in refusal(post(server, DRAW, {}))
    for path in (DRAW, TXT2IMG):
        assert "the prompt is empty" in refusal(post(server, path, {"prompt": ""}))
    assert "the prompt is empty" in refusal(post(server, TXT2IMG, {"prompt": None}))


@pytest.mark.parametrize("name", ["n", "steps", "seed", "guidance"])
def test_true_is_no_number(server, name):
    assert refusal(post(server, DRAW, {**ASKED, name: True})) == f"{name}: true is no number"


@pytest.mark.parametrize("size", ["32X16", "32*16", "32 x 16", "32\u00d716", " 32x16 "])
def test_sizes_have_several_signs(server, size):
    made = settings(post(server, DRAW, {**ASKED, "size": size}))
    assert (made.width, made.height) == (32, 16)


@pytest.mark.parametrize(
    "asked", [{"width": 16}, {"height": 16}, {**ASKED, "width": 16, "height": 16}]
)
def test_a_size_is_given_once_and_whole(server, asked):
    told = refusal(post(server, DRAW, {"prompt": "a", **asked}))
    assert "give width and height, or size alone" in told


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("DPM++ 2M Karras", "dpm++2m-karras"),
        ("k_dpmpp_2m_ka", "dpm++2m-karras"),
        ("dpmpp_2m_karras", "dpm++2m-karras"),
        ("euler_k", "euler-karras"),
        ("K_EULER", "euler"),
        ("Euler A", "euler-a"),
        ("euler ancestral", "euler-a"),
        ("dpm++_2m", "dpm++2m"),
        ("DPM++ 2M SDE Exponential", "dpm++2m-sde-exponential"),
        ("DPM++ 2M SGM Uniform", "dpm++2m-trailing"),
        ("DPMSolverMultistepScheduler", "dpm++2m"),
        ("Default", None),
        ("Automatic", None),
        ("Heun", "Heun"),
        ("k", "k"),
    ],
)
def test_samplers_have_names_in_many_programs(name, key):
    assert own_name(name) == key


def test_samplers_names_draw_over_every_api(server):
    for path, asked, field in (
        (DRAW, ASKED, "sampler"), (DRAW, ASKED, "scheduler"), (TXT2IMG, OF_A1111, "sampler_name"),
    ):  # fmt: skip
        made = settings(post(server, path, {**asked, field: "k_dpmpp_2m_ka"}))
        assert (made.sampler, made.schedule) == ("DPM++ 2M", "karras")
        assert settings(post(server, path, {**asked, field: "Default"})).sampler == "Euler"
    for key, names in ALIASES.items():
        assert {own_name(name) for name in names} == {key}


def test_switches_of_a1111_may_be_texts_and_objects_empty_lists(server):
    asked = {"restore_faces": "false", "tiling": "False", "enable_hr": "false", "s_churn": "0",
             "eta": "1.0", "override_settings": [], "alwayson_scripts": [],
             "styles": {}}  # fmt: skip
    assert settings(post(server, TXT2IMG, {**OF_A1111, **asked})).width == 16
    told = refusal(post(server, TXT2IMG, {**OF_A1111, "restore_faces": "true"}))
    assert "restore_faces True" in told
    for scripts in (["x"], "x", 5):
        told = refusal(post(server, TXT2IMG, {**OF_A1111, "alwayson_scripts": scripts}))
        assert told.startswith("alwayson_scripts is ")


# --- images ---------------------------------------------------------------------------------


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def address(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def half(size=(16, 16)) -> bytes:
    """A teal image whose right half is transparent."""
    image = Image.new("RGBA", size, "teal")
    image.paste((0, 0, 0, 0), (size[0] // 2, 0, *size))
    return png(image)


PLAIN = png(Image.new("RGB", (16, 16), "teal"))
EDIT = {"prompt": "an owl", "steps": 2, "seed": 1}


@pytest.mark.parametrize(
    "images",
    [
        {"image": address(PLAIN)},
        {"image": base64.b64encode(PLAIN).decode()},
        {"image": [address(PLAIN)]},
        {"images": [{"image_url": address(PLAIN)}]},
        {"images": [{"image_url": {"url": address(PLAIN)}}]},
        {"image": address(PLAIN), "mask": None},
    ],
)
def test_an_edit_may_be_json(server, images):
    made = settings(post(server, "/v1/images/edits", {**EDIT, **images}))
    assert made.image and not made.mask and made.strength == 0.6
    varied = settings(post(server, "/v1/images/variations", {"steps": 2, **images}))
    assert varied.prompt == "picture" and varied.image


@pytest.mark.parametrize("mask", [address(half()), {"image_url": address(half())}])
def test_an_edit_of_json_may_have_a_mask(server, mask):
    body = {**EDIT, "images": [{"image_url": address(PLAIN)}], "mask": mask}
    made = settings(post(server, "/v1/images/edits", body))
    assert made.mask and made.strength == 1


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ({}, "image is missing"),
        ({"images": [{"file_id": "f"}]}, "no files are kept here"),
        ({"image": "https://a.example/b.png"}, "nothing is fetched here"),
        ({"image": 5}, "give base64, a data: URL"),
        ({"image": [address(PLAIN)] * 2}, "image: it is given twice"),
        ({"image": "/etc/passwd"}, "cannot be read as an image"),
    ],
)
def test_edits_of_json_that_are_refused(server, images, words):
    assert words in refusal(post(server, "/v1/images/edits", {**EDIT, **images}))


def test_an_image_to_generations_is_told_where_it_belongs(server):
    for name in ("image", "images", "image_url", "mask"):
        told = refusal(post(server, DRAW, {**ASKED, name: address(PLAIN)}))
        assert told == f"unknown field {name!r}: images are edited at /v1/images/edits"


def form(*parts):
    """A form of (name, file name or None, content)."""
    body = b""
    for name, file, content in parts:
        told = "" if file is None else f'; filename="{file}"'
        head = f'--edge\r\nContent-Disposition: form-data; name="{name}"{told}\r\n\r\n'
        body += head.encode() + content + b"\r\n"
    return body + b"--edge--\r\n"


FORM = {"Content_Type": "multipart/form-data; boundary=edge"}
TOLD = (("prompt", None, b"an owl"), ("steps", None, b"2"))


@pytest.mark.parametrize(
    "part",
    [
        ("image[]", "a.png", PLAIN),
        ("image[0]", "../../etc/passwd", PLAIN),
        ("image", None, address(PLAIN).encode()),
    ],
)
def test_an_image_of_a_form_has_several_names(server, part):
    assert settings(post(server, "/v1/images/edits", form(*TOLD, part), **FORM)).image


def test_a_form_of_thousands_of_parts_is_refused(server):
    for file in (None, "a.png"):
        many = form(*[(f"f{i}", file, b"") for i in range(1000)])
        assert "Too many" in refusal(post(server, "/v1/images/edits", many, **FORM))


def test_what_is_transparent_in_an_image_is_its_mask_unless_the_model_has_none(server):
    def drawn(image, *more):
        body = form(*TOLD, ("image", "a.png", image), *more)
        return settings(post(server, "/v1/images/edits", body, **FORM))

    assert drawn(half()).mask and drawn(half()).strength == 1
    for made in (
        drawn(half(), ("model", None, b"gpt-image-1")),
        drawn(png(Image.new("RGBA", (16, 16), "teal"))),
        drawn(PLAIN),
    ):
        assert not made.mask and made.strength == 0.6


def test_a_mask_of_the_images_shape_is_scaled_to_it(server):
    image, own = Image.new("RGB", (16, 16)), Image.open(io.BytesIO(half()))
    for size in ((32, 32), (8, 8)):
        mask = Image.open(io.BytesIO(half(size)))
        light = [
            as_grey(one).point(lambda grey: grey >= LIGHT) for one in (own, matched(mask, image))
        ]
        assert light[0].tobytes() == light[1].tobytes()
        parts = (("image", "a.png", PLAIN), ("mask", "m.png", half(size)))
        made = settings(post(server, "/v1/images/edits", form(*TOLD, *parts), **FORM))
        assert made.mask and made.strength == 1
    parts = (("image", "a.png", PLAIN), ("mask", "m.png", half((32, 16))))
    told = refusal(post(server, "/v1/images/edits", form(*TOLD, *parts), **FORM))
    assert "the mask is 32x16, its image 16x16" in told


@pytest.mark.parametrize(
    "text", ["[" * 20_000, '{"prompt": ["a", "b"]}', '{"prompt": 5}', "[]", "{", '{"prompt": ""}']
)
def test_settings_in_an_image_that_koala_did_not_write_are_no_prompt(server, text):
    told, file = PngInfo(), io.BytesIO()
    told.add_text("koala", text)
    Image.new("RGB", (16, 16)).save(file, "PNG", pnginfo=told)
    body = {"image": base64.b64encode(file.getvalue()).decode(), "steps": 2}
    assert settings(post(server, "/v1/images/variations", body)).prompt == "picture"


def chunk(kind: bytes, data: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + crc


def test_a_variation_of_a_huge_image_is_refused(server):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    huge = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    body = {"image": base64.b64encode(huge).decode()}
    assert "make it smaller" in refusal(post(server, "/v1/images/variations", body))


def test_an_image_of_a1111_may_stand_alone_and_is_never_fetched(server):
    asked = {**OF_A1111, "init_images": base64.b64encode(PLAIN).decode()}
    assert settings(post(server, "/sdapi/v1/img2img", asked)).image
    for given_image in ("http://127.0.0.1/a.png", "https://a.example/b.png"):
        told = refusal(post(server, "/sdapi/v1/img2img", asked | {"init_images": [given_image]}))
        assert "nothing is fetched here" in told
