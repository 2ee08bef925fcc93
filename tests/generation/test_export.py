"""What is written for other runtimes, opened by them and held to what PyTorch computes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("gguf")
pytest.importorskip("openvino_genai")
pytest.importorskip("openvino_tokenizers")

import gguf
import onnx
import onnxruntime as ort
import openvino_genai as genai

import koala
from koala.architectures.table import ARCHITECTURES, get
from koala.checkpoints import gguf_file
from koala.checkpoints.latent_scale import LatentScale
from koala.checkpoints.load import load_text, load_unet, load_vae
from koala.checkpoints.resolve import read_model
from koala.checkpoints.single_file import joined
from koala.checkpoints.tensors import load_tensor
from koala.errors import UserError
from koala.generation.export import export
from toy import toy_inputs, toy_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = toy_pipeline(tmp_path_factory.mktemp("toy") / "koala", architecture="koala")
    (folder / "NOTICE.txt").write_text("by somebody")
    return folder


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("onnx")
    return {
        dtype: export(model, "onnx", out / dtype, None if dtype == "fp32" else dtype).out
        for dtype in ("fp32", "fp16")
    }


def run(folder: Path, name: str, **given: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(folder / name / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, given)


def close(ours: np.ndarray, theirs: torch.Tensor, bound: float) -> None:
    error = np.abs(ours - theirs.numpy()).max() / theirs.numpy().std()
    assert error < bound


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-4), ("fp16", 2e-2)])
@pytest.mark.parametrize(("rows", "side"), [(2, 8), (3, 9)])  # 9: no multiple of the factor
def test_onnx_runtime_computes_what_the_u_net_does(model, exported, dtype, bound, rows, side):
    given, draw = toy_inputs(), torch.Generator().manual_seed(2)
    x = torch.randn(rows, 4, side, side + 3, generator=draw)
    asked = {
        "sample": x,
        "timestep": torch.tensor([999.0, 500.0, 1.0])[:rows],
        "encoder_hidden_states": torch.randn(rows, 5 * side, 40, generator=draw),
        "text_embeds": torch.randn(rows, 24, generator=draw),
        "time_ids": given["added_cond_kwargs"]["time_ids"][:1].expand(rows, -1),
    }
    (ours,) = run(exported[dtype], "unet", **{k: v.numpy() for k, v in asked.items()})
    x, t, text, pooled, ids = asked.values()
    with torch.no_grad():
        theirs = load_unet(model)(
            x, t, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}
        ).sample
    close(ours, theirs, bound)


def test_onnx_runtime_computes_what_text_encoders_and_vae_do(model, exported):
    tokenizer, _, *encoders = load_text(model)
    ids = tokenizer(["a fox", "a"], padding="max_length", return_tensors="pt").input_ids
    pooled = []
    with torch.no_grad():
        for name, encoder in zip(("text_encoder", "text_encoder_2"), encoders, strict=True):
            ours = run(exported["fp32"], name, input_ids=ids.numpy())
            theirs = encoder(ids, output_hidden_states=True)
            close(ours[-2], theirs.hidden_states[-2], 1e-4)
            pooled.append((ours[0], theirs))
        close(pooled[1][0], pooled[1][1].text_embeds, 1e-4)
        vae = load_vae(model)
        scale = LatentScale(vae.config)
        latents = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(3))
        given = {"latent_sample": (latents / scale.factor).numpy()}
        (image,) = run(exported["fp32"], "vae_decoder", **given)
        close(image, vae.decode(scale.denormalise(latents)).sample, 1e-4)
        (moments,) = run(exported["fp32"], "vae_encoder", sample=image)
        mean = vae.encode(torch.from_numpy(image)).latent_dist.mode()
        close(moments[:, :4] * scale.factor, scale.normalise(mean), 1e-3)


def test_an_onnx_folder_is_optimums(model, exported):
    for folder in exported.values():
        assert json.loads((folder / "model_index.json").read_text())["_class_name"]
        assert (folder / "NOTICE.txt").read_text() == "by somebody"
        for name in ("unet", "vae_decoder", "vae_encoder", "text_encoder", "text_encoder_2"):
            graph = folder / name / "model.onnx"
            onnx.checker.check_model(graph)
            assert {file.name for file in graph.parent.iterdir()} == {
                "model.onnx", "model.onnx_data", "config.json"
            }  # fmt: skip
        config = json.loads((folder / "vae_decoder" / "config.json").read_text())
        assert "scaling_factor" in config and "latents_mean" not in config
    sizes = [(folder / "unet" / "model.onnx_data").stat().st_size for folder in exported.values()]
    assert 0.45 < sizes[1] / sizes[0] < 0.55


@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_genai_draws_what_we_draw(tmp_path, monkeypatch, dtype):
    monkeypatch.setenv("KOALA_CACHE", str(tmp_path / "cache"))
    report = export("koala-mini", "openvino", tmp_path / "form", dtype)
    assert not report.notes
    assert (tmp_path / "form" / "NOTICE.txt").is_file()
    theirs = genai.Text2ImagePipeline(
        str(report.out), "CPU", INFERENCE_PRECISION_HINT="f32", DYNAMIC_QUANTIZATION_GROUP_SIZE=0
    )
    drawn = theirs.generate(
        "a fox, noto style", width=128, height=128, num_inference_steps=2, guidance_scale=3.5,
        generator=genai.TorchGenerator(7),
    )  # fmt: skip
    whole = "koala-mini" if dtype == "fp32" else report.out
    ours = koala.load(whole, "cpu")("a fox, noto style", seed=7, steps=2).images[0]
    difference = np.array(drawn.data)[0].astype(int) - np.array(ours.convert("RGB")).astype(int)
    assert np.abs(difference).max() <= 4  # it cuts what we round, and rounds its schedule
    assert isinstance(ours, Image.Image) and np.array(ours).std() > 1


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> Path:
    """A toy SDXL whose text encoders and VAE have the names that a single file has."""
    return toy_pipeline(tmp_path_factory.mktemp("toy") / "sdxl")


@pytest.mark.parametrize("dtype", gguf_file.DTYPES)
def test_a_gguf_file_holds_the_weights(known, tmp_path, monkeypatch, dtype):
    contents = read_model(known)
    monkeypatch.setitem(ARCHITECTURES, "sdxl", contents.architecture)
    report = export(known, "gguf", tmp_path / "toy.gguf", dtype)
    tensors = {one.name: one for one in gguf.GGUFReader(report.out).tensors}
    wanted = joined(contents)
    assert {*tensors} == {*wanted}
    kinds = set()
    for name, view in wanted.items():
        stored, exact = tensors[name], load_tensor(view, "F32").numpy()
        if name == "conditioner.embedders.1.model.text_projection":
            exact = exact.T  # as stable-diffusion.cpp multiplies by it (`benchmarks.sd_cpp`)
        kinds.add(stored.tensor_type.name)
        value = gguf.dequantize(stored.data, stored.tensor_type).reshape(exact.shape)
        bound = {"F32": 0, "F16": 1e-3, "Q8_0": 0.01, "Q5_0": 0.07, "Q4_0": 0.14}
        assert np.abs(value - exact).max() <= bound[stored.tensor_type.name] * np.abs(exact).max()
    assert gguf_file.DTYPES[dtype] in kinds


def test_only_what_stable_diffusion_cpp_knows_is_written(model, tmp_path):
    with pytest.raises(UserError, match="it would take it for SSD-1B or Vega"):
        export(model, "gguf", tmp_path / "x.gguf")
    assert [*tmp_path.iterdir()] == []
    for name in ("koala-1b", "bk-sdxl", "koala-700m"):
        assert gguf_file.unknown_to_sd_cpp(get(name))
    for name in gguf_file.KNOWN:
        assert gguf_file.unknown_to_sd_cpp(get(name)) is None
