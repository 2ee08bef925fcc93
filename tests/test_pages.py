"""The pages' commands, run in order at toy size: what a reader is told to type works."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from koala import architectures, recipes
from koala.cli import main
from koala.conversion import convert
from koala.formats import BUNDLED
from koala.lora.names import base_named
from toy_lora import toy_lora

DOCS = Path(__file__).parent.parent / "docs"


def commands_of(page: str) -> list[list[str]]:
    """The arguments of every command on the page, in order."""
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return [shlex.split(line)[1:] for line in "".join(blocks).replace("\\\n", " ").splitlines()]


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
    commands = commands_of("your-own-sdxl.md")
    assert len(commands) == 8
    for command in commands:
        if command[0] == "distill":
            recipes.get(command[1])  # weeks on a GPU: that there is such a recipe is all for here
        elif command[0] != "prepare":  # pictures of one's own: test_data's matter
            assert main(command) == 0, (command, capsys.readouterr().err)
    written = {p.name for p in desk.iterdir()}
    assert {"runs", "my-koala.safetensors", "my-style-koala.safetensors", "pictures"} <= written
    assert "inherited" in capsys.readouterr().out
    (picture,) = (desk / "pictures").glob("*.png")
    with Image.open(picture) as image:
        assert "<lora:my-style:0.8>" in image.info["parameters"]
