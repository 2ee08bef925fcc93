"""Conversion: there and back without a bit lost, and read by programs that are not ours."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from koala.architectures.config import unet_config
from koala.architectures.table import UNetArchitecture, get
from koala.checkpoints import ldm_keys, single_file, validate
from koala.checkpoints.bundled import BUNDLED
from koala.checkpoints.compress import compress
from koala.checkpoints.convert import convert
from koala.checkpoints.load import load_text
from koala.checkpoints.resolve import resolve_model, unpacked
from koala.checkpoints.tensors import read_metadata, size_of
from koala.checkpoints.words import read_words
from koala.errors import UserError
from published import published
from toy import TEXT_WIDTHS, TIME_EMBED

NAMES = ("sdxl", "bk-sdxl", "koala-1b", "koala-700m", "ssd-1b", "segmind-vega")
WEIGHTS = {component: f"{stem}.safetensors" for component, stem in validate.WEIGHTS.items()}


def small(name: str) -> UNetArchitecture:
    """A known U-Net with the toy pipeline's widths."""
    return replace(
        get(name), widths=(16, 32, 32), heads=(1, 2, 2), groups=8,
        context=sum(TEXT_WIDTHS), pooled=TEXT_WIDTHS[1], time_ids=TIME_EMBED,
    )  # fmt: skip


@pytest.fixture(params=NAMES)
def folder(request, toy_sdxl, tmp_path) -> Path:
    """The toy pipeline with a U-Net of every known kind."""
    folder = shutil.copytree(toy_sdxl, tmp_path / "folder")
    torch.manual_seed(0)
    UNet2DConditionModel(**unet_config(small(request.param))).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def toy_file(toy_sdxl, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("single") / "toy.safetensors"
    convert(toy_sdxl, "single-file", file)
    return file


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder, by component and its published name."""
    return {
        f"{component}/{name.removeprefix('text_model.')}": tensor
        for component, file in WEIGHTS.items()
        for name, tensor in load_file(folder / component / file).items()
    }


def small_files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.suffix != ".safetensors"
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


# --- there and back -------------------------------------------------------------------------


def test_round_trip_is_bit_exact(folder, tmp_path):
    first = convert(folder, "single-file", tmp_path / "a.safetensors")
    back = convert(first.out, "diffusers", tmp_path / "back")
    again = convert(back.out, "single-file", tmp_path / "b.safetensors")
    assert_equal(weights(back.out), weights(folder))
    files = small_files(back.out)
    assert "license: unknown" in files.pop("README.md").decode()  # a card, as there was none
    assert files == small_files(folder)
    assert_equal(load_file(again.out), load_file(first.out))
    assert (first.architecture, first.dtypes, first.left_out) == ("custom", ("F32",), ())
    assert first.bytes == first.out.stat().st_size


def test_bundled_model_and_its_credits(tmp_path):
    report = convert("koala-mini", "single-file", tmp_path / "mini.safetensors")
    assert report.architecture == "koala-mini"
    assert report.out.stat().st_size < 40e6  # CLIP's vocabulary stays at home
    back = convert(report.out, "diffusers", tmp_path / "back").out
    mini = BUNDLED / "koala-mini"
    assert_equal(weights(back), weights(mini))
    kept = small_files(mini)
    del kept["vae_tiny/config.json"]  # a single file has no place for a second VAE
    assert read_words(back, "back") == read_words(mini, "koala-mini")
    assert {**kept, **small_files(back)} == small_files(back)
    tokenizers = [load_text(at)[:2] for at in (back, mini)]
    words = "a red fox, flat twemoji style"
    assert [t(words).input_ids for t in tokenizers[0]] == [
        t(words).input_ids for t in tokenizers[1]
    ]


@pytest.mark.parametrize(("dtype", "kind"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_dtypes(toy_sdxl, toy_file, tmp_path, dtype, kind):
    halved = {name: tensor.to(kind) for name, tensor in weights(toy_sdxl).items()}
    assert_equal(weights(convert(toy_file, "diffusers", tmp_path / "a", dtype).out), halved)
    assert_equal(weights(convert(toy_sdxl, "diffusers", tmp_path / "b", dtype).out), halved)
    file = convert(toy_file, "single-file", tmp_path / "c.safetensors", dtype)
    assert file.dtypes == ({"fp16": "F16", "bf16": "BF16"}[dtype],)
    assert_equal(load_file(file.out), {name: t.to(kind) for name, t in load_file(toy_file).items()})


def test_a_student_cut_out_of_a_single_file_is_the_folders(toy_sdxl, toy_file, tmp_path):
    students = [
        compress(teacher, "koala-700m", tmp_path / teacher.stem).out
        for teacher in (toy_sdxl, toy_file)
    ]
    assert_equal(weights(students[1]), weights(students[0]))
    files = [small_files(student) for student in students]
    assert files[0].keys() == files[1].keys()
    assert all(files[0][path] == files[1][path] for path in files[0] if path != "README.md")


def test_a_single_file_is_a_model_to_generate_with(
    toy_sdxl, toy_file, tmp_path, monkeypatch, capsys
):
    from koala.generation import load

    monkeypatch.setenv("KOALA_CACHE", str(tmp_path / "cache"))
    drawn = load(str(toy_file), "cpu")("a fox", steps=2, seed=3).images[0]
    assert capsys.readouterr().err.count("unpacking") == 1
    folder = resolve_model(toy_file)
    assert "unpacking" not in capsys.readouterr().err
    assert folder.is_relative_to(tmp_path / "cache")
    expected = load(toy_sdxl, "cpu")("a fox", steps=2, seed=3).images[0]
    assert drawn.tobytes() == expected.tobytes()
    os.utime(toy_file, ns=(0, 0))  # a changed file is another model
    assert resolve_model(toy_file) != folder


def test_of_several_processes_one_unpacks_and_the_others_wait(toy_file, tmp_path, monkeypatch):
    monkeypatch.setenv("KOALA_CACHE", str(tmp_path))
    name = unpacked(toy_file).name  # what is left when a process is killed while it unpacks
    models = tmp_path / "models"
    shutil.move(models / name, models / f".{name}.1234-ab.part")
    assert (models / f".{name}.lock").exists()
    program = "import sys; from koala.checkpoints.resolve import resolve_model as r; r(sys.argv[1])"
    command = [sys.executable, "-c", program, str(toy_file)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert sorted(text.count("unpacking") for text in said) == [0, 0, 1]
    assert sorted(p.name for p in models.iterdir()) == [f".{name}.lock", name]


# --- readers that are not ours --------------------------------------------------------------


def test_diffusers_reads_the_unet(folder, tmp_path):
    """By its `from_single_file`, given our configuration."""
    file = convert(folder, "single-file", tmp_path / "x.safetensors").out
    unet = UNet2DConditionModel.from_single_file(
        str(file), config=str(folder), subfolder="unet", local_files_only=True
    )
    assert_equal(unet.state_dict(), load_file(folder / "unet" / WEIGHTS["unet"]))


def test_diffusers_reads_the_whole_pipeline(toy_sdxl, toy_file):
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(toy_file), config=str(toy_sdxl), local_files_only=True
    )
    expected = weights(toy_sdxl)
    found = {
        f"{component}/{name.removeprefix('text_model.')}": tensor
        for component in WEIGHTS
        for name, tensor in getattr(pipeline, component).state_dict().items()
    }
    assert_equal(found, expected)


# --- SDXL as published ----------------------------------------------------------------------


def sparse(file: Path, tensors: dict[str, tuple[int, ...]], **metadata: str) -> Path:
    """A weights file of zeros that takes no room."""
    header, end = {"__metadata__": metadata}, 0
    for name, shape in tensors.items():
        begin, end = end, end + size_of("F16", shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)
    return file


MORE = {  # what published files hold beside the pipeline
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77),
    "conditioner.embedders.1.model.logit_scale": (),
    "model_ema.decay": (),
    "denoiser.sigmas": (1000,),
}


@pytest.mark.parametrize("name", ["sdxl", "koala-700m"])
def test_a_published_file_at_full_size(tmp_path, name):
    """Its configurations are SDXL's: the real classes built from them have exactly its tensors."""
    file = sparse(tmp_path / "x.safetensors", {**published(name), **MORE})
    contents = single_file.read(file)
    assert contents.architecture == get(name)
    assert sorted(contents.left_out) == sorted(MORE)
    text_2 = contents.config("text_encoder_2/config.json")
    assert (text_2["num_attention_heads"], text_2["hidden_act"]) == (20, "gelu")
    assert contents.config("text_encoder/config.json")["hidden_act"] == "quick_gelu"
    configs = {c: contents.config(f"{c}/config.json") for c in WEIGHTS}
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel.from_config(configs["unet"]),
            "vae": AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder"])),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**text_2)),
        }
    assert models["vae"].config.scaling_factor == 0.13025
    for component, model in models.items():
        expected = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        if component == "text_encoder":
            del expected["text_projection.weight"]
        assert {n: v.shape for n, v in contents.tensors[component].items()} == expected
    assert contents.config("scheduler/scheduler_config.json")["timestep_spacing"] == "trailing"
    lengths = {
        c: contents.config(f"{c}/tokenizer_config.json") for c in ("tokenizer", "tokenizer_2")
    }
    assert [c["model_max_length"] for c in lengths.values()] == [77, 77]
    assert lengths["tokenizer_2"]["pad_token"] == "!"
    mini = BUNDLED / "koala-mini"
    for path in ("tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json"):
        assert contents.files[path] == (mini / path).read_bytes()


def test_marks_of_v_prediction(tmp_path):
    tensors = {**published("koala-700m"), "v_pred": (0,), "ztsnr": (0,)}
    contents = single_file.read(sparse(tmp_path / "x.safetensors", tensors))
    schedule = contents.config("scheduler/scheduler_config.json")
    assert schedule["prediction_type"] == "v_prediction"
    assert schedule["rescale_betas_zero_snr"] is True


def test_the_licence_is_carried_along(toy_sdxl, tmp_path):
    said = {"modelspec.license": "CreativeML Open RAIL++-M", "modelspec.author": "somebody"}
    file = sparse(tmp_path / "x.safetensors", published("koala-700m"), **said)
    contents = single_file.read(file)
    assert contents.metadata == said
    assert b"modelspec.author: somebody" in contents.files["NOTICE.modelspec.txt"]
    named = shutil.copytree(toy_sdxl, tmp_path / "named")
    (named / "README.md").write_text("---\nlicense: openrail++\n---\n# A model\n")
    (named / "LICENSE").write_text("terms")
    single = convert(named, "single-file", tmp_path / "y.safetensors").out
    assert read_metadata(single)["modelspec.license"] == "openrail++"
    back = convert(single, "diffusers", tmp_path / "back").out
    for name in ("README.md", "LICENSE"):
        assert (back / name).read_bytes() == (named / name).read_bytes()
    student = compress(single, "koala-700m", tmp_path / "student").out
    assert "license: openrail++" in (student / "README.md").read_text()
    assert (student / "LICENSE").read_text() == "terms"


# --- bad input ------------------------------------------------------------------------------


def refused(model, message: str, to: str = "diffusers", name: str = "out", **options) -> None:
    out = Path(model).with_name(name)
    with pytest.raises(UserError, match=message) as error:
        convert(model, to, out, **options)
    assert "\n" not in str(error.value)
    assert not [p for p in out.parent.iterdir() if p.name.endswith(".part")]


def changed(toy_file: Path, file: Path, change, **metadata) -> Path:
    """A copy of the toy's single file with other tensors or metadata."""
    tensors = load_file(toy_file)
    change(tensors)
    save_file(tensors, file, {**read_metadata(toy_file), **metadata})
    return file


def test_tensors_that_are_missing_extra_or_misshapen(toy_file, tmp_path):
    def lose(tensors):
        for name in sorted(n for n in tensors if n.startswith("first_stage_model.dec"))[:12]:
            del tensors[name]

    refused(
        changed(toy_file, tmp_path / "a.safetensors", lose),
        r"vae: missing tensors: (\S+, ){9}\S+ and 2 more$",
    )
    prefix = ldm_keys.PREFIXES["text_encoder_2"]

    def add(tensors):
        tensors[f"{prefix}stranger"] = torch.zeros(1)
        tensors[f"{prefix}text_projection"] = torch.zeros(3)

    refused(
        changed(toy_file, tmp_path / "b.safetensors", add),
        r"text_encoder_2: unexpected tensors: stranger; .* wrong shape: text_projection \[3\]$",
    )

    def lose_unet(tensors):
        del tensors["model.diffusion_model.out.2.bias"]

    refused(changed(toy_file, tmp_path / "c.safetensors", lose_unet), "missing .*: out.2.bias$")

    def only_unet(tensors):
        for name in [n for n in tensors if not n.startswith("model.")]:
            del tensors[name]

    refused(
        changed(toy_file, tmp_path / "d.safetensors", only_unet),
        "holds unet and lacks vae, text_encoder, text_encoder_2: add --base MODEL with the SDXL",
    )

    def integers(tensors):
        name = "first_stage_model.quant_conv.bias"
        tensors[name] = tensors[name].to(torch.int32)

    refused(changed(toy_file, tmp_path / "e.safetensors", integers), "vae holds I32 weights")

    def large(tensors):
        tensors["model.diffusion_model.out.2.bias"][0] = 1e9

    file = changed(toy_file, tmp_path / "f.safetensors", large)
    refused(file, "too large for F16; use fp32 or bf16", dtype="fp16")


@pytest.mark.parametrize(
    ("carried", "message"),
    [
        ("nothing", "cannot be read"),
        ("[]", "must hold a JSON object, not list"),
        ('{"../../evil": "x"}', r"holds '../../evil', which is not a file of a model folder"),
        ('{"/etc/passwd": "x"}', "not a file of a model folder"),
        ('{"unet/../x.json": "x"}', "not a file of a model folder"),
        ('{"unet/run.py": "x"}', "not a file of a model folder"),
        ('{"LICENSE": 3}', "LICENSE must be text"),
        ('{"unet/config.json": "{}"}', "lacks model_index.json, scheduler/scheduler_config.json"),
    ],
)
def test_forged_small_files(toy_file, tmp_path, carried, message):
    file = changed(toy_file, tmp_path / "x.safetensors", lambda _: None, **{"koala.files": carried})
    refused(file, message)


def test_a_file_without_configurations_must_be_sdxls(toy_file, tmp_path):
    save_file(load_file(toy_file), tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "this is an unknown kind of U-Net: widths")
    tensors = published("koala-700m")
    more = {n: (50000, *s[1:]) for n, s in tensors.items() if n.endswith("token_embedding.weight")}
    file = sparse(tmp_path / "y.safetensors", {**tensors, **more})
    refused(file, r"text_encoder has 50,000 tokens, CLIP has 49,408; .*use the folder")
    narrow = {n: (64, *s[1:]) for n, s in tensors.items() if n.endswith("0.conv1.weight")}
    file = sparse(tmp_path / "z.safetensors", {**tensors, **narrow, "v_pred": (0,)})
    with pytest.raises(UserError):
        single_file.read(file)


def test_wrong_settings(toy_sdxl, toy_file, tmp_path):
    (tmp_path / "model").symlink_to(toy_sdxl)
    model = tmp_path / "model"
    refused(model, "unknown format 'onnx': choose diffusers, single-file", to="onnx")
    refused(model, "unknown dtype 'int8': choose fp32, fp16, bf16", dtype="int8")
    refused(model, "must end in .safetensors, not out.ckpt", to="single-file", name="out.ckpt")
    taken = tmp_path / "taken.safetensors"
    taken.write_text("mine")
    refused(model, "taken.safetensors exists; name a new", to="single-file", name=taken.name)
    refused(model, "is a file; name a new one", name=taken.name)
    assert taken.read_text() == "mine"
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02whatever this is")
    refused(tmp_path / "model.ckpt", "is a pickle")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", "this is not a Stable Diffusion XL model but a LoRA")
