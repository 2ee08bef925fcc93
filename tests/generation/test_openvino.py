"""OpenVINO's numbers against PyTorch's, and the choice between the two by measurement."""

import dataclasses
import json
import re
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

pytest.importorskip("openvino")

from koala.architectures.config import INNER, from_unet_config
from koala.architectures.layout import inner_widths
from koala.checkpoints.load import build_unet
from koala.checkpoints.resolve import resolve_model
from koala.cli import main
from koala.errors import UserError
from koala.generation import Engine
from koala.generation.decode import full, load_tiny, tiny
from koala.generation.loader import load, set_runtime
from koala.generation.runtime import compiled, openvino
from koala.generation.runtime.backends import Backend, choose, example, timed
from koala.generation.runtime.fixed_batches import ROWS
from koala.generation.runtime.pytorch import predictor
from koala.mini.tiny import new_tiny
from koala.serving.warmup import warm_up
from koala.utils.device import has_bf16
from toy import toy_pipeline, toy_unet, toy_vae
from toy_lora import toy_base, toy_lora

LATENTS = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KOALA_BACKEND")  # the choice is what is tested here
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("KOALA_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def folder(cache, tmp_path_factory):
    return toy_pipeline(tmp_path_factory.mktemp("toy") / "koala", architecture="koala")


@pytest.fixture(scope="module")
def pipeline(folder):
    return load(folder, "cpu")


@pytest.fixture(scope="module")
def unet(pipeline):
    return pipeline.unet.requires_grad_(False)


@pytest.fixture(scope="module")
def vae(pipeline):
    return pipeline.vae.requires_grad_(False)


def test_the_u_net_gives_the_same_noise_at_every_size_and_batch(unet, cache):
    ours, theirs = openvino.predictor(unet), predictor(unet)
    for rows, side, tokens in ((2, 8, 32), (3, 9, 5)):  # 9: no multiple of the U-Net's factor
        asked = example(unet, rows, side, tokens)
        torch.testing.assert_close(ours(*asked), theirs(*asked), atol=1e-4, rtol=0)
    assert list((cache / "openvino").glob("*.xml")) and list((cache / "openvino").glob("*/*.blob"))


def test_a_pruned_u_net_gives_the_same_noise(unet, cache):
    possible = inner_widths(from_unet_config(unet.config))
    narrow = {path: inner.unit for path, inner in possible.items() if inner.unit < inner.width}
    torch.manual_seed(0)
    pruned = build_unet(dict(unet.config) | {INNER: narrow}).eval().requires_grad_(False)
    asked = example(pruned, 2, 8, 5)
    ours, theirs = openvino.predictor(pruned)(*asked), predictor(pruned)(*asked)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_the_decoder_gives_the_same_images(vae):
    with torch.inference_mode():
        images = openvino.decoder(vae)(LATENTS)
        torch.testing.assert_close(images, full(vae)(LATENTS), atol=1e-4, rtol=0)


def test_a_tiny_decoder_gives_the_same_images():
    torch.manual_seed(0)
    model = new_tiny().eval().requires_grad_(False)
    with torch.inference_mode():
        for latents in (LATENTS, 5 * LATENTS[:, :, :5]):  # beyond what it bounds them to
            images = openvino.decoder(model)(latents)
            torch.testing.assert_close(images, tiny(model)(latents), atol=1e-4, rtol=0)
    model.register_to_config(act_fn="gelu")
    with pytest.raises(UserError, match="act_fn is 'relu', this one's is 'gelu'"):
        openvino.decoder(model)


def test_a_tiny_decoder_alone_leaves_the_backend_free():
    """`decode="tiny"` asks for no memory plan that only PyTorch carries out."""
    said: list[str] = []
    pipeline = load("koala-mini", "cpu", decode="tiny", say=said.append)
    backend = [line for line in said if line.startswith("backend")]
    assert len(backend) == 1 and pipeline.plan is not None and pipeline.plan.mode.decode == "tiny"
    asked = {"steps": 1, "seed": 0}
    image = np.asarray(pipeline("a fox", **asked).images[0], dtype=np.int16)
    own = load_tiny(resolve_model("koala-mini"))
    pipeline.predict, pipeline.decode = predictor(pipeline.unet), tiny(own)
    plain = np.asarray(pipeline("a fox", **asked).images[0], dtype=np.int16)
    assert np.abs(image - plain).max() <= 1  # of 255
    said.clear()
    load("koala-mini", "cpu", decode="tiny", weights="fp32", say=said.append)
    assert not said


def test_what_is_in_the_cache_is_not_made_again(vae, cache):
    expected = openvino.decoder(vae)(LATENTS)
    written = {file: file.stat().st_mtime_ns for file in (cache / "openvino").glob("*.xml")}
    assert torch.equal(openvino.decoder(vae)(LATENTS), expected)
    assert written == {file: file.stat().st_mtime_ns for file in (cache / "openvino").glob("*.xml")}


def test_other_weights_are_another_model(vae):
    bias = vae.decoder.conv_out.bias
    before = openvino.decoder(vae)(LATENTS)
    bias += 0.1
    after, expected = openvino.decoder(vae)(LATENTS), full(vae)(LATENTS)
    bias -= 0.1
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=0)


def smallest_unet() -> UNet2DConditionModel:
    """Two stages, one with a transformer: quantising takes as long as there are layers."""
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=40,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=72,
    ).eval()


def test_eight_bits_are_near(cache):
    pytest.importorskip("nncf")
    torch.manual_seed(0)
    unet = smallest_unet()
    samples, predict = [], predictor(unet)
    for rows in (1, 2, 3, 4):
        openvino.recorded(predict, samples)(*example(unet, rows, 8, 5))
    assert [len(x) for x, _, _ in samples] == [1, 2, 3, 4]
    asked = example(unet, 2, 8, 5)
    made = []
    calibration = openvino.Calibration("four", lambda: made.append(1) or samples)
    exact, quantised = predict(*asked), openvino.predictor(unet, "int8", calibration)(*asked)
    error = (quantised - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.1  # quantised indeed, and not much worse
    again = choose(unet, toy_vae(), "openvino-int8", calibration)  # found in the cache
    assert made == [1] and again.name == "openvino-int8"
    torch.testing.assert_close(again.predict(*asked), quantised, atol=1e-6, rtol=0)


@pytest.mark.skipif(not has_bf16(), reason="this processor has no bfloat16")
def test_a_model_in_bfloat16_runs_in_it(cache):
    torch.manual_seed(0)
    unet = smallest_unet().requires_grad_(False)
    asked = example(unet, 2, 8, 5)
    exact = predictor(unet)(*asked)
    # Three times, of the same weights: each from its own cache, none from the other's.
    for precision in ("bf16", "fp32", "bf16"):
        error = (openvino.predictor(unet, precision)(*asked) - exact).norm() / exact.norm()
        assert 1e-5 < error < 0.03 if precision == "bf16" else error < 1e-5  # 8 bits of mantissa
    error = (openvino.predictor(unet.bfloat16(), "bf16")(*asked) - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.03


def by_default(pipeline, cache, faster):
    """A pipeline like it, with the verdict that `faster` wins by far; and what was said."""
    drawn, lines = dataclasses.replace(pipeline), []
    choose(drawn.unet, drawn.vae)
    for file in (cache / "backends").glob("*.json"):
        verdict = json.loads(file.read_text()) | {"busy": False}
        verdict["seconds"] = {name: 1.0 if name == faster else 9.0 for name in verdict["seconds"]}
        file.write_text(json.dumps(verdict))
    set_runtime(drawn, say=lines.append)
    return drawn, lines


def test_nobody_asked_and_the_faster_draws(pipeline, cache, monkeypatch):
    asked = {"seed": 3, "steps": 2}
    expected = np.asarray(pipeline("a fox", **asked).images[0], dtype=np.int16)
    for name in ("torch", "openvino"):
        drawn, lines = by_default(pipeline, cache, name)
        assert len(lines) == 1 and re.match(rf"backend {name} \(one evaluation: .* ms\)$", lines[0])
        found = np.asarray(drawn("a fox", **asked).images[0], dtype=np.int16)
        assert np.abs(found - expected).max() <= 1  # of 255
        again = np.asarray(drawn("a fox", strict=True, **asked).images[0])
        assert np.array_equal(again, np.asarray(drawn("a fox", strict=True, **asked).images[0]))
    monkeypatch.setenv("KOALA_BACKEND", "torch")
    assert choose(pipeline.unet, pipeline.vae).why == "as $KOALA_BACKEND says"
    assert choose(pipeline.unet, pipeline.vae, "openvino").name == "openvino"
    monkeypatch.setenv("KOALA_BACKEND", "abacus")
    with pytest.raises(UserError, match="KOALA_BACKEND 'abacus'"):
        load("koala-mini", "cpu")


def test_other_predictions_and_vaes(pipeline, vae):
    """What a U-Net predicts is the sampler's affair; a VAE that is not built stays PyTorch's."""
    asked = {"seed": 3, "steps": 2}
    drawn = []
    for backend in ("torch", "openvino"):
        other = dataclasses.replace(pipeline)
        other.scheduler_config = {**pipeline.scheduler_config, "prediction_type": "v_prediction"}
        set_runtime(other, backend)
        drawn.append(np.asarray(other("a fox", **asked).images[0], dtype=np.int16))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1  # of 255
    usual = np.asarray(pipeline("a fox", **asked).images[0], dtype=np.int16)
    assert np.abs(drawn[0] - usual).max() > 1
    strange = toy_vae()
    strange.register_to_config(act_fn="gelu")
    with pytest.raises(UserError, match="act_fn is 'silu', this one's is 'gelu'"):
        choose(pipeline.unet, strange, "openvino")
    with pytest.raises(UserError, match="act_fn"):
        openvino.decoder(strange)
    assert choose(pipeline.unet, strange).name == "torch"


def test_a_large_model_is_not_converted_unasked(unet, vae, cache, monkeypatch):
    choose(unet, vae, "auto")
    monkeypatch.setattr("koala.generation.runtime.backends.SMALL", 1000)
    assert "one evaluation" in choose(unet, vae).why  # it was, when somebody asked
    bias = unet.conv_out.bias
    bias += 0.1  # another model of this architecture
    chosen = choose(unet, vae)
    bias -= 0.1
    assert chosen.name == "torch" and "--backend auto converts" in chosen.why


def test_a_lora_that_comes_later_is_drawn(pipeline, folder, cache, tmp_path):
    """By PyTorch, whichever way it comes; and when it goes, all is as before."""
    style = toy_lora(tmp_path / "style.safetensors", toy_base(pipeline.unet))
    asked = {"seed": 3, "steps": 2}

    def pixels(from_pipeline, **more):
        image = from_pipeline("a fox", **asked, **more).images[0]
        return np.asarray(image, dtype=np.int16)

    plain = load(folder, "cpu", backend="torch")
    before = pixels(plain)
    plain.add_lora(style, 0.5)
    with_lora = pixels(plain)
    assert np.abs(with_lora - before).max() > 1
    drawn, _ = by_default(load(folder, "cpu", backend="torch"), cache, "openvino")
    own = pixels(drawn)
    assert np.array_equal(pixels(drawn, lora={style: 0.5}), with_lora)
    assert np.array_equal(pixels(drawn), own)
    drawn.add_lora(style, 1.0)
    drawn.scale_lora("style", 0.5)
    assert np.array_equal(pixels(drawn), with_lora)
    drawn.remove_lora("style")
    assert np.array_equal(pixels(drawn), own)
    drawn.add_lora(style, 0.5, merged=True)
    assert np.abs(pixels(drawn) - with_lora).max() <= 1
    beside = load(folder, "cpu", lora={style: 0.5})
    assert np.array_equal(pixels(beside), with_lora)


def test_a_lora_beside_the_weights_is_refused(unet):
    handle = unet.conv_in.register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(UserError, match="merge"):
        openvino.predictor(unet)
    handle.remove()


def test_refusals(unet, vae, monkeypatch):
    with pytest.raises(UserError, match="fp16"):
        openvino.predictor(unet, "fp16")
    with pytest.raises(UserError, match="for the U-Net"):
        openvino.decoder(vae, "int8")
    with pytest.raises(UserError, match="abacus"):
        choose(unet, vae, "abacus")
    half = toy_unet("koala").half()
    for backend in ("openvino", "openvino-bf16", "torch-bf16"):
        with pytest.raises(UserError, match=f"'{backend}': it takes a model in float32.* float16"):
            choose(half, vae, backend)
    with pytest.raises(UserError, match="samples"):
        choose(unet, vae, "openvino-int8")
    monkeypatch.setattr("koala.generation.runtime.backends.has_bf16", lambda: False)
    with pytest.raises(UserError, match="no bfloat16; choose openvino or torch"):
        choose(unet, vae, "openvino-bf16")
    monkeypatch.setattr("koala.generation.runtime.backends.free_bytes", lambda device: 1000)
    with pytest.raises(UserError, match=r"conversion takes about .* GiB, 0\.0 GiB are free"):
        choose(unet, vae, "openvino")
    assert "conversion takes" in choose(unet, vae, "auto").why


def test_a_back_end_is_measured_once_and_remembered(unet, vae, monkeypatch, tmp_path):
    monkeypatch.setenv("KOALA_CACHE", str(tmp_path))
    before = choose(unet, vae, "remembered")
    assert before.name == "torch" and "auto measures" in before.why
    chosen = choose(unet, vae)
    (file,) = (tmp_path / "backends").glob("*.json")
    seconds = json.loads(file.read_text())["seconds"]
    assert set(seconds) == {"torch", "openvino"} and min(seconds.values()) > 0
    # The verdict is obeyed, whichever it is and however it is asked for.
    for torch_s, openvino_s, name in ((1.0, 2.0, "torch"), (2.0, 1.0, "openvino")):
        verdict = json.loads(file.read_text()) | {"busy": False}
        verdict["seconds"] = {"torch": torch_s, "openvino": openvino_s}
        file.write_text(json.dumps(verdict))
        for asked in (None, "auto", "remembered"):
            assert choose(unet, vae, asked).name == name
    assert isinstance(chosen, Backend)
    asked = example(unet)
    torch.testing.assert_close(
        choose(unet, vae, "openvino").predict(*asked), before.predict(*asked), atol=1e-4, rtol=0
    )


def test_what_was_measured_on_a_busy_machine_is_measured_again(unet, vae, monkeypatch, tmp_path):
    monkeypatch.setenv("KOALA_CACHE", str(tmp_path))
    choose(unet, vae)
    (file,) = (tmp_path / "backends").glob("*.json")
    noise = {"seconds": {"torch": 1e6, "openvino": 1e9}, "busy": True}
    file.write_text(json.dumps(noise))
    remembered = choose(unet, vae, "remembered")  # without a measurement
    assert remembered.name == "torch" and "beside other work" in remembered.why
    choose(unet, vae)
    assert max(json.loads(file.read_text())["seconds"].values()) < 1e6


def test_a_machine_is_busy_if_others_have_its_processor(unet):
    exact = predictor(unet)
    asleep, busy = timed(lambda *asked: time.sleep(0.05) or exact(*asked), unet)
    assert busy and asleep > 0.05


def test_the_fastest_may_round_and_says_so(cache, monkeypatch, tmp_path):
    """Of all that this processor has; the U-Net itself is left as it is."""
    monkeypatch.setenv("KOALA_CACHE", str(tmp_path))
    monkeypatch.setattr("koala.generation.runtime.backends.has_bf16", lambda: True)
    torch.manual_seed(0)
    unet, tiny_vae = smallest_unet().requires_grad_(False), toy_vae().requires_grad_(False)
    monkeypatch.setattr(
        "koala.generation.runtime.backends.openvino.predictor", lambda *_: predictor(unet)
    )
    choose(unet, tiny_vae, "fastest")
    (file,) = (tmp_path / "backends").glob("*.json")
    verdict = json.loads(file.read_text()) | {"busy": False}
    assert set(verdict["seconds"]) == {"torch", "openvino", "torch-bf16", "openvino-bf16"}
    verdict["seconds"] = dict.fromkeys(verdict["seconds"], 1.0) | {"torch-bf16": 0.5}
    file.write_text(json.dumps(verdict))
    assert choose(unet, tiny_vae, "remembered").name == "torch"  # never unasked
    chosen = choose(unet, tiny_vae, "fastest")
    assert chosen.name == "torch-bf16" and unet.dtype == torch.float32
    asked = example(unet, 2, 8, 5)
    exact = predictor(unet)(*asked)
    assert 1e-5 < (chosen.predict(*asked) - exact).norm() / exact.norm() < 0.03


def test_warming_up_leaves_nothing_to_compile(pipeline, cache):
    """Whoever joins or leaves then, and with guidance or without."""
    drawn = dataclasses.replace(pipeline)
    set_runtime(drawn, "openvino")
    assert drawn.batch_sizes == ROWS
    warm_up(drawn, 3, drawn.batch_sizes)
    before = sorted((cache / "openvino").rglob("*.blob"))
    engine = Engine(drawn)
    for seed, guidance in enumerate((1, 3, 3)):
        engine.submit(*drawn.requests("a", guidance=guidance, seed=seed, steps=2))
        engine.turn()
    while engine.turn():
        pass
    assert sorted((cache / "openvino").rglob("*.blob")) == before


def test_the_cache_keeps_to_its_size(tmp_path):
    import os

    (tmp_path / "0a").mkdir()
    for i in range(4):
        file = tmp_path / ("0a" if i % 2 else "") / f"{i}.blob"
        file.write_bytes(bytes(10))
        os.utime(file, (i, i))
    compiled.trim(tmp_path, 25)
    assert sorted(file.name for file in tmp_path.rglob("*.blob")) == ["2.blob", "3.blob"]


def test_koala_generate_takes_the_back_end_asked_for(folder, tmp_path, cache, capsys):
    converted = set((cache / "openvino").glob("*.xml"))
    given = ["generate", "a fox", "--model", str(folder), "--steps", "2", "--seed", "7"]
    drawn = {}
    for backend in ("torch", "openvino"):
        out = tmp_path / backend
        assert main([*given, "--backend", backend, "--out", str(out)]) == 0
        assert f"backend {backend}" in capsys.readouterr().err
        (path,) = out.glob("*.png")
        drawn[backend] = np.asarray(Image.open(path), dtype=np.int16)
    assert np.abs(drawn["torch"] - drawn["openvino"]).max() <= 1  # of 255: the same but rounding
    assert set((cache / "openvino").glob("*.xml")) == converted  # of equal weights, elsewhere read
    assert main([*given, "--backend", "openvino", "--compile", "--out", str(tmp_path)]) == 2
    assert "--compile" in capsys.readouterr().err


def test_the_page(cache, tmp_path, monkeypatch, capsys):
    """What docs/speed.md has typed on a CPU; `fastest` would take minutes."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "speed.md").read_text()
    page = text[text.index("## On a CPU") : text.index("## On a GPU")]
    drawn = 0
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", page, re.DOTALL):
        if language == "python":
            names: dict = {}
            exec(compile(block, "speed.md", "exec"), names)
            assert names["pipeline"]("a fox, noto style", seed=1).images[0].size == (128, 128)
            continue
        for program, *given in map(shlex.split, block.splitlines()):
            if program == "koala" and "fastest" not in given:
                assert main(given) == 0, capsys.readouterr().err
                drawn += 1
    assert drawn == len([*tmp_path.rglob("*.png")]) == 3
