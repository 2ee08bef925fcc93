"""The benchmark of carried LoRAs, at toy size: it trains, carries, draws, measures and records."""

import json
import math

import pytest
import torch
from torch import nn

from benchmarks import looks, lora_carry
from koala.errors import UserError

pytestmark = pytest.mark.usefixtures("packages")


class Colours(nn.Module):
    """An extractor that tells what one can compute by hand: the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


def test_a_lora_is_trained_carried_and_measured(teacher, tmp_path):
    training = looks.Training(samples=8, batch=4, rank=2, learning_rate=1e-2, held_out=0.5)
    data = looks.prepare(training, teacher, tmp_path / "data")
    made, losses = looks.train(training, str(teacher), data, tmp_path / "run")
    assert math.isfinite(losses.first_tenth) and math.isfinite(losses.last_tenth)
    models = {"teacher": str(teacher), "student": "koala-mini"}
    lora = made / lora_carry.FILE
    held_out = looks.HeldOut.of(data, 2)
    figures, sheet = lora_carry.compare(models, lora, held_out, Colours(), seeds=1)
    carried = figures["student"]["lora"]
    assert (carried["made_for"], carried["applied_to"]) == ("sdxl-mini", "koala-mini")
    assert carried["applied"] < carried["modules"] == figures["teacher"]["lora"]["applied"]
    assert all(figures[name]["shift"] != 0 for name in models)
    assert sheet.width > sheet.height / 5
    json.dumps(figures)


def test_the_shift_is_measured_along_the_way_to_the_target():
    without = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    target = torch.tensor([[10.0, 1.0]])
    found = looks.measure(without, without + torch.tensor([[1.0, 3.0], [3.0, 3.0]]), target)
    assert found == looks.Shift(distance=10.0, shift=2.0, error=1.0, sideways=3.0)


def test_a_style_of_the_family_is_no_evidence(teacher, tmp_path):
    for style, told in (("noto", "was trained on"), ("mdi", "give an art set of emoji")):
        with pytest.raises(UserError, match=told):
            looks.prepare(looks.Training(style=style), teacher, tmp_path)
