"""The tiny autoencoder's training: it learns the VAE's pictures, and its recipe ends in a model."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderTiny

from koala import recipes
from koala.errors import UserError
from koala.generation import load
from koala.generation.decode import full, load_tiny, tiny
from koala.mini.bundle import bundle
from koala.mini.tiny import NOISE, TinyDistillation, new_tiny
from koala.recipes.train import distill
from toy import toy_vae
from toy_family import TINY


def latents(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_it_is_small_and_of_diffusers_class():
    model = new_tiny()
    assert isinstance(model, AutoencoderTiny)
    assert sum(p.numel() for p in model.parameters()) < 500_000
    assert model.decode(latents(1, 0)).sample.shape == (1, 3, 32, 32)
    assert model.encode(torch.zeros(1, 3, 32, 32)).latents.shape == (1, 4, 4, 4)


def test_its_target_is_what_the_vae_draws(packages):
    vae, z = toy_vae(), latents(2, 1)
    task = TinyDistillation(new_tiny(), vae, z)
    with torch.no_grad():
        torch.testing.assert_close(task.drawn(z) / 2 + 0.5, full(vae)(z), atol=1e-5, rtol=0)
    assert task.preview(task.trainable).size[0] > 0


def test_it_learns_both_ways_and_leaves_the_vae_alone(packages):
    torch.manual_seed(0)
    vae = toy_vae()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    task = TinyDistillation(new_tiny(), vae, latents(2, 1))
    assert len([*task.parameters()]) == len([*task.trainable.parameters()])
    optimizer = torch.optim.Adam(task.trainable.parameters(), 2e-3)
    seen = []
    for step in range(40):
        losses = task.losses({"latents": latents(4, 0)}, [torch.Generator().manual_seed(step)])
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        seen.append(losses)
    for name in ("pixel", "latent"):  # an untrained VAE's pictures tell little of their latents
        first, last = (sum(s[name].item() for s in part) for part in (seen[:5], seen[-5:]))
        assert last < 0.8 * first, name
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


def test_half_of_the_latents_get_noise_below_a_half(packages):
    noise = TinyDistillation._noise(torch.Size((400, 4, 8, 8)), torch.Generator().manual_seed(0))
    strengths = noise.std((1, 2, 3))
    assert 0.4 < (strengths == 0).float().mean() < 0.6
    assert strengths.max() == pytest.approx(NOISE, rel=0.15)


def test_the_recipe_ends_in_the_model_with_its_tiny_autoencoder(base_parts, tmp_path, packages):
    data, base = base_parts
    recipe = replace(recipes.get("tiny-mini"), training=TINY)
    model = distill(recipe, data, tmp_path / "run", str(base), "cpu")
    for file in base.rglob("*.*"):  # everything else is the teacher's, its card too
        assert (model / file.relative_to(base)).read_bytes() == file.read_bytes()
    loaded = load_tiny(model)
    assert torch.isfinite(tiny(loaded)(latents(1, 0))).all()
    assert isinstance(AutoencoderTiny.from_pretrained(model / "vae_tiny"), AutoencoderTiny)
    pipeline = load(model, "cpu", decode="tiny")
    assert pipeline.plan.mode.decode == "tiny"
    assert pipeline("a fox", steps=1, seed=0).images[0].size == (128, 128)

    assert distill(recipe, data, tmp_path / "run", str(base), "cpu") == model  # finished: no step
    bundle(model, tmp_path / "bundled")
    halves = load_tiny(tmp_path / "bundled").state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(halves[name], tensor.half().float())
    with pytest.raises(UserError, match="--teacher"):
        distill(recipe, data, tmp_path / "other", None, "cpu")
    changed = ["hardware.compile=true"]
    with pytest.raises(UserError, match="--set"):
        distill(recipe, data, tmp_path / "other", str(base), "cpu", settings=changed)
