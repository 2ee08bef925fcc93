"""Files as other programs write them: their names, their 8 bits, and what is broken in them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from koala.architectures.table import get
from koala.checkpoints import single_file
from koala.checkpoints.compress import compress
from koala.checkpoints.convert import convert
from koala.checkpoints.detect import unet_shapes
from koala.checkpoints.inspect import inspect
from koala.checkpoints.ldm_keys import PREFIXES
from koala.checkpoints.load import load_text, load_unet, load_vae
from koala.checkpoints.prediction import VELOCITY, Prediction
from koala.checkpoints.resolve import read_model, resolve_model
from koala.checkpoints.spellings import _of_average
from koala.checkpoints.tensors import all_finite, load_tensor, read_metadata
from koala.checkpoints.validate import WEIGHTS
from koala.errors import UserError

U = PREFIXES["unet"]
UNET = "unet/diffusion_pytorch_model.safetensors"
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def toy_file(toy_sdxl, tmp_path_factory) -> Path:
    return convert(toy_sdxl, "single-file", tmp_path_factory.mktemp("s") / "toy.safetensors").out


@pytest.fixture
def folder(toy_sdxl, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(toy_sdxl, tmp_path / "model")


def values(model: Path) -> dict[str, torch.Tensor]:
    """Every tensor as it is read, by component and name."""
    return {
        f"{component}/{name.removeprefix('text_model.')}": load_tensor(view)
        for component, of in read_model(model).tensors.items()
        for name, view in of.items()
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def under(prefix: str, folder: Path, component: str) -> dict[str, torch.Tensor]:
    """A component of the folder with diffusers' or transformers' names, after a prefix."""
    of = load_file(folder / component / f"{WEIGHTS[component]}.safetensors")
    full = component == "text_encoder"  # transformers shortens its names since 5.6
    return {
        prefix + (f"text_model.{n}" if full and not n.startswith("text_model.") else n): t
        for n, t in of.items()
    }


def rewritten(case: str, tensors: dict[str, torch.Tensor], folder: Path) -> dict:
    """The tensors of a single file as one of the other programs names them."""
    clip, big, vae = (PREFIXES[c] for c in ("text_encoder", "text_encoder_2", "vae"))
    if case == "vae":
        return {n.replace(vae, "vae."): t for n, t in tensors.items()}
    if case == "clip_l":
        return {n.replace(clip, "text_encoders.clip_l.transformer."): t for n, t in tensors.items()}
    if case == "clip_g, OpenCLIP's names":
        return {n.replace(big, "text_encoders.clip_g.model."): t for n, t in tensors.items()}
    if case == "VAE attention in 2-d":
        return {n: t[:, :, 0, 0] if ".attn_1." in n and t.ndim == 4 else t
                for n, t in tensors.items()}  # fmt: skip
    if case in ("DDP", "Lightning"):
        before = {"DDP": "module.", "Lightning": "state_dict."}[case]
        return {f"{before}{n}": t for n, t in tensors.items()}
    if case == "compiled":
        return {n.replace(U, f"{U}_orig_mod."): t for n, t in tensors.items()}
    if case == "clip_g, transformers' names":
        kept = {n: t for n, t in tensors.items() if not n.startswith(big)}
        return kept | under("text_encoders.clip_g.transformer.", folder, "text_encoder_2")
    if case == "VAE, old attention":
        kept = {n: t for n, t in tensors.items() if not n.startswith(vae)}
        for name, tensor in under("vae.", folder, "vae").items():
            for new, old in OLD.items():
                if f".attentions.0.{new}." in name:
                    name = name.replace(new, old)
                    tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
            kept[name] = tensor
        return kept
    assert case == "diffusers'"
    return {n: t for c in WEIGHTS for n, t in under(f"{c}.", folder, c).items()}


@pytest.mark.parametrize(
    "case",
    ["vae", "clip_l", "clip_g, OpenCLIP's names", "clip_g, transformers' names",
     "VAE attention in 2-d", "VAE, old attention", "diffusers'", "DDP", "Lightning", "compiled"],
)  # fmt: skip
def test_other_writers_names_are_read(case, toy_file, toy_sdxl, tmp_path):
    file = tmp_path / "theirs.safetensors"
    tensors = rewritten(case, load_file(toy_file), toy_sdxl)
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, read_metadata(toy_file))
    assert_equal(values(file), values(toy_sdxl))
    assert single_file.read(file).left_out == ()


def test_a_name_that_two_tensors_have_is_refused(toy_file, tmp_path):
    tensors = load_file(toy_file)
    tensors["vae.quant_conv.bias"] = tensors["first_stage_model.quant_conv.bias"].clone()
    file = tmp_path / "twice.safetensors"
    save_file(tensors, file, read_metadata(toy_file))
    with pytest.raises(UserError, match=r"quant_conv\.bias twice, under two names"):
        single_file.read(file)


# --- 8 bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [None, "scale_weight", "weight_scale"])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_fp8_is_read_with_its_scales(ending, dtype, toy_file, toy_sdxl, tmp_path):
    tensors, expected = load_file(toy_file), {}
    for name in [n for n in tensors if n.startswith("model.") and n.endswith(".weight")]:
        weight = tensors[name]
        if weight.ndim > 1:
            scale = (weight.abs().max() / 448).float() if ending else torch.tensor(1.0)
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            expected[name] = tensors[name].float() * scale
            if ending:
                tensors[f"{name.removesuffix('.weight')}.{ending}"] = scale
    if ending == "scale_weight":  # a mark beside them all, or in the network's own part of the file
        tensors["scaled_fp8"] = torch.zeros(0)
    elif ending:
        tensors[f"{U}scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    file = tmp_path / "fp8.safetensors"
    save_file(tensors, file, read_metadata(toy_file))
    assert "F8_E4M3" in inspect(file).parts["unet"].dtypes
    report = convert(file, "single-file", tmp_path / "out.safetensors", dtype)
    assert report.left_out == ()
    found = load_file(report.out)
    kind = torch.bfloat16 if dtype else torch.float16
    for name, weight in expected.items():
        assert torch.equal(found[name], weight.to(kind)), name
    original = load_file(toy_file)
    some = next(n for n in expected if n.endswith("proj.weight"))
    assert (found[some].float() - original[some]).abs().max() < original[some].abs().max() / 8


def test_a_scale_of_many_numbers_is_refused(toy_file, tmp_path):
    tensors = load_file(toy_file)
    tensors["model.diffusion_model.out.2.scale_weight"] = torch.ones(4)
    name = "model.diffusion_model.out.2.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "x.safetensors", read_metadata(toy_file))
    with pytest.raises(UserError, match=r"out.2.scale_weight is F32 \[4\], not one F32 number"):
        single_file.read(tmp_path / "x.safetensors")


# --- NaN ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_told_by_the_bits(dtype, bad):
    kind = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
            "BF16": torch.bfloat16}[dtype]  # fmt: skip
    good = torch.tensor([0.0, -1.5, torch.finfo(kind).max, torch.finfo(kind).tiny], dtype=kind)
    assert all_finite(good.view(torch.uint8).numpy().tobytes(), dtype)
    good[1] = bad
    assert not all_finite(good.view(torch.uint8).numpy().tobytes(), dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_weight_is_named_before_anything_is_made_of_it(folder, tmp_path, bad):
    for file, name in ((UNET, "conv_out.bias"), ("vae/" + Path(UNET).name, "quant_conv.bias")):
        tensors = load_file(folder / file)
        tensors[name][0] = bad
        save_file(tensors, folder / file, {"format": "pt"})
    found = r"{}: {} holds NaN or infinite"
    for load, file, name in (
        (load_unet, UNET, "conv_out.bias"),
        (load_vae, "vae", "quant_conv.bias"),
    ):
        with pytest.raises(UserError, match=found.format(f".*{file}.*", name)):
            load(folder)
    for dtype in (None, "bf16"):
        with pytest.raises(UserError, match=r"conv_out.bias holds NaN or infinite"):
            compress(folder, "koala-700m", tmp_path / "out", dtype)
        with pytest.raises(UserError, match=r"bias holds NaN or infinite"):
            convert(folder, "single-file", tmp_path / "out.safetensors", dtype)
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


# --- variants -------------------------------------------------------------------------------


def halve(folder: Path, components: tuple[str, ...], variant: str = "fp16") -> None:
    for c in components:
        stem = folder / c / WEIGHTS[c]
        Path(f"{stem}.safetensors").rename(f"{stem}.{variant}.safetensors")


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("components", [("unet",), tuple(WEIGHTS)])
def test_a_folder_with_only_a_variant_is_read(folder, toy_sdxl, tmp_path, components, variant):
    expected = values(toy_sdxl)
    halve(folder, components, variant)
    assert_equal(values(resolve_model(folder)), expected)
    assert_equal(values(convert(folder, "diffusers", tmp_path / "again").out), expected)
    for load in (load_unet, load_vae, lambda at: load_text(at)[3]):
        assert_equal(load(folder).state_dict(), load(toy_sdxl).state_dict())


def test_several_variants_are_not_chosen_among(folder):
    halve(folder, ("unet",), "ema")
    shutil.copy(folder / "unet" / f"{WEIGHTS['unet']}.ema.safetensors",
                folder / "unet" / f"{WEIGHTS['unet']}.non_ema.safetensors")  # fmt: skip
    with pytest.raises(UserError, match="in several variants, ema, non_ema: rename the files of"):
        resolve_model(folder)


def test_an_usual_file_is_taken_before_its_variant(folder, toy_sdxl):
    broken = {n: t * 0 for n, t in load_file(folder / UNET).items()}
    save_file(broken, folder / UNET.replace(".safe", ".fp16.safe"), {"format": "pt"})
    assert_equal(values(resolve_model(folder)), values(toy_sdxl))


# --- what it predicts -----------------------------------------------------------------------


def test_v_prediction_goes_there_and_back(folder, tmp_path):
    import json

    config = folder / "scheduler" / "scheduler_config.json"
    stated = Prediction(VELOCITY, zero_snr=True)
    config.write_text(json.dumps(json.loads(config.read_text()) | stated.config))
    file = convert(folder, "single-file", tmp_path / "v.safetensors", "fp16").out
    tensors, metadata = load_file(file), read_metadata(file)
    assert tensors["v_pred"].shape == tensors["ztsnr"].shape == (0,)
    assert metadata["modelspec.prediction_type"] == "v"
    bare = {k: v for k, v in metadata.items() if k != "modelspec.prediction_type"}
    for name, said in (("both", metadata), ("marks", bare)):
        save_file(tensors, tmp_path / f"{name}.safetensors", said)
        assert single_file.read(tmp_path / f"{name}.safetensors").prediction == stated
    back = convert(file, "diffusers", tmp_path / "back")
    assert back.left_out == ()  # the marks are read, not dropped
    student = compress(file, "koala-700m", tmp_path / "student").out
    for model in (folder, file, back.out, student):
        assert inspect(model).prediction == "v, zero terminal SNR"
        assert "predicts  v, zero terminal SNR" in inspect(model).text()
    assert "predicts v, zero terminal SNR" in (student / "README.md").read_text()


def test_marks_that_another_program_added_win(toy_file, tmp_path):
    tensors = load_file(toy_file) | {"v_pred": torch.zeros(0)}
    save_file(tensors, tmp_path / "x.safetensors", read_metadata(toy_file))
    assert single_file.read(tmp_path / "x.safetensors").prediction == Prediction(VELOCITY)


def test_an_edm_file_is_refused_before_it_is_unpacked(toy_file, tmp_path, monkeypatch):
    monkeypatch.setenv("KOALA_CACHE", str(tmp_path / "cache"))
    tensors = load_file(toy_file) | {"edm_vpred.sigma_max": torch.tensor(120.0)}
    save_file(tensors, tmp_path / "x.safetensors", read_metadata(toy_file))
    with pytest.raises(UserError, match="EDM model"):
        resolve_model(tmp_path / "x.safetensors")
    assert not (tmp_path / "cache").exists()
    assert inspect(tmp_path / "x.safetensors").kind.startswith("an EDM model")


def test_a_single_file_says_what_it_is(toy_file):
    stated = {k: v for k, v in read_metadata(toy_file).items() if k.startswith("modelspec.")}
    assert stated == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "custom",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "sdxl",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "epsilon",
    }


# --- an average alone, and shards -----------------------------------------------------------


@pytest.mark.parametrize("name", ["sdxl", "koala-700m", "koala-mini", "sdm-v2.0"])
def test_an_average_s_names_get_their_dots_back(name):
    for one in unet_shapes(get(name), "ldm"):
        assert _of_average("model_ema.diffusion_model" + one.replace(".", "")) == U + one
        assert _of_average(f"model_ema.diffusion_model.{one}") == U + one


def test_a_file_with_the_average_alone_is_read_with_it(toy_file, tmp_path):
    tensors = load_file(toy_file)
    ema = {f"model_ema.{n[6:].replace('.', '')}" if n.startswith(U) else n: t
           for n, t in tensors.items()}  # fmt: skip
    ema |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    save_file(ema, tmp_path / "ema.safetensors", read_metadata(toy_file))
    assert_equal(values(tmp_path / "ema.safetensors"), values(toy_file))
    both = tensors | {n: t + 1 for n, t in ema.items() if n.startswith("model_ema.")}
    save_file(both, tmp_path / "both.safetensors", read_metadata(toy_file))
    assert_equal(values(tmp_path / "both.safetensors"), values(toy_file))


def test_a_shard_is_called_one(toy_file, tmp_path):
    shard = tmp_path / "x" / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    shard.parent.mkdir(parents=True)
    shutil.copy(toy_file, shard)
    with pytest.raises(UserError, match="is shard 1 of 2 of a model: give the model's folder, in"):
        read_model(shard)
    assert inspect(shard).kind.startswith("shard 1 of 2 of a model: give the model's folder")
    (shard.parent / "config.json").touch()
    with pytest.raises(
        UserError, match=f"shard 1 of 2 of a model: give the folder {shard.parent}$"
    ):
        resolve_model(shard)
    (shard.parent.parent / "model_index.json").touch()
    with pytest.raises(UserError, match=f"give the folder {tmp_path / 'x'}$"):
        compress(shard, "koala-700m", tmp_path / "out")
