"""Programs that people point at such a server: the package itself where it is installed, else the
requests that it sends with its defaults."""

import asyncio
import base64
import io
import json
import shutil
import subprocess
from functools import partial

import httpx2
import openai
import pytest
from PIL import Image

from koala.generation import load, read_settings
from koala.serving.settings import Limits
from toy import toy_pipeline
from toy_server import running

KEY = {"api_key": "none"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = toy_pipeline(tmp_path_factory.mktemp("toy") / "toy", architecture="koala")
    data, told = tmp_path_factory.mktemp("data"), {"fit": True}
    told |= {
        "model_aliases": ("gpt-image-1", "dall-e-3"),
        "allow_origins": ("https://lite.example",),
        "allow_hosts": ("host.docker.internal",),
    }
    with running(load(folder, "cpu"), data, Limits(max_batch=4, rate=0), **told) as found:
        yield found


@pytest.fixture
def web(server):
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client


def picture(size=(64, 64)) -> io.BytesIO:
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(file, "PNG")
    file.name = "image.png"
    file.seek(0)
    return file


def as_text(size=(64, 64)) -> str:
    return base64.b64encode(picture(size).getvalue()).decode()


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def drawn(answer) -> list[Image.Image]:
    """The images of an answer of either API."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    texts = body["images"] if "images" in body else [one["b64_json"] for one in body["data"]]
    return [opened(text) for text in texts]


# --- packages -------------------------------------------------------------------------------


def test_openai(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", max_retries=0, **KEY)
    made = client.images.generate(model="gpt-image-1", prompt="a fox", size="1024x1024")
    assert opened(made.data[0].b64_json).size == (1024, 1024)
    edited = client.images.edit(image=picture((256, 256)), prompt="an owl", model="gpt-image-1")
    assert opened(edited.data[0].b64_json).size == (64, 64)  # the native area
    varied = client.images.create_variation(image=picture(), n=2, size="256x256")
    assert [opened(one.b64_json).size for one in varied.data] == [(256, 256)] * 2
    linked = client.images.generate(model="dall-e-3", prompt="a fox", response_format="url")
    assert httpx2.get(linked.data[0].url).content.startswith(b"\x89PNG")


def test_webuiapi(server):
    webuiapi = pytest.importorskip("webuiapi")
    host, port = server.url.removeprefix("http://").split(":")
    api = webuiapi.WebUIApi(host=host, port=int(port))
    assert api.txt2img(prompt="a fox").image.size == (512, 512)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    asked = {"images": [Image.open(picture())], "prompt": "an owl", "mask_image": mask}
    assert api.img2img(**asked, width=64, height=64, steps=3).image.size == (64, 64)
    asked = {"enable_hr": True, "width": 64, "height": 64, "steps": 3, "scheduler": "karras"}
    assert api.txt2img(prompt="a fox", **asked).image.size == (128, 128)
    lists = ("samplers", "schedulers", "sd_vae", "upscalers", "latent_upscale_modes", "loras",
             "sd_models", "hypernetworks", "face_restorers", "realesrgan_models", "prompt_styles",
             "embeddings", "memory", "scripts", "progress", "cmd_flags", "options")  # fmt: skip
    for name in lists:
        getattr(api, f"get_{name}")()
    for name in ("refresh_checkpoints", "interrupt", "skip", "util_wait_for_ready"):
        getattr(api, name)()
    assert "a fox" in str(api.png_info(api.txt2img(prompt="a fox", steps=2).image).info)
    small = Image.open(picture((32, 32)))
    larger = api.extra_single_image(image=small, upscaler_1="Lanczos", upscaling_resize=2)
    assert larger.image.size == (64, 64)
    api.util_set_model(api.util_get_current_model())
    with pytest.raises(RuntimeError, match="has no model that describes images"):
        api.interrogate(image=small)


def test_litellm(server, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    told = {"model": "openai/gpt-image-1", "api_base": f"{server.url}/v1", **KEY}
    made = litellm.image_generation(prompt="a fox", n=2, size="1024x1024", **told)
    assert [opened(one["b64_json"]).size for one in made.data] == [(1024, 1024)] * 2
    assert litellm.image_edit(image=picture(), prompt="an owl", **told).data[0].b64_json


def test_langchain(server):
    module = pytest.importorskip("langchain_community.utilities.dalle_image_generator")
    tool = module.DallEAPIWrapper(base_url=f"{server.url}/v1", model="dall-e-3", **KEY)
    assert httpx2.get(tool.run("a fox")).content.startswith(b"\x89PNG")


def test_image_generation_mcp(server, monkeypatch):
    pytest.importorskip("image_generation_mcp")
    from image_generation_mcp.providers import openai as of_openai
    from image_generation_mcp.providers import sd_webui
    from image_generation_mcp.providers.types import InputImage

    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    image = InputImage(picture((256, 256)).getvalue(), "image/png")

    def size(provider, **told):
        made = asyncio.run(provider().generate("a fox", negative_prompt="blur", **told))
        return Image.open(io.BytesIO(made.image_data)).size

    gpt = partial(of_openai.OpenAIImageProvider, "none", "gpt-image-1")
    dalle = partial(of_openai.OpenAIImageProvider, "none", "dall-e-3")
    webui = partial(sd_webui.SdWebuiImageProvider, server.url)
    assert size(gpt) == size(dalle) == (1024, 1024)
    assert size(gpt, aspect_ratio="3:2", reference_images=[image]) == (1536, 1024)
    assert size(webui) == size(webui, reference_images=[image]) == (768, 768)


NPM = """
const fs = require("fs"), OpenAI = require("openai");
const client = new OpenAI({baseURL: process.argv[1] + "/v1", apiKey: "none", maxRetries: 0});
const {images} = client, told = {model: "gpt-image-1", prompt: "a fox", size: "64x64", n: 1};
(async () => {
  const made = [(await images.generate(told)).data[0].b64_json];
  const image = fs.createReadStream(process.argv[2]), asked = {model: "gpt-image-1"};
  made.push((await images.edit({...told, image})).data[0].b64_json);
  for await (const event of await images.generate({...told, stream: true, partial_images: 1}))
    made.push(event.b64_json);
  const tools = [{type: "image_generation", size: "64x64"}];
  const answer = await client.responses.create({...asked, input: "a fox", tools});
  made.push(answer.output[0].result);
  console.log(JSON.stringify(made));
})();
"""


def test_openai_of_npm(server, tmp_path):
    """`npm install openai` in a folder, and NODE_PATH=FOLDER/node_modules."""
    node = shutil.which("node")
    if node is None or subprocess.run([node, "-e", "require('openai')"], check=False).returncode:
        pytest.skip("node has no package openai")
    (tmp_path / "image.png").write_bytes(picture().getvalue())
    command = [node, "-e", NPM, server.url, str(tmp_path / "image.png")]
    told = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert [opened(text).size for text in told] == [(64, 64)] * 5


# --- requests -------------------------------------------------------------------------------

SILLY_TAVERN = {
    "url": "http://x", "auth": "a:b", "prompt": "a fox", "negative_prompt": "blur",
    "sampler_name": "DPM++ 2M", "scheduler": "karras", "steps": 20, "cfg_scale": 7, "width": 512,
    "height": 512, "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent",
    "hr_scale": 2, "hr_additional_modules": [], "denoising_strength": 0.7, "save_images": True,
    "hr_second_pass_steps": 0, "send_images": True, "do_not_save_grid": False, "seed": None,
    "do_not_save_samples": False, "override_settings": {"CLIP_stop_at_last_layers": 1},
    "override_settings_restore_afterwards": True, "clip_skip": 1,
}  # fmt: skip
REQUESTS = {  # with their defaults
    "SillyTavern": ("/sdapi/v1/txt2img", SILLY_TAVERN, (512, 512)),
    "Open WebUI": (
        "/sdapi/v1/txt2img",
        {"prompt": "a fox", "batch_size": 1, "width": 512, "height": 512, "steps": 50},
        (512, 512),
    ),
    "Open WebUI, OpenAI engine": (
        "/v1/images/generations",
        {"model": "dall-e-3", "prompt": "a fox", "n": 1, "size": "512x512",
         "response_format": "b64_json"},
        (512, 512),
    ),
    "LibreChat, Stable Diffusion": (
        "/sdapi/v1/txt2img",
        {"prompt": "a fox", "negative_prompt": "blur", "cfg_scale": 4.5, "steps": 22,
         "width": 1024, "height": 1024},
        (1024, 1024),
    ),
    "LibreChat, image_gen_oai": (
        "/v1/images/generations",
        {"model": "gpt-image-1", "prompt": "a fox", "size": "1024x1024", "quality": "auto",
         "background": "auto", "n": 1},
        (1024, 1024),
    ),
    "image-generation-mcp, SD WebUI": (
        "/sdapi/v1/txt2img",
        {"prompt": "a fox", "width": 768, "height": 768, "steps": 30, "cfg_scale": 7.0,
         "sampler_name": "DPM++ 2M", "scheduler": "Karras", "negative_prompt": ""},
        (768, 768),
    ),
    "image-generation-mcp, OpenAI": (
        "/v1/images/generations",
        {"model": "gpt-image-1", "prompt": "a fox", "background": "opaque", "n": 1,
         "output_format": "png", "quality": "auto", "size": "1024x1024"},
        (1024, 1024),
    ),
    "numbers as floats": (
        "/v1/images/generations",
        {"prompt": "a fox", "n": 1.0, "seed": -1, "num_inference_steps": 3, "guidance_scale": 2.0,
         "size": "64x64"},
        (64, 64),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_default_requests_draw_what_is_asked_for(web, name):
    path, asked, size = REQUESTS[name]
    (image,) = drawn(web.post(path, json=asked))
    assert image.size == size
    image.fp.seek(0)
    settings = read_settings(image.fp)
    assert settings.width == 64  # the native area, enlarged
    if asked.get("scheduler", "").lower() == "karras":
        assert (settings.sampler, settings.schedule) == ("DPM++ 2M", "karras")


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/sdapi/v1/txt2img", {"width": 500, "height": 333}),
        ("/sdapi/v1/txt2img", {"width": 66, "height": 61}),
        ("/v1/images/generations", {"size": "1170x2532"}),
    ],
)
def test_sizes_of_any_number_of_pixels_are_drawn(web, path, asked):
    (image,) = drawn(web.post(path, json={"prompt": "a fox", "steps": 2, **asked}))
    assert image.size == tuple(asked.values()) or "{}x{}".format(*image.size) == asked["size"]


NEIGHBOURS = {
    "ComfyUI's name of a sampler": {"sampler_name": "dpmpp_2m", "scheduler": "karras"},
    "Simple": {"scheduler": "Simple"},
    "payload of the web UI": {
        "alwayson_scripts": {
            "API payload": {"args": []},
            "Refiner": {"args": [False, "", 0.8]},
            "Sampler": {"args": [3, "DPM++ 2M", "Karras"]},
            "Seed": {"args": [7, False, -1, 0, 0, 0]},
            "Soft Inpainting": {"args": [False, 1, 0.5, 4, 0, 0.5, 2]},
        }
    },
    "ADetailer without models": {
        "alwayson_scripts": {"ADetailer": {"args": [True, False, {"ad_model": "None"}]}}
    },
    "styles": {"styles": [""]},
    "fields of other programs": {"distilled_cfg_scale": 3.5, "hr_additional_modules": []},
    "texts for numbers": {"steps": "3", "seed": "-1", "cfg_scale": "7"},
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_what_other_programs_of_the_kind_send_draws(web, name):
    asked = {"prompt": "a fox", "steps": 3, "width": 64, "height": 64, **NEIGHBOURS[name]}
    (image,) = drawn(web.post("/sdapi/v1/txt2img", json=asked))
    image.fp.seek(0)
    settings = read_settings(image.fp)
    assert settings.steps == 3
    if name.startswith(("ComfyUI", "payload")):
        assert (settings.sampler, settings.schedule) == ("DPM++ 2M", "karras")
    assert name != "payload of the web UI" or settings.seed == 7


@pytest.mark.parametrize("asked", [{"args": [True, "a"]}, {"args": [True]}, {"args": "x"}])
def test_a_script_that_is_on_is_refused(web, asked):
    for name in ("ADetailer", "Sampler", "Seed"):
        body = {"prompt": "a fox", "alwayson_scripts": {name: asked}}
        answer = web.post("/sdapi/v1/txt2img", json=body)
        assert answer.status_code == 400 and name in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "asked",
    [
        {"num_inference_steps": 3, "steps": None},
        {"steps": 3, "sampler_name": "Euler a", "num_images": 1, "image_size": "64x64"},
        {"steps": 3.0, "batch_size": 1, "width": 64.0, "height": 64.0, "size": None},
    ],
)
def test_names_of_other_servers_draw_over_openais_api(web, asked):
    (image,) = drawn(web.post("/v1/images/generations", json={"prompt": "a fox", **asked}))
    image.fp.seek(0)
    assert image.size == (64, 64) and read_settings(image.fp).steps == 3


def test_curl(server, tmp_path):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    told = ["-H", "Content-Type: application/json", "-d", '{"prompt": "a fox", "steps": 2}']
    command = [curl, "-sf", f"{server.url}/v1/images/generations", *told]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert opened(answer["data"][0]["b64_json"]).size == (64, 64)


@pytest.mark.parametrize(
    "path",
    ["upscalers", "latent-upscale-modes", "sd-vae", "cmd-flags", "memory", "embeddings",
     "hypernetworks", "face-restorers", "prompt-styles", "scripts", "script-info", "sd-models",
     "samplers", "schedulers", "options", "progress", "loras", "sd-models/", "samplers/",
     "extensions", "realesrgan-models", "sd-modules"],
)  # fmt: skip
def test_what_clients_ask_for_first(web, path):
    assert web.get(f"/sdapi/v1/{path}").status_code == 200


def test_calls_beside_drawing(web):
    assert web.get("/queue/status").json()["queue_size"] == 0
    assert web.head("/").status_code == 200
    for name in ("skip", "interrupt", "refresh-checkpoints", "refresh-loras", "refresh-vae"):
        assert web.post(f"/sdapi/v1/{name}").status_code == 200
    asked = {"image": as_text((32, 32)), "upscaling_resize": 2, "upscaler_1": "Lanczos"}
    larger = web.post("/sdapi/v1/extra-single-image", json=asked).json()["image"]
    assert opened(larger).size == (64, 64)
    both = {"imageList": [{"data": as_text((32, 32)), "name": "a"}] * 2, "upscaler_1": "Nearest"}
    images = web.post("/sdapi/v1/extra-batch-images", json=both).json()["images"]
    assert [opened(text).size for text in images] == [(64, 64)] * 2
    for name in ("interrogate", "unload-checkpoint"):
        answer = web.post(f"/sdapi/v1/{name}", json={"image": as_text()})
        assert answer.status_code == 501 and answer.json()["error"]["message"]


def test_the_wikis_example_script(web):
    (text,) = web.post("/sdapi/v1/txt2img", json={"prompt": "a fox", "steps": 5}).json()["images"]
    asked = {"image": "data:image/png;base64," + text}
    assert web.post("/sdapi/v1/png-info", json=asked).json()["info"].startswith("a fox\nSteps: 5,")


@pytest.mark.parametrize(
    "change",
    [
        {"init_images": ["\n".join(as_text()[i : i + 76] for i in range(0, 9999, 76))]},
        {"init_images": [as_text().rstrip("=")]},
        {"init_images": [as_text().replace("+", "-").replace("/", "_")]},
        {"resize_mode": 1},
        {"styles": ["None"]},
        {"alwayson_scripts": {"ADetailer": {"args": [{"ad_model": "None"}]}}},
        {"mask": as_text(), "mask_blur": 12, "inpainting_fill": 2},
    ],
    ids=["lines", "padding", "addresses", "resize", "styles", "ADetailer", "mask"],
)
def test_spellings_of_images_and_of_what_is_off(web, change):
    asked = {"prompt": "an owl", "steps": 3, "width": 64, "height": 64, **change}
    (image,) = drawn(web.post("/sdapi/v1/img2img/", json={"init_images": [as_text()], **asked}))
    assert image.size == (64, 64)


def test_a_page_elsewhere_is_let_in_by_name_alone(web):
    asked = {"Origin": "https://lite.example"}
    path = "/sdapi/v1/txt2img"
    before = asked | {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    allowed = web.options(path, headers=before).headers
    assert "POST" in allowed["access-control-allow-methods"]
    assert "content-type" in allowed["access-control-allow-headers"]
    answer = web.post(path, json={"prompt": "a fox", "steps": 2}, headers=asked)
    assert drawn(answer)
    assert answer.headers["access-control-allow-origin"] == asked["Origin"]
    assert web.get("/sdapi/v1/options", headers={"Origin": "https://x.example"}).status_code == 403


def test_a_container_calls_the_server_by_its_own_name(web):
    asked = {"Host": "host.docker.internal:8000"}
    assert web.get("/sdapi/v1/options", headers=asked).status_code == 200
    answer = web.get("/sdapi/v1/options", headers={"Host": "other.docker.internal"})
    assert answer.status_code == 403 and "--allow-host" in answer.json()["error"]["message"]
