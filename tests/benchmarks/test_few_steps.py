"""The comparison of step distillation's methods, rehearsed at toy size, and stopped half way."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import few_steps, few_steps_cost
from benchmarks.few_steps import METHODS, Trial, run, summary
from koala import recipes
from koala.checkpoints.load import load_scheduler_config
from koala.checkpoints.sampling import Sampling, of_config
from koala.errors import UserError
from koala.recipes.train import distill
from toy_family import TINY
from toy_metrics import letters

# "guided" is trained elsewhere, and as the others here.
OTHERS = {name: method for name, method in METHODS.items() if name != "guided"}


class Colours(nn.Module):
    """Image features at toy size: a thumbnail."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, 3).flatten(1)


@pytest.fixture
def trial(base_parts, tmp_path, packages, monkeypatch):
    monkeypatch.setattr("koala.recipes.build.MINI_PROMPTS", ("a fox",))
    monkeypatch.setattr(few_steps, "TIMED", (1, 2))
    monkeypatch.setattr(few_steps, "METHODS", OTHERS)
    data, base = base_parts
    first = replace(recipes.get("sdxl-mini-64"), training=TINY)
    teacher = distill(first, data, tmp_path / "teacher", str(base), "cpu")
    return Trial(
        data, str(teacher), str(teacher), tmp_path / "out", core_seconds=1e-3, batch=2, seeds=(0,),
        evaluation_seeds=(0,), steps=(1,), prompts=4, extra=("prompts=a fox",),
    )  # fmt: skip


def test_a_trial_goes_on_and_says_what_it_measured(trial):
    record = run(trial, extractor=Colours(), sentences=letters)
    assert set(record["measured"]["1"]) == {
        "real pictures", "student", "teacher, guided", *(f"{method}-0" for method in OTHERS),
    }  # fmt: skip
    assert record["samples"] == {"progressive": 2, "dmd": 8, "mmd": 2}  # a cycle of steps each
    told = {
        method: of_config(load_scheduler_config(trial.out / f"{method}-0" / "model"))
        for method in OTHERS
    }
    four = Sampling(steps=4, guidance=1.0)
    assert told == dict.fromkeys(OTHERS, four)
    table = (trial.out / "few_steps.md").read_text()
    assert "r@5, 1" in table and all(f"| {method} |" in table for method in OTHERS)

    def files():
        return {path: path.stat().st_mtime_ns for path in trial.out.glob("*-*/core_seconds.json")}

    shutil.rmtree(trial.out / "drawn-1")  # as if it was stopped while it measured
    (trial.out / "few_steps.json").unlink()
    before = files()
    again = run(trial, extractor=Colours(), sentences=letters)
    assert files() == before
    assert again["measured"] == record["measured"]
    assert json.loads((trial.out / "few_steps.json").read_text()) == again
    with pytest.raises(UserError, match="holds a trial with other settings"):
        run(replace(trial, batch=4))


def test_a_summary_is_a_mean_and_half_of_its_interval():
    assert summary([0.5]) == (0.5, None)
    mean, half = summary([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.30 * 0.1 / 3**0.5)


def test_the_pages_table_is_the_scripts():
    page = Path(__file__).parents[2] / "docs" / "few-steps.md"
    assert few_steps_cost.table() in page.read_text()


def test_the_pages_trial_is_the_record():
    root = Path(__file__).parents[2]
    record = json.loads((root / "benchmarks" / "few_steps.json").read_text())
    table = few_steps.table(record["measured"], record["trial"]["seeds"])
    assert table in (root / "docs" / "few-steps.md").read_text()
