"""What only the package `datasets` reads: folders laid out for it, and the Hub's data sets."""

import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from koala.cli import main
from koala.data.index import Index
from koala.data.prepare import prepare
from koala.data.preprocess import Preparation
from koala.data.sources import recognise
from koala.data.sources.hub import HubData
from koala.errors import UserError
from toy_sources import caption, images

NUMBER, HELD_OUT = 9, 3
CARD = """---
configs:
- config_name: pictures
  drop_labels: true
  data_files:
  - split: train
    path: few/*
  - split: test
    path: more/*
- config_name: few
  data_files: few/*
---
"""


@pytest.fixture(scope="module")
def files():
    return images(NUMBER)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def laid_out(files, tmp_path):
    """Images with captions in a metadata.parquet; which are for tests, the card alone says."""
    root = tmp_path / "laid out"
    of = {"few": range(HELD_OUT, NUMBER), "more": range(HELD_OUT)}
    for name, numbers in of.items():
        (root / name).mkdir(parents=True)
        for n in numbers:
            (root / name / f"{n}.jpg").write_bytes(files[n])
        rows = [{"file_name": f"{n}.jpg", "text": caption(n)} for n in numbers]
        pq.write_table(pa.Table.from_pylist(rows), root / name / "metadata.parquet")
    (root / "README.md").write_text(CARD)
    return root


def test_a_folder_laid_out_for_datasets_is_read_as_its_card_says(laid_out, files):
    source = recognise(f"{laid_out}:pictures", "datasets")
    assert source == HubData(str(laid_out), "pictures")
    source = source.fetch()
    items = [i for part in source.parts() for i in source.items(part, 0, source.count(part))]
    order = [*range(HELD_OUT, NUMBER), *range(HELD_OUT)]
    assert [item.read() for item in items] == [files[n] for n in order]
    assert [item.captions for item in items] == [{"text": caption(n)} for n in order]
    assert [item.split for item in items] == [None] * 6 + ["test"] * 3


def test_of_several_configurations_one_must_be_named(laid_out, toy_sdxl, tmp_path):
    with pytest.raises(UserError, match=r"Config name is missing.*\['pictures', 'few'\]"):
        prepare(str(laid_out), tmp_path / "out", str(toy_sdxl), kind="datasets")


def test_its_images_are_prepared(laid_out, toy_sdxl, tmp_path):
    (laid_out / "README.md").write_text(CARD.split("- config_name: few")[0] + "---\n")
    given = Preparation(size=64, step=8, unit=8, held_out=0.0)
    how = {"kind": "datasets", "workers": 2, "preparation": given}
    report = prepare(str(laid_out), tmp_path / "out", str(toy_sdxl), **how)
    assert report.latents.samples == {"train picture": 6, "test picture": 3}
    index = Index(tmp_path / "out")
    assert index.made_with["source"] == "datasets"
    told = {index.caption(s, r, "text") for s in range(len(index)) for r in range(index.rows[s])}
    assert told == {caption(n) for n in range(NUMBER)}


@pytest.mark.parametrize("column", ["image", "photo"])
def test_the_column_that_datasets_marks_has_the_images(column, files, tmp_path):
    """In what it saves and in parquet files, as those of the Hub are."""
    rows = {column: [{"bytes": f, "path": None} for f in files], "text": [*map(caption, range(9))]}
    made = datasets.Dataset.from_dict(rows).cast_column(column, datasets.Image())
    made.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "tables").mkdir()
    made.to_parquet(str(tmp_path / "tables" / "train.parquet"))
    for kind in ("saved", "tables"):
        source = recognise(tmp_path / kind)
        (part,) = source.parts()
        items = list(source.items(part, 0, source.count(part)))
        assert [item.read() for item in items] == files
        assert [item.captions for item in items] == [{"text": caption(n)} for n in range(9)]


def test_a_name_of_the_hub_is_one_and_a_misspelt_path_is_none(tmp_path, monkeypatch):
    assert recognise("org/name") == HubData("org/name")
    assert recognise("org/name:small", "datasets") == HubData("org/name", "small")
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    for place, kind in (("pictures/fox", None), ("org/name", "parquet"), ("org", None)):
        with pytest.raises(UserError, match=rf"source '{place}' does not exist.*ORG/NAME"):
            recognise(place, kind)


def test_without_network_or_package_one_line_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    command = ["prepare", "org/name", "--model", "koala-mini", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot load org/name" in line
    assert '`load_dataset("ORG/NAME").save_to_disk("DIR")`' in line
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("datasets is not installed; run pip install -e '.[datasets]'")
    assert not [*(tmp_path / "out").glob("[!.]*")]
