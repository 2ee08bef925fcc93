"""The pages' commands, run in order at toy size: what a reader is told to type works."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from koala import architectures
from koala.cli import main
from koala.conversion import convert
from koala.formats import BUNDLED
from koala.lora.names import base_named
from toy_lora import toy_lora

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The page's blocks in one language, continuation lines joined."""
    found = re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A reader's folder: a fine-tune as a single file, here `sdxl-mini`, and a LoRA for it."""
    model = shutil.copytree(BUNDLED / "koala-mini", tmp_path / "model")
    shutil.rmtree(model / "unet")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**architectures.unet_config(architectures.get("sdxl-mini")))
    unet.save_pretrained(model / "unet")
    convert(model, "single-file", tmp_path / "my-sdxl.safetensors")
    toy_lora(tmp_path / "my-style.safetensors", base_named(str(model)))
    shutil.rmtree(model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KOALA_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_your_own_sdxl(desk, capsys):
    lines = "".join(blocks("your-own-sdxl.md", "sh")).splitlines()
    commands = [shlex.split(line)[1:] for line in lines]
    assert len(commands) == 7
    for command in commands:
        if command[0] != "prepare":  # pictures are test_data's matter
            assert main(command) == 0, (command, capsys.readouterr().err)
    written = {p.name for p in desk.iterdir()}
    assert {"runs", "my-koala.safetensors", "my-style-koala.safetensors", "pictures"} <= written
    assert "inherited" in capsys.readouterr().out
    (picture,) = (desk / "pictures").glob("*.png")
    with Image.open(picture) as image:
        assert "<lora:my-style:0.8>" in image.info["parameters"]


def test_your_own_sdxls_recipe_is_one():
    (block,) = blocks("your-own-sdxl.md", "python")
    names: dict = {}
    *making, distilling = block.splitlines()
    exec("\n".join(making), names)
    assert distilling.startswith("koala.distill(replace(mini, training=training),")
    assert (names["training"].samples, names["mini"].cut) == (64_000, "koala-700m")
