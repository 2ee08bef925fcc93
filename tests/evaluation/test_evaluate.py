"""`koala evaluate` from the command line: prompts of files and sets, local weights."""

import json
import re
import shutil

import pytest
from PIL import Image

from koala.cli import main
from koala.evaluation.drawing import fingerprint
from toy import toy_pipeline
from toy_metrics import random_pictures, toy_clip, toy_clip_vision

STYLES = ("anime", "concept-art", "paintings", "photo")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Two models, weights, HPSv2's layout with two prompts in each style, and real pictures."""
    folder = tmp_path_factory.mktemp("desk")
    for seed, name in enumerate(("first", "second")):
        toy_pipeline(folder / name, seed=seed, architecture="koala")
    toy_clip(folder / "clip")
    toy_clip_vision(folder / "clip-336")
    (folder / "HPDv2").mkdir()
    for style in STYLES:
        (folder / "HPDv2" / f"{style}.json").write_text(
            json.dumps([f"a fox, {style}", "(an owl) [AND] a \\ cat"])
        )
    (folder / "real").mkdir()
    for i, picture in enumerate(random_pictures(7, (50, 40))):
        picture.save(folder / "real" / f"{i}.jpg")
    (folder / "p.txt").write_text("a fox\nan owl\na cat\n")
    return folder


def evaluate(desk, *given: str) -> int:
    weights = [f"clip-vit-large-patch14={desk / 'clip'}", f"pickscore={desk / 'clip'}"]
    return main(["evaluate", *given, "--steps", "1", "--guidance", "1", "--weights", *weights])


def test_two_sets_and_two_models_are_one_table(desk, tmp_path, capsys):
    models = [f"first={desk / 'first'}", f"both={desk / 'first'},{desk / 'second'}"]
    given = ["--prompts", str(desk / "HPDv2"), str(desk / "p.txt"), "--out", str(tmp_path / "out")]
    metrics = ["--metrics", "clip-score", "pickscore", "--json"]
    assert evaluate(desk, *models, *given, *metrics) == 0, capsys.readouterr().err
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    keys = [f"{prompts} {metric}" for prompts in ("hpsv2", "p") for metric in metrics[1:3]]
    assert [f"{c['prompts']} {c['metric']}" for c in report["columns"]] == keys
    first, both = report["rows"]
    assert [len(row["cells"][keys[1]]["by_seed"]) for row in (first, both)] == [1, 2]
    cell = first["cells"][keys[1]]
    assert list(cell["categories"]) == [*STYLES] and first["cells"][keys[3]]["categories"] == {}
    assert cell["value"] == pytest.approx(sum(cell["categories"].values()) / 4)
    assert [c["column"] for c in report["comparisons"]] == keys
    assert all(c["text"] for c in report["comparisons"])
    page = (tmp_path / "out" / "report.md").read_text()
    assert "## PickScore ↑, by category of hpsv2" in page
    assert "CLIP score ↑ (p)" in page and "both (2 trainings)" in page
    drawn = tmp_path / "out" / "drawn" / "hpsv2"
    assert {path.name for path in drawn.iterdir()} == {"first", "both", "both-2", "prompts.jsonl"}


def test_hpsv2s_published_lines_are_marked(desk, tmp_path):
    """The metric itself is tested beside; here a folder of pictures meets the set's own layout."""
    from koala.evaluation.measuring import published_rows
    from koala.evaluation.plan import plan
    from koala.evaluation.table import Column

    handed = tmp_path / "handed"
    for style in STYLES:
        (handed / style).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (64, 64)).save(handed / style / f"{i:05d}.jpg")
    asked = plan([str(handed)], tmp_path / "out", [str(desk / "HPDv2")], metrics=["r@1"],
                 judge=desk / "p.txt")  # fmt: skip
    column = Column("hpsv2", "hpsv2.1", "HPSv2.1 ↑", True, 1, 2, "x")
    rows = published_rows([column], asked.parts)
    assert all(row.source.startswith("https://") and "published" in row.label for row in rows)
    for row in rows:
        cell = row.cells[column.key]
        assert list(cell.categories) == [*STYLES]
        assert cell.value == pytest.approx(sum(cell.categories.values()) / 4, abs=0.0101)


def test_a_distance_compares_with_a_folder_of_real_pictures(desk, tmp_path, capsys):
    given = [
        f"first={desk / 'first'}",
        f"second={desk / 'second'}",
        "--prompts",
        str(desk / "p.txt"),
    ]
    more = ["--pictures", str(desk / "real"), "--metrics", "cmmd", "--out", str(tmp_path / "out")]
    weights = f"clip-vit-large-patch14-336={desk / 'clip-336'}"
    sampling = ["--steps", "1", "--guidance", "1", "--weights", weights]
    assert main(["evaluate", *given, *more, *sampling]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["first", "second"]
    for row in report["rows"]:
        cell = row["cells"]["p cmmd"]
        assert cell["low"] <= cell["value"] <= cell["high"] and cell["value"] > 0
    assert report["settings"]["reference pictures"] == 7


def test_what_lacks_is_told_in_one_line(desk, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    file, out = ["--prompts", str(desk / "p.txt")], ["--out", str(tmp_path / "out")]
    model = str(desk / "first")
    inception = ["--metrics", "fid", "--pictures", str(desk / "real")]
    lone = tmp_path / "lone"
    shutil.copytree(desk / "real", lone)
    (lone / "1.jpg").unlink()
    (tmp_path / "empty").mkdir()
    for given, says in (
        (
            [model, *file, "--metrics", "aesthetic"],
            "clip-vit-large-patch14 are missing: they are https",
        ),
        ([model, *file, "--metrics", "fid"], "give their folder to --pictures"),
        ([model, *file, "--metrics", "r@1"], "give --judge"),
        ([model, *file, *inception], "torch_fidelity is not inst|inception are missing: down"),
        ([str(lone), *file], "has no picture of the prompt"),
        ([str(tmp_path / "empty"), *file], "neither a model"),
        ([model, *file, "--weights", "pickscore"], "write NAME=PATH"),
        ([model, *file, "--metrics", "cmmd", "--pictures", "gone"], "no such folder"),
        ([model, *file, "--metrics", "soft-tifa-gm"], "no prompt set tells what it asks for"),
    ):
        status = main(["evaluate", *given, *out, "--guidance", "1", "--steps", "1"])
        told = capsys.readouterr().err.strip().splitlines()
        assert (status, len(told)) == (2, 1), told
        assert re.search(says, told[0]), told
    assert not (tmp_path / "out").exists()


def test_models_whose_parts_are_links_are_told_apart(desk, tmp_path):
    """As bundled ones that share a VAE: what was drawn with other weights is not kept."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for part in (desk / name).iterdir():
            (tmp_path / name / part.name).symlink_to(part)
        assert fingerprint(tmp_path / name) == fingerprint(desk / name)
    assert fingerprint(tmp_path / "first") != fingerprint(tmp_path / "second")
