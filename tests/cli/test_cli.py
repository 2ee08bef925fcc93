"""The command line: what it prints, what it refuses, and how fast it answers."""

import io
import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict

import pytest
from diffusers import StableDiffusionXLPipeline
from PIL import Image

import koala
from koala import recipes
from koala.cli import COMMANDS, command_named, main
from koala.data.illustrations.scenes import SMALL
from koala.generation import read_settings
from toy_controlnet import saved, toy_controlnet
from toy_ip_adapter import toy_image_encoder, toy_ip_adapter


def refused(capsys, *arguments: str) -> str:
    """Runs a command that must end with status 2 and one line; returns the line."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("koala: ")
    return line


def test_help_names_every_command_with_an_example(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in map(command_named, COMMANDS):
        assert f"  {command.name:<14} {command.summary}\n{'':17}{command.examples[0]}\n" in shown
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"koala {koala.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_examples(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    command = command_named(name)
    assert command.name == name
    for example in command.examples:
        assert f"\n  {example}\n" in shown
        assert shlex.split(example)[:2] == ["koala", name]
        command.parse(shlex.split(example)[2:])


def test_help_leaves_the_recipes_names_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    assert {*recipes.NAMES} <= {*re.findall(r"[\w-]+", capsys.readouterr().out)}


def test_architectures_prints_the_comparison(capsys):
    assert main(["architectures"]) == 0
    shown = capsys.readouterr().out
    for figure in ("2,567,463,684", "1,161,184,324", "782,822,724", "6.76"):
        assert figure in shown
    assert main(["architectures", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["koala-700m"]["parameters"] == 782_822_724


def test_generate_draws_saves_and_says_how(toy_sdxl, tmp_path, capsys):
    out = tmp_path / "drawn"
    given = ["generate", "a fox", "--model", str(toy_sdxl), "--steps", "2", "--seed", "7"]
    assert main([*given, "-n", "2", "--out", str(out), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [m["seed"] for m in made] == [7, 8]
    for m in made:
        settings = read_settings(m["path"])
        assert (settings.prompt, settings.seed, settings.steps) == ("a fox", m["seed"], 2)
        with Image.open(m["path"]) as image:
            assert image.size == (m["width"], m["height"])
            assert "Steps: 2" in image.info["parameters"]


def test_generate_draws_the_prompts_in_a_file(toy_sdxl, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffan owl\r\n\r\n  a red apple \r\n".encode())
    asked = ["generate", "a fox", "--prompts", str(file), "--model", str(toy_sdxl), "--steps", "1"]
    assert main([*asked, "--seed", "7", "--json", "--out", str(tmp_path)]) == 0
    drawn = [read_settings(one["path"]) for one in json.loads(capsys.readouterr().out)]
    told = [(settings.prompt, settings.seed) for settings in drawn]
    assert told == [("a fox", 7), ("an owl", 8), ("a red apple", 9)]


def test_a_table_of_prompts_is_read_as_one(toy_sdxl, tmp_path, capsys):
    file = tmp_path / "prompts.csv"
    asked = ["generate", "--prompts", str(file), "--model", str(toy_sdxl), "--steps", "1"]
    file.write_text("id,prompt\n1,an owl\n")
    assert main([*asked, "--json", "--out", str(tmp_path)]) == 0
    (drawn,) = json.loads(capsys.readouterr().out)
    assert read_settings(drawn["path"]).prompt == "an owl"
    file.write_text("prompt,seed\nan owl,7\n")
    assert main([*asked, "--out", str(tmp_path / "none")]) == 2
    assert "the column 'seed' has no effect here" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_generate_writes_the_file_that_is_named(toy_sdxl, tmp_path, capsys):
    given = ["generate", "a fox", "--model", str(toy_sdxl), "--steps", "1", "--seed", "7"]
    fox = tmp_path / "drawn" / "fox.png"
    assert main([*given, "--negative-prompt", "blue", "--out", str(fox)]) == 0
    assert capsys.readouterr().out == f"{fox}  seed 7\n"
    assert read_settings(fox).negative_prompt == "blue"
    line = refused(capsys, *given, "--out", str(fox))
    assert line == f"koala: {fox} exists; name another file, or a folder, which is added to"
    assert main([*given, "--negative", "blue", "-n", "2", "--strict", "--out", str(fox)]) == 0
    assert capsys.readouterr().out.split() == [
        str(fox.with_name("fox-1.png")), "seed", "7", str(fox.with_name("fox-2.png")), "seed", "8",
    ]  # fmt: skip
    assert fox.read_bytes() == fox.with_name("fox-1.png").read_bytes()
    assert len(list(fox.parent.iterdir())) == 3


def test_generate_says_how_much_of_a_controlnet_is_used(toy_sdxl, tmp_path, capsys):
    unet = StableDiffusionXLPipeline.from_pretrained(toy_sdxl).unet
    net = saved(toy_controlnet(unet), tmp_path / "edges")
    Image.new("RGB", (64, 64), "white").save(edges := tmp_path / "edges.png")
    given = ["generate", "a fox", "--model", str(toy_sdxl), "--steps", "1", "--seed", "7"]
    given += ["--control", str(net), "--control-image", str(edges), "--control-scale", "0.5"]
    assert main([*given, "--out", str(fox := tmp_path / "fox.png")]) == 0
    assert "ControlNet edges: 10 of 10 residuals are used" in capsys.readouterr().err
    assert (read_settings(fox).control, read_settings(fox).control_scale) == ("edges", 0.5)


def test_generate_says_how_much_of_an_ip_adapter_is_used(toy_sdxl, tmp_path, capsys):
    unet = StableDiffusionXLPipeline.from_pretrained(toy_sdxl).unet
    file = toy_ip_adapter(unet, tmp_path / "ip-toy.safetensors")
    encoder = toy_image_encoder(tmp_path / "encoder")
    Image.new("RGB", (64, 48), "white").save(shown := tmp_path / "shown.png")
    given = ["generate", "a fox", "--model", str(toy_sdxl), "--steps", "1", "--seed", "7"]
    given += ["--ip-adapter", f"{file}:0.5", "--ip-image", str(shown)]
    given += ["--image-encoder", str(encoder)]
    assert main([*given, "--out", str(fox := tmp_path / "fox.png")]) == 0
    assert "IP-Adapter ip-toy: 17 of 17 layers are used" in capsys.readouterr().err
    assert (read_settings(fox).ip_adapter, read_settings(fox).ip_scale) == ("ip-toy", 0.5)


def test_a_long_prompt_is_read_to_its_end(toy_sdxl, tmp_path):
    drawn = set()
    for end in ("zebra", "horse"):
        prompt = "a fox " + "and an owl " * 9 + "and finally a " + end
        given = ["generate", prompt, "--model", str(toy_sdxl), "--steps", "1", "--seed", "1"]
        assert main([*given, "--out", str(tmp_path / end)]) == 0
        (path,) = (tmp_path / end).glob("*.png")
        with Image.open(path) as image:
            drawn.add(image.tobytes())
    assert len(drawn) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["generate", ""], "empty"),
        (["generate", "a fox", "--size", "70x64"], "multiples of 8"),
        (["generate", "a" * 100_000], "100,000 characters"),
        (["generate", "a fox", "--scheduler", "heun"], "heun"),
        (["generate", "a fox", "--strength", "0.5"], "without an image"),
        (["generate", "a fox", "--image", "missing.png"], "missing.png"),
        (["generate", "a fox", "--steps", "0"], "steps"),
        (["generate", "a fox", "--steps", "many"], "many"),
        (["generate", "a fox", "--out", "/proc/nowhere"], "cannot write"),
        (["generate", "a\x1bfox"], "U+001B"),
        (["generate", "a fox", "-n", "1000000"], "1 to 10,000"),
        (["generate", "a fox", "--vram", "0.001"], "the smallest that works is"),
        (["generate", "a fox", "--weights", "fp16", "--device", "cpu"], "float16"),
        (["generate", "a fox", "--backend", "abacus"], "abacus"),
        (["generate", "a fox", "--graphs", "--device", "cpu"], "CUDA graphs"),
        (["generate", "a fox", "--device", "abacus"], "abacus"),
    ],
)
def test_generate_refuses(given, said, toy_sdxl, tmp_path, capsys):
    where = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    assert said in refused(capsys, *given, "--model", str(toy_sdxl), *where)
    assert not (tmp_path / "out").exists()


def test_generate_refuses_images(toy_sdxl, tmp_path, capsys):
    """A mask of another size, a strength out of its range, and a bomb."""
    out = ["--model", str(toy_sdxl), "--out", str(tmp_path / "out")]
    image, mask, bomb = (str(tmp_path / name) for name in ("a.png", "mask.png", "bomb.png"))
    Image.new("RGB", (64, 64)).save(image)
    Image.new("L", (64, 48), "white").save(mask)
    Image.new("1", (20_000, 20_000)).save(bomb)
    for given, said in (
        (["--image", image, "--mask", mask], "the mask is 64x48, its image 64x64"),
        (["--image", image, "--strength", "1.5"], "strength is 1.5"),
        (["--image", bomb], "holds over a hundred million pixels: allowed are 64,000,000"),
    ):
        assert said in refused(capsys, "generate", "a fox", *given, *out)
    assert not (tmp_path / "out").exists()


def test_the_first_frame_of_an_animated_image_is_read_and_that_is_said(toy_sdxl, tmp_path, capsys):
    file = tmp_path / "fox.gif"
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    frames[0].save(file, save_all=True, append_images=frames[1:])
    out = ["--model", str(toy_sdxl), "--out", str(tmp_path / "out"), "--steps", "2"]
    assert main(["generate", "a fox", "--image", str(file), *out]) == 0
    assert f"koala: {file} has 3 frames or pages: the first is read\n" in capsys.readouterr().err


def test_models_that_are_none_are_refused(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    (tmp_path / "empty").mkdir()
    for model, said in (("koala-giga", "koala-mini"), (str(tmp_path / "empty"), "model_index")):
        line = refused(capsys, "generate", "a fox", "--model", model, *out)
        assert said in line
        assert model in line


def test_a_name_that_the_terminal_cannot_show_is_escaped(toy_sdxl, tmp_path, monkeypatch):
    (tmp_path / "🦊").symlink_to(toy_sdxl)
    said = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", said)
    assert main(["inspect", str(tmp_path / "🦊")]) == 0
    said.flush()
    assert b"\\U0001f98a" in said.buffer.getvalue()


def test_compress_reports(toy_sdxl, tmp_path, capsys):
    given = ["compress", str(toy_sdxl), "--to", "koala-700m", "--out", str(tmp_path / "small")]
    assert main(given) == 0
    assert "inherited" in capsys.readouterr().out
    assert "small exists and is not empty; name a new folder" in refused(capsys, *given)
    assert "koala-700m" in refused(capsys, *given[:2], "--to", "koala-2b", "--out", "x")


def test_distill_and_prepare_and_evaluate_refuse(tmp_path, capsys):
    assert "sdxl-mini" in refused(capsys, "distill", "sdxl-maxi")
    assert "--data" in refused(capsys, "distill", "sdxl-mini", "--out", str(tmp_path / "run"))
    assert "illustrations-small" in refused(capsys, "prepare", "photos", "--out", str(tmp_path))
    report = ["--pictures", str(tmp_path), "--out", str(tmp_path / "report")]
    assert "two models" in refused(capsys, "evaluate", "a=x", "a=y", *report)
    assert "no prompts" in refused(capsys, "evaluate", "koala-mini", *report)
    mirrored = ["prepare", "illustrations-small", "--mirror", "--out", str(tmp_path)]
    assert "give --model" in refused(capsys, *mirrored)
    assert not list(tmp_path.iterdir())
    made = {"source": "illustrations", **asdict(SMALL), "test_pairs": 0.1}  # of the same size
    (tmp_path / "set.json").write_text(json.dumps(made))
    assert "test_pairs=0.1" in refused(capsys, *mirrored, "--model", "koala-mini")


def test_a_dry_run_shows_the_recipe(capsys):
    assert main(["distill", "koala-mini", "--dry-run", "--card", "4090", "--json"]) == 0
    student = json.loads(capsys.readouterr().out)["student"]
    assert student["cut"] == "koala-700m"
    taps = {tap["location"]: tap["stages"] for tap in student["settings"]["taps"]}
    assert taps == {"sa": None, "lf": ["DW-1", "UP-3"]}  # self-attention everywhere


def test_sigterm_removes_what_is_half_written(tmp_path):
    code = """
import os, signal, sys, time
from pathlib import Path
from koala import cli
from koala.utils.atomic import new_folder

def run(o):
    with new_folder(Path(sys.argv[1])) as part:
        (part / "file").write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

write = cli.Command("write", "write", ("koala write",), lambda p: None, run)
cli.command_named = lambda name: write
sys.exit(cli.main(["write"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "koala: interrupted\n")
    assert not list(tmp_path.iterdir())
