"""The script of the ablations, whole, at toy size."""

import json
from dataclasses import replace

import pytest

from benchmarks import ablations
from koala import recipes
from koala.distillation.settings import DistillationSettings
from koala.errors import UserError
from koala.evaluation.statistics import Interval, Verdict
from koala.evaluation.table import Comparison, EvaluationReport
from koala.recipes import configured
from koala.recipes.train import distill
from toy_family import TINY

TOY = ["training.batch=4", "training.warmup=0", "training.preview_every=1000", "prompts=a fox"]
METRIC = "fd-efflite0"


def test_every_arm_is_a_training_of_its_own():
    made = {}
    for name, arm in ablations.ARMS.items():
        recipe = configured(ablations.RECIPE, arm.settings)
        assert isinstance(recipe.settings, DistillationSettings)
        made[name] = (repr(replace(recipe, training=TINY)), arm.teacher)
    assert len(set(made.values())) == len(made)
    lines = (*ablations.PAPER, *ablations.OURS)
    named = {name for line in lines for name in (line.first, line.second)}
    assert named == set(ablations.ARMS), "every arm is there for a line"


def test_arms_are_trained_scored_and_judged(base_parts, tmp_path, packages, monkeypatch):
    monkeypatch.setattr("koala.recipes.build.MINI_PROMPTS", ("a fox",))
    data, base = base_parts
    first = replace(recipes.get("sdxl-mini-64"), training=TINY)
    teacher = distill(first, data, tmp_path / "teacher", str(base), "cpu")
    given = [
        "--teacher", str(teacher), "--data", str(data), "--out", str(tmp_path / "out"),
        "--only", "SA", "task", "--seeds", "0", "1", "--samples", "8", "--set", *TOY,
        "--count", "3", "--metrics", METRIC, "--judge-by", METRIC,
    ]  # fmt: skip
    ablations.main(given)
    out = tmp_path / "out"
    found = json.loads((out / "ablations.json").read_text())
    rows = {row["says"]: row for row in found[METRIC]}
    judged = rows.pop("distillation beats the task alone")
    assert {row["verdict"] for row in rows.values()} == {"not measured"}
    low, high = judged["interval"]
    assert low <= judged["difference"] <= high
    report = json.loads((out / "report" / "report.json").read_text())
    trainings = [row["trainings"] for row in report["rows"] if row["name"] in ("SA", "task")]
    assert trainings == [2, 2]
    assert "distillation beats the task alone | SA | task" in (out / "ablations.md").read_text()


@pytest.mark.parametrize(
    ("first", "says", "expected"),
    [
        ("SA", "better", "reproduced"),
        ("SA", "worse", "refuted"),
        ("task", "worse", "reproduced"),
        ("task", "better", "refuted"),
        ("SA", "cannot be told", "cannot be told: 40 prompts would"),
    ],
)
def test_a_line_is_reproduced_if_its_first_arm_is_better(first, says, expected):
    second = "task" if first == "SA" else "SA"
    prompts = 40 if says == "cannot be told" else None
    verdict = Verdict(Interval(0.2, 0.1, 0.3), says, prompts)
    comparison = Comparison(first, second, "illustrations r@5", verdict)
    report = EvaluationReport([], [], [comparison], {}, {}, "", "")
    row = ablations.verdicts(report, "r@5")[0]
    assert row["verdict"] == expected
    sign = 1 if first == "SA" else -1
    assert row["difference"] == sign * 0.2
    assert row["interval"] == sorted([sign * 0.1, sign * 0.3])


def test_unknown_arms_and_missing_teachers_are_told(tmp_path):
    with pytest.raises(UserError, match="did you mean task"):
        ablations.chosen_arms(["tusk"], {"teacher": tmp_path})
    with pytest.raises(UserError, match="no model for bottom: give --deep-teacher"):
        ablations.chosen_arms(["bottom"], {"teacher": tmp_path})
    with pytest.raises(UserError, match="no model for pruned: give --pruned"):
        ablations.chosen_arms(["pruned"], {"teacher": tmp_path})
    assert "bottom" not in ablations.chosen_arms([], {"teacher": tmp_path})
