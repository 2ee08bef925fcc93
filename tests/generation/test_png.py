"""PNG files with their settings, contact sheets, and the demo that makes one."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageFont, PngImagePlugin

from koala.errors import Failure, UserError
from koala.generation import Result, Settings, check_writable, load, read_settings, save
from koala.generation.demo import EIGHT_PROMPTS, demo, main
from koala.generation.png import parameters
from koala.serving.jobs.gallery_writer import encode
from koala.utils.contact_sheet import contact_sheet, wrap
from toy import toy_pipeline

IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
EXAMPLE = Settings("a red fox", "", 10, 3.5, 7, 64, 64, "koala-mini", "0.1.0")


def result(*settings: Settings) -> Result:
    return Result([Image.new("RGB", (8, 8), (i, 2, 3)) for i in range(len(settings))], [*settings])


def test_parameters_are_automatic1111s_text():
    assert parameters(EXAMPLE) == (
        "a red fox\n"
        "Steps: 10, Sampler: Euler, Schedule type: SGM Uniform, CFG scale: 3.5, Seed: 7, "
        "Size: 64x64, Model: koala-mini, Version: koala 0.1.0"
    )
    other = Settings("ü\nb", "blur,\nnoise", 25, 5.0, 2**63 - 1, 72, 40, 'a, "b"', "0.1.0")
    assert parameters(other) == (
        "ü\nb\nNegative prompt: blur,\nnoise\n"
        "Steps: 25, Sampler: Euler, Schedule type: SGM Uniform, CFG scale: 5, "
        'Seed: 9223372036854775807, Size: 72x40, Model: "a, \\"b\\"", Version: koala 0.1.0'
    )


def test_parameters_name_what_differs_from_the_plain_way():
    lcm = replace(EXAMPLE, sampler="LCM", schedule="lcm", image="0123", strength=0.6)
    assert "Sampler: LCM, Schedule type: Automatic" in parameters(lcm)
    assert parameters(lcm).endswith("Denoising strength: 0.6")
    assert parameters(replace(EXAMPLE, guidance_until=0.5)).endswith("Guidance until: 0.5")


def test_images_of_earlier_versions_are_read(tmp_path):
    """Before LoRAs, other samplers and given pictures, settings said less."""
    (path,) = save(result(EXAMPLE), tmp_path)
    with Image.open(path) as image:
        text = json.loads(image.info["koala"])
        for name in ("loras", "guidance_until", "strength", "image", "mask"):
            del text[name]
        info = PngImagePlugin.PngInfo()
        info.add_text("koala", json.dumps(text))
        image.save(tmp_path / "old.png", pnginfo=info)
    assert read_settings(tmp_path / "old.png") == EXAMPLE


@pytest.mark.parametrize(
    ("texts", "program"),
    [
        ({"parameters": "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7"}, "AUTOMATIC1111's web"),
        ({"parameters": "a cat\nSteps: 20, Version: koala 0.2.0"}, "koala as text alone"),
        ({"prompt": "{}", "workflow": "{}"}, "ComfyUI"),
        ({"invokeai_metadata": "{}"}, "InvokeAI"),
        ({"Dream": "a cat -s 50"}, "InvokeAI"),
        ({"Software": "NovelAI", "Comment": "{}"}, "NovelAI"),
        ({"parameters": "{}", "fooocus_scheme": "fooocus"}, "Fooocus"),
        ({"parameters": '{"sui_image_params": {}}'}, "SwarmUI"),
    ],
)
def test_settings_of_other_programs_are_named(tmp_path, texts, program):
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(UserError, match=f"holds settings of {program}.* not read here") as caught:
        read_settings(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


def test_settings_of_other_programs_in_a_jpeg_are_named(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a cat\nSteps: 20, Sampler: x".encode("utf-16-be")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(UserError, match="holds settings of AUTOMATIC1111's web UI"):
        read_settings(tmp_path / "a.jpg")


prompts = st.text(max_size=60)


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    record=st.builds(
        Settings,
        prompt=prompts,
        negative_prompt=prompts,
        steps=st.integers(1, 1000),
        guidance=st.floats(0, 100),
        seed=st.integers(0, 2**63 - 1),
        width=st.integers(2, 512).map(lambda n: 8 * n),
        height=st.integers(2, 512).map(lambda n: 8 * n),
        model=prompts,
        version=prompts,
    )
)
def test_settings_survive_the_file(tmp_path, record):
    (path,) = save(result(record), tmp_path, stem="x")
    assert read_settings(path) == record
    with Image.open(path) as image:
        assert image.info["parameters"] == parameters(record)
        assert image.convert("RGB").getpixel((0, 0)) == (0, 2, 3)
    path.unlink()


def test_files_are_named_after_their_prompts_and_numbered(tmp_path):
    out = tmp_path / "new" / "folder"
    named = [
        Settings(p, "", 1, 1.0, 0, 8, 8, "m", "0") for p in ("A red FOX, 3d!", "狐", "A red fox 3D")
    ]
    names = [path.name for path in save(result(*named), out)]
    assert names == ["a-red-fox-3d-0001.png", "picture-0001.png", "a-red-fox-3d-0002.png"]
    assert sorted(os.listdir(out)) == sorted(names)


def test_no_image_is_ever_replaced(tmp_path):
    (tmp_path / "x-0007.png").write_bytes(b"mine")
    (tmp_path / "x-0009.txt").write_bytes(b"mine too")
    (tmp_path / "x-9999.png").write_bytes(b"the last of four digits")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    names = [path.name for path in save(result(EXAMPLE, EXAMPLE), tmp_path, stem="x")]
    assert names == ["x-10000.png", "x-10001.png"]
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_name_that_ends_in_png_is_the_file_or_the_files(tmp_path):
    fox = tmp_path / "new" / "fox.png"
    assert save(result(EXAMPLE), fox) == [fox]
    numbered = [fox.with_name("fox-1.png"), fox.with_name("fox-2.png")]
    check_writable(fox, 2)
    assert save(result(EXAMPLE, EXAMPLE), fox) == numbered
    assert read_settings(fox) == read_settings(numbered[1]) == EXAMPLE
    before = {path: path.read_bytes() for path in (fox, *numbered)}
    for images in (1, 2):
        with pytest.raises(UserError, match=r"\.png exists; name another file, or a folder"):
            check_writable(fox, images)
        with pytest.raises(UserError, match=r"\.png exists"):
            save(result(*[EXAMPLE] * images), fox)
    assert before == {path: path.read_bytes() for path in fox.parent.iterdir()}


def test_a_name_of_another_kind_of_image_is_refused_and_a_folder_is_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"fox\.jpg: pictures are written as PNG; name it fox\.png"):
        check_writable("fox.jpg")
    (folder := tmp_path / "drawn.png").mkdir()
    check_writable(folder)
    (path,) = save(result(EXAMPLE), folder)
    assert path.parent == folder
    assert save(result(EXAMPLE), tmp_path / "v1.5")[0].parent == tmp_path / "v1.5"


def test_files_can_be_read_like_any_other(tmp_path):
    (path,) = save(result(EXAMPLE), tmp_path)
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_failure_leaves_nothing_half_written(tmp_path):
    class Torn(Image.Image):
        def save(self, file, **kwargs):
            file.write(b"\x89PNG")
            raise OSError(28, "No space left on device")

    with pytest.raises(Failure, match="No space left"):
        save(Result([Torn()], [EXAMPLE]), tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("stem", ["", "a/b", ".", "/x"])
def test_a_stem_that_is_no_plain_name_is_refused(tmp_path, stem):
    with pytest.raises(UserError, match="plain name"):
        save(result(EXAMPLE), tmp_path / "out", stem=stem)
    assert not (tmp_path / "out").exists()


def test_unwritable_folders_are_refused_and_writable_ones_left_alone(tmp_path):
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    for bad in (file, file / "deeper", Path("/proc/koala"), Path("/proc")):
        with pytest.raises(UserError, match="cannot write"):
            check_writable(bad)
        with pytest.raises(UserError, match="cannot write"):
            save(result(EXAMPLE), bad)


def test_files_without_our_settings_are_refused(tmp_path):
    plain, text = tmp_path / "plain.png", tmp_path / "text.png"
    Image.new("RGB", (4, 4)).save(plain)
    text.write_text("no picture")
    with pytest.raises(UserError, match="no settings of koala's"):
        read_settings(plain)
    for bad in (text, tmp_path / "missing.png"):
        with pytest.raises(UserError, match="cannot be read"):
            read_settings(bad)


def test_images_of_the_pipeline_carry_what_makes_them_again(tmp_path):
    pipe = load(toy_pipeline(tmp_path / "toy", architecture="koala"), device="cpu")
    drawn = pipe("a fox", number=2, steps=2)
    for image, path in zip(drawn.images, save(drawn, tmp_path / "out"), strict=True):
        found = read_settings(path)
        again = pipe(found.prompt, steps=found.steps, guidance=found.guidance, seed=found.seed)
        difference = [
            abs(a - b) for a, b in zip(again.images[0].tobytes(), image.tobytes(), strict=True)
        ]
        assert max(difference) <= 1


def test_a_contact_sheet_holds_every_image_enlarged_on_white():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [Image.new("RGB", (32, 16), colour) for colour in colours]
    sheet = contact_sheet(images, ["a red one", "green", "blue"], columns=2, scale=4, title="Three")
    assert sheet.mode == "RGB" and sheet.getpixel((0, 0)) == (255, 255, 255)
    counts = {colour: n for n, colour in sheet.getcolors(1 << 20)}
    assert all(counts[colour] == 16 * 32 * 16 for colour in colours)
    untitled = contact_sheet(images, ["a red one", "green", "blue"], columns=2, scale=4)
    assert untitled.height < sheet.height and untitled.width == sheet.width
    wide = contact_sheet(images, ["", "", ""], columns=9, scale=4)
    assert wide.width > sheet.width and wide.height < untitled.height


def test_transparent_images_lie_on_white():
    clear = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    sheet = contact_sheet([clear], [""], columns=1)
    assert sheet.getcolors() == [(sheet.width * sheet.height, (255, 255, 255))]


@given(text=st.text(max_size=80), width=st.integers(24, 200))
@hypothesis_settings(max_examples=50, deadline=None)
def test_wrapped_lines_fit_and_lose_no_letter(text, width):
    font = ImageFont.load_default(14)
    lines = wrap(text, font, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(line and (len(line) == 1 or font.getlength(line) <= width) for line in lines)


def test_demo_draws_eight_images_and_says_where(tmp_path, capsys):
    out = demo(
        tmp_path / "sheets" / "demo.png", toy_pipeline(tmp_path / "toy", architecture="koala")
    )
    printed = capsys.readouterr().out
    assert all(prompt in printed for prompt in EIGHT_PROMPTS) and len(EIGHT_PROMPTS) == 8
    assert str(out.resolve()) in printed.splitlines()[-1]
    assert [path.name for path in out.parent.iterdir()] == ["demo.png"]
    with Image.open(out) as sheet:
        assert sheet.width > 4 * 256 and sheet.height > 2 * 256


def test_demo_refuses_an_unwritable_place_in_one_line(capsys):
    assert main(["--out", "/proc/koala/demo.png"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("koala: cannot write to /proc/koala")


def test_every_image_says_that_a_model_made_it(tmp_path):
    """As IPTC's digital source type, which other programs read from XMP."""
    (path,) = save(result(EXAMPLE), tmp_path)
    files = [path, *(tmp_path / f"x.{kind}" for kind in ("png", "webp", "jpeg"))]
    with Image.open(path) as image:
        for file in files[1:]:
            file.write_bytes(encode(image, None, file.suffix[1:]))
    for file in files:
        with Image.open(file) as image:
            (found,) = ElementTree.fromstring(image.info["xmp"]).iter(
                f"{{{IPTC}}}DigitalSourceType"
            )
        assert found.text.endswith("/digitalsourcetype/trainedAlgorithmicMedia")


@pytest.mark.parametrize("change", [{"loras": 5}, {"loras": [["x"]]}, {"embeddings": 1}])
def test_settings_of_a_strangers_image_are_refused(tmp_path, change):
    info = PngImagePlugin.PngInfo()
    info.add_text("koala", json.dumps({**asdict(EXAMPLE), **change}))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(UserError, match="holds settings that koala did not write"):
        read_settings(tmp_path / "x.png")
