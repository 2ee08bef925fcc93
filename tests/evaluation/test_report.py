"""The report, whole, at toy size: toy pipelines, drawn pictures and a small feature extractor."""

import io
import json
import shutil
from operator import attrgetter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from koala.checkpoints.pipeline_files import SCHEDULER
from koala.checkpoints.sampling import Sampling
from koala.data.illustrations.images import ImageSet
from koala.errors import UserError
from koala.evaluation.illustrations import choose
from koala.evaluation.metrics.catalogue import OFFLINE
from koala.evaluation.models import REAL, per_row, rows_of
from koala.evaluation.plan import plan
from koala.evaluation.report import evaluate
from koala.evaluation.table import Cell, Column, EvaluationReport, EvaluationRow
from koala.generation.png import read_settings
from koala.utils.contact_sheet import image_grid
from toy import toy_pipeline
from toy_metrics import letters

STYLES = ("round", "square", "flat")
METRICS = [f"illustrations {name}" for name in OFFLINE]
R5 = "illustrations r@5"


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


TOY = {"count": 10, "steps": 1, "guidance": 1.0}
SEEDS = (0, 1, 2, 3)  # more than one unit
TOYS = {"extractor": Colours(), "sentences": letters}


@pytest.fixture(scope="module")
def written(images, model, tmp_path_factory):
    """Two names for one model, three seeds."""
    out = tmp_path_factory.mktemp("out") / "report"
    models = {"one": model, "same": model}
    notes = {"one": "1,024 samples"}
    return evaluate(models, out, pictures=images, **TOY, notes=notes, **TOYS), out


def test_every_row_has_every_measure_for_every_seed(written):
    report, _ = written
    assert [row.name for row in report.rows] == [REAL, "one", "same"]
    assert [list(row.cells) for row in report.rows] == [METRICS] * 3
    for row in report.rows[1:]:
        for cell in row.cells.values():
            assert [len(seeds) for seeds in cell.by_seed] == [3]
            assert cell.value == pytest.approx(np.mean(cell.by_seed))
            assert cell.low <= cell.value <= cell.high
        assert all(0 <= row.cells[key].value <= 1 for key in METRICS[2:])
    first = report.rows[1].cells[METRICS[0]]
    assert len(set(first.by_seed[0])) == 3, "seeds draw other pictures"


def test_the_same_model_measures_the_same_and_noise_is_far_from_real(written):
    real, one, same = ({k: c.value for k, c in row.cells.items()} for row in written[0].rows)
    assert one == same
    assert [c.verdict.says for c in written[0].comparisons] == ["equal"] * 5
    assert one[METRICS[0]] > 3 * real[METRICS[0]]
    assert one[METRICS[1]] > real[METRICS[1]]
    assert real[R5] > one[R5]


def test_what_is_written_says_what_was_measured(written):
    report, out = written
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "drawn",
        "judge.safetensors",
        "report.json",
        "report.md",
        "scores",
        "sheet.png",
    ]
    stored = json.loads((out / "report.json").read_text())
    assert stored == json.loads(json.dumps(report.as_dict()))
    assert stored["settings"]["seeds"] == [0, 1, 2]
    assert len(stored["prompts"]["illustrations"]) == 10
    page = (out / "report.md").read_text()
    assert report.table() in page and report.verdicts() in page
    assert "one (1,024 samples)" in page
    assert "torch" in page
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 10 * 128
        assert sheet.height > 3 * 128


def test_pictures_are_kept_with_their_settings(written):
    _, out = written
    folder = out / "drawn" / "illustrations"
    texts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert len(texts) == 10
    for seed, i in ((0, 0), (2, 7)):
        settings = read_settings(folder / "one" / str(seed) / f"{i:05d}.png")
        assert settings.prompt == texts[i]["prompt"]
        assert (settings.seed, settings.steps, settings.guidance) == (10 * seed + i, 1, 1.0)


def test_a_killed_run_goes_on_where_it_stopped(written, images, model, tmp_path):
    """Half of the pictures and scores are gone: only they are made again, and are the same."""
    report, out = written
    copy = shutil.copytree(out, tmp_path / "again")
    (copy / "report.json").unlink()
    drawn = sorted((copy / "drawn").rglob("*.png"))
    before = {path: path.stat().st_mtime_ns for path in drawn}
    for path in drawn[::2]:
        path.unlink()
    scores = sorted((copy / "scores").rglob("*.safetensors"))
    for path in scores[::2]:
        path.unlink()
    again = evaluate(
        {"one": model, "same": model}, copy, pictures=images, **TOY,
        notes={"one": "1,024 samples"}, **TOYS,
    )  # fmt: skip
    assert sorted((copy / "drawn").rglob("*.png")) == drawn
    kept = [path for path in drawn[1::2] if path.stat().st_mtime_ns == before[path]]
    assert len(kept) == len(drawn[1::2])
    assert sorted((copy / "scores").rglob("*.safetensors")) == scores
    for row, old in zip(again.rows, report.rows, strict=True):
        for key, cell in row.cells.items():
            assert cell.value == pytest.approx(old.cells[key].value, rel=1e-4), (row.name, key)


def test_a_folder_drawn_otherwise_is_not_gone_on_with(written, images, model):
    with pytest.raises(UserError, match="was made with steps=1, now it is 2"):
        evaluate({"one": model}, written[1], pictures=images, **{**TOY, "steps": 2}, **TOYS)


def test_processes_share_the_work_and_find_the_same(written, images, model, tmp_path, monkeypatch):
    """As torchrun starts them, but one after the other: the second does its units, no others."""
    report, _ = written
    out = tmp_path / "shared"
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = {}
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        found[rank] = evaluate({"one": model}, out, pictures=images, **TOY, seeds=SEEDS, **TOYS)
        if rank == "1":
            assert sorted(path.name for path in out.iterdir()) == ["drawn", "scores"]
            assert len(list((out / "drawn").rglob("*.png"))) == 8  # of 40, in units of 32
    assert found["1"] is None
    for key, cell in found["0"].rows[1].cells.items():
        for got, wanted in zip(cell.by_seed[0], report.rows[1].cells[key].by_seed[0], strict=False):
            assert got == pytest.approx(wanted, rel=1e-4), key


def test_a_report_on_the_same_judge_is_the_same(written, images, model, tmp_path):
    report, out = written
    judge = out / "judge.safetensors"
    again = evaluate(
        {"one": model}, tmp_path / "again", pictures=images, **TOY, judge=judge, **TOYS
    )
    for row, before in zip(again.rows, report.rows[:2], strict=True):
        for key, cell in before.cells.items():  # threads may add up in another order
            assert row.cells[key].value == pytest.approx(cell.value, rel=1e-5), (row.name, key)


def test_a_judge_of_another_extractor_is_refused(written, images, model, tmp_path):
    class Fewer(Colours):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)[:, :20]

    with pytest.raises(UserError, match="the judge was trained"):
        evaluate(
            {"one": model},
            tmp_path / "out",
            pictures=images,
            **TOY,
            seeds=(0,),
            judge=written[1] / "judge.safetensors",
            extractor=Fewer(),
            sentences=letters,
        )
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_folder_of_pictures_is_a_row_like_its_model(written, images, model, tmp_path):
    """What one model drew, handed over as a folder of pictures named by the prompts' ids."""
    report, out = written
    drawn = out / "drawn" / "illustrations"
    ids = [json.loads(line)["id"] for line in (drawn / "prompts.jsonl").read_text().splitlines()]
    handed = tmp_path / "handed"
    handed.mkdir()
    for seed in range(3):
        for i, id in enumerate(ids):
            shutil.copy(drawn / "one" / str(seed) / f"{i:05d}.png", handed / f"{id}_{seed}.png")
    found = evaluate({"handed": handed}, tmp_path / "out", pictures=images, count=10, **TOYS)
    for key, cell in report.rows[1].cells.items():
        assert found.rows[1].cells[key].value == pytest.approx(cell.value, rel=1e-5), key
    next(handed.iterdir()).unlink()
    with pytest.raises(UserError, match="2 pictures of the prompt"):
        evaluate({"handed": handed}, tmp_path / "out", pictures=images, count=10, **TOYS)


def test_trainings_of_a_row_are_averaged_and_widen_its_interval(images, model, tmp_path):
    other = toy_pipeline(tmp_path / "other", seed=5, architecture="koala")
    models = {"both": [model, other], "one": model, "other": other}
    report = evaluate(models, tmp_path / "out", pictures=images, **TOY, seeds=(0,), **TOYS)
    both, one, two = (row.cells[METRICS[0]] for row in report.rows[1:])
    assert both.by_seed == [*one.by_seed, *two.by_seed]
    assert both.value == pytest.approx((one.value + two.value) / 2)
    assert report.rows[1].label == "both (2 trainings)"
    widths = [cell.high - cell.low for cell in (both, one, two)]
    assert widths[0] > 2 * max(widths[1:]), "the two trainings differ"


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
        ({"count": 13}, "13 prompts requested, but"),
        ({"count": 2}, "at least 3"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"models": {}}, "at least one"),
        ({"models": {"one": "no-such-model"}}, "no-such-model"),
        ({"notes": {"two": "x"}}, "notes on"),
        ({"judge": "missing.safetensors"}, "missing.safetensors"),
        ({"pictures": "nowhere"}, "no prompts"),
        ({"prompts": ["a.txt"]}, "brings its own prompts"),
        ({"metrics": ["clipscore"]}, "did you mean clip-score"),
        ({"metrics": ["geneval"]}, "no prompt set tells what it asks for"),
        ({"metrics": ["clip-score"], "weights": {"clip-vit-large-patch14": "/gone"}}, "/gone"),
        ({"weights": {"hpsv2.1": "x"}}, "no chosen metric needs them"),
    ],
)
def test_a_users_mistake_is_told_before_anything_is_drawn(wrong, says, images, model, tmp_path):
    given = {"models": {"one": model}, "pictures": images, **TOY, **wrong}
    with pytest.raises(UserError, match=says):
        evaluate(**given, out=tmp_path / "out", **TOYS)
    assert not (tmp_path / "out").exists()


def test_rows_are_called_by_their_names_or_by_themselves():
    rows = rows_of(["koala-mini", "b=a=c", "seeds=x,y,z"])
    assert [row.name for row in rows] == ["koala-mini", "b=a", "seeds"]
    assert [run.model for run in rows[2].runs] == ["x", "y", "z"]
    assert [run.name for run in rows[2].runs] == ["seeds", "seeds-2", "seeds-3"]
    (row,) = rows_of([("LF@DW-1,UP-3", ["runs/LF@DW-1,UP-3-0", "runs/a=b"])])
    assert row.name == "LF@DW-1,UP-3"
    assert [run.model for run in row.runs] == ["runs/LF@DW-1,UP-3-0", "runs/a=b"]
    for wrong, says in (
        (["a=x", "a"], "two models are named 'a'"),
        (["x,y"], "call their row, NAME=x,y"),
        (["a=x,"], "empty run"),
        (["a=x,y", "a-2=z"], "kept as 'a-2'"),
        ([f"{REAL}=x"], "call none"),
    ):
        with pytest.raises(UserError, match=says):
            rows_of(wrong)


OWN = attrgetter("steps")


def test_pictures_that_are_there_take_no_steps(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="a is a folder of pictures, which are not drawn"):
        per_row("steps", ["10", "a=4"], rows_of([f"a={tmp_path}", "b"]), int, OWN)


def test_values_are_of_all_rows_or_of_one():
    rows = rows_of(["a", "sdxl=x"])
    assert per_row("steps", ["10", "sdxl=25"], rows, int, OWN) == {"a": 10, "sdxl": 25}
    for wrong, says in (
        (["10", "sdx=25"], "did you mean sdxl"),
        (["10", "20"], "one value for all"),
        (["ten"], "--steps ten"),
    ):
        with pytest.raises(UserError, match=says):
            per_row("steps", wrong, rows, int, OWN)


def test_a_model_of_which_nothing_is_said_is_drawn_as_it_is_made_for(model, tmp_path):
    few = shutil.copytree(model, tmp_path / "few")
    file = few / SCHEDULER
    made_for = Sampling(steps=2, guidance=1.0).to_config()
    file.write_text(json.dumps(json.loads(file.read_text()) | made_for))
    (tmp_path / "prompts.txt").write_text("a fox\nan owl\na cat\n")
    prompts = str(tmp_path / "prompts.txt")
    found = plan([f"base={model}", f"few={few}"], tmp_path / "out", [prompts], measured=False)
    assert found.steps == {"base": 10, "few": 2}
    assert found.guidance == {"base": 3.5, "few": 1.0}
    found = plan(
        [f"base={model}", f"few={few}"], tmp_path / "out", [prompts], steps=["few=3"],
        measured=False,
    )  # fmt: skip
    assert found.steps == {"base": 10, "few": 3}


def test_models_of_two_sizes_are_refused(images, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "unet" / "config.json").read_text())
    smaller = json.dumps({**config, "sample_size": config["sample_size"] // 2})
    (other / "unet" / "config.json").write_text(smaller)
    with pytest.raises(UserError, match="different sizes"):
        evaluate({"one": model, "other": other}, tmp_path / "out", pictures=images, **TOY)


def test_a_folder_that_cannot_be_written_is_told(images, model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        evaluate({"one": model}, tmp_path / "file" / "out", pictures=images, **TOY)


def test_cells_show_their_interval_and_the_share_of_real():
    column = Column("illustrations", "r@5", "R@5 ↑", True, 1, 3, "x")
    assert Cell(0.5, 0.4, 0.6).text(column) == "0.500 [0.400, 0.600]"
    assert Cell(0.5).text(Column("p", "kid", "KID", False, 1000, 1, "x")) == "500.0"
    rows = [
        EvaluationRow(REAL, "", {column.key: Cell(0.8)}),
        EvaluationRow("m", "", {column.key: Cell(0.4, 0.3, 0.5)}),
        EvaluationRow("p", "", {}, source="a paper"),
    ]
    table = EvaluationReport(rows, [column], [], {}, {}, "", "").table().splitlines()
    assert table[2].endswith("| 1.00 |")
    assert table[3].endswith("| 0.50 |")
    assert table[4].startswith("| p (published) |")


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
