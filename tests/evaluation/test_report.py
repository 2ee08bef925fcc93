"""The report, whole, at toy size: toy pipelines, drawn pictures and a small feature extractor."""

import io
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from koala.data.illustrations.images import ImageSet
from koala.errors import UserError
from koala.evaluation.models import by_name
from koala.evaluation.report import REAL, choose, evaluate
from koala.evaluation.table import EvaluationReport, EvaluationRow
from koala.utils.contact_sheet import image_grid
from toy import toy_pipeline

STYLES = ("round", "square", "flat")
METRICS = ["FD-EffLite0", "kernel distance", "R@1", "R@5", "R@10"]


class Colours(nn.Module):
    """Picture features at toy size: a random projection of a 4x4 thumbnail."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 24))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.float() / 255)


def letters(texts: list[str]) -> Tensor:
    """Text features at toy size: how often each letter occurs."""
    counts = torch.tensor([[float(t.count(chr(97 + i))) for i in range(26)] for t in texts])
    return nn.functional.normalize(counts, dim=-1)


def drawing(concept: int, style: str) -> bytes:
    image = Image.new("RGB", (48, 48), "white")
    draw = ImageDraw.Draw(image)
    colour = (concept * 37 % 256, concept * 91 % 256, concept * 53 % 256)
    (draw.ellipse if style == "round" else draw.rectangle)((8, 8, 40, 40), fill=colour)
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def rows() -> list[dict]:
    """40 concepts in three styles; 12 pairs and 4 concepts are held out."""
    found = []
    for concept in range(40):
        name = "".join(chr(97 + (concept * k) % 26) for k in (1, 3, 7, 11))
        for style in STYLES:
            pair = concept < 12 and style == "flat"
            split = "test-concept" if concept >= 36 else "test-pair" if pair else "train"
            found.append(
                {
                    "image": {"bytes": drawing(concept, style), "path": ""},
                    "id": f"{style}-{concept}",
                    "kind": "emoji",
                    "concept": name,
                    "style": style,
                    "split": split,
                    "subject": name,
                    "short": f"{name}, {style}",
                    "long": f"a {name} in {style} style",
                    "everyday": f"{name} please",
                }
            )
    return found


def write_images(folder, some: list[dict]):
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(some), folder / "pictures-00000.parquet")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("set") / "pictures", rows())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy_pipeline(tmp_path_factory.mktemp("model") / "toy", architecture="koala")


TOY = {"prompts": 10, "steps": 1, "guidance": 1.0}


@pytest.fixture(scope="module")
def written(images, model, tmp_path_factory):
    """Two names for one model, three seeds."""
    out = tmp_path_factory.mktemp("out") / "report"
    models = {"one": model, "same": model}
    extractor, notes = Colours(), {"one": "1,024 samples"}
    report = evaluate(
        models, images, out, **TOY, notes=notes, extractor=extractor, sentences=letters
    )
    return report, out


def test_every_row_has_every_measure_for_every_seed(written):
    report, _ = written
    assert [row.name for row in report.rows] == [REAL, "one", "same"]
    assert [list(row.values) for row in report.rows] == [METRICS] * 3
    assert [len(row.values["R@5"]) for row in report.rows] == [1, 3, 3]
    assert all(0 <= v <= 1 for row in report.rows for k in METRICS[2:] for v in row.values[k])
    assert len(set(report.rows[1].values["FD-EffLite0"])) == 3, "seeds draw other pictures"


def test_the_same_model_measures_the_same_and_noise_is_far_from_real(written):
    real, one, same = written[0].rows
    assert one.values == same.values
    assert one.mean("FD-EffLite0") > 3 * real.mean("FD-EffLite0")
    assert one.mean("kernel distance") > real.mean("kernel distance")
    assert real.mean("R@5") > one.mean("R@5")


def test_what_is_written_says_what_was_measured(written):
    report, out = written
    names = sorted(path.name for path in out.iterdir())
    assert names == ["judge.safetensors", "report.json", "report.md", "sheet.png"]
    stored = json.loads((out / "report.json").read_text())
    assert stored == json.loads(json.dumps(report.as_dict()))
    assert stored["settings"]["seeds"] == [0, 1, 2]
    assert len(stored["prompts"]) == 10
    page = (out / "report.md").read_text()
    assert report.table() in page
    assert "one (1,024 samples)" in page
    assert "torch" in page
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 10 * 128
        assert sheet.height > 3 * 128


def test_a_report_on_the_same_judge_is_the_same(written, images, model, tmp_path):
    report, out = written
    again = evaluate(
        {"one": model},
        images,
        tmp_path / "again",
        **TOY,
        judge=out / "judge.safetensors",
        extractor=Colours(),
        sentences=letters,
    )
    for row, before in zip(again.rows, report.rows[:2], strict=True):
        for metric, values in before.values.items():  # threads may add up in another order
            assert row.values[metric] == pytest.approx(values, rel=1e-5), (row.name, metric)


def test_a_judge_of_another_extractor_is_refused(written, images, model, tmp_path):
    class Fewer(Colours):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)[:, :20]

    with pytest.raises(UserError, match="the judge was trained"):
        evaluate(
            {"one": model},
            images,
            tmp_path / "out",
            **TOY,
            seeds=(0,),
            judge=written[1] / "judge.safetensors",
            extractor=Fewer(),
            sentences=letters,
        )
    assert not list((tmp_path / "out").iterdir())


def test_what_is_chosen_keeps_the_splits_apart_and_does_not_depend_on_order(images, tmp_path):
    real = ImageSet(images)
    chosen, reference, train = choose(real, 10)
    assert (len(chosen), len(reference), len(train)) == (10, 12 + 12, 36 * 3 - 12)
    assert set(chosen) < set(reference)
    assert not set(train) & set(reference)
    backwards = ImageSet(write_images(tmp_path / "backwards", rows()[::-1]))
    ids = [[s.rows[i]["id"] for i in choose(s, 10)[0]] for s in (real, backwards)]
    assert ids[0] == ids[1]
    assert choose(real, 5)[0] == chosen[:5]


def test_a_caption_is_no_prompt_twice(tmp_path):
    doubled = rows() + [{**row, "id": row["id"] + "-again"} for row in rows()]
    real = ImageSet(write_images(tmp_path / "doubled", doubled))
    texts = [real.rows[i]["short"] for i in choose(real, 12)[0]]
    assert len(set(texts)) == 12
    with pytest.raises(UserError, match="has 12 held-out"):
        choose(real, 13)


def test_too_little_to_train_a_judge_on_is_told(tmp_path):
    train = [row for row in rows() if row["split"] == "train"]
    held_out = [row for row in rows() if row["split"] != "train"]
    real = ImageSet(write_images(tmp_path / "few", held_out + train[:9]))
    with pytest.raises(UserError, match="has 9 pictures to train the judge on"):
        choose(real, 10)
    assert len(choose(real, 9)[0]) == 9


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prompts": 13}, "13 prompts requested, but"),
        ({"prompts": 1}, "at least 2"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"models": {}}, "at least one"),
        ({"models": {"one": "no-such-model"}}, "no-such-model"),
        ({"notes": {"two": "x"}}, "notes on"),
        ({"judge": "missing.safetensors"}, "missing.safetensors"),
        ({"images": "nowhere"}, "nowhere"),
    ],
)
def test_a_users_mistake_is_told_before_anything_is_drawn(wrong, says, images, model, tmp_path):
    given = {"models": {"one": model}, "images": images, **TOY, **wrong}
    with pytest.raises(UserError, match=says):
        evaluate(**given, out=tmp_path / "out", extractor=Colours(), sentences=letters)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_models_are_called_by_their_names_or_by_themselves():
    assert by_name(["koala-mini", "b=a=c"]) == {"koala-mini": "koala-mini", "b=a": "c"}
    with pytest.raises(UserError, match="two models are named 'a'"):
        by_name(["a=x", "a"])


def test_models_of_two_sizes_are_refused(images, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "unet" / "config.json").read_text())
    smaller = json.dumps({**config, "sample_size": config["sample_size"] // 2})
    (other / "unet" / "config.json").write_text(smaller)
    with pytest.raises(UserError, match="different sizes"):
        evaluate({"one": model, "other": other}, images, tmp_path / "out", **TOY)


def test_a_folder_that_cannot_be_written_is_told(images, model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        evaluate({"one": model}, images, tmp_path / "file" / "out", **TOY)


def test_a_cell_shows_mean_and_spread():
    row = EvaluationRow("m", "", {"R@5": [0.5, 0.7, 0.6], "R@1": [0.25]})
    assert row.cell("R@5", 2) == "0.60 ± 0.10 (0.50 to 0.70)"
    assert row.cell("R@1", 1, 100) == "25.0"
    measures = {metric: [0.5] for metric in METRICS}
    rows = [EvaluationRow(REAL, "", measures), EvaluationRow("m", "", {**measures, "R@5": [0.25]})]
    table = EvaluationReport(rows, {}, {}, "", "", []).table().splitlines()
    assert table[2].endswith("| 1.00 |")
    assert table[3].endswith("| 0.50 |")


def test_the_sheet_has_a_row_a_model_and_a_column_a_prompt():
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    sheet = image_grid({"first": [red, blue], "second": [blue, red]}, ["a", "b"])
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(sheet.height, sheet.width, 3).long()
    for colour, other in ((0, 2), (2, 0)):
        only = (pixels[..., colour] > 250) & (pixels[..., other] < 5)
        assert int(only.sum()) == 2 * 128 * 128
    longer = image_grid({"first": [red, blue]}, ["a long caption that wraps " * 3, "b"])
    assert longer.height > image_grid({"first": [red, blue]}, ["a", "b"]).height
