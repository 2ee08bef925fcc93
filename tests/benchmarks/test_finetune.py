"""The benchmark of fine-tuning: its subject's images, and the page that tells what it measured."""

import json
from pathlib import Path

from benchmarks import finetune
from koala.data.illustrations.colours import BACKGROUNDS
from toy_packages import CODES, LABELS

ROOT = Path(__file__).parents[2]


def test_images_of_the_subject_differ_and_show_all_backgrounds(packages, monkeypatch):
    monkeypatch.setattr(finetune, "SUBJECT", CODES[0])
    monkeypatch.setattr(finetune, "LABEL", LABELS[0])
    images = finetune.subject_images("openmoji", 2 * finetune.PICTURES)
    assert len({image.tobytes() for image in images}) == len(images)
    assert len({image.getpixel((0, image.height - 1)) for image in images}) == len(BACKGROUNDS)


def test_the_pages_table_is_the_scripts():
    record = json.loads((ROOT / "benchmarks" / "finetune.json").read_text())
    assert finetune.table(record) in (ROOT / "docs" / "finetuning.md").read_text()
