"""The notebook: its cells run from top to bottom, and it is committed without output."""

import ast
import json
import re
import tomllib
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "notebooks" / "koala_mini.ipynb"
CELLS = [cell for cell in json.loads(FILE.read_text())["cells"] if cell["cell_type"] == "code"]


def test_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    install, *rest = ("".join(cell["source"]) for cell in CELLS)
    target = re.fullmatch(r"%pip install --quiet --editable (\S+)", install)[1]
    project = tomllib.loads((FILE.parent / target / "pyproject.toml").read_text())["project"]
    assert project["name"] == "koala-diffusion"
    names: dict = {}
    shown = []
    for cell in rest:
        *statements, last = ast.parse(cell).body
        exec(compile(ast.Module(statements, []), FILE.name, "exec"), names)
        if isinstance(last, ast.Expr):  # whose value a notebook shows
            shown.append(eval(compile(ast.Expression(last.value), FILE.name, "eval"), names))
        else:
            exec(compile(ast.Module([last], []), FILE.name, "exec"), names)
    sizes = [each.size for each in shown if isinstance(each, Image.Image)]
    assert sizes == [(128, 128), (512, 128), (512, 128), (512, 128), (256, 128)]
    assert len({each.tobytes() for each in names["four"]}) == 4
    assert (tmp_path / "student" / "unet" / "config.json").is_file()
    assert "tensors inherited" in capsys.readouterr().out


def test_it_is_committed_without_output():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)
