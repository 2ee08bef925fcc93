"""Inspection: every kind of file and model described, without torch and without loading."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from koala.checkpoints.convert import convert
from koala.checkpoints.inspect import inspect
from koala.cli import main
from koala.errors import UserError


def test_the_bundled_model_and_its_single_file(tmp_path):
    folder = inspect("koala-mini")
    file = inspect(convert("koala-mini", "single-file", tmp_path / "mini.safetensors").out)
    assert (folder.layout, file.layout) == ("diffusers", "ldm")
    for found in (folder, file):
        assert (found.kind, found.unet_parameters, found.depths) == (
            "koala-mini",
            4762148,
            (0, 1, 1),
        )
        assert found.mid is None
        assert found.parts.keys() == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert {c: p.parameters for c, p in folder.parts.items()} == {
        c: p.parameters for c, p in file.parts.items()
    }
    assert file.parts["text_encoder_2"].tensors < folder.parts["text_encoder_2"].tensors


def test_licence_and_metadata(tmp_path, toy_sdxl):
    file = convert(toy_sdxl, "single-file", tmp_path / "a.safetensors").out
    from koala.checkpoints.tensors import read_metadata

    said = {"modelspec.license": "MIT", "modelspec.title": "A\x1b[31mred" + "x" * 400}
    save_file(load_file(file), tmp_path / "b.safetensors", {**read_metadata(file), **said})
    found = inspect(tmp_path / "b.safetensors")
    assert (found.kind, found.licence) == ("custom", "mit")
    assert {**found.metadata, **said} == found.metadata
    assert "koala.files" not in found.metadata
    assert "\x1b" not in found.text()  # what strangers wrote does not reach the terminal as it is
    assert "(409 characters)" in found.text()


def test_other_files_are_described_too(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 3).half()}, file, {"ss_dim": "4"})
    found = inspect(file)
    assert found.kind.startswith("a LoRA")
    assert (found.layout, found.unet_parameters) == (None, None)
    assert (found.parts["all"].parameters, found.parts["all"].dtypes) == (12, ("F16",))
    assert "ss_dim: '4'" in found.text()
    save_file({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, file)
    assert inspect(file).kind == "a Flux transformer"


def test_a_unet_alone_and_a_damaged_one(tmp_path, toy_sdxl):
    weights = load_file(convert("koala-mini", "single-file", tmp_path / "m.safetensors").out)
    unet = {n: t for n, t in weights.items() if n.startswith("model.diffusion_model.")}
    save_file(unet, tmp_path / "u.safetensors")
    found = inspect(tmp_path / "u.safetensors")
    assert (found.kind, list(found.parts), found.licence) == ("koala-mini", ["unet"], None)
    del unet["model.diffusion_model.out.2.bias"]
    save_file(unet, tmp_path / "u.safetensors")
    with pytest.raises(
        UserError, match=r"nearest known U-Net is koala-mini; missing tensors: out.2.bias"
    ):
        inspect(tmp_path / "u.safetensors")


def test_an_average_is_named_whether_it_is_read_or_not(tmp_path):
    weights = load_file(convert("koala-mini", "single-file", tmp_path / "m.safetensors").out)
    unet = "model.diffusion_model."
    named = {n.removeprefix("model.").replace(".", ""): t for n, t in weights.items() if unet in n}
    ema = {f"model_ema.{name}": tensor.clone() for name, tensor in named.items()}
    rest = {name: tensor for name, tensor in weights.items() if unet not in name}
    save_file(rest | ema, tmp_path / "alone.safetensors")
    save_file(weights | ema, tmp_path / "beside.safetensors")
    alone, beside = (inspect(tmp_path / f"{name}.safetensors") for name in ("alone", "beside"))
    assert (alone.kind, alone.average, beside.average) == ("koala-mini", "read", "left out")
    assert "\n  average   the U-Net is the EMA average: the file has no other\n" in alone.text()
    assert beside.parts["other"].tensors == len(ema)
    assert "\n  average   an EMA average of the U-Net lies beside it (other)" in beside.text()
    assert inspect(tmp_path / "m.safetensors").average is None
    assert "  average " not in inspect(tmp_path / "m.safetensors").text()


def test_the_command(tmp_path, capsys):
    assert main(["inspect", "koala-mini", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["parts"]["vae"]["dtypes"]) == ("koala-mini", ["F16"])
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x02" * 10)
    assert main(["inspect", str(tmp_path / "x.ckpt")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is a pickle, which can run code" in error


def test_torch_is_not_needed():
    script = (
        "import sys; from koala.checkpoints.inspect import inspect;"
        "print(inspect('koala-mini').kind);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "koala-mini\n"), done.stderr
