"""More of what people do on the page: the queue, LoRAs, the gallery, grids, foreign images."""

import importlib.resources
import importlib.util
import io
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver import Keys

from toy_browser import (
    PHONE,
    Page,
    api,
    begin_long,
    drop,
    needs_chromium,
    png,
    png_with,
    read,
)  # fmt: skip

pytestmark = needs_chromium
A1111 = (
    "a (red:1.2) fox <lora:ink:0.7> <lora:gone:1>\nNegative prompt: blue\nSteps: 30, "
    "Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, Size: 1024x768, Model: dream, Clip skip: 2"
)
COMFY = {
    "3": {"class_type": "KSampler", "inputs": {
        "seed": 9, "steps": 25, "cfg": 6.5, "sampler_name": "dpmpp_2m", "scheduler": "karras",
        "denoise": 1, "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0],
        "latent_image": ["5", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sub/dream.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 832, "height": 1216}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "an owl", "clip": ["10", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "grey", "clip": ["10", 1]}},
    "10": {"class_type": "LoraLoader", "inputs": {
        "lora_name": "ink.safetensors", "strength_model": 0.6, "model": ["4", 0]}},
    "11": {"class_type": "FreeU_V2", "inputs": {"model": ["4", 0]}},
}  # fmt: skip
INVOKE = {
    "positive_prompt": "a whale", "negative_prompt": "", "seed": 3, "steps": 28, "cfg_scale": 5.5,
    "scheduler": "euler_a", "width": 1024, "height": 1024, "model": {"name": "dream"},
    "loras": [{"model": {"name": "ink"}, "weight": 0.5}], "clip_skip": 2, "controlnets": [],
}  # fmt: skip


def photo(kind: str) -> bytes:
    """A JPEG or WebP with A1111's text in its EXIF."""
    exif, file = Image.Exif(), io.BytesIO()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.encode("utf-16be")
    Image.new("RGB", (32, 24)).save(file, kind, exif=exif)
    return file.getvalue()


def draw(page: Page, prompt: str, **fields: object) -> str:
    """The id of an image that was drawn from the form."""
    page.set("prompt", prompt)
    for id, value in {"steps": 2, "number": 1, **fields}.items():
        page.set(id, value)
    before = page.js("return document.querySelector('.job')?.dataset.job ?? ''")
    page.click("#draw")
    job = page.wait("[...document.querySelectorAll('.job.done')].map(e => e.dataset.job)"
                    ".find(id => id !== arguments[0])", before)  # fmt: skip
    return str(api(page, f"/v1/jobs/{job}")["pictures"][0]["id"])


def view(page: Page, id: str) -> None:
    page.wait("document.querySelector(arguments[0])", f'#thumbnails [data-picture="{id}"]')
    page.click(f'#thumbnails [data-picture="{id}"]')


def newest(page: Page, other: str) -> dict:
    """The newest image of the gallery, once it is not the other."""
    page.wait("document.querySelector('#thumbnails [data-picture]')?.dataset.picture"
              " > arguments[0]", other)  # fmt: skip
    return dict(api(page, "/v1/gallery?limit=1")["data"][0])


# --- the queue ------------------------------------------------------------------------------


def test_what_waits_is_folded_and_all_can_be_cancelled(page):
    first = begin_long(page)
    for _ in range(2):
        page.click("#draw")
    page.wait("document.querySelectorAll('#waiting .job').length === 2")
    assert page.find("#waiting").text == "2 jobs are waiting"
    assert page.find("#jobs .job").get_attribute("data-job") == first
    text = page.find("#queue-text").text
    to_come = int(text.removesuffix(" images to come"))
    assert 16 < to_come <= 24, text  # of three times eight; the first job's may be drawn already
    page.click("#cancel-all")
    page.wait("document.getElementById('queue').hidden && !document.querySelector('.job')")
    assert {job["status"] for job in api(page, "/v1/jobs?limit=3")["data"]} == {"cancelled"}


def test_what_is_drawn_elsewhere_appears(page):
    page.later(
        """await fetch("/v1/images/generations", {
          method: "POST", headers: {"Content-Type": "application/json"},
          body: JSON.stringify({prompt: "a frog", steps: 1})})"""
    )
    page.wait("document.querySelector('#thumbnails button')?.title === 'a frog'")


@pytest.mark.parametrize("size", [PHONE, (1280, 860)])
def test_a_long_prompt_stays_on_the_screen(page, server, size):
    page.open(server, size)
    page.ready()
    page.set("prompt", "a very " * 20 + "long owl")
    page.js("document.getElementById('more').open = true")
    page.set("steps", 1)
    page.click("#draw")
    page.job("done")
    assert page.js("return document.documentElement.scrollWidth") <= size[0]
    for part in (".job", ".job .words", ".job button"):
        box = page.find(part).rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= size[0], part


# --- the form -------------------------------------------------------------------------------


def test_a_lora_is_picked(page):
    page.js("document.getElementById('loras').open = true")
    page.set("lora", "ink")
    field = page.find("#lora-list input")
    field.clear()
    field.send_keys("0.5")
    page.driver.refresh()
    page.ready()
    id = draw(page, "a fox, noto style")
    assert api(page, f"/v1/gallery/{id}")["settings"]["loras"] == [["ink", 0.5]]
    page.click("#lora-list button")
    id = draw(page, "a fox, noto style <lora:ink:0.8>")
    typed = api(page, f"/v1/gallery/{id}")["settings"]
    assert typed["loras"] == [["ink", 0.8]] and "<lora" not in typed["prompt"]
    assert not page.driver.find_elements("css selector", "#lora-list li")


def test_hints_say_what_the_model_is_made_for(page):
    made = api(page, "/page/about.json")["size"]
    page.set("size", "own")
    page.wait("!document.getElementById('own-size').hidden")
    assert page.values("width", "height") == [str(made)] * 2
    page.set("width", 2 * made)
    page.set("height", 2 * made)
    note = page.find("#size-note")
    assert f"was made for {made} × {made}: this is drawn at {made} × {made}" in note.text
    page.set("width", made)
    page.set("height", made)
    assert not note.is_displayed()


def test_the_weight_of_a_word_is_changed_by_keys(page):
    page.set("prompt", "a red fox")
    field = page.find("#prompt")
    field.send_keys(Keys.CONTROL, Keys.ARROW_UP)
    assert page.values("prompt") == ["a red (fox:1.1)"]
    field.send_keys(Keys.CONTROL, Keys.ARROW_UP)
    assert page.values("prompt") == ["a red (fox:1.2)"]
    for _ in range(2):
        field.send_keys(Keys.CONTROL, Keys.ARROW_DOWN)
    assert page.values("prompt") == ["a red fox"]


def test_the_page_speaks_the_browsers_language(page, server):
    try:
        for language, said in (("de-AT", "Erzeugen"), ("fr", "Générer"), ("ko-KR", "생성")):
            page.driver.execute_cdp_cmd(
                "Emulation.setUserAgentOverride", {"userAgent": "x", "acceptLanguage": language}
            )
            page.open(server)
            page.ready()
            assert page.find("#draw span").text == said
            assert page.js("return document.documentElement.lang") == language[:2]
            page.js("for (const part of document.querySelectorAll('details')) part.open = true")
            assert page.js("return document.documentElement.scrollWidth") <= 1280
    finally:
        page.driver.execute_cdp_cmd(
            "Emulation.setUserAgentOverride", {"userAgent": "x", "acceptLanguage": "en"}
        )


def test_a_grid_of_two_settings(page):
    page.set("prompt", "a fox, noto style")
    page.set("seed", 3)
    page.js("document.getElementById('grid').open = true")
    page.click("#draw-grid")
    assert "Choose a setting" in page.find("#error").text
    for id, value in (
        ("x", "steps"),
        ("x-values", "1, 2"),
        ("y", "words"),
        ("y-values", "fox, owl"),
    ):
        page.set(id, value)
    page.click("#draw-grid")
    page.wait("document.querySelectorAll('#grids td .tile[aria-label] img').length === 4")
    heads = [head.text for head in page.driver.find_elements("css selector", "#grids th")]
    assert heads[:2] == ["Steps 1", "Steps 2"] and heads[3] == "Words of the prompt owl"
    drawn = [one["settings"] for one in api(page, "/v1/gallery?limit=4")["data"]]
    made = sorted((one["prompt"], one["steps"], one["seed"]) for one in drawn)
    assert made == [(f"a {what}, noto style", n, 3) for what in ("fox", "owl") for n in (1, 2)]
    page.driver.refresh()
    page.ready()
    page.wait("document.querySelectorAll('#grids td .tile[aria-label]').length === 4")
    page.click("#grids .head button")
    assert not page.driver.find_elements("css selector", "#grids .job")


# --- the viewer -----------------------------------------------------------------------------


def test_again_vary_and_enlarge_and_the_image_before(page):
    first = draw(page, "a frog, flat twemoji style", seed=4)
    view(page, first)
    assert not page.find("#compare").is_displayed()
    page.click("#again")
    again = newest(page, first)
    assert again["settings"]["seed"] != 4 and again["settings"]["image"] == ""
    page.click("#vary")
    varied = newest(page, again["id"])
    assert varied["settings"]["image"] and varied["settings"]["strength"] == 0.6
    page.click("#enlarge")
    large = newest(page, varied["id"])["settings"]
    native = api(page, "/page/about.json")["size"]
    assert (large["width"], large["seed"], large["strength"]) == (2 * native, 4, 0.5)
    page.find("#viewer").send_keys(Keys.ESCAPE)
    view(page, varied["id"])
    page.click("#compare")
    page.wait("document.getElementById('before').naturalWidth > 0")
    page.js("const s = document.getElementById('split'); s.value = 30;"
            "s.dispatchEvent(new Event('input'))")  # fmt: skip
    assert "70%" in str(page.js("return document.getElementById('before').style.clipPath"))
    page.click("#copy")
    page.wait("document.querySelector('[data-notes]').textContent === 'Prompt copied.'")
    page.find("#viewer").send_keys(Keys.ESCAPE)


# --- the gallery ----------------------------------------------------------------------------


def shown(page: Page) -> list[str]:
    return list(
        page.js("return [...document.querySelectorAll('#thumbnails button')].map(b => b.title)")
    )


def test_the_gallery_is_searched_and_favourites_are_kept(page):
    whale, crab = draw(page, "a Whale at night"), draw(page, "a crab at noon")
    page.set("search", "whale at")
    page.wait("[...document.querySelectorAll('#thumbnails button')].every(b =>"
              " b.title.includes('Whale at'))")  # fmt: skip
    assert "a Whale at night" in shown(page)
    page.set("search", "nothing of the kind")
    page.wait("!document.getElementById('none-found').hidden")
    page.set("search", "")
    view(page, crab)
    page.click("#favourite")
    page.find("#viewer").send_keys(Keys.ESCAPE)
    page.driver.refresh()
    page.ready()
    page.click("#favourites")
    page.wait("document.querySelectorAll('#thumbnails button').length === 1")
    assert shown(page) == ["a crab at noon"]
    page.click("#favourites")
    page.wait("document.querySelector(arguments[0])", f'#thumbnails [data-picture="{whale}"]')


def test_several_are_downloaded_and_deleted(page, downloads: Path):
    ids = [draw(page, f"a cat, number {i}", seed=i) for i in range(3)]
    page.click("#select")
    for id in ids[:2]:
        page.click(f'#thumbnails [data-picture="{id}"]')
    assert page.find("#selected").text == "2 selected"
    page.click("#download-selected")
    page.wait("document.getElementById('notes').textContent === 'Packing 2 images'")
    saved = downloads / "koala.zip"
    page.waited(saved.exists)
    with zipfile.ZipFile(saved) as packed:
        assert packed.testzip() is None
        names = packed.namelist()
        assert [name[13:] for name in names] == ["a-cat-number-1-1.png", "a-cat-number-0-0.png"]
        assert Image.open(packed.open(names[0])).text["parameters"].startswith("a cat, number 1")
    page.click("#delete-selected")
    assert page.find("#delete-selected").text == "Delete 2 images permanently?"
    page.click("#delete-selected")
    page.wait("document.getElementById('notes').textContent === '2 images deleted.'")
    left = {one["id"] for one in api(page, "/v1/gallery")["data"]}
    assert ids[2] in left and not {*ids[:2]} & left


def test_an_image_of_the_gallery_is_dragged_to_the_start(page):
    id = draw(page, "a dog, noto style")
    page.js(
        """const dataTransfer = new DataTransfer();
        const go = (kind, on) => on.dispatchEvent(
          new DragEvent(kind, {dataTransfer, bubbles: true, cancelable: true}));
        go("dragstart", document.querySelector(arguments[0]).parentElement);
        go("drop", document.getElementById("start"));""",
        f'#thumbnails [data-picture="{id}"]',
    )
    page.wait("!document.getElementById('given').hidden")
    assert page.find("#notes").text == "The next image starts from this one."
    page.click("#ungive")


# --- images of other programs ---------------------------------------------------------------


def test_settings_of_other_programs_are_read(page):
    for content in (png_with("parameters", A1111), photo("JPEG"), photo("WEBP")):
        found = read(page, content)
        assert found["source"] == "A1111" and found["others"] == ["Clip skip"]
        assert (found["prompt"], found["negative_prompt"]) == ("a (red:1.2) fox", "blue")
        assert found["loras"] == [["ink", 0.7], ["gone", 1]] and found["width"] == 1024
    found = read(page, png_with("prompt", json.dumps(COMFY)))
    assert found["source"] == "ComfyUI" and found["others"] == ["FreeU_V2"]
    assert (found["prompt"], found["negative_prompt"], found["seed"]) == ("an owl", "grey", 9)
    assert (found["width"], found["height"], found["model"]) == (832, 1216, "dream")
    assert found["sampler"] == "dpmpp_2m karras" and found["loras"] == [["ink", 0.6]]
    found = read(page, png_with("invokeai_metadata", json.dumps(INVOKE)))
    assert found["source"] == "InvokeAI" and found["others"] == ["clip_skip"]
    assert (found["prompt"], found["steps"], found["loras"]) == ("a whale", 28, [["ink", 0.5]])
    for nothing in ("[1]", "null", "{}", '{"3": {"class_type": "KSampler", "inputs": {}}}'):
        assert read(page, png_with("prompt", nothing)) is None


def test_broken_photos_are_borne(page):
    for content in (photo("JPEG"), photo("WEBP")):
        for end in range(0, min(len(content), 400), 7):
            broken = bytearray(content)
            broken[end] ^= 0xFF
            read(page, bytes(broken))
            read(page, content[:end])


def test_foreign_settings_are_fitted_and_what_is_left_out_is_named(page):
    made = api(page, "/page/about.json")
    drop(page, photo("JPEG"), "fox.jpg")
    page.wait("document.getElementById('prompt').value !== ''")
    own = made["sampling"]
    assert page.values("prompt", "seed", "steps", "guidance", "scheduler") == [
        "a (red:1.2) fox", "5", str(own["steps"]), f"{own['guidance']:g}", own["scheduler"],
    ]  # fmt: skip
    assert page.find("#lora-list").text.startswith("ink")
    told = page.find("#told").text
    assert "It was made with dream" in told
    for left in (
        "Clip skip",
        "30 steps",
        "guidance 7",
        "DPM++ 2M Karras",
        "1024 × 768",
        "LoRA gone",
    ):
        assert left in told, left
    assert "ink" not in told
    width, height = (int(side) for side in page.values("size")[0].split("x"))
    assert abs(width / height - 4 / 3) < 0.1 and width * height < 1.5 * made["size"] ** 2
    page.click("#told button")
    assert not page.find("#told").is_displayed()


# --- for everybody --------------------------------------------------------------------------


@pytest.mark.skipif(not importlib.util.find_spec("axe_core_python"), reason="no axe-core here")
def test_axe_finds_nothing(page, server):
    axe = (importlib.resources.files("axe_core_python") / "axe.min.js").read_text()
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        page.open(server)
        page.ready()
        page.js(axe)
        id = draw(page, "a fox, noto style")
        drop(page, png(size=(128, 128)), "halves.png")
        page.wait("!document.getElementById('given').hidden")
        page.js("for (const part of document.querySelectorAll('details')) part.open = true")
        page.click("#select")
        assert faults(page) == []
        page.click("#select")
        view(page, id)
        assert faults(page) == []
        page.find("#viewer").send_keys(Keys.ESCAPE)
        page.click("#paint")
        page.find("#canvas").send_keys(Keys.SPACE)  # something is painted
        assert faults(page) == []
        page.click("#painter [data-close]")
        page.wait("!document.getElementById('fill-field').hidden")
        assert faults(page) == []
        page.set("size", "own")
        assert page.find("#own-size").is_displayed()
        assert faults(page) == []
        page.click('[popovertarget="tips"]')
        assert faults(page) == []
        page.click("#ungive")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def faults(page: Page) -> list:
    """What axe has against the page as it is: rules and elements."""
    found = page.later("return (await axe.run()).violations.map("
                       "v => [v.id, ...v.nodes.map(n => n.target.join(' '))])")  # fmt: skip
    return list(found)


def test_notes_cover_no_button(page, server):
    for size in (PHONE, (768, 1024), (1280, 860)):
        page.open(server, size)
        page.ready()
        page.js("document.getElementById('more').open = true")
        page.click("#usual")
        page.wait("document.getElementById('notes').textContent !== ''")
        note, head = page.find("#notes").rect, page.find(".top").rect
        assert head["y"] <= note["y"] and note["height"] > 0
        assert note["y"] + note["height"] <= head["y"] + head["height"]
        model = page.find("#model")
        assert not model.is_displayed() or note["x"] + note["width"] <= model.rect["x"]
