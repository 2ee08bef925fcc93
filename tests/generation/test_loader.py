"""koala.load: each argument gives what the parts behind it give, bit for bit, at toy size."""

import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import koala
from koala.cli import main
from koala.errors import UserError
from koala.generation.decode import full
from koala.generation.loader import placed
from koala.generation.memory.placement import Placement
from koala.generation.memory.plan import Planner
from koala.generation.runtime.compile import fuse_projections
from koala.generation.runtime.fixed_batches import ROWS, in_fixed_batches, one_by_one
from koala.generation.runtime.pytorch import predictor
from koala.lora.adapters import Attached, Merged
from koala.serving.run import loaded
from koala.serving.settings import Limits, Options
from toy import toy_pipeline, toy_tiny
from toy_lora import toy_base, toy_lora

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return toy_pipeline(tmp_path_factory.mktemp("toy") / "koala", architecture="koala")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    toy_tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def style(folder, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    return toy_lora(file, toy_base(koala.load(folder, "cpu").unet))


def drawn(pipeline) -> np.ndarray:
    return np.asarray(pipeline("a fox", steps=2, seed=1).images[0])


def planned(folder: Path, **asked):
    """A pipeline by the first plan that fits into 4 GiB."""
    planner = Planner(folder, CPU, (64, 64), **asked)
    return placed(folder, "koala", Placement(planner, planner.choose(16 << 30), print), {}, print)


def test_nothing_but_a_name_gives_plain_pytorch_in_float32(folder):
    pipeline = koala.load(folder, "cpu")
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.float32
    assert pipeline.plan is None and pipeline.batch_sizes == () and pipeline.loras == {}
    assert pipeline.predict is pipeline._plain


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16])
def test_dtype_is_that_of_u_net_and_text_encoders(folder, dtype):
    pipeline = koala.load(folder, "cpu", dtype=dtype)
    models = (pipeline.unet, *pipeline.conditioner.encoders)
    assert {model.dtype for model in models} == {torch.bfloat16}
    assert pipeline.vae.dtype == torch.float32


def test_loras_lie_beside_the_weights_unless_the_runtime_needs_them_merged(folder, style):
    lines: list[str] = []
    beside = koala.load(folder, "cpu", lora={style: 0.5}, say=lines.append)
    assert isinstance(beside.loras["style"], Attached) and "style" in lines.pop()
    merged = koala.load(folder, "cpu", lora={style: 0.5}, backend="torch", say=lines.append)
    assert isinstance(merged.loras["style"], Merged) and "style" in lines[0]
    for pipeline, merge in ((beside, False), (merged, True)):
        own = koala.load(folder, "cpu")
        own.add_lora(style, 0.5, merged=merge)
        assert np.array_equal(drawn(pipeline), drawn(own))
    by_plan = koala.load(folder, "cpu", lora={style: 0.5}, weights="fp32")
    assert isinstance(by_plan.loras["style"], Merged)
    assert np.array_equal(drawn(by_plan), drawn(merged))


def test_compile_fuses_compiles_and_takes_fixed_batches(folder):
    """Drawn without compiling: test_compile.py compares what is compiled."""
    lines: list[str] = []
    pipeline = koala.load(folder, "cpu", compile=True, say=lines.append)
    assert pipeline.batch_sizes == ROWS and "blocks are compiled" in lines[0]
    compiled = [m for m in pipeline.unet.modules() if m._compiled_call_impl is not None]
    assert compiled and any(m._compiled_call_impl for m in pipeline.vae.decoder.modules())
    own = koala.load(folder, "cpu")
    fuse_projections(own.unet)
    own.predict = in_fixed_batches(predictor(own.unet))
    own.decode = one_by_one(full(own.vae))
    with torch.compiler.set_stance("force_eager"):
        assert np.array_equal(drawn(pipeline), drawn(own))


def test_graphs_are_for_cuda(folder):
    with pytest.raises(UserError, match="CUDA graphs: the device is cpu"):
        koala.load(folder, "cpu", graphs=True)


def test_back_ends_are_those_of_the_measurement(folder, tmp_path, monkeypatch):
    """ "remembered" is plain PyTorch without a word until something was measured."""
    monkeypatch.setenv("KOALA_CACHE", str(tmp_path))
    lines: list[str] = []
    expected = drawn(koala.load(folder, "cpu"))
    assert np.array_equal(
        drawn(koala.load(folder, "cpu", backend="remembered", say=lines.append)), expected
    )
    assert lines == ["backend torch (as $KOALA_BACKEND says)"]
    lines.clear()
    named = koala.load(folder, "cpu", backend="torch", say=lines.append)
    assert np.array_equal(drawn(named), expected) and lines == ["backend torch (as asked)"]


@pytest.mark.parametrize(
    "asked",
    [
        {"vram": 16}, {"vram": "16"}, {"vram": "free"}, {"weights": "fp32"}, {"weights": "int8"},
        {"weights": "fp8"}, {"decode": "tiled"}, {"vram": 16, "weights": "int8", "decode": "tiled"},
    ],
)  # fmt: skip
def test_a_plan_is_the_planners(folder, asked):
    pipeline = koala.load(folder, "cpu", **asked)
    own = planned(folder, **{name: value for name, value in asked.items() if name != "vram"})
    assert pipeline.plan.mode == own.plan.mode
    if asked.get("vram") in (16, "16"):
        assert replace(pipeline.plan, process=0) == own.plan
    assert np.array_equal(drawn(pipeline), drawn(own))


def test_the_tiny_autoencoder_is_the_one_named(folder, tiny):
    pipeline = koala.load(folder, "cpu", decode="tiny", tiny_vae=tiny)
    assert pipeline.plan.mode.decode == "tiny"
    assert np.array_equal(drawn(pipeline), drawn(planned(folder, decode="tiny", tiny=tiny)))


def test_the_plan_holds_what_will_be_drawn(folder):
    plan = koala.load(folder, "cpu", vram=16, size="128x64", images=3, from_image=True).plan
    planner = Planner(folder, CPU, (128, 64), 3, from_image=True)
    assert replace(plan, process=0) == planner.choose(16 << 30)
    assert [phase.name for phase in plan.phases] == ["encode", "picture", "denoise", "decode"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"backend": "abacus"}, "unknown backend 'abacus'"),
        ({"weights": "int3"}, "unknown weights 'int3'"),
        ({"decode": "half"}, "unknown decoder 'half'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"vram": 0}, "vram is 0"),
        ({"vram": 1e-6}, "the smallest that works is"),
        ({"vram": 4, "backend": "torch"}, "--backend has no effect under a memory plan"),
        ({"weights": "int8", "compile": True}, "--compile has no effect under a memory plan"),
        ({"decode": "tiled", "graphs": True}, "--graphs has no effect under a memory plan"),
        ({"vram": 4, "dtype": "bf16"}, "--dtype has no effect under a memory plan"),
        ({"backend": "openvino", "compile": True}, "--compile is PyTorch's"),
        ({"device": "abacus"}, "abacus"),
        ({"lora": {"nothing.safetensors": 1000}}, "LoRA scale is 1000"),
        ({"lora": {"nothing.safetensors": 1}}, "nothing.safetensors"),
        ({"decode": "tiny", "tiny_vae": "no/where/at/all"}, "no tiny autoencoder"),
        ({"vram": 4, "size": "65x64"}, "multiples of 8"),
    ],
)
def test_what_is_not_allowed_or_excludes_another_is_refused(folder, asked, words):
    with pytest.raises(UserError, match=words):
        koala.load(folder, **{"device": "cpu", **asked})


def test_the_docstring_says_what_each_argument_is():
    for name in inspect.signature(koala.load).parameters:
        assert f"{name}:" in koala.load.__doc__ or f"{name}," in koala.load.__doc__, name


@pytest.mark.parametrize("weights", [None, "int8"])
def test_the_command_line_draws_what_koala_load_draws(folder, style, tmp_path, capsys, weights):
    given = ["generate", "a fox", "--model", str(folder), "--device", "cpu", "--steps", "2"]
    given += ["--seed", "1", "--lora", f"{style}:0.5", "--out", str(tmp_path)]
    given += [] if weights is None else ["--weights", weights]
    assert main(given) == 0, capsys.readouterr().err
    (file,) = tmp_path.glob("*.png")
    own = koala.load(
        folder, "cpu", lora={style: 0.5}, weights=weights, backend=None if weights else "torch"
    )
    assert np.array_equal(np.asarray(Image.open(file)), drawn(own))


@pytest.mark.parametrize("options", [{}, {"vram": "4"}])
def test_the_server_draws_what_koala_load_draws(folder, tmp_path, options):
    limits = Limits(max_batch=1)
    served, _ = loaded(
        Options(str(folder), device="cpu", data=tmp_path, limits=limits, **options), print
    )
    assert np.array_equal(drawn(served), drawn(koala.load(folder, "cpu", **options)))
