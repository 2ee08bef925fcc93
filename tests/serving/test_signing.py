"""Images with a C2PA manifest, read back."""

import base64
import io
import json

import httpx2
import pytest
from PIL import Image

from koala.errors import UserError
from koala.generation import load, read_settings
from koala.serving.settings import Options, check
from koala.serving.signing import Signing
from toy import toy_pipeline
from toy_server import running

ASKED = {"prompt": "a fox", "steps": 2, "size": "16x16"}


def manifest(data: bytes, format: str):
    import c2pa

    found = json.loads(c2pa.Reader(f"image/{format}", io.BytesIO(data)).json())
    # A toy authority is in nobody's list; anything else would be a fault.
    assert [one["code"] for one in found["validation_status"]] == ["signingCredential.untrusted"]
    return found["manifests"][found["active_manifest"]]


def test_images_of_every_api_are_signed(signing_files, tmp_path):
    pipeline = load(toy_pipeline(tmp_path / "toy", architecture="koala"), "cpu")
    told = {"sign_key": signing_files[0], "sign_certificates": signing_files[1]}
    with running(pipeline, tmp_path / "data", **told) as server, httpx2.Client(
        base_url=server.url, timeout=120
    ) as client:  # fmt: skip
        images = []
        for format in ("png", "webp", "jpeg"):
            asked = {**ASKED, "output_format": format}
            answer = client.post("/v1/images/generations", json=asked).json()
            images.append((base64.b64decode(answer["data"][0]["b64_json"]), format))
        answer = client.post("/sdapi/v1/txt2img", json={**ASKED, "do_not_save_samples": True})
        images.append((base64.b64decode(answer.json()["images"][0]), "png"))
        link = client.post("/v1/images/generations", json={**ASKED, "response_format": "url"})
        images.append((client.get(link.json()["data"][0]["url"]).content, "png"))
    for data, format in images:
        signed = manifest(data, format)
        assert signed["signature_info"]["common_name"] == "server"
        assert "trainedAlgorithmicMedia" in json.dumps(signed["assertions"])
    assert read_settings(io.BytesIO(images[0][0])).prompt == "a fox"


@pytest.mark.parametrize("side", [8, 300])
def test_a_manifest_takes_a_few_kilobytes_whatever_the_image(signing_files, side):
    signing, file = Signing(*signing_files), io.BytesIO()
    Image.effect_noise((side, side), 50).save(file, "PNG")
    assert 0 < len(signing(file.getvalue(), "png")) - len(file.getvalue()) < 8 * 1024


def test_what_cannot_sign_is_refused_at_once(signing_files, tmp_path):
    key, chain = signing_files
    (tmp_path / "wrong").write_text("no key")
    wrong, nowhere = tmp_path / "wrong", tmp_path / "nowhere"
    for told, words in (
        ({"sign_key": key}, "go together"),
        ({"sign_key": wrong, "sign_certificates": chain}, "no private key"),
        ({"sign_key": key, "sign_certificates": wrong}, "cannot sign"),
        ({"sign_key": key, "sign_certificates": nowhere}, "cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            check(Options(**told))
