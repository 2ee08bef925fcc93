"""The page of `koala serve` in a real Chromium: what people do with it, done."""

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image, ImageFilter
from selenium.webdriver import ActionChains, Keys

import koala
from koala.data.illustrations import art, scenes
from koala.generation import Settings, read_settings
from koala.generation.png import parameters
from koala.generation.requests import Known
from koala.generation.samplers import SAMPLERS, get
from koala.serving import errors
from koala.serving.api import page as served
from toy_browser import (
    DESKTOP,
    PHONE,
    Page,
    api,
    begin_long,
    cancel,
    drop,
    needs_chromium,
    png,
    png_with,
    read,
)  # fmt: skip
from toy_server import running

SETTINGS = Settings(
    prompt="a fox, noto style", negative_prompt="blue, grey", steps=7, guidance=2.5, seed=11,
    width=64, height=96, model="koala-mini", version="1", sampler="DPM++ 2M",
    guidance_until=0.5, loras=(("my-style", 0.8),),
)  # fmt: skip
LANGUAGES = ("en.json", "de.json", "fr.json", "ko.json")
FIELDS = ("prompt", "negative", "steps", "guidance", "until", "seed", "scheduler", "size")
FILLED = ["a fox, noto style", "blue, grey", "7", "2.5", "0.5", "11", "dpm++2m", "own"]


# --- without a browser ----------------------------------------------------------------------


def test_styles_are_those_that_the_bundled_model_has_seen():
    presets = json.loads(served.files()["presets.json"].content)["koala-mini"]
    emoji = [art.ART_SETS[name].style for name in scenes.SMALL.styles]
    icons = {style for variant in scenes.VARIANTS.values() for style in variant.values()}
    assert presets["styles"][: len(emoji)] == emoji
    assert set(presets["styles"][len(emoji) :]) == icons


def test_the_page_is_whole():
    files = served.files()
    text = "\n".join(file.content.decode() for file in files.values())
    named = re.findall(r'"page/([\w.]+)"', text) + re.findall(r'from "\./([\w.]+)"', text)
    assert set(named) - {"about.json"} == set(files) - {"index.html", *LANGUAGES}
    ids = set(re.findall(r'\bid="([\w-]+)"', files["index.html"].content.decode()))
    assert set(re.findall(r'\$\("([\w-]+)"\)', text)) <= ids
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert not re.search(r'<script(?! type="module" src)|\son\w+="|\sstyle="|innerHTML', text)


def test_the_files_are_sent_with_the_policy_and_only_when_changed():
    app = FastAPI()
    errors.install(app, lambda code: None)
    app.include_router(served.router(Known("toy", 64, {}, None), True, 1024))
    client = TestClient(app)
    about = client.get("/page/about.json").json()
    schedulers = about.pop("schedulers")
    assert {*SAMPLERS} <= {*schedulers} and schedulers["euler-karras"] == "Euler Karras"
    for key, name in schedulers.items():
        assert get(key) == get(name)
    usual = {"steps": 10, "guidance": 3.5, "scheduler": "euler", "few": False}
    sizes = {"size": 64, "far": 1.5, "fit": True, "pixels": 1024}
    assert about == {"model": "toy", "sampling": usual} | sizes
    for path in ("/", "/page/page.js"):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304 and again.content == b""
    for path in ("/page/", "/page/page.py", "/page/..%2Fpage.py", "/page/%00"):
        assert client.get(path).status_code == 404


def texts(language: str) -> dict[str, str]:
    return dict(json.loads(served.files()[f"{language}.json"].content))


def test_every_text_is_there_in_every_language():
    english = texts("en")
    files = served.files()
    code = "\n".join(files[name].content.decode() for name in files if name not in LANGUAGES)
    used = re.findall(r'\b(?:t|many)\("([\w-]+)"', code)
    used += re.findall(r'data-t(?:-\w+)?="([\w-]+)"', code)
    assert set(used) <= {*english} | {key.removesuffix("-one") for key in english}
    for key in english:
        assert f'"{key.removesuffix("-one")}"' in code, f"{key} is not used"
    for language in LANGUAGES:
        translated = texts(language.removesuffix(".json"))
        assert translated.keys() == english.keys()
        for key, text in translated.items():
            assert text.strip(), (language, key)
            holes = sorted(re.findall(r"\{\w+\}", text))
            assert holes == sorted(re.findall(r"\{\w+\}", english[key])), (language, key)
    for language in ("de", "fr", "ko"):
        same = [key for key, text in texts(language).items() if text == english[key]]
        assert len(same) < 0.12 * len(english), (language, same)


# --- drawing --------------------------------------------------------------------------------


@needs_chromium
def test_a_image_is_made(page):
    page.js("""
        window.seen = {bars: [], previews: 0};
        new MutationObserver(() => {
          const bar = document.querySelector(".job progress");
          if (bar) seen.bars.push(bar.value);
          seen.previews = Math.max(seen.previews, document.querySelectorAll(".preview").length);
        }).observe(document.getElementById("jobs"),
          {subtree: true, childList: true, attributes: true});""")
    assert page.find("#welcome").is_displayed()
    page.find("#prompt").send_keys("a fox")
    page.click('#styles [data-style="flat twemoji style"]')
    page.click('#styles [data-style="noto style"]')
    assert page.values("prompt") == ["a fox, noto style"]
    page.set("seed", 7)
    page.set("number", 2)
    page.set("steps", 20)
    page.find("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    job = api(page, f"/v1/jobs/{page.job('done')}")
    seen = dict(page.js("return seen"))
    assert seen["bars"] == sorted(seen["bars"]) and seen["bars"][-1] == 1
    assert len(set(seen["bars"])) > 3 and seen["previews"] >= 1
    assert [one["settings"]["seed"] for one in job["pictures"]] == [7, 8]
    page.wait("[...document.querySelectorAll('.job .tile img')]"
              ".filter(i => i.naturalWidth === 128).length === 2")  # fmt: skip
    page.wait("document.querySelectorAll('#thumbnails button').length === 2")
    assert not page.find("#welcome").is_displayed()
    content = page.later(
        """const blob = await (await fetch(values[0])).blob();
        return btoa(String.fromCharCode(...new Uint8Array(await blob.arrayBuffer())));""",
        job["pictures"][0]["url"],
    )
    found = read(page, base64.b64decode(str(content)))
    settings = job["pictures"][0]["settings"]
    beside = {"source": "koala", "others": []}
    assert {key: settings[key] for key in found if key not in beside} | beside == found


@needs_chromium
def test_a_job_is_cancelled(page):
    first = begin_long(page)
    page.set("number", 1)
    page.click("#draw")
    waiting = "document.querySelector('#waiting .job')"
    second = page.wait(f"{waiting}?.dataset.job")
    page.wait(f"/^Queued, \\d+ images? ahead$/.test({waiting}.querySelector('.said').textContent)")
    assert second != first and page.find("#jobs .job").get_attribute("data-job") == first
    assert page.find("#waiting").text == "1 job is waiting"  # folded
    page.click("#waiting summary")
    cancel(page, str(second))
    cancel(page, first)
    assert page.find("#draw").is_enabled()


@needs_chromium
def test_a_running_job_is_found_again_after_a_reload(page):
    job = begin_long(page)
    before = api(page, f"/v1/jobs/{job}")["progress"]["done"]
    page.driver.refresh()
    page.ready()
    assert page.values("prompt", "steps") == ["a whale, noto style", "200"]
    steps = "Number(document.querySelector(arguments[0])?.textContent.match(/^\\d+/))"
    page.wait(f"{steps} > arguments[1]", f'[data-job="{job}"] .said', before)
    page.wait("document.querySelector('.job .preview')")
    cancel(page, job)


@needs_chromium
def test_the_servers_error_is_shown(page):
    page.click("#draw")
    assert page.find("#error").text == "Write a prompt first."
    page.set("prompt", "a fox")
    page.set("steps", 0)
    page.click("#draw")
    page.wait("document.getElementById('error').textContent.startsWith('steps is 0')")
    page.complaints()  # the browser notes the answer 400, too


# --- the gallery ----------------------------------------------------------------------------


@needs_chromium
def test_settings_go_from_the_gallery_to_the_form_and_make_the_image_again(page, downloads):
    page.set("prompt", "an owl, flat fluent style")
    page.set("negative", "blue")
    for id, value in (("steps", 6), ("guidance", 2.5), ("seed", 42), ("size", "160x104")):
        page.set(id, value)
    page.set("scheduler", "dpm++2m")
    asked = page.values(*FIELDS)
    page.click("#draw")
    first = api(page, f"/v1/jobs/{page.job('done')}")["pictures"][0]["id"]
    page.click("#usual")
    page.set("prompt", "")
    page.click(f'#thumbnails [data-picture="{first}"]')
    assert page.find("#viewed-prompt").text == "an owl, flat fluent style"
    page.click("#download")
    page.click("#use")
    assert page.values(*FIELDS) == asked and not page.find("#viewer").is_displayed()
    page.click("#draw")
    page.wait("document.querySelector('.job.done') && document.querySelector(arguments[0])",
              f'.job [data-picture]:not([data-picture="{first}"])')  # fmt: skip
    second = api(page, f"/v1/jobs/{page.job('done')}")["pictures"][0]["id"]
    first_pixels, second_pixels = (pixels(page, id) for id in (first, second))
    assert np.abs(first_pixels - second_pixels).max() <= 2
    (file,) = (p for p in downloads.iterdir() if p.suffix == ".png")
    assert file.name == "an-owl-flat-fluent-style-42.png"
    assert read_settings(file).seed == 42
    page.click(f'#thumbnails [data-picture="{second}"]')
    page.click("#delete")
    page.click("#delete")
    page.wait("document.querySelector(arguments[0]) === null", f'[data-picture="{second}"]')
    page.find("#viewer").send_keys(Keys.ESCAPE)
    remaining = {one["id"] for one in api(page, "/v1/gallery")["data"]}
    assert first in remaining and second not in remaining


def pixels(page: Page, id: str) -> np.ndarray:
    """A picture of the gallery, int [height, width, 4]."""
    width, height, data = page.later(
        """const blob = await (await fetch(`/v1/gallery/${values[0]}/image`)).blob();
        const {width, height} = await createImageBitmap(blob);
        const context = new OffscreenCanvas(width, height).getContext("2d");
        context.drawImage(await createImageBitmap(blob), 0, 0);
        return [width, height, [...context.getImageData(0, 0, width, height).data]];""",
        id,
    )
    return np.array(data).reshape(height, width, 4)


# --- PNGs -----------------------------------------------------------------------------------


@needs_chromium
def test_a_png_dropped_in_fills_the_form(page):
    drop(page, png(SETTINGS), "fox.png")
    page.wait("document.getElementById('prompt').value !== ''")
    assert page.values(*FIELDS, "width", "height") == [*FILLED, "64", "96"]
    assert "fox.png" in page.find("#notes").text
    assert page.find("#told").text.endswith("Left out: LoRA my-style.")


@needs_chromium
def test_a_png_without_settings_is_the_image_to_start_from(page):
    drop(page, png(size=(640, 320)), "halves.png")
    page.wait("!document.getElementById('given').hidden")
    order = page.later(
        "const {readForm} = await import('/page/form.js');"
        "document.getElementById('prompt').value = 'a fox'; return readForm()"
    )
    image = Image.open(io.BytesIO(base64.b64decode(order["image"].split(",")[1]))).convert("RGB")
    assert order["size"] == "184x88" and image.size == (184, 88)  # the usual area, whole eighths
    assert image.getpixel((6, 40)) == (255, 0, 0) and image.getpixel((176, 40)) == (0, 0, 255)
    drop(page, b"GIF89a", "broken.gif")
    page.wait("!document.getElementById('error').hidden")
    assert "broken.gif cannot be read" in page.find("#error").text


@needs_chromium
def test_settings_are_read_out_of_pngs(page):
    unicode = replace(SETTINGS, prompt='ein Füchslein 🦊, "noto", <3:\nzwei', model='a, "b": c')
    for settings in (SETTINGS, unicode):
        found = read(page, png(settings))
        assert found["source"] == "koala" and found["prompt"] == settings.prompt
        assert found["loras"] == [["my-style", 0.8]]
        for packed in (False, True):
            found = read(page, png_with("parameters", parameters(settings), packed))
            assert found["source"] == "A1111"
            for name in ("prompt", "negative_prompt", "steps", "guidance", "seed", "width",
                         "height", "model", "sampler", "guidance_until"):  # fmt: skip
                assert found[name] == getattr(settings, name), name
            assert found["loras"] == [["my-style", 0.8]]
    for nothing in (png(), b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", png_with("koala", "[1")):
        assert read(page, nothing) is None


@needs_chromium
def test_broken_pngs_are_borne(page):
    """Cut short anywhere, or with any length or byte wrong: an answer each time, quickly."""
    tried = page.later(
        """const {readSettings} = await import("/page/metadata.js");
        const bytes = Uint8Array.from(atob(values[0]), c => c.charCodeAt(0));
        let tried = 0;
        for (let at = 0; at < bytes.length; at++) {
          await readSettings(bytes.slice(0, at).buffer);
          for (const byte of [0, 0x7f, 0xff]) {
            const broken = bytes.slice();
            broken[at] = byte;
            await readSettings(broken.buffer);
          }
          tried++;
        }
        return tried;""",
        base64.b64encode(png(SETTINGS, (16, 16))).decode(),
    )
    assert tried == len(png(SETTINGS, (16, 16)))


# --- pictures to start from -----------------------------------------------------------------


@needs_chromium
def test_a_mask_is_painted_and_only_it_is_drawn_anew(page, tmp_path):
    file = tmp_path / "halves.png"
    file.write_bytes(png(size=(128, 128)))
    page.find("#file").send_keys(str(file))
    page.wait("!document.getElementById('given').hidden")
    page.js("document.getElementById('start').open = true")
    page.click("#paint")
    canvas = page.find("#canvas")
    width, height = canvas.size["width"], canvas.size["height"]
    stroke = ActionChains(page.driver).move_to_element_with_offset(canvas, width // 4, -height // 3)
    stroke.click_and_hold().move_by_offset(0, height // 3).move_by_offset(0, height // 3)
    stroke.release().perform()
    canvas.send_keys(Keys.SPACE)  # a dab more, where the brush is
    for _ in range(4):
        canvas.send_keys(Keys.ARROW_LEFT)
    share = "return (await import('/page/mask.js')).painted()"
    before = page.later(share)
    canvas.send_keys(Keys.SPACE)  # a dab elsewhere, taken back
    assert page.later(share) > before
    page.click("#undo")
    assert page.later(share) == before
    page.click("#painter [data-close]")
    page.set("prompt", "a tree, noto style")
    page.set("strength", 1)
    assert not page.find("#fill").is_enabled()  # it would have no effect
    page.set("strength", 0.9)
    page.set("fill", "surroundings")
    page.set("seed", 3)
    mask = page.later("const {readForm} = await import('/page/form.js'); return readForm().mask")
    light = np.array(Image.open(io.BytesIO(base64.b64decode(mask.split(",")[1]))).convert("L"))
    assert light.shape == (128, 128) and set(np.unique(light)) == {0, 255}
    assert (light == light[::8, ::8].repeat(8, 0).repeat(8, 1)).all()  # in whole places
    assert light[:, :64].max() == 0 and light[48:80, 88:104].min() == 255
    assert 0.05 < (light / 255).mean() < 0.35
    page.click("#draw")
    image = api(page, f"/v1/jobs/{page.job('done')}")["pictures"][0]
    assert image["settings"]["mask"] and image["settings"]["strength"] == 0.9
    assert image["settings"]["mask_fill"] == "surroundings"
    drawn = pixels(page, image["id"])[..., :3]
    given = np.array(Image.open(file))
    difference = np.abs(drawn - given).mean(-1)
    assert (drawn[light == 0] == given[light == 0]).all()
    edge = light > np.array(Image.fromarray(light).filter(ImageFilter.MinFilter(3)))
    inner = np.array(Image.fromarray(light).filter(ImageFilter.MinFilter(9))) > 0
    assert image["settings"]["mask_blur"] == 4 and edge.sum() > 100 and inner.sum() > 100
    assert difference[edge].mean() < difference[inner].mean() / 2  # it blends in
    page.click("#unpaint")
    assert page.later("const {readForm} = await import('/page/form.js'); return !readForm().mask")


# What does not fit into the size chooser, of the sizes of a model of 1024 pixels.
CUT = """
const select = document.getElementById("size"), style = getComputedStyle(select);
const room = select.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
const context = document.createElement("canvas").getContext("2d");
context.font = style.font;
const found = [];
for (const language of values[0]) {
  const words = await (await fetch(`page/${language}`)).json();
  const square = words.square.replace("{size}", "1024 × 1024");
  const texts = [square, words["like-image"], words["own-size"], "1344 × 768, 16:9"];
  found.push(...texts.filter((text) => context.measureText(text).width > room));
}
return found;
"""


@needs_chromium
@pytest.mark.parametrize("size", [PHONE, (768, 1024), DESKTOP])
def test_the_size_chooser_shows_each_size_whole(browser, server, size):
    browser.open(server, size)
    browser.ready()
    assert browser.later(CUT, list(LANGUAGES)) == []


# --- a phone, and a key ---------------------------------------------------------------------


@needs_chromium
def test_nothing_is_wider_than_a_phone(page, server):
    page.open(server, PHONE)
    page.ready()
    widths = "[document.documentElement.scrollWidth, innerWidth]"
    assert page.js(f"return {widths}") == [PHONE[0]] * 2
    drop(page, png(replace(SETTINGS, prompt="a " + "very" * 40 + " long fox")), "fox.png")
    drop(page, png(), "halves.png")
    page.wait("!document.getElementById('given').hidden")
    page.js("for (const part of document.querySelectorAll('details')) part.open = true")
    assert page.js(f"return {widths}") == [PHONE[0]] * 2
    page.click("#paint")
    canvas = page.find("#canvas").rect
    assert canvas["x"] >= 0 and canvas["x"] + canvas["width"] <= PHONE[0]
    page.click("#painter [data-close]")
    page.click("#ungive")
    page.click("#usual")
    page.set("prompt", "a tree, noto style")
    page.click("#draw")
    page.job("done")
    page.click(".job .tile")
    for part in ("#viewed", "#use", "#delete", "#viewer"):
        box = page.find(part).rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0], part
    page.find("#viewer").send_keys(Keys.ESCAPE)
    assert page.js(f"return {widths}") == [PHONE[0]] * 2


@needs_chromium
def test_a_key_is_asked_for_where_one_is_needed(browser, tmp_path):
    (tmp_path / "keys").write_text("a-key-of-some-length\n")
    pipeline, keys = koala.load("koala-mini"), tmp_path / "keys"
    with running(pipeline, tmp_path / "data", api_key_file=keys) as server:
        browser.open(server.url)
        for key, why in (("wrong", "operator"), ("a-key-of-some-length", "is not valid")):
            browser.wait("document.getElementById('ask').open")
            browser.wait("document.getElementById('ask-why').textContent.includes(arguments[0])",
                         why)  # fmt: skip
            browser.set("key", key)
            browser.find("#key").send_keys(Keys.ENTER)
        browser.ready()
        browser.set("prompt", "a fox, noto style")
        browser.click("#draw")
        browser.job("done")
        browser.wait("document.querySelector('#thumbnails img')?.naturalWidth > 0")
        browser.driver.refresh()
        browser.ready()
        assert not browser.find("#ask").is_displayed()
    browser.complaints()  # two answers 401 were meant
