"""/sdapi/v1 as AUTOMATIC1111's tools call it: pictures, progress, interrupt; nothing ignored."""

import base64
import io
import json
import threading
import time

import httpx2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from koala.generation import load, read_settings
from koala.generation.png import parameters
from koala.serving.api.a1111_fields import framed
from koala.serving.api.a1111_only_masked import around
from stepping import assert_near
from toy import toy_pipeline
from toy_server import gated, running

# What a common client library sends when nothing is asked for but a prompt.
LIBRARY = {
    "enable_hr": False, "hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 0,
    "hr_resize_x": 0, "hr_resize_y": 0, "denoising_strength": 0.7, "firstphase_width": 0,
    "firstphase_height": 0, "styles": [], "seed": -1, "subseed": -1, "subseed_strength": 0.0,
    "seed_resize_from_h": 0, "seed_resize_from_w": 0, "batch_size": 1, "n_iter": 1,
    "restore_faces": False, "tiling": False, "do_not_save_samples": False,
    "do_not_save_grid": False, "negative_prompt": "", "eta": 1.0, "s_churn": 0, "s_tmax": 0,
    "s_tmin": 0, "s_noise": 1, "override_settings": {}, "sampler_index": None,
    "override_settings_restore_afterwards": True, "script_name": None, "script_args": [],
    "send_images": True, "save_images": False, "alwayson_scripts": {}, "sampler_name": None,
    "use_deprecated_controlnet": False, "refiner_checkpoint": "", "refiner_switch_at": 0.8,
}  # fmt: skip
MASKING = {
    "resize_mode": 0, "mask_blur": 4, "mask_blur_x": 4, "mask_blur_y": 4, "inpainting_fill": 0,
    "inpaint_full_res": True, "inpaint_full_res_padding": 0, "inpainting_mask_invert": 0,
    "initial_noise_multiplier": 1, "include_init_images": False, "latent_mask": None,
}  # fmt: skip
ASKED = {"prompt": "a fox", "steps": 3, "width": 16, "height": 16, "cfg_scale": 3, "seed": 5}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "toy"
    return load(toy_pipeline(folder, architecture="koala"), "cpu")


@pytest.fixture
def gate(pipeline):
    """While it is closed (cleared), no step is taken."""
    with gated(pipeline) as gate:
        yield gate


@pytest.fixture(scope="module")
def server(pipeline, tmp_path_factory):
    with running(pipeline, tmp_path_factory.mktemp('data')) as server, httpx2.Client(
        base_url=f"{server.url}/sdapi/v1", timeout=60
    ) as client:  # fmt: skip
        client.app = server.app
        yield client


@pytest.fixture
def client(server, gate):
    """The one server's client, with an empty gallery."""
    for one in gallery(server):
        server.app.state.gallery.remove(one.id)
    return server


def ok(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()


def gallery(client):
    client.app.state.gallery_writer.flush()
    return client.app.state.gallery.page(100)


def opened(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def as_text(colour, side=16, height=None):
    file = io.BytesIO()
    Image.new("RGB", (side, height or side), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def half():
    """A mask whose right half is light."""
    file, image = io.BytesIO(), Image.new("L", (16, 16), 0)
    image.paste(255, (8, 0, 16, 16))
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_txt2img_draws_what_the_pipeline_draws(client, pipeline):
    asked = {**LIBRARY, **ASKED, "negative_prompt": "blur", "batch_size": 2, "n_iter": 2,
             "sampler_name": "DPM++ 2M", "scheduler": "SGM Uniform"}  # fmt: skip
    answer = ok(client.post("/txt2img", json=asked))
    alone = pipeline(
        "a fox", negative_prompt="blur", size="16x16", steps=3, guidance=3.0, seed=5, number=4,
        scheduler="dpm++2m",
    )  # fmt: skip
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [5, 6, 7, 8] and info["seed"] == 5
    assert info["sampler_name"] == "DPM++ 2M" and (info["width"], info["height"]) == (16, 16)
    assert info["infotexts"] == [parameters(settings) for settings in alone.settings]
    assert answer["parameters"]["prompt"] == "a fox"
    for text, image, settings in zip(answer["images"], alone.images, alone.settings, strict=True):
        assert_near(opened(text), image)
        assert opened(text).info["parameters"] == parameters(settings)
        assert read_settings(io.BytesIO(base64.b64decode(text))) == settings
    assert len(gallery(client)) == 4


def test_a_prompt_alone_is_enough(client):
    answer = ok(client.post("/txt2img", json={"prompt": "a fox"}))
    info = json.loads(answer["info"])
    assert (info["width"], info["height"], info["steps"], info["cfg_scale"]) == (64, 64, 10, 3.5)
    assert info["sampler_name"] == "Euler" and info["seed"] >= 0


def test_images_are_kept_and_sent_unless_they_are_not_to_be(client):
    asked = {**ASKED, "do_not_save_samples": True, "send_images": False}
    answer = ok(client.post("/txt2img", json=asked))
    assert answer["images"] == [] and gallery(client) == []


def test_img2img_paints_within_the_mask_or_without_it(client):
    asked = {**LIBRARY, **MASKING, **ASKED, "init_images": [as_text("teal")],
             "denoising_strength": 1.0, "mask": half()}  # fmt: skip
    answer = ok(client.post("/img2img", json=asked))
    assert answer["parameters"]["init_images"] is None and answer["parameters"]["mask"] is None
    settings = read_settings(io.BytesIO(base64.b64decode(answer["images"][0])))
    assert settings.image and settings.mask and settings.strength == 1
    info = json.loads(answer["info"])
    assert info["denoising_strength"] == 1
    right = answer["images"]
    left = ok(client.post("/img2img", json={**asked, "inpainting_mask_invert": 1}))["images"]
    again = ok(client.post("/img2img", json=asked))["images"]
    assert_near(opened(right[0]), opened(again[0]))
    assert left != right
    url = f"data:image/png;base64,{as_text('teal')}"
    more = {**asked, "init_images": [url], "mask": None, "include_init_images": True}
    del more["width"], more["height"]
    answer = ok(client.post("/img2img", json=more))
    assert answer["parameters"]["init_images"] == [url]
    assert opened(answer["images"][0]).size == (16, 16)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"restore_faces": True}, "restore_faces"),
        ({"tiling": True}, "tiling"),
        ({"styles": ["photo"]}, "styles"),
        ({"subseed_strength": 0.5}, "subseed_strength"),
        ({"eta": 0.5}, "eta"),
        ({"eta": 0, "sampler_name": "Euler a"}, "eta"),
        ({"s_churn": 2}, "s_churn"),
        ({"alwayson_scripts": {"controlnet": {"args": [{"module": "canny"}]}}}, "alwayson_scripts"),
        ({"script_name": "x/y/z plot"}, "script_name"),
        ({"refiner_checkpoint": "other"}, "refiner_checkpoint"),
        ({"override_settings": {"sd_model_checkpoint": "other"}}, "sd_model_checkpoint"),
        ({"sampler_name": "Heun"}, "sampler_name"),
        ({"scheduler": "Tangent"}, "scheduler"),
        ({"sampler_name": "DPM++ 2M Karras", "scheduler": "Exponential"}, "scheduler"),
        ({"eta": 0, "sampler_name": "DPM++ 2M SDE Karras"}, "eta"),
        ({"sampler_name": "LCM", "scheduler": "SGM Uniform"}, "scheduler"),
        ({"width": 16, "height": None}, "width"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": "many"}, "steps"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(client, asked, param):
    answer = client.post("/txt2img", json={**ASKED, **asked})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param and gallery(client) == []


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"width": 17, "height": 16}, "size 17x16"),
        ({"batch_size": 1000}, "batch_size times n_iter is 1000: this server allows at most"),
        ({"seed": -2}, "seed is -2"),
        ({"prompt": "a <lora:x>"}, "no LoRA folder"),
        ({"prompt": "a <hypernet:x:1>"}, "<hypernet:x:1> is not supported"),
        ({"prompt": "a cat AND a dog"}, "the prompt has AND"),
        ({"prompt": "a [cat:dog:half]"}, "no change that is known"),
        ({"cfg_scale": -1}, "cfg_scale is -1"),
    ],
)
def test_bad_values_are_refused_in_words(client, asked, says):
    answer = client.post("/txt2img", json={**ASKED, **asked})
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"init_images": []}, "init_images has 0 images"),
        ({"init_images": ["QUJD"]}, "image cannot be read"),
        ({"init_images": ["*"]}, "init_images is not valid base64"),
        ({"init_images": None}, "init_images"),
        ({"denoising_strength": 1.5}, "denoising_strength is 1.5: allowed"),
        ({"mask_blur": 65, "mask": half()}, "mask blur is 65: allowed"),
        ({"resize_mode": 3}, "resize_mode 3"),
        ({"mask": as_text("white", 24, 16)}, "mask is 24x16"),
    ],
)
def test_bad_images_are_refused(client, asked, says):
    answer = client.post("/img2img", json={**ASKED, "init_images": [as_text("teal")], **asked})
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]


def test_what_nobody_expects_is_no_500(client):
    for body in (b'{"\\ud800": 1}', b'{"prompt": "\\ud800"}', b'{"prompt": "a", "hr_x": NaN}',
                 b'{"prompt": "a", "hr_x": "\\ud800"}', b'{"prompt": "a", "seed": 1e400}',
                 b"[]", b"{", b'{"prompt": "a", "sampler_name": "\\ud800"}'):  # fmt: skip
        answer = client.post("/txt2img", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 400), (body, answer.text)


def test_progress_and_interrupt(client, gate):
    idle = ok(client.get("/progress"))
    assert idle["progress"] == 0 and idle["state"]["job_count"] == 0
    gate.clear()
    found = []
    asked = {**ASKED, "steps": 200, "batch_size": 2}
    thread = threading.Thread(target=lambda: found.append(ok(client.post("/txt2img", json=asked))))
    thread.start()
    while (seen := ok(client.get("/progress")))["state"]["job_count"] != 2:
        time.sleep(0.02)
    assert seen["state"]["job"] == "txt2img"
    gate.set()
    while not (seen := ok(client.get("/progress")))["current_image"]:
        pass
    gate.clear()
    assert opened(seen["current_image"]).size == (2, 2) and 0 < seen["progress"] < 1
    assert seen["state"]["sampling_steps"] == 200 and seen["eta_relative"] > 0
    assert ok(client.get("/progress?skip_current_image=true"))["current_image"] is None
    ok(client.post("/interrupt"))
    gate.set()
    thread.join(60)
    assert len(found[0]["images"]) == 1  # as far as it was
    assert len(json.loads(found[0]["info"])["all_seeds"]) == len(found[0]["images"])
    assert ok(client.get("/progress"))["state"]["job_count"] == 0


def test_an_interrupt_before_the_first_picture_answers_one(client, gate):
    gate.clear()
    found = []
    asked = {**ASKED, "steps": 200}
    thread = threading.Thread(target=lambda: found.append(ok(client.post("/txt2img", json=asked))))
    thread.start()
    while ok(client.get("/progress"))["state"]["job_count"] != 1:
        time.sleep(0.02)
    ok(client.post("/interrupt"))
    gate.set()
    thread.join(60)
    assert opened(found[0]["images"][0]).size == (16, 16)
    assert json.loads(found[0]["info"])["all_seeds"] == [5] and gallery(client) == []


def test_a_client_that_goes_frees_its_place(client, gate, pipeline):
    gate.clear()
    with pytest.raises(httpx2.TimeoutException):
        client.post("/txt2img", json=ASKED, timeout=0.5)
    gate.set()
    metrics, end = client.app.state.service.metrics.registry, time.monotonic() + 30
    while (
        metrics.get_sample_value("koala_active_pictures")
        or ok(client.get("/progress"))["state"]["job_count"]
    ):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_there_is(client, pipeline):
    (model,) = ok(client.get("/sd-models"))
    assert model["title"] == model["model_name"] == pipeline.name
    names = [sampler["name"] for sampler in ok(client.get("/samplers"))]
    assert {"Euler", "Euler a", "DPM++ 2M", "DPM++ SDE", "UniPC", "DDIM", "LCM"} <= {*names}
    for name in names:
        ok(client.post("/txt2img", json={**ASKED, "sampler_name": name}))
    schedules = ok(client.get("/schedulers"))
    labels = {"Automatic", "SGM Uniform", "Karras", "Exponential", "Uniform", "Align Your Steps"}
    assert labels <= {one["label"] for one in schedules}
    for schedule in schedules:
        for name in (schedule["name"], schedule["label"], *schedule["aliases"]):
            ok(client.post("/txt2img", json={**ASKED, "scheduler": name}))
    for sampler in ok(client.get("/samplers")):
        for alias in sampler["aliases"]:
            ok(client.post("/txt2img", json={**ASKED, "sampler_name": alias}))
    assert ok(client.get("/loras")) == []
    options = ok(client.get("/options"))
    assert options["sd_model_checkpoint"] == pipeline.name
    assert ok(client.post("/options", json=options)) is None
    answer = client.post("/options", json={"sd_model_checkpoint": "other"})
    assert answer.status_code == 400 and "has no effect" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "asked",
    [
        {"sampler_name": "DPM++ 2M Karras"},
        {"sampler_name": "DPM++ 2M", "scheduler": "karras"},
        {"sampler_index": "k_dpmpp_2m", "scheduler": "Karras"},
        {"sampler_name": "DPM++ 2M Karras", "scheduler": "Automatic"},
        {"sampler_name": "dpm++2m-karras"},
    ],
)
def test_every_spelling_of_a_sampler_and_its_schedule_draws_with_both(client, asked):
    (text,) = ok(client.post("/txt2img", json={**ASKED, **asked}))["images"]
    settings = read_settings(io.BytesIO(base64.b64decode(text)))
    assert (settings.sampler, settings.schedule) == ("DPM++ 2M", "karras")
    told = ok(client.post("/png-info", json={"image": text}))["info"]
    assert "Sampler: DPM++ 2M, Schedule type: Karras" in told


def test_fields_without_effect_are_named(client):
    off = {
        "ADetailer": {"args": [False, False, {"ad_model": "face.pt"}]},
        "controlnet": {"args": [{"enabled": False, "module": "canny"}]},
        "other": {"args": []},
    }
    asked = {**LIBRARY, **ASKED, "url": "http://x", "auth": "a:b", "colour": "red",
             "styles": ["None"], "alwayson_scripts": off, "clip_skip": 5,
             "override_settings": {"samples_format": "jpg"}}  # fmt: skip
    info = json.loads(ok(client.post("/txt2img", json=asked))["info"])
    assert info["ignored_fields"] == ["auth", "clip_skip", "colour", "samples_format", "url"]
    info = json.loads(ok(client.post("/txt2img", json={**LIBRARY, **ASKED}))["info"])
    assert info["ignored_fields"] == []
    asked = {**LIBRARY, **MASKING, **ASKED, "init_images": [as_text("teal")], "mask": half(),
             "mask_blur": 8, "mask_round": False}  # fmt: skip
    info = json.loads(ok(client.post("/img2img", json=asked))["info"])
    assert info["ignored_fields"] == ["mask_round"]
    answer = ok(client.post("/options", json={"jpeg_quality": 80}))
    assert answer == {"ignored_options": ["jpeg_quality"]}


def test_a_masked_part_starts_from_what_is_asked_for(client):
    asked = {**LIBRARY, **MASKING, **ASKED, "init_images": [as_text("teal")], "mask": half(),
             "denoising_strength": 0.7}  # fmt: skip
    drawn = {}
    for number, name in enumerate(("fill", None, "latent noise", "latent nothing")):
        (text,) = ok(client.post("/img2img", json={**asked, "inpainting_fill": number}))["images"]
        told = ok(client.post("/png-info", json={"image": text}))["info"]
        assert ("Masked content" in told) == (name is not None)
        assert name is None or f"Masked content: {name}" in told
        drawn[number] = opened(text).tobytes()
    assert drawn[0] == drawn[1] and len({*drawn.values()}) == 3  # the image is teal all over
    answer = client.post("/img2img", json={**asked, "inpainting_fill": 4})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "inpainting_fill is 4: allowed are 0 to 3"
    ok(client.post("/img2img", json={**asked, "inpainting_fill": 4, "mask": None}))
    ok(client.post("/img2img", json={**asked, "inpainting_fill": 2, "denoising_strength": 1}))


def test_only_what_is_masked_is_drawn_and_put_back(client, pipeline):
    whole = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    mask = Image.new("L", whole.size)
    mask.paste(255, (40, 20, 48, 36))
    files = [io.BytesIO(), io.BytesIO()]
    for image, file in zip((whole, mask), files, strict=True):
        image.save(file, "PNG")
    given, masked = (base64.b64encode(file.getvalue()).decode() for file in files)
    asked = {**LIBRARY, **MASKING, **ASKED, "init_images": [given], "mask": masked, "width": 32,
             "height": 32, "denoising_strength": 1.0, "inpaint_full_res_padding": 2}  # fmt: skip
    answer = ok(client.post("/img2img", json=asked))
    info = json.loads(answer["info"])
    image = opened(answer["images"][0])
    assert image.size == whole.size == (info["width"], info["height"])
    kept = np.asarray(mask) == 0
    assert (np.asarray(image)[kept] == np.asarray(whole)[kept]).all()
    box = (34, 18, 54, 38)  # 2 pixels wider, and as wide as it is high
    part, area = whole.crop(box), mask.crop(box)
    (alone,) = pipeline("a fox", size="32x32", steps=3, guidance=3.0, seed=5, image=part, mask=area,
                        strength=1.0).images  # fmt: skip
    expected = whole.copy()
    expected.paste(alone.resize((20, 20), Image.Resampling.LANCZOS), box[:2], area)
    assert_near(image, expected)
    settings = read_settings(io.BytesIO(base64.b64decode(answer["images"][0])))
    assert (settings.width, settings.enlarged, settings.pasted) == (32, "96x64", "20x20+34+18")
    assert "Inpaint area: Only masked" in info["infotexts"][0] and info["ignored_fields"] == []
    assert info["note"].startswith("the part at 20x20+34+18 was drawn at 32x32")
    (stored,) = gallery(client)
    assert Image.open(io.BytesIO(client.app.state.gallery.png(stored.id))).size == whole.size
    dark = {**asked, "mask": as_text("black", 64), "init_images": [as_text("teal", 64)]}
    answer = client.post("/img2img", json=dark)
    assert answer.status_code == 400 and "dark everywhere" in answer.json()["error"]["message"]


@given(st.tuples(*[st.integers(1, 200)] * 2), st.data(), st.integers(0, 300))
def test_a_part_holds_what_is_masked_and_stays_within_its_image(size, data, padding):
    left, top = (data.draw(st.integers(0, side - 1)) for side in size)
    right, bottom = (
        data.draw(st.integers(low + 1, side)) for low, side in zip((left, top), size, strict=True)
    )
    shape = data.draw(st.none() | st.tuples(*[st.integers(16, 4096)] * 2))
    box = around((left, top, right, bottom), padding, shape, size)
    assert 0 <= box[0] <= left and 0 <= box[1] <= top
    assert right <= box[2] <= size[0] and bottom <= box[3] <= size[1]


def test_what_clients_ask_for_first_is_there(client):
    for name in ("sd-vae", "latent-upscale-modes", "hypernetworks", "face-restorers",
                 "prompt-styles", "script-info", "sd-modules"):  # fmt: skip
        assert ok(client.get(f"/{name}")) == []
    for name in ("refresh-checkpoints", "refresh-loras"):
        assert ok(client.post(f"/{name}/")) is None
    assert ok(client.get("/embeddings"))["loaded"] == {}
    assert ok(client.get("/scripts")) == {"txt2img": [], "img2img": []}
    assert ok(client.get("/memory"))["ram"]["used"] > 0
    assert ok(client.get("/cmd-flags"))["api"] is True
    assert ok(client.post("/skip")) == {}
    assert "Lanczos" in [one["name"] for one in ok(client.get("/upscalers"))]
    root = str(client.base_url).removesuffix("/sdapi/v1/")
    assert ok(httpx2.get(f"{root}/queue/status"))["queue_size"] == 0
    head = httpx2.head(f"{root}/")
    assert head.status_code == 200 and head.content == b""
    assert httpx2.head(f"{root}/nothing").status_code == 404


def test_settings_are_read_from_a_png_and_pictures_enlarged(client):
    png = ok(client.post("/txt2img", json=ASKED))["images"][0]
    broken = "\n".join(png[i : i + 76] for i in range(0, len(png), 76)).rstrip("=")
    answer = ok(client.post("/png-info", json={"image": f"data:image/png;base64,{broken}"}))
    assert answer["info"] == answer["items"]["parameters"] and "Seed: 5" in answer["info"]
    assert ok(client.post("/png-info", json={"image": as_text("teal")}))["info"] == ""
    asked = {"image": png, "upscaling_resize": 3, "upscaler_1": "Lanczos", "resize_mode": 0}
    answer = ok(client.post("/extra-single-image", json=asked))
    assert opened(answer["image"]).size == (48, 48)
    asked |= {"resize_mode": 1, "upscaling_resize_w": 40, "upscaling_resize_h": 20}
    answer = ok(client.post("/extra-single-image", json=asked))
    assert opened(answer["image"]).size == (40, 20)
    asked |= {"upscaling_crop": False}
    answer = ok(client.post("/extra-single-image", json=asked))
    assert opened(answer["image"]).size == (20, 20)
    for wrong in (
        {"upscaling_resize_w": 10**9, "upscaling_crop": True},
        {"upscaler_1": "R-ESRGAN"},
        {"codeformer_visibility": 0.5},
        {"upscaling_resize": 0, "resize_mode": 0},
    ):
        assert client.post("/extra-single-image", json=asked | wrong).status_code == 400
    answer = client.post("/interrogate", json={"image": png, "model": "clip"})
    assert answer.status_code == 501 and "describes images" in answer.json()["error"]["message"]


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_an_image_is_framed_as_asked(client, mode):
    wide = Image.new("RGB", (32, 16), "black")
    wide.paste("white", (8, 0, 24, 16))  # white in the middle half
    file = io.BytesIO()
    wide.save(file, "PNG")
    asked = {**ASKED, "init_images": [base64.b64encode(file.getvalue()).decode()]}
    answer = ok(client.post("/img2img", json={**asked, "resize_mode": mode}))
    assert opened(answer["images"][0]).size == (16, 16)
    shown = framed(wide, (16, 16), mode).convert("L")
    dark = (np.asarray(shown) < 128).sum()
    assert abs(dark - {0: 128, 1: 0, 2: 64}[mode]) <= 16


def test_a_second_pass_starts_from_the_first_enlarged(client, pipeline):
    asked = {**LIBRARY, **ASKED, "enable_hr": True, "hr_scale": 2, "denoising_strength": 0.7,
             "hr_second_pass_steps": 4, "batch_size": 2}  # fmt: skip
    answer = ok(client.post("/txt2img", json=asked))
    info = json.loads(answer["info"])
    assert (info["width"], info["height"]) == (32, 32) and info["all_seeds"] == [5, 6]
    assert info["ignored_fields"] == ["hr_upscaler"]  # "Latent"
    first = pipeline("a fox", size="16x16", steps=3, guidance=3.0, seed=5, number=2)
    for text, image, seed in zip(answer["images"], first.images, (5, 6), strict=True):
        larger = image.resize((32, 32), Image.Resampling.LANCZOS)
        (again,) = pipeline(
            "a fox", size="32x32", steps=4, guidance=3.0, seed=seed, image=larger, strength=0.7
        ).images
        difference = np.abs(np.asarray(opened(text), float) - np.asarray(again, float))
        assert difference.mean() < 2  # a rounding of the first pass is drawn on
    asked |= {"hr_resize_x": 24, "hr_resize_y": 40, "batch_size": 1}
    assert opened(ok(client.post("/txt2img", json=asked))["images"][0]).size == (24, 40)
    answer = client.post("/txt2img", json={**asked, "hr_scale": "much"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "hr_scale"


def test_a_key_may_be_basics_password_as_tools_send_it(pipeline, tmp_path):
    (tmp_path / "keys").write_text("k" * 20)
    with running(pipeline, tmp_path / "data", api_key_file=tmp_path / "keys") as server:
        url = f"{server.url}/sdapi/v1/samplers"
        ok(httpx2.get(url, auth=("anybody", "k" * 20)))
        ok(httpx2.get(url, headers={"Authorization": f"Bearer {'k' * 20}"}))
        for header in (
            "Basic " + "k" * 20,
            "Basic ***",
            "Basic",
            "Digest " + "k" * 20,
            "Basic /w==",
        ):
            assert httpx2.get(url, headers={"Authorization": header}).status_code == 401
        assert httpx2.get(url, auth=("k" * 20, "wrong")).status_code == 401


@pytest.mark.parametrize("asked", [{"cfg_scale": 1}, {"cfg_scale": 0}])
def test_a_negative_prompt_without_guidance_is_ignored_and_named(client, asked):
    """Tools send theirs with every request, whatever the model."""
    body = {**ASKED, "negative_prompt": "blur", **asked}
    info = json.loads(ok(client.post("/txt2img", json=body))["info"])
    assert info["ignored_fields"] == ["negative_prompt"] and info["negative_prompt"] == ""
    guided = json.loads(ok(client.post("/txt2img", json={**body, "cfg_scale": 2}))["info"])
    assert guided["ignored_fields"] == [] and guided["negative_prompt"] == "blur"


@pytest.mark.parametrize("steps", [1, 3, 7, 49, None])
@pytest.mark.parametrize("strength", [0, 0.01])
def test_a_strength_of_almost_nothing_does_one_step(client, steps, strength):
    asked = {**ASKED, "steps": steps, "init_images": [as_text("teal")]}
    (text,) = ok(client.post("/img2img", json={**asked, "denoising_strength": strength}))["images"]
    settings = read_settings(io.BytesIO(base64.b64decode(text)))
    assert int(settings.steps * settings.strength) == 1
