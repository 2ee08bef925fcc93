"""Names of models and where they resolve to; incomplete and foreign models are refused."""

import filecmp
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from koala.checkpoints.bundled import BUNDLED, bundled_names
from koala.checkpoints.convert import convert
from koala.checkpoints.load import load_scheduler_config, load_text, load_unet, load_vae
from koala.checkpoints.resolve import check_name, resolve_model, single_file_path
from koala.checkpoints.validate import CONFIGS
from koala.errors import UserError
from toy import toy_pipeline

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder_2/model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return toy_pipeline(tmp_path_factory.mktemp("toy") / "whole")


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(whole, tmp_path / "model")


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_whole_folder_is_its_own_model(whole):
    assert resolve_model(whole) == resolve_model(str(whole)) == whole


def test_bundled_models_are_whole():
    for name in bundled_names():
        folder = resolve_model(name)
        for file in (BUNDLED / name).rglob("*.*"):
            assert filecmp.cmp(file, folder / file.relative_to(BUNDLED / name), shallow=False)
        shared = [path for path in (BUNDLED / "koala-mini").iterdir() if path.is_dir()]
        assert all((folder / path.name).is_dir() for path in shared)


@pytest.mark.parametrize("load", [load_unet, load_text])
def test_each_layer_is_handed_over_before_the_next_is_read(folder, load):
    seen: list[str] = []

    def layer(path, module):
        assert not any(p.is_meta for p in module.parameters(recurse=False))
        unread = [p for child in module.children() for p in child.parameters()]
        assert all(p.is_meta for p in unread)
        seen.append(path)

    made = load(folder, layer=layer)
    models = [made] if load is load_unet else made[2:]
    assert seen == [path for model in models for path, _ in model.named_modules()]
    assert not any(p.is_meta for model in models for p in model.parameters())


def test_loads_as_float32_whatever_is_stored(whole, folder):
    for file in (UNET, VAE, TEXT, "text_encoder/model.safetensors"):
        tensors = {k: t.half() if t.is_floating_point() else t
                   for k, t in load_file(folder / file).items()}  # fmt: skip
        save_file(tensors, folder / file, metadata={"format": "pt"})
    parts = {
        UNET: load_unet(folder),
        VAE: load_vae(folder),
        TEXT: load_text(folder)[3],
    }
    for file, module in parts.items():
        expected = load_file(whole / file)
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        state = module.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[k], expected[k].half().float()) for k in state)
    assert load_unet(folder, torch.bfloat16).dtype is torch.bfloat16
    assert load_vae(folder, torch.bfloat16).dtype is torch.bfloat16
    tokenizer, tokenizer_2, encoder, encoder_2 = load_text(folder, torch.float16)
    assert encoder.dtype is encoder_2.dtype is torch.float16
    assert tokenizer.model_max_length == tokenizer_2.model_max_length == 32
    assert load_scheduler_config(folder)["timestep_spacing"] == "trailing"


@pytest.mark.parametrize("name", ["koala-maxi", "", "a/b/c", "./nowhere", "/nowhere/at/all", "-/x"])
def test_unknown_names_list_what_is_allowed(name):
    with pytest.raises(UserError, match=r"unknown model .*koala-mini.*folder.*Hub id"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["sdxl.safetensors", "sdxl.ckpt", "models/sdxl.GGUF"])
def test_a_file_that_is_not_there_is_called_so(name):
    for resolve in (resolve_model, check_name):
        with pytest.raises(UserError, match=f"model {name} does not exist: give an existing file"):
            resolve(name)


def test_a_name_is_checked_without_fetching_anything(whole, folder):
    for name in (str(whole), "koala-mini", "nobody/nothing", "nobody/nothing/x.safetensors"):
        check_name(name)
    (folder / UNET).unlink()
    for name, said in (("koala-mni", "did you mean koala-mini"), (str(folder), "lacks")):
        with pytest.raises(UserError, match=said):
            check_name(name)


def test_hub_id_that_cannot_be_had(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="'nobody/nothing' is not a local folder") as error:
        resolve_model("nobody/nothing")
    assert "\n" not in str(error.value)


def test_hub_id_in_the_cache(monkeypatch, tmp_path, whole):
    from huggingface_hub import constants

    commit = "0" * 40
    repo = tmp_path / "models--some--koala"
    shutil.copytree(whole, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert resolve_model("some/koala") == repo / "snapshots" / commit


def test_a_single_file_of_the_hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    commit = "0" * 40
    snapshot = tmp_path / "models--some--teacher" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "four_steps.safetensors").touch()
    (tmp_path / "models--some--teacher" / "refs").mkdir()
    (tmp_path / "models--some--teacher" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = single_file_path("some/teacher/four_steps.safetensors")
    assert found == snapshot / "four_steps.safetensors"
    with pytest.raises(UserError, match=r"'some/teacher/one.safetensors' is not a local file"):
        resolve_model("some/teacher/one.safetensors")


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        resolve_model(folder)
    assert "\n" not in str(error.value)


def test_folders_that_are_no_model(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no model_index.json")
    refused(folder / "model_index.json", "is text, not a safetensors file.*the model's folder")
    edit(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    refused(folder, "is a StableDiffusionPipeline .*no addition embedding.*StableDiffusionXLPip")
    (folder / "model_index.json").write_text("[]")
    refused(folder, "must hold a JSON object, not list")
    (folder / "model_index.json").write_text("{")
    refused(folder, "model_index.json cannot be read")


ALONE = {  # config.json -> what a folder with it is
    "UNet2DConditionModel": "a U-Net alone: add --base MODEL",
    "AutoencoderKL": "a VAE alone, which the option --vae takes",
    "ControlNetModel": "a ControlNet, which is applied to a model with `koala generate --control`",
    "T2IAdapter": "a T2IAdapter, which koala does not read",
}


@pytest.mark.parametrize("kind", ALONE)
def test_a_folder_with_one_network_is_called_by_its_name(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
    refused(tmp_path, rf"is not a model \(it has no model_index.json\) but {ALONE[kind]}")


def test_a_folder_of_other_files_says_what_to_give(folder, tmp_path):
    (tmp_path / "a").mkdir()
    refused(tmp_path / "a", "but an empty folder$")
    (tmp_path / "a" / "x.ckpt").touch()
    refused(tmp_path / "a", r"a folder of pickles \(x.ckpt\), which can run code")
    (tmp_path / "a" / "x.safetensors").touch()
    refused(tmp_path / "a", f"a folder of files: give {tmp_path / 'a' / 'x.safetensors'}$")
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "a", "an adapter of PEFT: give its .safetensors file")
    refused(tmp_path, f"a folder of models: give {folder}$")
    refused(folder / "unet", f"the unet of a model: give the folder {folder}$")
    (folder / "model_index.json").unlink()
    refused(folder / "scheduler", "a scheduler alone")
    (folder / "run.json").touch()
    refused(folder, "a training that has neither finished nor saved a checkpoint")


def test_the_hub_s_cache_is_told_from_a_folder_of_models(folder, tmp_path):
    cache = tmp_path / "hub" / "models--me--toy"
    for commit in ("aaa", "bbb"):
        shutil.copytree(folder, cache / "snapshots" / commit)
    refused(tmp_path / "hub", f"a folder of models: give {cache}/snapshots/aaa or {cache}/")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("bbb\n")
    refused(cache, f"but the Hub's cache of a model: give {cache}/snapshots/bbb$")


@pytest.mark.parametrize(
    ("mark", "what"),
    [("form.json", "a model for OpenVINO by koala export, from which generate and serve draw"),
     ("unet/openvino_model.xml", "a model for OpenVINO, which koala does not read"),
     ("unet/model.onnx", "a model for ONNX Runtime, which koala does not read")],
)  # fmt: skip
def test_a_model_for_another_runtime_is_called_that(folder, mark, what):
    (folder / mark).touch()
    assert resolve_model(folder) == folder  # beside the usual files
    shutil.rmtree(folder / "vae")
    refused(folder, f"is {what}: give the model that it was made of$")


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint", "ControlNet", "PAG"])
def test_pipelines_with_the_same_networks_are_read(folder, tmp_path, kind):
    edit(folder / "model_index.json", _class_name=f"StableDiffusionXL{kind}Pipeline",
         controlnet=["diffusers", "ControlNetModel"], requires_aesthetics_score=False)  # fmt: skip
    assert resolve_model(folder) == folder
    convert(folder, "diffusers", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert not {"controlnet", "requires_aesthetics_score"} & index.keys()
    assert index["vae"] == ["diffusers", "AutoencoderKL"]


def test_relatives_are_called_by_their_names(folder):
    config = folder / "unet" / "config.json"
    whole = config.read_text()
    for changes, said in (
        ({"time_cond_proj_dim": 256}, r"a latent consistency model's U-Net \(LCM\)"),
        ({"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 4096}, "Kolors"),
        ({"cross_attention_dim": 1280, "block_out_channels": [384, 768, 1536, 1536]}, "refiner"),
        ({"cross_attention_dim": 768, "addition_embed_type": None}, "SD 1.5's U-Net"),
        ({"in_channels": 8}, "an instruct-pix2pix U-Net: 8 input channels, SDXL's has 4$"),
    ):
        edit(config, **changes)
        refused(folder, f"^{folder} has .*{said}")
        config.write_text(whole)
    tensors = load_file(folder / UNET)
    save_file({f"{name}.absmax": tensor for name, tensor in tensors.items()}, folder / UNET)
    refused(folder, "unet holds a model in 4 bits of bitsandbytes, which koala does not read")
    edit(folder / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline",
         requires_aesthetics_score=True)  # fmt: skip
    shutil.rmtree(folder / "text_encoder")
    refused(folder, "is the SDXL refiner: give the base model")


@pytest.mark.parametrize("component", CONFIGS)
def test_missing_component(folder, component):
    shutil.rmtree(folder / component)
    refused(folder, f"lacks {component}/")


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(folder, file, keep):
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:keep])
    refused(folder, rf"{Path(file).name} .*(truncated|safetensors).*download it again")


def test_damaged_weights(folder):
    content = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(content + b"\0")
    refused(folder, "damaged")
    (folder / UNET).write_bytes(b"\x80\x02" + content[2:])
    refused(folder, "truncated|not a valid safetensors")
    (folder / UNET).write_bytes(content[:8] + b"!" * (len(content) - 8))
    refused(folder, "not a valid safetensors file: bad header")


def test_absent_weights_name_what_is_there(folder):
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    refused(folder, r"lacks diffusion_pytorch_model.safetensors; found only .*model.bin: pickles")
    (folder / "unet" / "diffusion_pytorch_model.bin").rename(folder / "unet" / "model.onnx")
    refused(folder, r"lacks diffusion_pytorch_model.safetensors; found only model.onnx$")


def test_a_published_name_suggests_its_hub_id():
    with pytest.raises(UserError, match="on the Hub it is etri-vilab/koala-lightning-700m"):
        resolve_model("koala-lightning-700m")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "an EDM model"),
        ("scheduler/scheduler_config.json", {"beta_start": None}, "lacks beta_start: without"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "flow-match"),
        ("unet/config.json", {"in_channels": 9}, "has an inpainting U-Net: 9 input channels"),
    ],
)
def test_another_kind_of_model_is_refused_at_the_first_look(folder, file, changes, message):
    edit(folder / file, **changes)
    refused(folder, message)
    check_name("some/model")  # a Hub id is looked at when it is there
    with pytest.raises(UserError, match=message):
        check_name(str(folder))


def test_shards(folder):
    tensors = load_file(folder / UNET)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, of in shards.items():
        save_file({name: tensors[name] for name in of}, folder / "unet" / file)
    (folder / UNET).unlink()
    weight_map = {name: file for file, of in shards.items() for name in of}
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    resolve_model(folder)
    state = load_unet(folder).state_dict()
    assert all(torch.equal(state[name], tensors[name]) for name in names)
    (folder / "unet" / "b.safetensors").unlink()
    refused(folder, r"b.safetensors cannot be read: No such file")
    index.write_text(json.dumps({"weight_map": {"x": "../../secret"}}))
    refused(folder, "outside its folder")
    index.write_text("{}")
    refused(folder, "no weight_map")


def change_names(folder: Path, file: str) -> None:
    tensors = {f"x.{name}": tensor for name, tensor in load_file(folder / file).items()}
    save_file(tensors, folder / file, metadata={"format": "pt"})


def test_foreign_unet_is_refused_before_loading(folder):
    change_names(folder, UNET)
    refused(folder, r"missing tensors: .* and \d+ more; unexpected tensors: x\..* and \d+ more$")
    with pytest.raises(UserError, match="unexpected tensors"):
        load_unet(folder)


@pytest.mark.parametrize(("file", "load"), [(VAE, load_vae), (TEXT, load_text)])
def test_foreign_weights_are_refused_on_loading(folder, file, load):
    tensors = load_file(folder / file)
    first, second = sorted(tensors)[:2]
    tensors["stranger"] = tensors.pop(first)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"missing tensors: {first}; unexpected tensors: stranger"):
        load(folder)
    tensors[first] = tensors.pop("stranger")
    tensors[second] = torch.zeros(3, 1, 2)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"tensors of the wrong shape: {second}"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("text_encoder/config.json", {"hidden_size": 20}, "cross_attention_dim is 40, .* give 44"),
        ("text_encoder_2/config.json", {"projection_dim": 9}, "pooled width is 24, .* give 9"),
        ("vae/config.json", {"latent_channels": 16}, "latent channels is 4, .* give 16"),
        ("vae/config.json", {"block_out_channels": [8, 8]}, "latent factor is 8, .* give 2"),
        ("unet/config.json", {"in_channels": 9}, "an inpainting U-Net: 9 input channels"),
        ("unet/config.json", {"layers_per_block": 1}, "the weights do not fit"),
        ("unet/config.json", {"addition_embed_type": None}, "no addition embedding"),
    ],
)
def test_parts_that_do_not_fit_each_other(folder, file, change, message):
    edit(folder / file, **change)
    refused(folder, message)
