"""`koala finetune`: a LoRA of ten pictures and a whole U-Net, stopped, resumed, read by others."""

import json
import signal
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from koala.checkpoints import card_text, model_card
from koala.cli import main
from koala.data.latents import LatentSet
from koala.generation import load
from koala.lora.training import FILE, LoraSettings
from toy import toy_pipeline
from toy_sources import images, prepared

SMALL = [
    "training.samples=16", "training.batch=4", "training.lr=0.01", "training.preview_every=16",
    "training.ema_half_life=1", "hardware.accumulate=2",
]  # fmt: skip
SUBJECT = "a photo of sks fox"


@pytest.fixture(scope="module")
def koala(tmp_path_factory) -> Path:
    return toy_pipeline(tmp_path_factory.mktemp("koala") / "toy-koala", architecture="koala")


@pytest.fixture(scope="module")
def data(koala, tmp_path_factory) -> Path:
    """Ten pictures without captions, in a folder that says what they show."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "there" / f"2_{SUBJECT}").mkdir(parents=True)
    for n, file in enumerate(images(10, [(70, 70), (64, 100)])):
        (folder / "there" / f"2_{SUBJECT}" / f"{n}.jpg").write_bytes(file)
    return prepared(folder / "there", koala, folder / "d", "--held-out", "0")


def command(recipe: str, model: Path, data: Path, out: Path, *changes: str) -> list[str]:
    names = {change.partition("=")[0] for change in changes}
    settings = [text for text in SMALL if text.partition("=")[0] not in names]
    return [
        "finetune", recipe, "--model", str(model), "--data", str(data), "--out", str(out),
        "--device", "cpu", "--set", *settings, *changes,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def fox(koala, data, tmp_path_factory) -> Path:
    """A run of `dreambooth`."""
    run = tmp_path_factory.mktemp("runs") / "fox"
    assert main(command("dreambooth", koala, data, run)) == 0
    return run


def test_a_lora_is_read_by_diffusers_and_koala_alike(koala, fox):
    assert {p.name for p in (fox / "lora").iterdir()} == {FILE, "fox.safetensors", "README.md"}
    assert list((fox / "previews").glob("*.png"))
    stream = StableDiffusionXLPipeline.from_pretrained(koala)
    asked = {
        "num_inference_steps": 2, "guidance_scale": 1.0, "height": 64, "width": 64,
        "output_type": "latent",
    }  # fmt: skip

    def drawn() -> torch.Tensor:
        return stream(SUBJECT, generator=torch.Generator().manual_seed(3), **asked).images

    plain = drawn()
    stream.load_lora_weights(fox / "lora", weight_name=FILE)
    (config,) = stream.unet.peft_config.values()
    assert (config.r, config.lora_alpha) == (16, 16)
    theirs = drawn()
    assert (theirs - plain).abs().max() > 1e-3
    stream.unload_lora_weights()
    stream.load_lora_weights(fox / "lora", weight_name="fox.safetensors")
    torch.testing.assert_close(drawn(), theirs, rtol=1e-4, atol=1e-4)

    ours, reports = [], []
    for name in ("fox.safetensors", FILE):
        pipeline = load(koala, device="cpu")
        reports.append(pipeline.add_lora(fox / "lora" / name))
        ours.append(pipeline(SUBJECT, steps=2, guidance=1.0, seed=3).images[0].tobytes())
    without = load(koala, device="cpu")(SUBJECT, steps=2, guidance=1.0, seed=3)
    assert ours[0] == ours[1] != without.images[0].tobytes()
    for report in reports:
        assert report.applied == report.modules > 0
        assert report.made_for == report.applied_to
        assert not report.dropped and not report.doubt


def test_generate_takes_the_lora(koala, fox, tmp_path, capsys):
    given = ["--model", str(koala), "--device", "cpu", "--steps", "1"]
    lora = ["--lora", str(fox / "lora" / "fox.safetensors")]
    assert main(["generate", SUBJECT, *given, *lora, "--out", str(tmp_path / "fox.png")]) == 0
    assert (tmp_path / "fox.png").is_file()


def test_only_the_loras_matrices_are_kept_and_the_base_is_not_touched(koala, fox):
    (checkpoint,) = (fox / "checkpoints").iterdir()
    names = load_file(checkpoint / "state.safetensors").keys()
    assert names and all("lora_" in name for name in names)
    with safe_open(fox / "lora" / FILE, "pt") as file:
        names = [*file.keys()]
    assert all(name.startswith("unet.") and ".default" not in name for name in names)
    text = (fox / "lora" / "README.md").read_text()
    assert "toy-koala" in text and "recipe: `dreambooth`, fine-tuned from toy-koala" in text


def test_a_stopped_run_goes_on_to_the_same_lora(koala, data, fox, tmp_path, monkeypatch, capsys):
    given = command("dreambooth", koala, data, tmp_path / "fox")
    read = LatentSet.batch

    def signalled(self: LatentSet, first: int, *rest: int) -> dict:
        if first == 8:
            signal.raise_signal(signal.SIGTERM)
        return read(self, first, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(LatentSet, "batch", signalled)
        assert main(given) == 1
    assert "stopped after 12 samples; run again to continue" in capsys.readouterr().err
    assert main(given) == 0
    ours, theirs = (load_file(of / "lora" / FILE) for of in (tmp_path / "fox", fox))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_whole_u_net_and_its_card(toy_sdxl, data, tmp_path):
    run = tmp_path / "run"
    assert main(command("full", toy_sdxl, data, run, "training.ema_others=4")) == 0
    unet = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(toy_sdxl / unet), load_file(run / "model" / unet)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if "weight" in name)
    assert (run / "model-ema-4" / unet).is_file()
    card = model_card.read(run / "model")
    assert card.trained.tuned and card.trained.teacher == "sdxl" and not card.trained.distilled
    assert "fine-tuned from sdxl" in card_text.text(card)
    again = tmp_path / "again"
    few = ("training.samples=4", "training.preview_every=1000")
    (run / "model" / "words.json").write_text("{}")  # it learns others
    assert main(command("full", run / "model", data, again, *few)) == 0
    assert model_card.read(again / "model").trained.before == 16
    assert not (again / "model" / "words.json").exists()


def test_captions_with_other_programs_syntax_are_previewed(koala, tmp_path):
    there, run = tmp_path / "there", tmp_path / "run"
    there.mkdir()
    for n, file in enumerate(images(4, [(70, 70)])):
        (there / f"{n}.jpg").write_bytes(file)
        (there / f"{n}.txt").write_text(f"{n} foxes, {{red|blue}} (fur:20) --ar 16:9")
    data = prepared(there, koala, tmp_path / "d", "--held-out", "0")
    assert main(command("lora", koala, data, run, "training.samples=4")) == 0
    assert len([*(run / "previews").iterdir()]) == 1


def test_a_dry_run_counts_the_lora_alone(capsys):
    costs = []
    for recipe in ("lora", "full"):
        given = ["finetune", recipe, "--model", "koala-mini", "--dry-run", "--card", "4090"]
        assert main([*given, "--json"]) == 0
        costs.append(json.loads(capsys.readouterr().out)["cost"])
    lora, full = costs
    assert lora["trained"] < full["trained"] / 10
    assert lora["memory"]["frozen weights"] == pytest.approx(full["memory"]["weights"] / 2)
    assert lora["memory"]["optimiser"] == pytest.approx(2 * lora["memory"]["weights"])
    assert lora["tflop_a_sample"] == pytest.approx(full["tflop_a_sample"] * 2 / 3)
    # Unlike a teacher's recipe, an architecture will do for a model that is not here.
    assert (
        main(["finetune", "full", "--model", "koala-mini-1b", "--dry-run", "--card", "4090"]) == 0
    )
    assert "koala-mini-1b, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["koala-mini"], "choose full, lora, dreambooth"),
        (["lora", "--set", "lora.rank=0"], "lora.rank is 0"),
        (["lora", "--set", "lora.modules=some"], "choose attention, transformers, all"),
        (["full", "--set", "lora.rank=4"], "unknown --set name 'lora.rank'"),
        (["lora", "--set", "hardware.sharding=fsdp"], "a LoRA is too small to be worth sharding"),
        (["lora", "--set", "hardware.teacher=offloaded"], "there is no teacher"),
        (["full", "--dry-run", "--set", "hardware.teacher=offloaded"], "there is no teacher"),
        (["lora", "--set", "prompts=a {red|blue} fox"], "the prompt has {red|blue}"),
        (["lora", "--card", "4090"], "--card is for --dry-run"),
        (["lora", "--dry-run", "--card", "4090", "--model", "org/name"], "downloads nothing"),
    ],
)
def test_what_is_refused(given, said, koala, data, tmp_path, capsys):
    model = [] if "--model" in given else ["--model", str(koala)]
    rest = ["--data", str(data), "--out", str(tmp_path / "run")]
    assert main(["finetune", *given, *model, *rest]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_distill_does_not_finetune(capsys):
    assert main(["distill", "lora", "--data", ".", "--out", "x"]) == 2
    assert "unknown recipe 'lora'" in capsys.readouterr().err
    assert main(["finetune", "lora", "--data", ".", "--out", "x"]) == 2
    assert "koala finetune needs --model" in capsys.readouterr().err
    assert main(["finetune", "lora", "--dry-run", "--card", "4090"]) == 2
    assert "with --dry-run an architecture, such as koala-700m" in capsys.readouterr().err


def test_alpha_and_rank_are_what_they_must_be():
    assert LoraSettings(rank=8, alpha=4).config().lora_alpha == 4
    assert LoraSettings(rank=8).config().lora_alpha == 8
