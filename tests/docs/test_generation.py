"""docs/generation.md, typed in from top to bottom: every command and every line of Python."""

import json
import re
import shlex
from pathlib import Path

from PIL import Image

from koala.cli import main
from koala.generation.samplers import SAMPLERS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "generation.md").read_text()


def test_the_page_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red apple, noto style\n")
    names: dict = {}
    commands = 0
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", PAGE, re.DOTALL):
        if language == "python":
            exec(compile(block, "generation.md", "exec"), names)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "koala" and main(arguments) == 0, capsys.readouterr().err
            commands += 1
    assert commands == 9
    assert len(list((tmp_path / "pictures").glob("a-fox-noto-style-*.png"))) == 6
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 11
    assert names["doomed"].cancelled() and names["owl"].size == names["car"].size == (128, 128)
    with Image.open(tmp_path / "preview.png") as preview:
        assert preview.size == (16, 16)


def test_the_page_names_every_sampler():
    rows = re.findall(r"^\| `([a-z][\w+-]*)` \| ([^|]+) \|", PAGE, re.MULTILINE)
    assert rows == [(name, sampler.name) for name, sampler in SAMPLERS.items()]


def test_the_pages_figures_are_those_of_the_record():
    record = json.loads((ROOT / "benchmarks" / "engine.json").read_text())
    row = next(line for line in PAGE.splitlines() if line.startswith("| 0."))
    figures = [float(cell) for cell in row.strip("|").split("|")]
    assert figures == list(record["times that"].values())
    assert f"{record['processor seconds of one picture, 10 steps']:.2f} s" in PAGE
