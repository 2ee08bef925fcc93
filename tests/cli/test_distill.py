"""`koala distill` on bad input: one line that says what it is, exit status 2 or 1, nothing lost."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from koala.checkpoints import model_card
from koala.checkpoints.compress import compress
from koala.checkpoints.resolve import resolve_model
from koala.cli import main
from toy import toy_pipeline
from toy_sources import images, prepared, write_folder

SMALL = [
    "training.samples=16", "training.batch=4", "training.validate_every=8", "pixels=64",
    "hardware.compile=", "hardware.accumulate=1", "prompts=a fox",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(toy_sdxl, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    source = write_folder(folder / "there", images(24, [(70, 70)]))
    return prepared(source, toy_sdxl, folder / "d", "--held-out", "0.3")


@pytest.fixture(scope="module")
def others(toy_sdxl, tmp_path_factory) -> dict[str, Path]:
    """Models that do not do: a teacher of another VAE, and one of a student's shape."""
    folder = tmp_path_factory.mktemp("others")
    vae = toy_pipeline(folder / "vae", seed=1)
    return {"vae": vae, "student": toy_pipeline(folder / "student", architecture="koala")}


def distil(
    out: Path, data: Path, teacher: Path, *changes: str, recipe: str = "ablation-sa",
    student: str | Path | None = None,
) -> int:  # fmt: skip
    """Its exit status."""
    names = {change.partition("=")[0] for change in changes}
    settings = [text for text in SMALL if text.partition("=")[0] not in names]
    return main(
        ["distill", recipe, "--data", str(data), "--out", str(out), "--teacher", str(teacher),
         "--device", "cpu", *(["--student", str(student)] if student else []),
         "--set", *settings, *changes]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recipe": "ablation-sb"}, "ablation-sa-lf"),
        ({"changes": ["training.batches=4"]}, "training.batch"),
        ({"changes": ["settings.feature_weight=0"]}, "taps is given but feature_weight is 0"),
        ({"changes": ["hardware.accumulate=3"]}, "does not divide into 3 equal parts"),
        ({"changes": ["training.batch=5"]}, "16 samples are not a multiple of the batch 5: use 20"),
        ({"changes": ["pixels=128"]}, "latents for 64 pixels, this training is for 128"),
        ({"changes": ["hardware.stored_text=true"]}, "holds no text embeddings"),
        ({"teacher": "vae"}, "of the posterior's deviation; prepare into another folder with"),
        ({"teacher": "student"}, "custom cannot be cut to koala-1b, which is a share of an SDXL"),
        ({"student": "vae"}, "has the U-Net custom, but this recipe trains koala-1b of custom"),
        ({"student": "nowhere"}, "nowhere"),
        ({"data": "nowhere"}, "nowhere does not exist: give a folder made by `koala prepare`"),
    ],
)
def test_what_is_known_before_the_first_step(given, said, data, others, toy_sdxl, tmp_path, capsys):
    teacher = others.get(given.get("teacher"), toy_sdxl)
    place = tmp_path / given["data"] if "data" in given else data
    status = distil(
        tmp_path / "run", place, teacher, *given.get("changes", []),
        recipe=given.get("recipe", "ablation-sa"),
        student=others.get(given.get("student"), given.get("student")),
    )  # fmt: skip
    shown = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and said in shown[-1] and shown[-1].startswith("koala: ")
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_another_vae_with_the_same_latents_will_do(data, toy_sdxl, tmp_path, capsys):
    """As SDXL's and its fp16-fix: its weights differ, what it makes of an image hardly."""
    teacher = shutil.copytree(toy_sdxl, tmp_path / "teacher")
    vae = teacher / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(vae)
    save_file({name: value * 1.001 for name, value in weights.items()}, vae)
    few = ("training.samples=4", "training.validate_every=0")
    assert distil(tmp_path / "run", data, teacher, *few) == 0
    assert "of the posterior's deviation: little enough to be used" in capsys.readouterr().err


def test_a_teacher_may_be_a_student(data, toy_sdxl, tmp_path):
    """A cut of a cut: its blocks begin as its teacher's, and are paired with them."""
    teacher, run = compress(toy_sdxl, "koala-1b", tmp_path / "teacher").out, tmp_path / "run"
    depths = ("cut=0,1,1,no-mid", "training.samples=4", "training.validate_every=0")
    assert distil(run, data, teacher, *depths) == 0
    begun, theirs = (
        load_file(folder / "unet/diffusion_pytorch_model.safetensors")
        for folder in (run / "start", teacher)
    )
    assert len(begun) < len(theirs) and all(torch.equal(theirs[n], v) for n, v in begun.items())
    card = model_card.read(run / "model")
    assert (card.cut.teacher, card.cut.architecture) == ("teacher", "custom")
    made = (run / "model").rename(tmp_path / "made")
    unfinished = resolve_model(run)  # the average in its checkpoint
    unet = "unet/diffusion_pytorch_model.safetensors"
    weights, theirs = load_file(unfinished / unet), load_file(made / unet)
    assert weights.keys() == theirs.keys()
    assert all(torch.equal(weights[name], value) for name, value in theirs.items())
    line = json.loads((run / "stats.jsonl").read_text().splitlines()[0])
    assert line["feat"] == pytest.approx(sum(v for k, v in line.items() if k.startswith("tap ")))


def test_a_missing_shard_and_a_latent_that_is_no_number(data, toy_sdxl, tmp_path, capsys):
    copy = shutil.copytree(data, tmp_path / "copy")
    shard = sorted(copy.glob("latents/*"))[0]
    tensors = load_file(shard)
    shard.unlink()
    assert distil(tmp_path / "run", copy, toy_sdxl) == 2
    assert f"1 shards are missing, the first is latents/{shard.name}" in capsys.readouterr().err
    spoilt = {name: torch.full_like(value, torch.nan) for name, value in tensors.items()}
    save_file(spoilt, shard)
    assert distil(tmp_path / "run", copy, toy_sdxl) == 1
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        f"in latents/{shard.name} has NaN or infinite values" in shown and "prepare again" in shown
    )
    save_file(tensors, shard)
    assert distil(tmp_path / "run", copy, toy_sdxl) == 0  # the same command goes on
    capsys.readouterr()
    assert distil(tmp_path / "run", copy, toy_sdxl, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"model": str(tmp_path / "run" / "model")}


def test_a_full_disk_loses_nothing(data, toy_sdxl, tmp_path, capsys):
    """No file may be as large as a checkpoint; then there is room again."""
    run, changes = tmp_path / "run", ("training.save_every=0", "training.preview_every=1000")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    distil(tmp_path / "whole", data, toy_sdxl, *changes)
    size = max(p.stat().st_size for p in (tmp_path / "whole" / "checkpoints").rglob("*"))
    shutil.copytree(tmp_path / "whole" / "start", run / "start")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
    try:
        assert distil(run, data, toy_sdxl, *changes) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot write the checkpoint" in shown and "run again" in shown
    assert not list((run / "checkpoints").iterdir()) and not (run / "model").exists()
    assert distil(run, data, toy_sdxl, *changes) == 0
    file = "model/unet/diffusion_pytorch_model.safetensors"
    assert (run / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
