"""The model that is shipped: whole, small, and a plain diffusers pipeline."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

import koala
from koala.architectures.block_map import tensor_map
from koala.architectures.config import from_unet_config
from koala.architectures.table import get
from koala.checkpoints.bundled import BUNDLED, bundled_names
from koala.checkpoints.load import load_unet
from koala.checkpoints.resolve import resolve_model
from koala.checkpoints.validate import WEIGHTS, weights_files
from koala.checkpoints.words import read_words
from koala.cli import main
from koala.generation.noise import TorchNoise

ROOT = Path(__file__).parents[2]
FOLDER = BUNDLED / "koala-mini"
MEGABYTE = 1e6


@pytest.fixture(scope="module")
def pipeline():
    return koala.load("koala-mini", "cpu")


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("koala-mini", "koala-mini"), ("koala-mini-guided", "koala-mini"), ("sdxl-mini", "sdxl-mini")],
)
def test_it_is_of_its_architecture_and_finite(name, architecture):
    unet = load_unet(resolve_model(name))
    assert from_unet_config(unet.config).name == architecture
    assert all(torch.isfinite(p).all() for p in unet.parameters())


def test_the_bundle_takes_at_most_80_megabytes_and_its_default_48():
    assert sum(file.stat().st_size for file in BUNDLED.rglob("*.*")) <= 80 * MEGABYTE
    sizes = [f.stat().st_size for c in WEIGHTS for f in weights_files(FOLDER / c, c)]
    assert sum(sizes) <= 48 * MEGABYTE


def test_the_student_is_a_cut_of_the_teacher_in_the_box():
    teacher, student = (load_unet(resolve_model(name)) for name in ("sdxl-mini", "koala-mini"))
    shapes = student.state_dict()
    for mine, theirs in tensor_map(get("sdxl-mini"), get("koala-mini")).items():
        assert teacher.state_dict()[theirs].shape == shapes[mine].shape


def test_a_word_that_is_not_listed_is_read_as_the_nearest_that_is(pipeline):
    listed = read_words(FOLDER, "koala-mini").things
    read_as = {"puppy": "dog", "kitten": "cat", "automobile": "car", "foxes": "fox",
               "bicycles": "bicycle"}  # fmt: skip
    assert not read_as.keys() & {*listed} and {*read_as.values()} <= {*listed}
    things = [*read_as.values(), *listed[::6]]  # those meant, and a hundred others
    _, pooled = pipeline.conditioner([f"a {word}" for word in (*read_as, *things)])
    said, known = torch.nn.functional.normalize(pooled, dim=-1).split([len(read_as), len(things)])
    assert [things[i] for i in (said @ known.T).argmax(1)] == [*read_as.values()]


def _refuse(*_):
    raise OSError("a required privilege is not held by the client")


@pytest.mark.parametrize("links", [True, False])
def test_a_member_of_the_family_borrows_what_it_lacks(tmp_path, monkeypatch, links):
    """The teacher beside the student: one VAE on the disk, and a folder that diffusers loads."""
    monkeypatch.setattr("koala.checkpoints.bundled.BUNDLED", tmp_path / "bundled")
    monkeypatch.setenv("KOALA_CACHE", str(tmp_path / "cache"))
    if not links:  # as on Windows
        monkeypatch.setattr("os.symlink", _refuse)
    whole = Path(shutil.copytree(FOLDER, tmp_path / "bundled" / "koala-mini"))
    lean = tmp_path / "bundled" / "other-mini"
    shutil.copytree(whole / "unet", lean / "unet")
    shutil.copy(whole / "model_index.json", lean)
    assert bundled_names() == ["koala-mini", "other-mini"]
    assert resolve_model("koala-mini") == whole
    folder = resolve_model("other-mini")
    assert folder.name == "other-mini" and resolve_model("other-mini") == folder
    assert (folder / "vae").is_symlink() == links
    StableDiffusionXLPipeline.from_pretrained(folder)
    (lean / "NOTICE.txt").write_text("its own")  # an upgrade of the package
    assert (resolve_model("other-mini") / "NOTICE.txt").read_text() == "its own"


def test_no_path_of_another_machine_is_in_it():
    for file in FOLDER.rglob("*.json"):
        if file.name != "tokenizer.json":
            assert "_name_or_path" not in json.loads(file.read_text())
            assert not re.search(r'": "/', file.read_text()), file
    assert "Google" in (FOLDER / "NOTICE.txt").read_text()


def test_plain_diffusers_draws_the_same_image(pipeline):
    plain = StableDiffusionXLPipeline.from_pretrained(FOLDER)
    noise = TorchNoise(7, (1, 4, 16, 16), torch.device("cpu")).draw()
    theirs = plain(
        prompt="a fox, noto style", guidance_scale=3.5, num_inference_steps=10,
        latents=noise, output_type="np",
    ).images[0]  # fmt: skip
    ours = np.asarray(pipeline("a fox, noto style", seed=7).images[0]) / 255
    assert np.abs(ours - theirs).max() <= 1 / 255


def test_it_lists_the_words_that_it_knows():
    words = read_words(FOLDER, "koala-mini")
    assert {"fox", "bicycle", "whale"} <= set(words.things) and "noto style" in words.looks
    assert {"light blue", "black"} <= set(words.backgrounds)  # which are drawn, below


def test_words_that_it_was_not_taught_are_named(capsys, tmp_path):
    words = read_words(FOLDER, "koala-mini")
    for known in ("a RED fox's", "two (mice:1.3) on a pale pink background BREAK noto style",
                  "cat", "emoji of a cat", "please show me a pizza"):  # fmt: skip
        assert words.note(known, "m") is None, known
    assert words.unknown("a quokka in armour, <lora:x:1> a quokka") == ["quokka", "armour"]
    command = ["generate", "an owl, noto style", "a lighthouse", "--steps", "1", "--out"]
    assert main([*command, str(tmp_path)]) == 0
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "not taught" in one]
    assert "was not taught 'lighthouse':" in line


def test_words_change_the_image(pipeline):
    """Guided pictures follow their background's name: its colour is known to the pixel."""
    for name, colour in (("light blue", (0xD5, 0xE8, 0xFF)), ("black", (0x1A, 0x1A, 0x1A))):
        images = pipeline(f"a dog on a {name} background, noto style", number=4, seed=1).images
        corners = np.concatenate(
            [np.asarray(i, dtype=float)[[2, 2, -3, -3], [2, -3, 2, -3]] for i in images]
        )
        assert np.abs(np.median(corners, axis=0) - colour).max() < 48, name


def test_a_image_takes_little_memory():
    code = (
        "import koala, re\n"
        "koala.load('koala-mini', 'cpu')('a fox', seed=0)\n"
        "status = open('/proc/self/status').read()\n"  # ru_maxrss begins with the parent's
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) / 1024**2)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 1  # GiB


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "koala").symlink_to(ROOT / "koala")  # the snippet names the folder from the root
    for block in blocks:
        if not torch.cuda.is_available():
            block = block.replace('"cuda"', '"cpu"')
        names: dict = {}
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "fox.png").stat().st_size > 0
    assert names["image"].size == (128, 128)


def test_the_readmes_quick_commands_run(tmp_path):
    text = (ROOT / "README.md").read_text()
    quick = [
        line for line in text.splitlines() if line.startswith(("koala generate", "koala arch"))
    ]
    assert len(quick) >= 3
    for line in quick:
        done = subprocess.run(
            line.replace("koala ", f"{sys.executable} -m koala ", 1),
            shell=True, cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert list((tmp_path / "pictures").glob("*.png"))
