"""A model stored in 4 bits: what is on the disk draws again, and what cannot read it says so."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

import koala
from koala.checkpoints.load import load_unet
from koala.checkpoints.model_card import read
from koala.checkpoints.quantised import IN_8_BITS
from koala.checkpoints.resolve import resolve_model
from koala.checkpoints.validate import read_tensors
from koala.cli import main
from koala.errors import UserError
from koala.generation.calibration import calibration
from koala.generation.pruning import prune_model
from koala.generation.quantise import hold, quantise
from koala.generation.quantised_folder import load_any_unet, stored_layer, write_quantised
from koala.generation.runtime.backends import example
from koala.generation.runtime.compiled import Compiled
from koala.generation.runtime.pytorch import predictor
from koala.generation.streaming import streamed_pipeline


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    out = tmp_path_factory.mktemp("stored") / "int4"
    arguments = ["--to", "diffusers", "--weights", "int4", "--out", str(out)]
    assert main(["convert", "koala-mini", *arguments]) == 0
    return out


def mini():
    return load_unet(resolve_model("koala-mini"))


@pytest.mark.parametrize("shape", [(128, 96), (64, 64, 3, 3), (64, 33), (16, 8)])
def test_a_stored_layer_is_nearer_than_rounding_alone(shape):
    draw = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(shape, generator=draw)
    weight[3] *= 20  # a channel of outliers
    weight[:, 5] *= 20
    layer = torch.nn.Linear(1, 1) if len(shape) == 2 else torch.nn.Conv2d(1, 1, 1)
    layer.weight = torch.nn.Parameter(weight.clone())
    model = torch.nn.ModuleDict({"layer": layer})
    quantise(model, "int4")
    alone = (model["layer"].weight - weight).square().sum()
    made = stored_layer("down.weight", weight)
    other = torch.nn.Linear(1, 1) if len(shape) == 2 else torch.nn.Conv2d(1, 1, 1)
    other.weight = torch.nn.Parameter(weight.clone())
    hold(other, "down", list(made.values()))
    with torch.no_grad():
        error = (other.float().weight - weight).square().sum()
    if "left" in made:
        assert error < 0.7 * alone
    else:
        assert error == pytest.approx(float(alone), rel=0.1)


def test_the_folder_draws_nearer_than_weights_rounded_alone(stored):
    pipeline = koala.load(stored, "cpu")
    assert pipeline.plan.mode.weights == "int4"
    assert np.ptp(np.array(pipeline("a fox", steps=1, seed=1).images[0])) > 0
    whole, rounded = mini(), mini()
    quantise(rounded, "int4")
    unet = load_any_unet(stored, torch.float32)
    x = example(whole, 2, 16, 32)
    with torch.no_grad():
        exact, near, far = (predictor(one)(*x) for one in (whole, unet, rounded))
    assert (near - exact).square().sum() < (far - exact).square().sum()
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            true = whole.get_submodule(name).weight
            assert (module.weight - true).square().mean() < 0.02 * true.square().mean(), name


def test_it_takes_a_third_of_fp16(stored):
    sizes = {name: one.size for name, one in read_tensors(stored, "unet").items()}
    whole = sum(w.numel() for w in mini().parameters())
    assert sum(sizes.values()) < 0.36 * 2 * whole
    assert read(stored).quantised.weights == "int4"
    assert "import torch" not in (stored / "README.md").read_text()


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "--to", "single-file", "--out", "x.safetensors"],
        ["convert", "--to", "diffusers", "--weights", "int4", "--out", "x"],
        ["compress", "--to", "0,1,1", "--out", "x"],
        ["export", "--to", "onnx", "--out", "x"],
        ["export", "--to", "openvino", "--dtype", "bf16", "--out", "x"],
    ],
)
def test_what_cannot_read_it_refuses_it_by_name(stored, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([command[0], str(stored), *command[1:]]) == 2
    assert "is stored in int4" in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())


def test_openvino_keeps_it_in_4_bits(stored, tmp_path, monkeypatch):
    openvino = pytest.importorskip("openvino")
    monkeypatch.setenv("KOALA_CACHE", str(tmp_path / "cache"))
    assert main(["export", str(stored), "--to", "openvino", "--out", str(tmp_path / "form")]) == 0
    model = ["koala-mini", "--to", "openvino", "--dtype", "int4"]
    assert main(["export", *model, "--out", str(tmp_path / "same")]) == 0
    file = tmp_path / "form" / "unet" / "openvino_model.bin"
    assert file.read_bytes() == (tmp_path / "same" / "unet" / file.name).read_bytes()
    size = sum(one.size for one in read_tensors(stored, "unet").values())
    assert size == pytest.approx(file.stat().st_size, rel=0.02)
    network = openvino.Core().read_model(file.with_suffix(".xml"))
    constants = [op for op in network.get_ops() if op.get_type_name() == "Constant"]
    assert {"f16", "f32", "i8", "u4"} <= {
        one.output(0).element_type.to_string() for one in constants
    }

    unet = load_any_unet(stored, torch.float32)
    x = example(unet, 2, 16, 32)
    with torch.no_grad():
        ours = predictor(unet)(*x)
    kinds = (np.float32, np.int64, *3 * (np.float32,))
    given = (x[0], x[1], x[2].text, x[2].pooled, x[2].time_ids)
    theirs = Compiled(file.with_suffix(".xml"))(
        *(np.asarray(one, kind) for one, kind in zip(given, kinds, strict=True))
    )
    assert np.abs(theirs[0] - ours.numpy()).max() < 1e-4
    drawn = koala.load(tmp_path / "form")("a fox", steps=2, seed=1).images[0]
    whole = koala.load("koala-mini", "cpu", backend="torch")("a fox", steps=2, seed=1).images[0]
    difference = np.asarray(drawn, float) - np.asarray(whole.convert(drawn.mode), float)
    assert 0 < np.square(difference).mean() < 255**2 / 10**1.5  # 15 dB
    assert not [*(tmp_path).glob("tmp*")]


def test_other_weights_and_loras_are_refused(stored, capsys):
    assert main(["inspect", str(stored)]) == 0
    with pytest.raises(UserError, match="is stored in int4: leave out"):
        koala.load(stored, "cpu", weights="int8")
    with pytest.raises(UserError, match="LoRAs are merged before"):
        koala.load(stored, "cpu", lora={"x": 1.0})
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        StableDiffusionXLPipeline.from_pretrained(stored, use_safetensors=True)


@pytest.mark.parametrize("options", [["--to", "single-file"], ["--for", "koala-700m"]])
def test_weights_are_for_a_folder(options, tmp_path, capsys):
    out = str(tmp_path / "x.safetensors")
    assert main(["convert", "koala-mini", *options, "--weights", "int4", "--out", out]) == 2
    assert "with --to diffusers" in capsys.readouterr().err


PROMPTS = ("a fox", "a red apple", "a house")


@pytest.fixture(scope="module")
def both(toy_sdxl, tmp_path_factory):
    """The toy model in 4 bits, calibrated on prompts and not."""
    place = tmp_path_factory.mktemp("both")
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    command = ["convert", str(toy_sdxl), "--to", "diffusers", "--weights", "int4"]
    calibrate = ["--calibrate", str(place / "prompts.txt")]
    assert main([*command, *calibrate, "--out", str(place / "calibrated")]) == 0
    assert main([*command, "--out", str(place / "plain")]) == 0
    return place / "calibrated", place / "plain"


def test_calibrated_it_computes_nearer_to_the_whole_model(both, toy_sdxl):
    inputs = calibration(streamed_pipeline(toy_sdxl, "toy"), PROMPTS)
    whole = predictor(load_unet(toy_sdxl))
    own, plain = (predictor(load_any_unet(folder, torch.float32)) for folder in both)
    with torch.no_grad():
        errors = [
            sum(float((one(*x) - whole(*x)).square().sum()) for x in inputs) for one in (own, plain)
        ]
    assert errors[0] < 0.8 * errors[1]


def test_calibrated_it_is_stored_and_draws_as_without(both):
    own, plain = (read_tensors(folder, "unet") for folder in both)
    assert {name: (one.dtype, one.shape) for name, one in own.items()} == {
        name: (one.dtype, one.shape) for name, one in plain.items()
    }
    assert sorted(f.name for f in both[0].iterdir()) == sorted(f.name for f in both[1].iterdir())
    picture = np.array(koala.load(both[0], "cpu")("a fox", steps=2, seed=1).images[0])
    assert np.ptp(picture) > 0


def test_the_card_says_by_how_many_prompts(both):
    assert [read(folder).quantised.prompts for folder in both] == [len(PROMPTS), 0]
    texts = [(folder / "README.md").read_text() for folder in both]
    assert "without training, calibrated on 3 prompts." in texts[0]
    assert "without training." in texts[1] and "calibrated" not in texts[1]


def test_layers_of_too_many_inputs_are_rounded_as_without(both, toy_sdxl, tmp_path, monkeypatch):
    monkeypatch.setattr("koala.generation.quantised_folder.MOST_INPUTS", 300)
    out = tmp_path / "x"
    made = write_quantised(
        toy_sdxl, out, calibrate=lambda folder, pipeline: calibration(pipeline, ["a fox"])[:2]
    )
    wide = f"{made.too_wide} layers of more than 300 inputs"
    but = f"calibrated on 4 prepared latents but for {wide}, "
    assert but in made.line()
    assert made.prompts == 0 and read(out).quantised.latents == made.latents == 4
    assert "calibrated on 4 prepared latents" in (out / "README.md").read_text()
    whole = load_unet(toy_sdxl)
    own, plain = (load_any_unet(folder, torch.float32) for folder in (out, both[1]))
    same, other = 0, 0
    for name, module in whole.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            continue
        equal = torch.equal(own.get_submodule(name).weight, plain.get_submodule(name).weight)
        first = name.startswith(IN_8_BITS)
        if first or module.weight[0].numel() > 300:
            assert equal, name
            same += not first
        else:
            other += not equal
    assert (same, other) == (made.too_wide, made.calibrated)


def test_a_pruned_model_is_calibrated(toy_sdxl, tmp_path):
    prune_model(toy_sdxl, 0.3, ["a fox"], tmp_path / "pruned")
    made = write_quantised(tmp_path / "pruned", tmp_path / "int4", calibrate=["a fox"])
    assert made.prompts == 1 and made.too_wide == 0 and "calibrated on 1 prompt, " in made.line()
    unets = load_unet(tmp_path / "pruned"), load_any_unet(tmp_path / "int4", torch.float32)
    x = example(unets[0], 2, 8, 5)
    with torch.no_grad():
        exact, near = (predictor(unet)(*x) for unet in unets)
    assert (near - exact).abs().mean() < 0.25 * exact.abs().mean()
