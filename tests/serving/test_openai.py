"""OpenAI's images API, asked by OpenAI's own client over a real connection."""

import base64
import http.client
import io
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qsl, urlsplit
from urllib.request import urlopen

import httpx2
import numpy as np
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from koala.errors import UserError
from koala.generation import load, read_settings
from koala.serving.links import SECONDS, Links
from koala.serving.settings import Limits, Options, check, quality_steps
from stepping import assert_near
from toy import TEXT_WIDTHS, toy_pipeline
from toy_lora import toy_base, toy_lora
from toy_server import running

SIZE = "32x16"
LIMITS = Limits(max_batch=4, steps=500, rate=0, images=3)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return load(toy_pipeline(tmp_path_factory.mktemp("toy") / "toy", architecture="koala"), "cpu")


@pytest.fixture(scope="module")
def server(pipeline, tmp_path_factory):
    loras = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("ink", "oil")):
        toy_lora(loras / f"{name}.safetensors", toy_base(pipeline.unet), seed=seed)
    toy_lora(loras.parent / "outside.safetensors", toy_base(pipeline.unet))
    data = tmp_path_factory.mktemp("data")
    embeddings = tmp_path_factory.mktemp("embeddings")
    save_file(
        {"clip_l": torch.ones(2, TEXT_WIDTHS[0]), "clip_g": torch.ones(2, TEXT_WIDTHS[1])},
        embeddings / "zork.safetensors",
    )
    save_file({"emb_params": torch.ones(2, 768)}, embeddings / "old.safetensors")
    folders = {"lora_dir": loras, "embedding_dir": embeddings}
    names = {"model_aliases": ("gpt-image-1", "dall-e-3"), "quality_steps": (("low", 2),)}
    with running(pipeline, data, LIMITS, **folders, **names) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0, timeout=60)


def opened(item) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json)))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def post(server, path: str, body: bytes, kind: str = "application/json"):
    """(status, parsed answer)."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.request("POST", path, body, {"Content-Type": kind})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def number_of(service, name: str) -> float:
    """A metric as Prometheus would read it."""
    return service.metrics.registry.get_sample_value(name)


def until(holds) -> None:
    """Waits until it holds; fails after some seconds."""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


# --- generations ----------------------------------------------------------------------------


def test_a_image_is_the_pipelines_own_and_carries_its_settings(client, pipeline):
    asked = {"seed": 7, "steps": 3, "guidance": 4.5, "negative_prompt": "blur"}
    answer = client.images.generate(
        prompt="a red fox", size=SIZE, extra_body={**asked, "scheduler": "dpm++2m"}
    )
    (item,) = answer.data
    own = pipeline("a red fox", size=SIZE, scheduler="dpm++2m", **asked)
    assert_near(opened(item), own.images[0])
    assert read_settings(io.BytesIO(base64.b64decode(item.b64_json))) == own.settings[0]
    assert answer.size == SIZE and answer.output_format == "png" and answer.background == "opaque"
    assert answer.usage.output_tokens == 32 * 16 // 64
    assert answer.usage.total_tokens == answer.usage.output_tokens + 3


def test_several_images_have_seeds_that_follow(client):
    answer = client.images.generate(prompt="a", n=3, size=SIZE, extra_body={"seed": 5, "steps": 1})
    made = [json.loads(opened(item).info["koala"]) for item in answer.data]
    assert [one["seed"] for one in made] == [5, 6, 7]


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_other_formats_can_be_compressed(client, kind):
    asked = {"prompt": "a", "size": "64x64", "output_format": kind, "extra_body": {"steps": 1}}
    small, large = (
        client.images.generate(**asked, output_compression=quality) for quality in (1, 100)
    )
    assert opened(small.data[0]).format == kind.upper() and small.output_format == kind
    assert len(small.data[0].b64_json) < len(large.data[0].b64_json)


def test_fields_without_effect_are_taken_and_size_may_be_auto(client, pipeline):
    answer = client.images.generate(
        prompt="a", model=pipeline.name, size="auto", quality="high", style="vivid", user="me",
        moderation="low", background="opaque", response_format="b64_json",
        extra_body={"safety_identifier": "x", "steps": 1},
    )  # fmt: skip
    assert answer.size == "64x64"


@pytest.mark.parametrize(
    ("said", "param", "words"),
    [
        ({"colour": "red"}, "colour", "unknown field"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": "many"}, "n", "valid integer"),
        ({"n": 4}, None, "n is 4: this server allows at most 3"),
        ({"steps": 501}, None, "steps is 501: this server allows at most 500"),
        ({"steps": 0}, None, "steps is 0"),
        ({"size": "big"}, None, "is not WIDTHxHEIGHT"),
        ({"size": "1024x1024"}, None, "allows at most 16,384 pixels"),
        ({"size": "33x16"}, None, "multiples of 8"),
        ({"response_format": "gif"}, "response_format", "allowed are b64_json and url"),
        ({"response_format": "url", "stream": True}, "response_format", "not streamed"),
        ({"cfg_scale": 2, "guidance": 2}, None, "give one"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"output_format": "gif"}, "output_format", "'png', 'webp' or 'jpeg'"),
        ({"output_compression": 50}, "output_compression", "applies to webp and jpeg"),
        ({"partial_images": 2}, "partial_images", "needs stream"),
        ({"partial_images": 4, "stream": True}, "partial_images", "less than or equal to 3"),
        ({"quality": "best"}, "quality", "'auto'"),
        ({"guidance": 1000}, None, "guidance is 1000"),
        ({"scheduler": "magic"}, None, "magic"),
        ({"seed": -2}, None, "seed is -2"),
        ({"prompt": " "}, None, "the prompt is empty"),
        ({"prompt": "\ud800"}, None, "half a character"),
        ({"\ud800": 1}, None, "half a character"),
        ({"lora": [{"name": "../outside"}]}, None, "choose ink, oil"),
        ({"lora": [{"name": "ink"}, {"name": "ink"}]}, None, "named once"),
        ({"lora": [{"name": "ink", "scale": 1000}]}, None, "LoRA scale"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(server, said, param, words):
    status, answer = post(
        server, "/v1/images/generations", json.dumps({"prompt": "a", **said}).encode()
    )
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == param and words in answer["error"]["message"]


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="this server has"):
        client.images.generate(prompt="a", model="dall-e-2")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"prompt": 1}', b"\xff", b"9" * 9999]
)
def test_a_body_that_is_no_request_is_refused(server, body):
    status, answer = post(server, "/v1/images/generations", body)
    assert status == 400 and answer["error"]["message"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
FIELDS = (
    "prompt", "n", "size", "response_format", "output_format", "output_compression", "background",
    "quality", "stream", "partial_images", "seed", "steps", "guidance", "guidance_until",
    "negative_prompt", "scheduler", "lora", "user",
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING))
def test_whatever_is_sent_is_the_clients_mistake_or_drawn(server, said):
    status, answer = post(server, "/v1/images/generations", json.dumps(said).encode())
    assert status in (200, 400) and ("data" in answer) == (status == 200)


# --- streams --------------------------------------------------------------------------------


@pytest.mark.parametrize("partial_images", [0, 1, 2, 3])
def test_a_stream_shows_partial_images_and_then_the_image(client, partial_images):
    asked = {"prompt": "an owl", "size": SIZE, "extra_body": {"seed": 3, "steps": 6}}
    events = list(client.images.generate(**asked, stream=True, partial_images=partial_images))
    *partial, last = events
    assert [event.type for event in partial] == ["image_generation.partial_image"] * partial_images
    assert [event.partial_image_index for event in partial] == list(range(partial_images))
    assert last.type == "image_generation.completed" and last.usage.total_tokens > 0
    assert last.size == SIZE and last.created_at
    plain = client.images.generate(**asked)
    assert_near(opened(last), opened(plain.data[0]))
    assert all(opened(event).size == opened(last).size for event in partial)
    assert len({event.b64_json for event in events}) == len(events)


def test_a_stream_that_fails_says_so(client, server):
    """Somebody else, here the service itself, cancels the picture."""
    with client.images.generate(
        prompt="a", size=SIZE, stream=True, partial_images=1, extra_body={"steps": 500}
    ) as stream:
        next(iter(stream))
        server.service.cancel()
        with pytest.raises(openai.APIError, match="was cancelled"):
            list(stream)


# --- edits ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo():
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 255, (16, 32, 3), np.uint8))


def test_an_edit_is_the_pipelines_own(client, pipeline, photo):
    asked = {"seed": 1, "steps": 4, "strength": 0.5}
    answer = client.images.edit(image=png(photo), prompt="a", extra_body=asked)
    own = pipeline("a", image=photo, **asked)
    assert_near(opened(answer.data[0]), own.images[0])
    assert answer.usage.input_tokens_details.image_tokens == 32 * 16 // 64


def test_what_is_transparent_in_the_mask_is_painted_anew(client, pipeline, photo):
    mask = Image.new("RGBA", photo.size, "black")
    mask.paste((0, 0, 0, 0), (16, 0, 32, 16))
    answer = client.images.edit(
        image=png(photo), mask=png(mask), prompt="a", extra_body={"seed": 1, "steps": 4}
    )
    light = Image.new("L", photo.size)
    light.paste(255, (16, 0, 32, 16))
    own = pipeline("a", image=photo, mask=light, strength=1.0, seed=1, steps=4)
    assert_near(opened(answer.data[0]), own.images[0])


def test_an_edit_streams_events_of_its_own_name(client, photo):
    events = list(
        client.images.edit(
            image=png(photo), prompt="a", stream=True, partial_images=1, extra_body={"steps": 8}
        )
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_a_large_image_is_drawn_at_a_size_that_fits(client):
    photo = Image.new("RGB", (400, 300), "teal")
    answer = client.images.edit(image=png(photo), prompt="a", extra_body={"steps": 2})
    width, height = map(int, answer.size.split("x"))
    assert 0.9 * 16384 < width * height <= 16384 and abs(width / height - 4 / 3) < 0.1


@pytest.mark.parametrize(
    ("files", "said", "words"),
    [
        ({"image": b"no picture"}, {}, "image cannot be read as an image"),
        ({}, {}, "image is missing"),
        ({"image": None, "mask": None}, {}, "no transparency"),
        ({"image": None}, {"colour": "red"}, "unknown field 'colour'"),
        ({"image": None}, {"n": "many"}, "valid integer"),
        ({"image": None}, {"lora": "ink"}, "lora is not valid JSON"),
        ({"image": None}, {"mask": "text"}, "mask: it must be a file"),
        ({"prompt": b"a file"}, {}, "prompt: it must be text"),
    ],
)
def test_edits_that_are_refused(server, photo, files, said, words):
    parts = {name: png(photo) if data is None else data for name, data in files.items()}
    fields = {name: text.encode() for name, text in {"prompt": "a", **said}.items()}
    body = b""
    for name, data in {**fields, **parts}.items():
        file = f'; filename="{name}"' if name in parts else ""
        head = f'--edge\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        body += head.encode() + data + b"\r\n"
    kind = "multipart/form-data; boundary=edge"
    status, answer = post(server, "/v1/images/edits", body + b"--edge--\r\n", kind)
    assert status == 400 and words in answer["error"]["message"]


def test_several_images_to_start_from_are_refused(client, photo):
    with pytest.raises(openai.BadRequestError, match="image: it is given twice"):
        client.images.edit(image=[png(photo), png(photo)], prompt="a")


# --- LoRAs, models --------------------------------------------------------------------------


def test_loras_change_the_images_that_name_them_and_no_other(client, server, pipeline, photo):
    asked = {"seed": 2, "steps": 2, "guidance": 2.0}
    loras = [[], [{"name": "ink", "scale": 0.8}], [{"name": "oil"}, {"name": "ink", "scale": -1}]]

    def draw(lora):
        body = {**asked, "lora": lora}
        answer = client.images.generate(prompt="a", size=SIZE, extra_body=body)
        return opened(answer.data[0])

    with ThreadPoolExecutor(3) as pool:
        images = list(pool.map(draw, loras))
    folder = server.service.lora_folder
    for image, lora in zip(images, loras, strict=True):
        files = {folder / f"{one['name']}.safetensors": one.get("scale", 1.0) for one in lora}
        own = pipeline("a", size=SIZE, lora=files, **asked)
        assert_near(image, own.images[0])
        assert json.loads(image.info["koala"])["loras"] == [list(p) for p in own.settings[0].loras]
    assert len({image.tobytes() for image in images}) == 3
    tagged = client.images.generate(prompt="a <lora:ink:0.8>", size=SIZE, extra_body=asked)
    assert_near(opened(tagged.data[0]), images[1])
    edit = client.images.edit(
        image=png(photo), prompt="a", extra_body={"lora": loras[1], "steps": 2, "strength": 1}
    )
    assert json.loads(opened(edit.data[0]).info["koala"])["loras"] == [["ink", 0.8]]


def test_embeddings_of_the_servers_folder_are_named_in_prompts(client, server, pipeline):
    folder, asked = server.service.embedding_folder, {"seed": 2, "steps": 2}
    answer = client.images.generate(prompt="a (zork:1.2)", size=SIZE, extra_body=asked)
    own = pipeline("a (zork:1.2)", size=SIZE, embedding=[folder / "zork.safetensors"], **asked)
    assert_near(opened(answer.data[0]), own.images[0])
    assert json.loads(opened(answer.data[0]).info["koala"])["embeddings"] == ["zork"]
    with pytest.raises(openai.BadRequestError, match=r"is a textual inversion of SD 1\.5"):
        client.images.generate(prompt="an old fox", size=SIZE, extra_body=asked)
    with urlopen(f"{server.url}/sdapi/v1/embeddings") as listed:
        found = json.load(listed)
    assert [*found["loaded"]] == ["zork"] and [*found["skipped"]] == ["old"]
    zork = found["loaded"]["zork"]
    assert (zork["vectors"], zork["shape"]) == (2, sum(TEXT_WIDTHS[:2]))


def test_models(client, pipeline):
    found = client.models.list().data[0]
    assert found.id == pipeline.name and found.loras == ["ink", "oil"]
    assert client.models.retrieve(pipeline.name).id == pipeline.name
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


# --- clients that go ------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_ends_when_its_client_goes(server, stream):
    service = server.service
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    body = {"prompt": "a", "size": SIZE, "steps": 500, "n": 3, "stream": stream}
    connection.request(
        "POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"}
    )
    until(lambda: number_of(service, "koala_active_pictures") == 3)
    before = number_of(service, "koala_cancelled_total")
    connection.close()
    until(lambda: number_of(service, "koala_active_pictures") == 0)
    assert number_of(service, "koala_cancelled_total") == before + 3


def test_the_images_of_synchronous_requests_are_in_the_gallery(client, server):
    answer = client.images.generate(prompt="kept", size=SIZE, extra_body={"steps": 1})
    gallery = server.app.state.gallery
    server.app.state.gallery_writer.flush()
    (image,) = gallery.page(1)
    assert image.settings["prompt"] == "kept"
    assert gallery.png(image.id) == base64.b64decode(answer.data[0].b64_json)


# --- as other clients ask -------------------------------------------------------------------


def test_an_image_can_be_had_at_an_address_that_needs_no_key(client, server):
    asked = {"prompt": "a", "size": SIZE, "extra_body": {"steps": 1, "seed": 3}}
    (item,) = client.images.generate(**asked, response_format="url").data
    assert item.url.startswith(server.url) and item.b64_json is None
    found = httpx2.get(item.url)
    assert found.headers["content-type"] == "image/png"
    assert read_settings(io.BytesIO(found.content)).seed == 3
    head, _, signature = item.url.rpartition("=")
    later = re.sub(r"expires=(\d)", r"expires=9\1", item.url)
    for forged in (f"{head}={'0' * len(signature)}", head, later, item.url.split("?")[0]):
        assert httpx2.get(forged).status_code == 404
    assert httpx2.get(f"{head}=\u00e9").status_code == 404


def test_addresses_expire():
    now = [1000.0]
    links = Links(lambda: now[0])
    query = dict(parse_qsl(urlsplit(links.path("a" * 32)).query))
    told = ("a" * 32, int(query["expires"]), query["signature"])
    assert links.good(*told) and not links.good("b" * 32, *told[1:])
    now[0] += SECONDS
    assert not links.good(*told) and not Links(lambda: 1000.0).good(*told)


def test_other_names_of_the_field_are_understood(server, client):
    asked = {"prompt": "a", "n": 1.0, "width": 32, "height": 16, "seed": -1, "steps": 2.0,
             "guidance_scale": 2.5, "sampler": "ddim", "model": "gpt-image-1"}  # fmt: skip
    status, answer = post(server, "/v1/images/generations/", json.dumps(asked).encode())
    assert status == 200, answer
    made = json.loads(
        Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).info["koala"]
    )
    assert (made["width"], made["height"], made["steps"]) == (32, 16, 2)
    assert (made["guidance"], made["sampler"]) == (2.5, "DDIM") and made["seed"] >= 0
    assert [one.id for one in client.models.list().data][1:] == ["gpt-image-1", "dall-e-3"]
    assert client.models.retrieve("dall-e-3").id == "dall-e-3"


@pytest.mark.parametrize(("quality", "steps"), [("low", 2), ("high", 10), (None, 10)])
def test_a_table_maps_quality_to_steps(client, quality, steps):
    asked = {} if quality is None else {"quality": quality}
    (item,) = client.images.generate(prompt="a", size=SIZE, **asked).data
    assert json.loads(opened(item).info["koala"])["steps"] == steps


def test_a_variation_starts_from_the_image_and_its_own_prompt(client, server):
    (first,) = client.images.generate(prompt="a fox", size=SIZE, extra_body={"steps": 2}).data
    image = base64.b64decode(first.b64_json)
    (item,) = client.images.create_variation(image=image, size=SIZE, n=1).data
    made = json.loads(opened(item).info["koala"])
    assert made["prompt"] == "a fox" and made["image"] and made["strength"] == 0.6
    plain = png(Image.new("RGB", (32, 16), "teal"))
    (item,) = client.images.create_variation(image=plain, extra_body={"steps": 2}).data
    assert opened(item).size == (32, 16)


@pytest.mark.parametrize(
    "told",
    [
        {"quality_steps": quality_steps("low=4,high=900")},
        {"allow_origins": ("*",)},
        {"allow_origins": ("https://a.example/path",)},
        {"trusted_proxies": ("proxy.example",)},
    ],
)
def test_options_that_make_no_sense_are_refused(told):
    with pytest.raises(UserError):
        check(Options(**told))


def test_a_table_of_steps_names_known_qualities():
    assert quality_steps("low=4, hd=30") == (("low", 4), ("hd", 30)) and quality_steps(None) == ()
    for wrong in ("best=4", "low", "low=many"):
        with pytest.raises(UserError, match="such as low=4"):
            quality_steps(wrong)
