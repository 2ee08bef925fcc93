"""Three decoders and two encoders: whole, in strips, tiny; and a VAE that overflows."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from koala.checkpoints.bundled import BUNDLED
from koala.checkpoints.load import load_vae
from koala.errors import Failure, UserError
from koala.generation.decode import full, load_tiny, tiled, tiny
from koala.generation.pixels import to_images
from koala.generation.row_tiling import encode_tiled
from koala.generation.runtime.pytorch import encode_image
from toy import toy_tiny, toy_vae


@pytest.fixture(scope="module")
def vae():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return toy_vae().requires_grad_(False)


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 2),
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    positions=st.integers(1, 3000),
)
def test_strips_of_any_height_give_the_whole_decoders_image(vae, n, height, width, positions):
    z = latents(n, 4, height, width)
    torch.testing.assert_close(tiled(vae, positions)(z), full(vae)(z), atol=1e-4, rtol=0)


def test_strips_of_the_bundled_vae_equal_the_whole_in_both_precisions():
    vae = load_vae(BUNDLED / "koala-mini")
    z = latents(1, 4, 24, 16)
    with torch.inference_mode():
        whole = full(vae)(z)
        torch.testing.assert_close(tiled(vae, 2048)(z), whole, atol=1e-5, rtol=0)
        half = vae.bfloat16()
        # A picture's own rounding in bfloat16 is the yardstick: strips add none of their own.
        own = (full(half)(z) - whole).abs().mean()
        assert (tiled(half, 2048)(z) - whole).abs().mean() < 1.1 * own


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 2),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    positions=st.integers(1, 4000),
)
def test_strips_of_any_height_give_the_whole_encoders_latents(vae, n, height, width, positions):
    pixels = latents(n, 3, 8 * height, 8 * width).clamp(-1, 1)
    whole = vae.encode(pixels).latent_dist.mode()
    ours = encode_tiled(vae, pixels, positions)
    torch.testing.assert_close(ours, whole, atol=1e-4, rtol=0)
    encoded = encode_image(vae, pixels, tiled=True)
    torch.testing.assert_close(encoded, encode_image(vae, pixels), atol=1e-4, rtol=0)


def test_strips_leave_the_latents_alone(vae):
    z = latents(1, 4, 4, 4)
    kept = z.clone()
    tiled(vae, 100)(z)
    assert torch.equal(z, kept)


@pytest.mark.parametrize("decoder", [full, tiled])
def test_a_vae_that_overflows_is_run_once_more_in_float32(vae, decoder):
    half = copy.deepcopy(vae).half()
    half.decoder.conv_in.weight *= 1e5  # group norms bring it down again, where it is not lost
    half.decoder.conv_in.weight.clamp_(-6e4, 6e4)
    z = latents(1, 4, 4, 4)
    assert not half.decode(z.half()).sample.isfinite().all()
    wanted = full(copy.deepcopy(half).float())(z)
    before = copy.deepcopy(half.state_dict())
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(decoder(half)(z), wanted, atol=1e-4, rtol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in half.state_dict().items())


@pytest.mark.parametrize("strips", [False, True])
def test_an_encoder_that_overflows_is_run_once_more_in_float32(vae, strips):
    half = copy.deepcopy(vae).half()
    half.encoder.conv_in.weight *= 1e6
    half.encoder.conv_in.weight.clamp_(-6e4, 6e4)
    pixels = latents(1, 3, 16, 16).clamp(-1, 1)
    assert not half.encode(pixels.half()).latent_dist.mode().isfinite().all()
    wanted = encode_image(copy.deepcopy(half).float(), pixels)
    torch.testing.assert_close(encode_image(half, pixels, strips), wanted, atol=1e-4, rtol=0)
    assert half.dtype == torch.float16


def test_a_tiny_decoder_that_overflows_is_run_once_more_in_float32():
    half = toy_tiny().half()
    convolutions = [m for m in half.decoder.modules() if isinstance(m, torch.nn.Conv2d)]
    convolutions[0].weight.mul_(1e6).clamp_(-6e4, 6e4)
    convolutions[1].weight.div_(6e4)  # brings it down again, where it is not lost
    z = latents(1, 4, 4, 4)
    assert not half.decode(z.half()).sample.isfinite().all()
    wanted = tiny(copy.deepcopy(half).float())(z)
    torch.testing.assert_close(tiny(half)(z), wanted, atol=1e-4, rtol=0)


def test_what_is_not_a_number_is_a_failure_that_names_the_culprit(vae):
    with pytest.raises(Failure, match="U-Net gave NaN"):
        full(vae)(torch.full((1, 4, 4, 4), torch.nan))
    broken = toy_vae()
    broken.decoder.conv_out.bias.data[0] = torch.nan
    for decoder in (full, tiled):
        with pytest.raises(Failure, match="decoder gave NaN in float32"):
            decoder(broken)(latents(1, 4, 4, 4))


def test_tiny_decodes_what_diffusers_tiny_decodes():
    model, z = toy_tiny(), latents(2, 4, 5, 3)
    expected = (model.decode(z).sample / 2 + 0.5).clamp(0, 1)
    pixels = tiny(model)(z)
    assert pixels.shape == (2, 3, 40, 24) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
    assert to_images(pixels)[1].size == (24, 40)


def written(folder: Path, model: AutoencoderTiny) -> Path:
    model.save_pretrained(folder)
    return folder


def test_a_tiny_autoencoder_is_found_in_its_folder_and_in_a_models(tmp_path):
    model = toy_tiny()
    written(tmp_path / "model" / "vae_tiny", model)
    for source in (tmp_path / "model", str(tmp_path / "model" / "vae_tiny")):
        loaded = load_tiny(source)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
    assert load_tiny(tmp_path / "model", torch.float16).dtype == torch.float16


def test_a_tiny_autoencoder_is_found_by_its_hub_id(tmp_path, monkeypatch):
    """In the local cache, as when it was fetched before; one that is not there is refused."""
    commit = "0" * 40
    stored = tmp_path / "models--some--taesdxl"
    model = toy_tiny()
    written(stored / "snapshots" / commit, model)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    loaded = load_tiny("some/taesdxl").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match="'some/other' is no local folder and cannot be downloaded"):
        load_tiny("some/other")


def test_what_is_no_tiny_autoencoder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tiny autoencoder at"):
        load_tiny(tmp_path)
    other = written(tmp_path / "kind", toy_tiny())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
    with pytest.raises(UserError, match="holds a AutoencoderKL"):
        load_tiny(other)
    with pytest.raises(UserError, match="decodes 16 channels 8-fold"):
        load_tiny(written(tmp_path / "wide", toy_tiny(latent_channels=16)))
    shallow = {"decoder_block_out_channels": (8,) * 3, "num_decoder_blocks": (1,) * 3}
    with pytest.raises(UserError, match="4 channels 4-fold"):
        load_tiny(written(tmp_path / "shallow", toy_tiny(**shallow)))
    cut = written(tmp_path / "cut", toy_tiny())
    tensors = toy_tiny().state_dict()
    tensors.pop("decoder.layers.0.bias")
    save_file(tensors, cut / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="does not fit its config"):
        load_tiny(cut)
