"""Model cards: they parse, they carry the licence over, their snippets run, and they say no more
than is known."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard as HubModelCard
from huggingface_hub import metadata_load
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from koala.checkpoints import card_text, model_card
from koala.checkpoints.card_facts import Compressed, Evaluated, Licence, ModelCard, Trained
from koala.checkpoints.compress import compress
from koala.checkpoints.sampling import Sampling
from koala.cli import main
from koala.errors import UserError
from koala.evaluation.cards import enter, folders_with_cards
from koala.evaluation.models import rows_of
from koala.evaluation.table import Cell, Column, EvaluationReport, EvaluationRow

CUT = Compressed("my-sdxl", "sdxl", 2_567_463_684, "koala-700m", 782_822_724, 676, 1_004, "bottom")
TRAINED = Trained(
    recipe="koala-mini",
    settings={"cut": "koala-700m", "training": {"samples": 40_000, "lr": 5e-4}},
    samples={"U-Net": 40_000},
    data={"pictures": 12_345, "source": "illustrations", "size": 64},
    teacher="sdxl-mini",
    distilled=True,
)
FULL = ModelCard("small", Licence("openrail++"), "org/my-sdxl", CUT, TRAINED)


def teacher_with(toy_sdxl: Path, tmp_path: Path, front_matter: str) -> Path:
    """The toy teacher, with a model card of its author's."""
    folder = tmp_path / "fine-tune"
    folder.mkdir()
    for part in toy_sdxl.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n\n# Fine-tune\n")
    return folder


def student_card(teacher: Path, tmp_path: Path) -> str:
    compress(teacher, "koala-700m", tmp_path / "student")
    return (tmp_path / "student" / "README.md").read_text()


# --- what a card says -----------------------------------------------------------------------


def test_a_compressed_model_has_a_card_that_the_hub_reads(toy_sdxl, tmp_path):
    teacher = teacher_with(toy_sdxl, tmp_path, "license: openrail++\nbase_model: org/sdxl")
    text = student_card(teacher, tmp_path)
    data = HubModelCard(text).data.to_dict()
    expected = {
        "license": "openrail++",
        "base_model": "org/sdxl",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
    }
    assert {key: data[key] for key in expected} == expected
    assert "text-to-image" in data["tags"] and "distillation" not in data["tags"]
    report = model_card.read(tmp_path / "student")
    assert report.cut.teacher == "fine-tune"
    assert f"{report.cut.parameters:,}" in text
    assert "not been distilled" in text and "Not evaluated." in text
    assert str(tmp_path) not in text  # where it lay on the disk is nobody's business


def test_an_unknown_licence_is_said_to_be(toy_sdxl, tmp_path):
    compress(toy_sdxl, "koala-700m", tmp_path / "student")
    text = (tmp_path / "student" / "README.md").read_text()
    assert HubModelCard(text).data.license == "unknown"
    assert "base_model" not in HubModelCard(text).data.to_dict()
    assert "Unknown: its teacher names none." in text


def test_a_licence_with_name_and_link_is_carried_whole(toy_sdxl, tmp_path):
    front = "license: other\nlicense_name: my-terms\nlicense_link: LICENSE.md"
    text = student_card(teacher_with(toy_sdxl, tmp_path, front), tmp_path)
    data = HubModelCard(text).data
    assert (data.license, data.license_name, data.license_link) == (
        "other",
        "my-terms",
        "LICENSE.md",
    )
    assert "my-terms, carried over from its teacher: LICENSE.md" in text


@pytest.mark.parametrize("front", ["license: [a", "license: 3", "- a list", "koala: 7"])
def test_a_card_that_cannot_be_read_is_refused(front, toy_sdxl, tmp_path):
    teacher = teacher_with(toy_sdxl, tmp_path, front)
    with pytest.raises(UserError, match=r"README\.md: its front matter cannot be read"):
        compress(teacher, "koala-700m", tmp_path / "student")
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ({}, Licence("unknown")),
        ({"modelspec.license": "CreativeML Open RAIL++-M License"}, Licence("openrail++")),
        ({"modelspec.license": "Terms of Ann"}, Licence("other", "Terms of Ann")),
        (
            {"modelspec.license": "https://example.org/terms"},
            Licence("other", "https://example.org/terms", "https://example.org/terms"),
        ),
    ],
)
def test_a_single_files_licence(metadata, licence):
    found = model_card.read_metadata(Path("ann.safetensors"), metadata)
    assert found == ModelCard("ann", licence)


def test_the_snippets_run_as_they_stand(toy_sdxl, tmp_path, monkeypatch):
    compress(toy_sdxl, "koala-700m", tmp_path / "student")
    monkeypatch.chdir(tmp_path / "student")
    text = Path("README.md").read_text()
    (python,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(python, "README.md", "exec"), {})
    with Image.open("fox.png") as image:
        assert image.size == (64, 64)
    (shell,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    assert shell == 'koala generate "a red fox" --model . --steps 10 --guidance 3.5\n'
    assert main(["generate", "a red fox", "--model", ".", "--steps", "1", "--guidance", "3.5"]) == 0


def test_the_snippets_are_of_what_the_model_is_made_for(tmp_path):
    (tmp_path / "scheduler").mkdir()
    made_for = Sampling(steps=4, guidance=1.0).to_config()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(made_for))
    model_card.write(FULL, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "guidance_scale=1, num_inference_steps=4" in text
    assert "--steps 4 --guidance 1\n" in text
    assert model_card.read(tmp_path) == FULL


def test_long_lists_are_shown_by_their_beginning_and_kept_whole(tmp_path):
    data = {"pictures": 9, "names": [f"thing {i}" for i in range(40)]}
    card = replace(FULL, trained=replace(TRAINED, data=data))
    model_card.write(card, tmp_path)
    body = (tmp_path / "README.md").read_text().split("\n---\n")[1]
    assert "thing 11" in body and "thing 12" not in body and "and 28 more" in body
    assert model_card.read(tmp_path) == card


# --- a card goes on -------------------------------------------------------------------------


def test_a_card_is_read_as_it_was_written(tmp_path):
    evaluated = Evaluated("| a |\n|---|\n| 1 |", {"prompts": 200, "seeds": [0, 1]}, "a laptop")
    for written in (ModelCard("bare"), FULL, replace(FULL, evaluated=evaluated)):
        model_card.write(written, tmp_path)
        assert model_card.read(tmp_path) == written
        assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20))
def test_any_licences_name_survives(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("card")
    written = replace(FULL, licence=Licence("other", name, None))
    model_card.write(written, folder)
    assert model_card.read(folder) == written
    assert metadata_load(folder / "README.md")["license_name"] == name


def test_training_goes_on_from_the_students_card(tmp_path):
    trained = model_card.trained_of(
        ModelCard("start", Licence("openrail++"), None, CUT), "run", TRAINED
    )
    assert trained == ModelCard("run", Licence("openrail++"), None, CUT, TRAINED)
    text = card_text.text(trained)
    for said in ("40,000", "12,345", "`koala-mini`, teacher sdxl-mini", "then distilled"):
        assert said in text
    assert "not been distilled" not in text
    assert "distillation" in card_text.front_matter(trained).tags


@pytest.mark.parametrize(
    ("before", "seen"), [(192_000, "192,000 samples"), (0, "an unrecorded number of samples")]
)
def test_a_student_that_went_on_says_from_what(before, seen):
    """Also one that others cut, of which no more is known."""
    text = card_text.text(
        ModelCard("mine", trained=replace(TRAINED, student="koala-700m", before=before))
    )
    assert f"- trained further from: koala-700m, after {seen}\n" in text
    assert "method and trained further from koala-700m." in text
    assert "trained from scratch" not in text and "long legible text" in text


def test_training_without_a_teacher_is_no_distillation():
    alone = ModelCard("t", trained=replace(TRAINED, distilled=False))
    assert "distillation" not in card_text.front_matter(alone).tags
    assert "VAE and text encoders of sdxl-mini" in card_text.text(alone)


def test_a_reports_row_is_entered(tmp_path):
    column = Column("illustrations", "r@5", "R@5 ↑", True, 1, 2, "koala.evaluation.retrieval")
    rows = [
        EvaluationRow(name, "", {column.key: Cell(value)})
        for name, value in (("real pictures", 0.5), ("mine", 0.25), ("yours", 0.125))
    ]
    report = EvaluationReport(rows, [column], [], {"prompts": 2}, {}, "a laptop", "koala evaluate")
    models = {name: tmp_path / name for name in ("mine", "yours")}
    for folder in models.values():
        folder.mkdir()
        model_card.write(FULL, folder)
    enter(report, folders_with_cards(rows_of([f"{n}={path}" for n, path in models.items()])))
    text = (tmp_path / "mine" / "README.md").read_text()
    assert "| mine | 0.25 |" in text and "| real pictures | 0.50 |" in text
    assert "yours" not in text
    assert model_card.read(tmp_path / "mine") == replace(
        FULL,
        evaluated=Evaluated(replace(report, rows=rows[:2]).table(), {"prompts": 2}, "a laptop"),
    )


def test_only_cards_of_ours_are_written_to(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Another's\n")
    for wrong in ("koala-mini", f"m={tmp_path}", f"m={tmp_path},{tmp_path}"):
        with pytest.raises(UserError, match="is not a folder with a koala model card"):
            folders_with_cards(rows_of([wrong]))


def test_names_are_no_paths(tmp_path):
    (tmp_path / "runs" / "mine" / "model").mkdir(parents=True)
    file = tmp_path / "ann.v2.safetensors"
    file.touch()
    assert model_card.name_of(tmp_path / "runs" / "mine" / "model") == "mine"
    assert model_card.name_of(str(tmp_path / "runs" / "mine")) == "mine"
    assert model_card.name_of(file) == "ann.v2"
    assert model_card.name_of("org/model") == "org/model"
    assert model_card.name_of(tmp_path / "to-be") == "to-be"
