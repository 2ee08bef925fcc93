"""docs/own.md: its file is a recipe that trains, is resumed, and is not mixed up with another."""

import json
import re
from pathlib import Path

import pytest

from koala.cli import main
from toy_sources import images, prepared, write_folder

PAGE = Path(__file__).parents[2] / "docs" / "own.md"
FILE, DATA = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
SMALL = [
    "training.samples=8", "training.batch=4", "training.validate_every=0", "pixels=64",
    "hardware.compile=", "hardware.accumulate=1", "prompts=a fox",
]  # fmt: skip


@pytest.fixture(scope="module")
def desk(toy_sdxl, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    source = write_folder(folder / "there", images(8, [(70, 70)]))
    prepared(source, toy_sdxl, folder / "data", "--held-out", "0")
    return folder


def distil(desk: Path, teacher: Path, out: str, text: str, *changes: str) -> int:
    (desk / "my_recipe.py").write_text(text)
    return main(
        ["distill", "--recipe", str(desk / "my_recipe.py"), "--data", str(desk / "data"),
         "--out", str(desk / out), "--teacher", str(teacher), "--device", "cpu",
         "--set", *SMALL, *changes]
    )  # fmt: skip


def test_the_pages_file_trains_and_goes_on(desk, toy_sdxl, capsys):
    assert distil(desk, toy_sdxl, "run", FILE) == 0
    line = json.loads((desk / "run" / "stats.jsonl").read_text().splitlines()[0])
    assert {"small", "tap conv_in", "task", "feat"} <= line.keys()
    assert all(0 <= value <= 2 for name, value in line.items() if name.startswith("tap "))
    run = json.loads((desk / "run" / "run.json").read_text())
    assert (run["custom"]["task"], run["custom"]["optimizer"]) == ("CosineTaps", "momentum")
    assert distil(desk, toy_sdxl, "run", FILE) == 0  # SGD's moments are read again
    capsys.readouterr()
    assert distil(desk, toy_sdxl, "run", FILE.replace("0.9", "0.8")) == 2
    assert "was made with custom.file=" in capsys.readouterr().err


def test_the_pages_data_are_read(desk, toy_sdxl):
    text = f"{FILE}\n{DATA}".replace("optimizer=momentum", "data=noisy")
    assert distil(desk, toy_sdxl, "noise", text) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "it must define recipe()"),
        ("def recipe():\n    return 3", "recipe() returned int; it must be a Student"),
        ("def recipe():\n    return 1 / 0", "my_recipe.py, line 2: ZeroDivisionError: division"),
        ("def recipe(:", "my_recipe.py: SyntaxError"),
        (
            "import koala\n\ndef recipe():\n    return koala.Custom(None, optimiser=1)",
            "unexpected keyword argument 'optimiser'",
        ),
    ],
)
def test_what_is_no_recipe(text, said, desk, toy_sdxl, capsys):
    assert distil(desk, toy_sdxl, "none", text) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (desk / "none").exists()


def test_a_name_or_a_file(capsys):
    for given in ([], ["koala-700m", "--recipe", "x.py"]):
        assert main(["distill", *given, "--data", ".", "--out", "x"]) == 2
        assert "give a recipe: a name, or --recipe FILE" in capsys.readouterr().err
    assert main(["distill", "--recipe", "no.py", "--data", ".", "--out", "x"]) == 2
    assert "no.py does not exist" in capsys.readouterr().err
