"""Drawing without PyTorch: from a model's OpenVINO form."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openvino")

import koala
from koala.cli import main
from koala.errors import UserError
from koala.generation import form
from koala.generation.light import LightPipeline
from koala.generation.loader import load
from koala.generation.opening import open_model
from koala.generation.samplers import SAMPLERS

_WITHOUT = """
import json, sys

class Refuse:
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers"):
            raise ImportError(f"{name} is refused")

sys.meta_path.insert(0, Refuse())
from koala.cli import main
status = main(sys.argv[1:])
print(json.dumps([status, "torch" in sys.modules]))
"""
PROMPTS = ["a fox, noto style", "a red (apple:1.4) " * 30]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that only these tests write to."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KOALA_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def model(cache, toy_sdxl, tmp_path_factory):
    """A toy model's folder, and its form."""
    folder = tmp_path_factory.mktemp("model") / "toy"
    shutil.copytree(toy_sdxl, folder)
    out = folder.with_name("toy-openvino")
    assert main(["export", str(folder), "--to", "openvino", "--out", str(out)]) == 0
    return folder, out


def pixels(image):
    return np.array(image, float)


@pytest.mark.parametrize("scheduler", [*SAMPLERS, "unipc-karras"])
def test_a_form_draws_what_pytorch_draws(model, scheduler):
    folder, out = model
    asked = {"steps": 3, "seed": 2**33, "scheduler": scheduler, "negative_prompt": "blue"}
    ours = LightPipeline(out)(PROMPTS, **asked)
    wanted = load(folder, "cpu")(PROMPTS, **asked)
    for one, other in zip(ours.images, wanted.images, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1  # of 255
        assert pixels(other).std() > 1
    assert ours.settings == wanted.settings


def test_previews_and_padding_to_other_batches_are_pytorchs(model):
    folder, out = model
    light, usual = LightPipeline(out), load(folder, "cpu")
    for pipeline in (light, usual):
        row = pipeline.begin(pipeline.requests("a fox", seed=1)[0])
        pipeline.shown = pixels(pipeline.preview(row))
    assert np.abs(light.shown - usual.shown).max() <= 1


def test_a_form_draws_where_pytorch_cannot_be_imported(model, tmp_path):
    _, out = model
    file = tmp_path / "fox.png"
    command = ["generate", "a fox", "--model", str(out), "--seed", "3", "--steps", "2"]
    ran = subprocess.run(
        [sys.executable, "-c", _WITHOUT, *command, "--out", str(file)],
        capture_output=True, encoding="utf-8", check=True,
    )  # fmt: skip
    assert json.loads(ran.stdout.splitlines()[-1]) == [0, False]
    with Image.open(file) as drawn:
        again = koala.load(out)("a fox", seed=3, steps=2).images[0]
        assert np.abs(pixels(drawn) - pixels(again)).max() <= 1


def test_a_form_is_served_where_pytorch_cannot_be_imported(model, tmp_path):
    _, out = model
    command = ["serve", "--model", str(out), "--port", "0", "--data", str(tmp_path)]

    def asked(place, **body):
        request = urllib.request.Request(
            place, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    with subprocess.Popen(
        [sys.executable, "-c", _WITHOUT, *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        try:
            ready = next(line for line in server.stderr if "is ready on" in line)
            place = f"{ready.split()[-1]}/v1/images/generations"
            drawn = asked(place, prompt="a fox", seed=3, num_inference_steps=2)["data"][0]
            url = ready.split()[-1] + "/sdapi/v1/img2img"
            with pytest.raises(urllib.error.HTTPError, match="400") as refused:
                asked(url, prompt="a fox", init_images=[drawn["b64_json"]])
            assert "without PyTorch" in json.load(refused.value)["error"]["message"]
        finally:
            server.terminate()
            ended = server.stdout.read().splitlines()[-1]
    assert json.loads(ended) == [0, False]
    with Image.open(io.BytesIO(base64.b64decode(drawn["b64_json"]))) as image:
        again = koala.load(out)("a fox", seed=3, steps=2).images[0]
        assert np.abs(pixels(image) - pixels(again)).max() <= 1


def test_a_drawing_with_openvino_leaves_a_form_and_changed_weights_do_not_use_it(model):
    folder, _ = model
    assert form.found(folder, "openvino") is None
    first = open_model(folder, "cpu", backend="openvino")
    assert not isinstance(first, LightPipeline)
    first.keep_form()
    second = open_model(folder, "cpu", backend="openvino")
    assert isinstance(second, LightPipeline) and second.name == first.name
    one, other = (each("a fox", seed=1, steps=2).images[0] for each in (first, second))
    assert np.abs(pixels(one) - pixels(other)).max() <= 1
    # a measurement's choice serves those who name no backend
    assert form.found(folder, "remembered") is None
    form.remember(folder, "openvino")
    assert form.found(folder, "remembered") == form.found(folder, "openvino") is not None
    form.remember(folder, "torch")
    assert form.found(folder, "remembered") is None
    # a LoRA, a plan and other dtypes are PyTorch's
    assert not isinstance(open_model(folder, "cpu", backend="openvino", dtype="fp32"), type(second))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert form.found(folder, "openvino") is None


@pytest.mark.parametrize("faster", ["openvino", "torch"])
def test_nobody_asked_and_what_was_measured_decides(model, cache, monkeypatch, faster):
    """The default takes the form exactly where it would run OpenVINO."""
    folder, _ = model
    monkeypatch.delenv("KOALA_BACKEND")
    lines = []
    drawn = load(folder, "cpu")  # measures, unless that is done
    drawn("a fox", steps=1, seed=0)
    drawn.keep_form()  # though transformers has hooked its encoders by now
    for file in (cache / "backends").glob("*.json"):
        verdict = json.loads(file.read_text()) | {"busy": False}
        verdict["seconds"] = {name: 1.0 if name == faster else 9.0 for name in verdict["seconds"]}
        file.write_text(json.dumps(verdict))
    load(folder, "cpu").keep_form()
    for backend in (None, "auto", "remembered"):
        opened = open_model(folder, "cpu", backend=backend, say=lines.append)
        assert isinstance(opened, LightPipeline) == (faster == "openvino")
        assert lines.pop().startswith(f"backend {faster} (")
    of_torch = open_model(folder, "cpu", of_requests=["embedding"])
    assert not isinstance(of_torch, LightPipeline)  # though the form is there
    monkeypatch.setenv("KOALA_BACKEND", "torch")
    assert not isinstance(open_model(folder, "cpu"), LightPipeline)
    monkeypatch.setenv("KOALA_BACKEND", "openvino")
    load(folder, "cpu").keep_form()
    assert isinstance(open_model(folder, "cpu"), LightPipeline)


def test_what_a_form_cannot_do_is_refused(model, tmp_path):
    _, out = model
    light = LightPipeline(out)
    with pytest.raises(UserError, match="without PyTorch, which starting from an image needs"):
        light("a fox", image=Image.new("RGB", (64, 64)), steps=2)
    for options in ({"vram": 4}, {"compile": True}, {"lora": {"x": 1.0}}, {"backend": "torch"}):
        with pytest.raises(UserError, match=f"leave out --{next(iter(options))}"):
            open_model(out, **options)
    broken = tmp_path / "broken"
    shutil.copytree(out, broken)
    (broken / "vae_decoder" / "openvino_model.bin").unlink()
    with pytest.raises(UserError, match=r"lacks vae_decoder/openvino_model\.bin"):
        LightPipeline(broken)
    (broken / form.FORM).write_text("{}")
    with pytest.raises(UserError, match="another version"):
        LightPipeline(broken)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--dtype", "fp16"], "openvino is written in fp32, bf16"),
        (["--push-to-hub", "a/b"], "does not take '--push-to-hub'"),
    ],
)
def test_an_export_is_checked_first(model, tmp_path, capsys, more, says):
    folder, _ = model
    command = ["export", str(folder), "--to", "openvino", "--out", str(tmp_path / "x"), *more]
    assert main(command) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "x").exists()
