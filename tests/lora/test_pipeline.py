"""LoRAs where a person meets them: `koala.load`, the pictures' settings, the command line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import koala
from koala.architectures.table import get
from koala.checkpoints.bundled import DEFAULT
from koala.cli import main
from koala.errors import UserError
from koala.generation import load, read_settings, save
from koala.generation.validation import loras as parsed
from koala.lora.names import base_named
from koala.lora.reading import read
from toy import toy_unet
from toy_lora import toy_base, toy_lora

TOY = toy_base(toy_unet("sdxl"))
OPTIONS = {"steps": 2, "seed": 5}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return (
        toy_lora(tmp_path / "a.safetensors", TOY, seed=1, alpha=8),
        toy_lora(tmp_path / "b.safetensors", TOY, "PEFT", seed=2),
    )


def pixels(pipeline, prompt: str = "a fox") -> np.ndarray:
    return np.asarray(pipeline(prompt, **OPTIONS).images[0], dtype=int)


def test_loras_change_images_and_leave_no_trace(toy_sdxl, files):
    """Also through the text encoders, whose embeddings the pipeline remembers."""
    first, second = files
    pipeline = load(toy_sdxl, "cpu")
    plain = pixels(pipeline)
    pipeline.add_lora(first, 1.0)
    pipeline.add_lora(second, 0.6)
    both = pixels(pipeline)
    assert (both != plain).any()
    merged = load(toy_sdxl, "cpu")
    for file, scale in ((first, 1.0), (second, 0.6)):
        merged.add_lora(file, scale, merged=True)
    assert abs(pixels(merged) - both).max() <= 1
    given = load(toy_sdxl, "cpu", lora={first: 1.0, second: 0.6})
    assert (pixels(given) == both).all()
    pipeline.scale_lora("a", 0.2)
    assert (pixels(pipeline) != both).any()
    pipeline.scale_lora("a", 1.0)
    assert (pixels(pipeline) == both).all()
    pipeline.remove_lora("b")
    pipeline.remove_lora("a")
    assert (pixels(pipeline) == plain).all()


def test_a_lora_on_a_text_encoder_alone_is_seen_at_once(toy_sdxl, tmp_path):
    file = toy_lora(tmp_path / "t.safetensors", TOY, "PEFT", lambda t: t.part != "unet", alpha=None)
    pipeline = load(toy_sdxl, "cpu")
    before = pipeline.conditioner(["a fox"])[0]
    assert pipeline.add_lora(file, 5).parts["unet"] == 0
    assert (pipeline.conditioner(["a fox"])[0] != before).any()
    pipeline.remove_lora("t")
    assert (pipeline.conditioner(["a fox"])[0] == before).all()


def test_images_say_which_loras_made_them(toy_sdxl, files, tmp_path):
    pipeline = load(toy_sdxl, "cpu", lora={files[0]: 1, files[1]: 0.6})
    drawn = pipeline("a fox", **OPTIONS)
    assert drawn.settings[0].loras == (("a", 1.0), ("b", 0.6))
    (path,) = save(drawn, tmp_path / "out")
    assert read_settings(path) == drawn.settings[0]
    text = Image.open(path).info["parameters"]
    assert text.splitlines()[0] == "a fox <lora:a:1> <lora:b:0.6>"


def test_settings_of_images_made_before_loras_are_read(toy_sdxl, tmp_path):
    from PIL import PngImagePlugin

    drawn = load(toy_sdxl, "cpu")("a fox", **OPTIONS)
    (path,) = save(drawn, tmp_path)
    assert " <lora" not in Image.open(path).info["parameters"]
    values = json.loads(Image.open(path).info["koala"])
    assert values.pop("loras") == []
    info = PngImagePlugin.PngInfo()
    info.add_text("koala", json.dumps(values))
    drawn.images[0].save(path, pnginfo=info)
    assert read_settings(path) == drawn.settings[0]


def test_misuse_is_refused(toy_sdxl, files):
    pipeline = load(toy_sdxl, "cpu", lora={files[0]: 1})
    with pytest.raises(UserError, match="a LoRA called 'a' is on the model already"):
        pipeline.add_lora(files[0])
    with pytest.raises(UserError, match="LoRA scale is nan: allowed are numbers from -100 to 100"):
        pipeline.add_lora(files[1], float("nan"))
    with pytest.raises(UserError, match="LoRA scale is 101"):
        pipeline.scale_lora("a", 101)
    with pytest.raises(UserError, match="'b' is not on the model; its LoRAs: a"):
        pipeline.remove_lora("b")
    pipeline.add_lora(files[1], merged=True)
    with pytest.raises(UserError, match="'b' is merged into the weights for good"):
        pipeline.scale_lora("b", 0.5)


@pytest.mark.parametrize(
    ("given", "file", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.6", "a.safetensors", 0.6),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("C:/a.safetensors", "C:/a.safetensors", 1.0),
        ("C:/a.safetensors:.5", "C:/a.safetensors", 0.5),
    ],
)
def test_the_commands_spelling_of_a_scale(given, file, scale):
    assert parsed([given]) == {file: scale}


def test_a_file_may_be_called_like_a_scale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:2").touch()
    assert parsed(["a:2"]) == {"a:2": 1.0}


def test_a_scale_that_is_no_number_is_a_bad_scale_and_no_missing_file(tmp_path):
    (tmp_path / "style").touch()
    for file in ("style.safetensors", str(tmp_path / "style")):
        for scale in ("0,8", "", "nan", "high", "0_8"):
            with pytest.raises(UserError, match=f"LoRA scale is '{scale}'.*as in {file}:0.8"):
                parsed([f"{file}:{scale}"])
    with pytest.raises(UserError, match="LoRA scale is '0,8'"):  # whatever the file is called
        parsed(["F:0,8"])
    with pytest.raises(UserError, match="LoRA a is given twice"):
        parsed(["a", "a:0.5"])


@pytest.fixture
def teachers_lora(tmp_path: Path) -> Path:
    """A LoRA for the teacher of the bundled model, in kohya's spelling."""
    base = base_named("koala-mini")
    teacher = replace(base, unet=get("sdxl-mini"))
    return toy_lora(tmp_path / "style.safetensors", teacher, alpha=1)


def test_generate_draws_the_bundled_student_with_its_teachers_lora(teachers_lora, tmp_path, capsys):
    arguments = ["generate", "a fox", "--steps", "1", "--seed", "3", "--out", str(tmp_path)]
    assert main([*arguments, "--json", "--lora", f"{teachers_lora}:0.5"]) == 0
    captured = capsys.readouterr()
    report = read(teachers_lora, base_named(DEFAULT)).report
    assert report.dropped and report.made_for == "sdxl-mini"
    assert f"koala: {report.line()}\n" in captured.err
    (made,) = json.loads(captured.out)
    assert made["loras"] == [["style", 0.5]]
    same = koala.load(DEFAULT, "cpu", lora={teachers_lora: 0.5})("a fox", steps=1, seed=3)
    difference = np.asarray(Image.open(made["path"]), int) - np.asarray(same.images[0], int)
    assert abs(difference).max() <= 1
    plain = koala.load(DEFAULT, "cpu")("a fox", steps=1, seed=3)
    assert same.images[0].tobytes() != plain.images[0].tobytes()


def test_generate_refuses_a_bad_lora_in_one_line(tmp_path, capsys):
    for given, told in (
        ("none.safetensors", "none.safetensors cannot be read: No such file or directory"),
        ("none.safetensors:200", "LoRA scale is 200.0: allowed are numbers from -100 to 100"),
    ):
        assert main(["generate", "a fox", "--out", str(tmp_path / "p"), "--lora", given]) == 2
        captured = capsys.readouterr()
        assert told in captured.err
        assert len(captured.err.strip().splitlines()) == 1
        assert not (tmp_path / "p").exists()


def test_convert_writes_a_lora_that_is_used_as_it_is(teachers_lora, tmp_path, capsys):
    out = tmp_path / "mini.safetensors"
    arguments = ["convert", str(teachers_lora), "--for", "koala-mini", "--out", str(out)]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    own = read(out, base_named("koala-mini")).report
    assert own.made_for == "koala-mini" and not own.dropped
    assert told["applied"] == own.applied == own.modules
    assert main(arguments) == 2
    assert f"{out} is a file; name a new one" in capsys.readouterr().err


def test_convert_takes_one_purpose_and_no_dtype_for_a_lora(teachers_lora, tmp_path, capsys):
    start = ["convert", str(teachers_lora), "--out", str(tmp_path / "x.safetensors")]
    assert main([*start, "--for", "koala-mini", "--dtype", "fp16"]) == 2
    assert "--dtype has no effect on a LoRA" in capsys.readouterr().err
    for wrong in ([], ["--for", "koala-mini", "--to", "diffusers"]):
        assert main([*start, *wrong]) == 2
    assert not (tmp_path / "x.safetensors").exists()
