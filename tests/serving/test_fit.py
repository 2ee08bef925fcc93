"""Sizes that a model was not made for: drawn at its own area, resized, and said so."""

import base64
import io
import json

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from koala.generation import load, read_settings
from koala.generation.validation import is_far
from koala.serving.fit import native_size
from toy import toy_pipeline
from toy_server import running


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = toy_pipeline(tmp_path_factory.mktemp("toy") / "toy", architecture="koala")
    data = tmp_path_factory.mktemp("data")
    with running(load(folder, "cpu"), data, fit=True) as server, httpx2.Client(
        base_url=server.url, timeout=60
    ) as client:  # fmt: skip
        yield client


def draw(client, **asked):
    answer = client.post("/v1/images/generations", json={"prompt": "a", "steps": 1, **asked})
    assert answer.status_code == 200, answer.text
    png = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return answer.json(), Image.open(io.BytesIO(png)), read_settings(io.BytesIO(png))


@pytest.mark.parametrize(
    ("size", "drawn"), [("512x512", (64, 64)), ("1024x256", (128, 32)), ("16x16", (64, 64))]
)
def test_a_far_size_is_drawn_at_the_native_area_and_resized(client, size, drawn):
    answer, image, settings = draw(client, size=size)
    assert "{}x{}".format(*image.size) == size == answer["size"] == settings.enlarged
    assert (settings.width, settings.height) == drawn
    assert answer["note"].startswith("drawn at {}x{}".format(*drawn))


def test_a_near_size_is_drawn_as_it_is(client):
    answer, image, settings = draw(client, size="64x72")
    assert image.size == (64, 72) and settings.enlarged == "" and answer["note"] is None


def test_without_fit_a_far_size_is_drawn_as_asked_and_said(client):
    answer, image, settings = draw(client, size="128x128", fit=False)
    assert image.size == (128, 128) == (settings.width, settings.height)
    assert answer["note"] == "the model was made for 64x64, and draws worse at 128x128"


def test_automatic1111s_default_size_is_drawn(client):
    asked = {"prompt": "a", "width": 512, "height": 512, "steps": 1}
    answer = client.post("/sdapi/v1/txt2img", json=asked).json()
    image = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
    info = json.loads(answer["info"])
    assert image.size == (512, 512) == (info["width"], info["height"])
    assert info["note"] == "drawn at 64x64, which the model was made for, and resized to 512x512"


def test_an_edit_without_a_size_has_the_native_area(client):
    file = io.BytesIO()
    Image.new("RGB", (1024, 512), "teal").save(file, "PNG")
    form = {"prompt": "a", "steps": "2"}
    answer = client.post("/v1/images/edits", data=form, files={"image": file.getvalue()})
    assert answer.json()["size"] == "88x48"


def test_a_job_is_resized_in_the_gallery(client):
    job = client.post("/v1/jobs", json={"prompt": "a", "steps": 1, "size": "256x256"}).json()
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
        list(events.iter_lines())
    (picture,) = client.get(f"/v1/jobs/{job['id']}").json()["pictures"]
    assert picture["settings"]["enlarged"] == "256x256"
    assert Image.open(io.BytesIO(client.get(picture["url"]).content)).size == (256, 256)


@given(st.integers(64, 512), st.integers(64, 512))
def test_a_fitted_size_is_one_the_model_was_made_for(width, height):
    fitted = native_size((width * 8, height * 8), 1024, 8)
    assert all(side % 8 == 0 for side in fitted) and not is_far(fitted, 1024)
