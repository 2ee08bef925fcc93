"""A model put together: a U-Net's file and its base, another VAE, LoRAs merged into it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from koala.checkpoints import card_facts, model_card, sampling
from koala.checkpoints.convert import convert
from koala.checkpoints.inspect import inspect
from koala.checkpoints.load import load_scheduler_config, load_text, load_unet
from koala.checkpoints.resolve import check_name, resolve_model
from koala.checkpoints.tensors import read_metadata
from koala.checkpoints.vae_files import read_vae
from koala.checkpoints.validate import WEIGHTS, check_folder
from koala.cli import main
from koala.errors import UserError
from koala.generation.advice import advise
from koala.lora.adapters import merge, modules_of
from koala.lora.assembly import assembled
from koala.lora.names import base_of
from koala.lora.reading import read
from toy import toy_pipeline
from toy_lora import toy_lora

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KOALA_CACHE", str(tmp_path / "cache" / "packages"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another model of the same sizes."""
    return toy_pipeline(tmp_path_factory.mktemp("other") / "other", seed=5)


@pytest.fixture(scope="module")
def single(other, tmp_path_factory) -> Path:
    return convert(other, "single-file", tmp_path_factory.mktemp("s") / "single.safetensors").out


def equal(folder: Path, component: str, expected: Path) -> bool:
    file = f"{component}/{WEIGHTS[component]}.safetensors"
    found, wanted = load_file(folder / file), load_file(expected / file)
    short = {n.removeprefix("text_model."): t for n, t in wanted.items()}
    return {n.removeprefix("text_model.") for n in found} == short.keys() and all(
        torch.equal(t, short[n.removeprefix("text_model.")]) for n, t in found.items()
    )


def unet_alone(layout: str, other: Path, single: Path, file: Path) -> Path:
    if layout == "diffusers":
        save_file(load_file(other / UNET), file)
    else:
        start = "model.diffusion_model."
        tensors = {n: t for n, t in load_file(single).items() if n.startswith(start)}
        cut = start if layout == "ldm, bare" else ""
        save_file({n.removeprefix(cut): t for n, t in tensors.items()}, file)
    return file


@pytest.mark.parametrize("layout", ["diffusers", "ldm", "ldm, bare"])
def test_a_base_completes_a_unet_alone(layout, other, single, toy_sdxl, tmp_path, capsys):
    file = unet_alone(layout, other, single, tmp_path / "sdxl_4step_unet.safetensors")
    folder = assembled(file, base=toy_sdxl)
    check_folder(folder)
    assert equal(folder, "unet", other)
    assert all(equal(folder, c, toy_sdxl) for c in ("vae", "text_encoder", "text_encoder_2"))
    assert load_scheduler_config(folder) == load_scheduler_config(toy_sdxl)
    card = model_card.read(folder).assembled
    assert card == card_facts.Assembled("sdxl_4step_unet", toy_sdxl.name, None, [])
    assert (
        "the U-Net of sdxl_4step_unet; what that lacks of sdxl"
        in (folder / "README.md").read_text()
    )
    assert capsys.readouterr().err.count("putting") == 1
    assert assembled(file, base=toy_sdxl) == folder and not capsys.readouterr().err
    assert assembled(file, base=other) != folder


def test_a_base_completes_a_folder_with_a_unet_alone(other, toy_sdxl, tmp_path, capsys):
    folder = shutil.copytree(other / "unet", tmp_path / "four_steps")
    with pytest.raises(UserError, match="but a U-Net alone: add --base MODEL"):
        resolve_model(folder)
    check_name(str(folder))
    found = assembled(folder, base=toy_sdxl)
    check_folder(found)
    assert equal(found, "unet", other) and equal(found, "vae", toy_sdxl)
    assert model_card.read(found).assembled.unet == "four_steps"
    described = inspect(folder)
    assert (described.layout, list(described.parts)) == ("diffusers", ["unet"])
    assert described.prediction == "epsilon (not stated: as SDXL)"
    ways = advise(folder, base=str(toy_sdxl))
    assert [way.disk for way in ways] == [way.disk for way in advise(other)]
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="four_steps lacks diffusion_pytorch_model"):
        assembled(folder, base=toy_sdxl)
    config = json.loads((folder / "config.json").read_text())
    for changes, said in (
        ({"in_channels": 9}, "has an inpainting U-Net"),
        ({"time_cond_proj_dim": 256}, "has a latent consistency model's U-Net"),
        ({"block_out_channels": 5}, "config.json: block_out_channels"),
        ({"addition_embed_type": None}, "four_steps has no addition embedding"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=said):
            assembled(folder, base=toy_sdxl)


def test_a_unet_alone_of_the_hub(other, toy_sdxl, tmp_path, monkeypatch):
    from huggingface_hub import constants

    repo, commit = tmp_path / "hub" / "models--some--unet", "0" * 40
    shutil.copytree(other / "unet", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert equal(assembled("some/unet", base=toy_sdxl), "unet", other)
    with pytest.raises(UserError, match="but a U-Net alone: add --base MODEL"):
        resolve_model("some/unet")
    (repo / "snapshots" / commit / "config.json").unlink()
    with pytest.raises(UserError, match="name one of its files, as some/unet/FILE"):
        resolve_model("some/unet")


def test_a_vae_of_another_scale_is_said(other, toy_sdxl, tmp_path, capsys):
    vae = shutil.copytree(other / "vae", tmp_path / "vae")
    assembled(toy_sdxl, vae=vae)
    assert "scales latents" not in capsys.readouterr().err
    config = json.loads((vae / "config.json").read_text())
    for changes, said in (
        ({"scaling_factor": 0.18215}, "(scaling_factor 0.18215, not 0.8)"),
        ({"latents_mean": None, "latents_std": None},
         "(latents_mean None, not [0.1, -0.2, 0.3, 0.0]; latents_std None, not"),
    ):  # fmt: skip
        (vae / "config.json").write_text(json.dumps(config | changes))
        for _ in range(2):  # when the model lies in the cache as well
            assembled(toy_sdxl, vae=vae)
            assert said in capsys.readouterr().err


def test_what_a_unet_states_of_itself_wins_over_its_base(other, single, toy_sdxl, tmp_path):
    file = unet_alone("ldm", other, single, tmp_path / "v.safetensors")
    save_file(load_file(file), file, {"modelspec.prediction_type": "v"})
    config = load_scheduler_config(assembled(file, base=toy_sdxl))
    assert config["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("kind", ["folder", "model", "file", "single file"])
def test_another_vae_takes_the_place_of_the_models(kind, other, single, toy_sdxl, tmp_path):
    if kind == "file":
        prefix = "first_stage_model."
        own = {n.removeprefix(prefix): t for n, t in load_file(single).items() if prefix in n}
        save_file(own, tmp_path / "vae.safetensors")
    given = {"folder": other / "vae", "model": other, "file": tmp_path / "vae.safetensors",
             "single file": single}[kind]  # fmt: skip
    folder = assembled(toy_sdxl, vae=given)
    check_folder(folder)
    assert equal(folder, "vae", other) and equal(folder, "unet", toy_sdxl)


def test_a_bundled_model_lends_its_vae():
    by_name, by_path = read_vae("koala-mini"), read_vae(resolve_model("koala-mini"))
    assert by_name.tensors == by_path.tensors and by_name.config == by_path.config


def test_a_file_without_a_vae_takes_the_one_given(other, single, toy_sdxl, tmp_path):
    tensors = {n: t for n, t in load_file(single).items() if not n.startswith("first_stage")}
    file = tmp_path / "novae.safetensors"
    save_file(tensors, file, read_metadata(single))
    with pytest.raises(UserError, match=r"lacks vae: add --vae FILE, or --base MODEL"):
        convert(file, "diffusers", tmp_path / "out")
    folder = assembled(file, vae=toy_sdxl)
    assert equal(folder, "vae", toy_sdxl) and equal(folder, "unet", other)


def lora_for(folder: Path, file: Path, seed: int) -> Path:
    return toy_lora(file, base_of(folder), seed=seed)


def test_loras_are_merged_as_into_a_live_model(toy_sdxl, tmp_path):
    files = [lora_for(toy_sdxl, tmp_path / f"{n}.safetensors", i) for i, n in enumerate("ab")]
    scales = {files[0]: 1.0, files[1]: -0.5}
    folder = assembled(toy_sdxl, loras=scales)
    unet, texts = load_unet(toy_sdxl), load_text(toy_sdxl)[2:]
    for file, scale in scales.items():
        merge(modules_of(unet, *texts), read(file, base_of(toy_sdxl)), scale)
    merged = [load_unet(folder), *load_text(folder)[2:]]
    plain = [load_unet(toy_sdxl), *load_text(toy_sdxl)[2:]]
    for ours, expected, before in zip(merged, [unet, *texts], plain, strict=True):
        changed = 0
        for name, weight in expected.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], weight, atol=1e-6, rtol=0)
            changed += not torch.equal(weight, before.state_dict()[name])
        assert changed > 3
    card = model_card.read(folder).assembled
    assert card.loras == ["a:1", "b:-0.5"]
    file = convert(folder, "single-file", tmp_path / "x.safetensors").out
    assert read_metadata(file)["modelspec.merged_from"] == "a:1, b:-0.5"


def test_a_few_step_lora_says_how_its_model_is_drawn(toy_sdxl, tmp_path):
    file = lora_for(toy_sdxl, tmp_path / "sdxl_lightning_4step_lora.safetensors", 0)
    folder = assembled(toy_sdxl, loras={file: 1.0})
    assert sampling.of_model(folder, folder) == sampling.Sampling(4, 1.0)


def test_parts_without_an_effect_are_refused(other, single, toy_sdxl, tmp_path, cache):
    for model in (toy_sdxl, single):
        with pytest.raises(UserError, match=r"--base .* has no effect"):
            assembled(model, base=other)
    with pytest.raises(UserError, match="but the vae of a model: give the folder"):
        assembled(toy_sdxl / "vae", base=other)
    with pytest.raises(UserError, match=r"--vae .* does not exist"):
        assembled(toy_sdxl, vae=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"is no VAE's folder \(the scheduler of a model"):
        assembled(toy_sdxl, vae=other / "scheduler")
    with pytest.raises(UserError, match="holds no VAE"):
        assembled(toy_sdxl, vae=other / UNET)
    assert assembled("koala-mini") == "koala-mini"
    assert not list(cache.rglob("model_index.json"))


def test_the_commands_take_them(other, single, toy_sdxl, tmp_path, capsys):
    file = str(unet_alone("ldm", other, single, tmp_path / "u.safetensors"))
    save_file(load_file(file), file, read_metadata(single))  # names its sizes, which no SDXL has
    base = ["--base", str(toy_sdxl)]
    lora = str(lora_for(toy_sdxl, tmp_path / "l.safetensors", 1))
    compressed = ["compress", file, "--to", "koala-700m", "--out", str(tmp_path / "s")]
    assert main(compressed) == 2
    assert "lacks vae, text_encoder, text_encoder_2: add --base MODEL" in capsys.readouterr().err
    assert main([*compressed, *base, "--teacher-lora", f"{lora}:0.5"]) == 0
    card = model_card.read(tmp_path / "s")
    assert (card.assembled.base, card.assembled.loras) == (toy_sdxl.name, ["l:0.5"])
    assert card.cut.teacher == "u"
    out = tmp_path / "fox.png"
    assert main(["generate", "a fox", "--model", file, *base, "--out", str(out), "--steps", "2",
                 "--device", "cpu"]) == 0  # fmt: skip
    assert out.is_file()
    assert main(["convert", file, "--to", "diffusers", "--out", str(tmp_path / "d"), *base]) == 0
    index = json.loads((tmp_path / "d" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    shutil.rmtree(tmp_path / "d")
    assert main(["convert", lora, "--for", str(toy_sdxl), "--out", str(tmp_path / "d.safetensors"),
                 *base]) == 2  # fmt: skip
    assert "no effect on a LoRA" in capsys.readouterr().err
