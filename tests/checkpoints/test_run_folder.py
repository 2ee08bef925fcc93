"""A training's folder, given as a model: what it made, or the average in a checkpoint."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from koala.checkpoints import model_card
from koala.checkpoints.compress import compress
from koala.checkpoints.inspect import inspect
from koala.checkpoints.resolve import check_name, resolve_model
from koala.checkpoints.sampling import Sampling, of_model
from koala.errors import UserError
from koala.evaluation.models import rows_of

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def run(toy_sdxl, tmp_path):
    """A training of a student with two checkpoints, before its end."""
    run = tmp_path / "run"
    start = compress(toy_sdxl, "koala-700m", run / "start", "fp32").out
    Sampling(4, 1.0).state_in(start)
    (run / "run.json").write_text(json.dumps({"samples": 1000, "ema_half_life": 32}))
    weights = load_file(start / UNET)
    for seen in (100, 200):
        state = {f"ema.32.{name}": value + seen for name, value in weights.items()}
        state |= {f"ema.8.{name}": value - seen for name, value in weights.items()}
        state |= {f"weights.{name}": value for name, value in weights.items()}
        (run / f"checkpoints/{seen:012d}").mkdir(parents=True)
        save_file(state, run / f"checkpoints/{seen:012d}/state.safetensors")
    return run


def first(folder) -> torch.Tensor:
    return load_file(folder / UNET)["conv_in.bias"]


def test_the_newest_checkpoint_s_average_is_the_model(run, capsys):
    check_name(str(run))
    begun, folder = first(run / "start"), resolve_model(run)
    assert torch.equal(first(folder), begun + 200)
    (line,) = capsys.readouterr().err.splitlines()
    assert "has not finished" in line and "after 200 of 1,000 samples" in line
    assert torch.equal(first(resolve_model(run / "checkpoints/000000000100")), begun + 100)
    assert of_model(run, folder).steps == 4
    card = (folder / "README.md").read_text()
    assert "a training that has not finished, run, after 200 of 1,000 samples" in card
    assert str(run) not in card and "has not been distilled" not in card
    assert model_card.read(folder).title == "run"
    assert inspect(run).layout == "diffusers"
    assert rows_of([str(run)])[0].runs[0].pictures is None  # though it has previews


def test_a_finished_training_is_what_it_made(run, toy_sdxl):
    shutil.copytree(toy_sdxl, run / "model")
    assert resolve_model(run) == run / "model"


def test_what_cannot_be_read_is_told(run):
    shutil.rmtree(run / "start")
    with pytest.raises(UserError, match="only a student's training can be read before it has"):
        resolve_model(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="neither finished nor saved a checkpoint"):
        resolve_model(run)
    (run / "lora").mkdir()
    with pytest.raises(UserError, match="made a LoRA: give the file in"):
        resolve_model(run)
