"""What ships: its own parts in fp16, its words and its card, and nothing that its family has."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from koala.checkpoints import model_card
from koala.checkpoints.words import Words, read_words
from koala.cli import main
from koala.data.illustrations.images import ImageSet
from koala.errors import UserError
from koala.mini.bundle import bundle
from toy import toy_pipeline

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = toy_pipeline(tmp_path_factory.mktemp("bundle") / "toy")
    (folder / "NOTICE.txt").write_text("credits")
    return folder


def test_a_member_holds_what_is_its_own(model, tmp_path):
    bundle(model, tmp_path / "koala-mini")
    teacher = shutil.copytree(model, tmp_path / "teacher")
    toy_pipeline(tmp_path / "other", seed=4)
    shutil.copy(tmp_path / "other" / UNET, teacher / UNET)
    bundle(teacher, tmp_path / "sdxl-mini")
    held = sorted(path.name for path in (tmp_path / "sdxl-mini").iterdir())
    assert held == ["NOTICE.txt", "README.md", "model_index.json", "unet"]
    halves, whole = load_file(tmp_path / "sdxl-mini" / UNET), load_file(teacher / UNET)
    assert all(torch.equal(halves[name], tensor.half()) for name, tensor in whole.items())
    told = model_card.read(tmp_path / "sdxl-mini")
    assert (told.title, told.licence.identifier) == ("sdxl-mini", "apache-2.0")
    with pytest.raises(UserError, match="koala-mini exists; remove it first"):
        bundle(model, tmp_path / "koala-mini")


def test_its_words_are_those_of_its_training_images(model, base_parts, tmp_path, capsys):
    data, _ = base_parts
    out = tmp_path / "mini"
    bundle(model, out, data)
    rows = [row for row in ImageSet(data).rows if row["split"] == "train"]
    words = read_words(out, "mini")
    assert set(words.things) == {row["concept"] for row in rows if row["kind"] == "emoji"}
    assert set(words.looks) == {row["style"] for row in rows}
    assert main(["generate", "--list-words", "--model", str(out)]) == 0
    assert f"things ({len(words.things)}): {words.things[0]}" in capsys.readouterr().out
    assert main(["generate", "--list-words", "--model", str(out), "--json"]) == 0
    given = json.loads(capsys.readouterr().out)
    assert Words(**{name: tuple(value) for name, value in given.items()}) == words


def test_a_model_without_words_says_so(model):
    with pytest.raises(UserError, match=r"toy lists no words: words.json is in"):
        read_words(model, "toy")
