"""`koala runs`: what the folders of trainings say, while they are written."""

import json
from pathlib import Path

import pytest
from PIL import Image

from koala.cli import main
from koala.errors import UserError
from koala.recipes.runs import list_runs, table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three runs: half way, finished, and begun a moment ago."""
    for name, samples, seen in (("a", 1_000, 500), ("b/deeper", 200, 200), ("c", 800, 0)):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"samples": samples}))
        lines = [
            {"samples": n, "loss": 1 / n, "grad_norm": 1.0, "samples_per_second": 5.0}
            for n in range(100, seen + 1, 100)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if lines:
            (run / "stats.jsonl").write_text(text + '{"samples": 9')  # being written
    (tmp_path / "runs/a/validation.jsonl").write_text('{"samples": 400, "loss": 0.25}\n')
    (tmp_path / "runs/a/checkpoints/000000000400").mkdir(parents=True)
    (tmp_path / "runs/a/checkpoints/000000000400/run.json").write_text("no run")
    return tmp_path / "runs"


def test_runs_are_listed_with_what_is_left(folder):
    half, finished, begun = list_runs(folder)
    assert (half.name, half.seen, half.loss, half.validation) == ("a", 500, 1 / 500, 0.25)
    assert half.seconds_left == 100 and not half.finished
    assert (finished.name, finished.finished, finished.seconds_left) == ("b/deeper", True, 0)
    assert (begun.seen, begun.loss, begun.seconds_left, begun.finished) == (0, None, None, False)
    head, *rows = table([half, finished, begun]).splitlines()
    assert len({len(row) for row in (head, *rows)}) == 1
    assert "1.67 min" in rows[0] and "finished" in rows[1] and rows[2].endswith("-")
    (alone,) = list_runs(folder / "a")
    assert alone.name == "a"


def test_the_command_prints_and_plots(folder, tmp_path, capsys):
    assert main(["runs", str(folder), "--plot", str(tmp_path / "runs.png"), "--json"]) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)] == ["a", "b/deeper", "c"]
    with Image.open(tmp_path / "runs.png") as image:
        assert image.format == "PNG" and image.width > 1_000


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no runs: give the --out of a training"):
        list_runs(tmp_path)
