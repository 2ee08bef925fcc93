"""The benchmark of fine-tuning: its subject's images, and the page that tells what it measured."""

import json
from pathlib import Path

from benchmarks import clipart, finetune
from koala.data.illustrations.colours import BACKGROUNDS
from toy_packages import CODES, LABELS

ROOT = Path(__file__).parents[2]


def test_images_of_the_subject_differ_and_show_all_backgrounds(packages, monkeypatch):
    monkeypatch.setattr(finetune, "SUBJECT", CODES[0])
    monkeypatch.setattr(finetune, "LABEL", LABELS[0])
    images = finetune.subject_images(2 * finetune.PICTURES)
    assert len({image.tobytes() for image in images}) == len(images)
    assert len({image.getpixel((0, image.height - 1)) for image in images}) == len(BACKGROUNDS)


PAGE = """<svg xmlns="http://www.w3.org/2000/svg" width="4in" height="2in" viewBox="0 0 400 200">
{}</svg>"""
DRAWN = PAGE.format('<rect x="300" y="20" width="80" height="40"/>')


def test_clip_art_is_found_by_its_name_and_fills_its_image(tmp_path):
    (tmp_path / "logos").mkdir()
    for name in ("red_fox_01", "foxglove", "logos/fox", "owl_01", "owl_02", "tree_fox_owl"):
        (tmp_path / f"{name}.svg").write_text(DRAWN)
    (tmp_path / "owl_02.svg").write_text(PAGE.format(""))
    (tmp_path / "owl.svg").write_text("no drawing")
    found = clipart.drawings(tmp_path, {"fox", "owl"})
    names = {thing: [file.stem for file in files] for thing, files in found.items()}
    assert names == {"fox": ["red_fox_01", "tree_fox_owl"], "owl": ["owl", "owl_01", "owl_02"]}
    none, image, empty = (clipart.image(file) for file in found["owl"])
    assert none is empty is None
    # 80 x 40 of the page, enlarged to the margins
    size, edge = clipart.SIZE, clipart.MARGIN // 2
    inside = {(x, y) for x in range(size) for y in range(size)}
    inside = {at for at in inside if image.getpixel(at) != (255, 255, 255)}
    assert (min(x for x, _ in inside), max(x for x, _ in inside)) == (edge, size - edge - 1)
    height = max(y for _, y in inside) - min(y for _, y in inside) + 1
    assert abs(height - (size - 2 * edge) // 2) <= 2


def test_the_pages_table_is_the_scripts():
    record = json.loads((ROOT / "benchmarks" / "finetune.json").read_text())
    assert finetune.table(record) in (ROOT / "docs" / "finetuning.md").read_text()
