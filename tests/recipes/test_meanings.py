"""`--set help`: every setting of every recipe says what it means."""

import json
from dataclasses import dataclass

import pytest

from koala import recipes
from koala.cli import main
from koala.recipes.meanings import meanings, settings_of

NAMES = (*recipes.NAMES, *recipes.FINETUNES)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_means_something(name):
    assert all(meaning for _, _, meaning in settings_of(recipes.get(name, NAMES)))


@dataclass
class Sizes:
    """Two sizes."""

    width: int  # in pixels,
    # of a page
    height: int = 3  # as well

    def __post_init__(self) -> None:
        self.width += 0  # not what it means


def test_a_meaning_is_the_comment_beside_the_field():
    assert meanings(Sizes) == {"width": "in pixels, of a page", "height": "as well"}


def test_the_command(capsys):
    assert main(["distill", "koala-lightning-700m", "--set", "help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("training.batch "))
    assert " ".join(line.split()) == "training.batch 128 of one step, over all processes"
    assert main(["finetune", "lora", "--set", "help", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["lora.rank"] == {"value": "16", "meaning": "of each pair of matrices"}
