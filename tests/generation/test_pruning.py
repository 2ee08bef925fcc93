"""Pruning without training: what it costs is known, and what it writes draws and converts."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

import koala
from koala.architectures.config import INNER, from_unet_config, unet_config
from koala.architectures.flops import flops
from koala.architectures.layout import Inner, inner_widths, parameters, tensor_shapes
from koala.architectures.table import get
from koala.checkpoints import prune as pruning
from koala.checkpoints.convert import convert
from koala.checkpoints.load import build_unet, load_unet
from koala.checkpoints.model_card import read
from koala.checkpoints.moments import Moments, Seen, inverse_of, principal
from koala.checkpoints.observed import observe
from koala.checkpoints.prune import Level, Site, levels, prune
from koala.checkpoints.unet_steps import evaluate
from koala.cli import main
from koala.errors import UserError
from koala.generation.calibration import asked, calibration
from koala.generation.denoise import Condition
from koala.generation.pruning import prune_model
from koala.generation.runtime.backends import example
from koala.generation.runtime.pytorch import predictor
from koala.generation.streaming import streamed_pipeline
from koala.recipes.prepared_inputs import prepared_inputs
from toy import seeded_unet, toy_unet


def moments_of(x: torch.Tensor) -> Moments:
    return Moments(len(x), torch.zeros_like(x[0]), x.sum(0), x.T @ x)


def inverse(x: torch.Tensor) -> torch.Tensor:
    return inverse_of(moments_of(x).covariance()[1])


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="NaN or infinite"):
        moments_of(torch.full((3, 2), torch.nan, dtype=torch.float64)).covariance()


def test_inputs_that_hardly_differ_have_an_inverse():
    draw = torch.Generator().manual_seed(0)
    x = (1 + 1e-4 * torch.randn(4, 64, generator=draw)).double()
    rounded = moments_of(x)
    rounded.products = (x.float().T @ x.float()).double()
    h, factor = rounded.covariance()
    assert torch.allclose(factor @ factor.T, h) and h.isfinite().all()
    assert (inverse_of(factor) @ h - torch.eye(64)).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["attention", "feed-forward"])
def test_an_error_foretold_is_that_of_the_fitted_layer(kind):
    draw = torch.Generator().manual_seed(0)
    site = Site("here", Inner(kind, 12, 3 if kind == "attention" else 1))
    mixed = torch.randn(12, 12, generator=draw, dtype=torch.float64)
    x = torch.randn(500, 12, generator=draw, dtype=torch.float64) @ mixed + 2
    w = torch.randn(5, 12, generator=draw, dtype=torch.float64)
    found = levels(site, w, inverse(x))
    assert [len(level.kept) for level in found] == [*range(site.units, -1, -1)]
    assert found[0].error == pytest.approx(0, abs=1e-6)
    assert all(a.error < b.error for a, b in pairwise(found))
    whole = float((x @ w.T - (x @ w.T).mean(0)).square().sum())
    for level in found[1:]:
        inputs = torch.cat([x[:, site.columns(level.kept)], torch.ones(500, 1)], dim=1)
        fitted = torch.linalg.lstsq(inputs, x @ w.T).solution
        error = float((inputs @ fitted - x @ w.T).square().sum())
        assert error * (1 - 1e-9) <= level.error < error + 2e-3 * whole  # damped


def test_what_others_make_up_for_goes_first():
    draw = torch.Generator().manual_seed(0)
    site = Site("here", Inner("feed-forward", 8, 1))
    x = torch.randn(300, 8, generator=draw, dtype=torch.float64)
    x[:, 5] = x[:, 1] - 2 * x[:, 2] + 1
    w = torch.ones(3, 8, dtype=torch.float64)
    second = levels(site, w, inverse(x))[1]
    assert len({1, 2, 5} - {*second.kept.tolist()}) == 1
    assert second.error < 1e-2 * float((x @ w.T).square().sum())


@pytest.fixture(scope="module")
def every():
    unet = seeded_unet()
    return [asked(*example(unet, 2, side, 5)) for side in (8, 8, 10)]


def run(unet, every) -> list[torch.Tensor]:
    with torch.no_grad():
        return [predictor(unet)(e.x, e.timesteps, Condition(*e[2:])) for e in every]


def error(unet, other, every) -> float:
    pairs = zip(run(unet, every), run(other, every), strict=True)
    return float(sum((a - b).square().sum() for a, b in pairs))


def made(pruned) -> torch.nn.Module:
    """The U-Net of what was pruned."""
    unet = build_unet(pruned.config)
    unet.load_state_dict(dict(pruned))
    return unet.eval().requires_grad_(False)


def seeded() -> tuple[dict, dict]:
    """Config and weights of the toy U-Net."""
    unet = seeded_unet()
    return unet.config, unet.state_dict()


@pytest.mark.parametrize("kind", ["sdxl", "koala"])
@pytest.mark.parametrize("side", [8, 10])  # the second is odd, once halved
def test_steps_compute_what_the_u_net_does(kind, side):
    unet = toy_unet(kind).requires_grad_(False)
    given = asked(*example(unet, 2, side, 5))
    streamed = pruning.unet_of(unet.config, unet.state_dict())
    assert all(w.untyped_storage().nbytes() < 8 for w in streamed.parameters())
    (exact,) = run(unet, [given])
    with torch.no_grad():
        assert torch.equal(evaluate(streamed, given), exact)
    assert torch.equal(run(streamed, [given])[0], exact)
    assert all(w.untyped_storage().nbytes() < 8 for w in streamed.parameters())


def test_a_streamed_pipeline_draws_as_one_in_memory(toy_sdxl):
    whole = koala.load(toy_sdxl, "cpu", backend="torch")
    streamed = streamed_pipeline(toy_sdxl, "toy")
    both = [calibration(one, ["a fox", "a red apple"]) for one in (whole, streamed)]
    for (x, t, c), (same, at, given) in zip(*both, strict=True):
        assert torch.allclose(x, same, atol=1e-3) and torch.equal(t, at)  # of other layouts
        assert torch.allclose(c.text, given.text, atol=1e-5)
        assert torch.allclose(c.pooled, given.pooled, atol=1e-5)


@pytest.mark.parametrize(("size", "rows"), [("64x64", 4), ("1448x1448", 2)])
def test_large_images_are_drawn_one_by_one(toy_sdxl, size, rows):
    pipeline = streamed_pipeline(toy_sdxl, "toy")
    every = calibration(pipeline, ["a fox", "a red apple"], size=size, steps=1)
    assert {len(x) for x, _, _ in every} == {rows}
    assert len(every) == 4 // rows


def test_sensitivities_are_gradients_of_the_whole_u_net(every):
    unet = seeded_unet()
    sites = pruning.sites_of(from_unet_config(unet.config))
    pruning.measure_sensitivity(pruning.unet_of(unet.config, unet.state_dict()), sites, every)
    draw, outputs = torch.Generator().manual_seed(0), {}
    for site in sites:
        unet.get_submodule(site.consumer).register_forward_hook(
            lambda module, inputs, output, path=site.path: outputs.update({path: output})
        )
    unet.conv_in.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    wanted = dict.fromkeys((site.path for site in sites), 0.0)
    for one in every:
        y = predictor(unet)(one.x, one.timesteps, Condition(*one[2:]))
        total = (y * torch.randn(y.shape, generator=draw)).sum()
        for path, gradient in zip(
            wanted, torch.autograd.grad(total, [outputs[path] for path in wanted]), strict=True
        ):
            wanted[path] += float(gradient.square().mean()) / len(every)
    for site in sites:
        assert site.sensitivity == pytest.approx(wanted[site.path], rel=1e-5)


@pytest.mark.parametrize("rows", [3, 512])  # that are read at a time
def test_a_fit_is_that_of_least_squares(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("koala.checkpoints.moments.ROWS", rows)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 10, generator=draw, dtype=torch.float64) + 1
    w = torch.randn(4, 10, generator=draw, dtype=torch.float64)
    moments, columns = moments_of(x), torch.tensor([0, 1, 4, 7, 8])
    h, _ = moments.covariance()
    cut, gain = Seen(moments.mean, h, tmp_path / "h").fitted(w, columns)
    among, cross = h[columns][:, columns], w @ h[:, columns]
    assert torch.allclose(cut, cross @ torch.linalg.inv(among))
    assert torch.allclose((x[:, columns] @ cut.T + gain).mean(0), (x @ w.T).mean(0))
    assert torch.allclose(principal(h.clone(), columns), among)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_pruned_u_net_is_smaller_and_nearer_than_an_unfitted_one(every, share, tmp_path):
    unet = seeded_unet()
    smaller = made(prune(*seeded(), share, every, tmp_path))
    arch, whole = (from_unet_config(one.config) for one in (smaller, unet))
    assert share <= 1 - parameters(arch) / parameters(whole) < share + 0.1
    assert {n: tuple(t.shape) for n, t in smaller.state_dict().items()} == tensor_shapes(arch)
    assert flops(arch, 64, 64, 32) < flops(whole, 64, 64, 32)
    possible = inner_widths(whole)
    cut = dict(arch.inner)
    random = torch.Generator().manual_seed(0)
    other, sites = {}, pruning.sites_of(whole)
    for site in sites:
        kept = cut.get(site.path, site.inner.width) // possible[site.path].unit
        other[site.path] = Level(torch.randperm(site.units, generator=random)[:kept].sort()[0], 0)
    by_chance = made(pruning.Pruned(*seeded(), sites, other, seen=None))
    assert error(smaller, unet, every) < 0.5 * error(by_chance, unet, every)


def test_nothing_is_lost_where_nothing_is_removed(every):
    unet = seeded_unet()
    sites = pruning.sites_of(from_unet_config(unet.config))
    whole = {site.path: Level(torch.arange(site.units), 0) for site in sites}
    same = made(pruning.Pruned(*seeded(), sites, whole, seen=None))
    assert error(same, unet, every) == 0


def test_more_than_there_is_cannot_be_removed(every, tmp_path):
    with pytest.raises(UserError, match=r"at most 0\.\d\d can be removed"):
        prune(*seeded(), 0.99, every, tmp_path)


def test_the_sites_are_all_that_can_be_narrower():
    for name in ("sdxl", "koala-700m", "ssd-1b"):
        arch = get(name)
        config = unet_config(arch)
        narrow = {p: i.width - i.unit for p, i in inner_widths(arch).items()}
        cut = from_unet_config(config | {INNER: narrow})
        assert dict(cut.inner) == narrow and cut != arch
        assert (cut.name, cut.tokens) == (f"{name}, pruned", arch.tokens)
        assert unet_config(cut) == config | {INNER: narrow}
        assert parameters(cut) < parameters(arch)


@pytest.mark.parametrize(
    "stated",
    [{"conv_in": 8}, {"down_blocks.0.resnets.0": 5}, {"down_blocks.0.resnets.0": 16}, [3],
     {"down_blocks.0.resnets.0": 0}, {"down_blocks.0.resnets.0": "8"}],
)  # fmt: skip
def test_widths_that_cannot_be_are_refused(stated):
    with pytest.raises(UserError, match="inner_widths"):
        from_unet_config({**toy_unet("koala").config, INNER: stated})


@pytest.fixture(scope="module")
def pruned(toy_sdxl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    (folder / "prompts.txt").write_text("a fox\n\n  a red apple\n")
    command = ["compress", str(toy_sdxl), "--prune", "0.2", "--out", str(folder / "model")]
    assert main([*command, "--calibrate", str(folder / "prompts.txt"), "--json"]) == 0
    return folder / "model"


def test_the_folder_draws_and_says_what_it_is(pruned, toy_sdxl, capsys):
    before, after = (load_unet(folder) for folder in (toy_sdxl, pruned))
    card = read(pruned).pruned
    counts = [sum(w.numel() for w in one.parameters()) for one in (before, after)]
    assert [card.before, card.after] == counts and counts[1] <= 0.8 * counts[0]
    text = (pruned / "README.md").read_text()
    assert "koala generate" in text and "import torch" not in text
    drawn = koala.load(pruned, "cpu")("a fox", steps=2, seed=1).images[0]
    again = koala.load(pruned, "cpu", weights="int8")("a fox", steps=2, seed=1).images[0]
    assert np.abs(np.array(drawn, float) - np.array(again, float)).mean() < 8
    assert main(["inspect", str(pruned)]) == 0
    assert f"{counts[1]:,} parameters" in capsys.readouterr().out


def test_a_single_file_of_it_is_read_again(pruned, tmp_path):
    convert(pruned, "single-file", tmp_path / "one.safetensors")
    convert(tmp_path / "one.safetensors", "diffusers", tmp_path / "again")
    first, second = (load_unet(folder).state_dict() for folder in (pruned, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_pruned_is_no_teacher_and_is_not_pruned_again(pruned, tmp_path, capsys):
    prompts = str(pruned.with_name("prompts.txt"))
    out = ["--out", str(tmp_path / "x")]
    assert main(["compress", str(pruned), "--to", "koala-700m", *out]) == 2
    assert "is pruned, and a cut is made of whole blocks" in capsys.readouterr().err
    assert main(["compress", str(pruned), "--prune", "0.1", "--calibrate", prompts, *out]) == 2
    assert "is pruned already" in capsys.readouterr().err.splitlines()[-1]
    (pruned.with_name("empty.txt")).write_text("\n")
    empty = ["--calibrate", str(pruned.with_name("empty.txt"))]
    assert main(["compress", str(pruned), "--prune", "0.1", *empty, *out]) == 2
    assert "has no prompts" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_pruned_u_net_is_built_from_its_config(pruned):
    config = json.loads((pruned / "unet" / "config.json").read_text())
    assert config[INNER] == dict(build_unet(config).config[INNER]) != {}


@pytest.fixture(scope="module")
def hollow(every, tmp_path_factory) -> torch.nn.Module:
    """A U-Net two of whose modules are their bias alone."""
    config, weights = seeded()
    sites = pruning.sites_of(from_unet_config(config))
    place = tmp_path_factory.mktemp("seen")
    streamed = pruning.unet_of(config, weights)
    seen = {
        site.path: Seen(moments.mean, moments.covariance()[0], place / site.path)
        for site, (_, moments) in zip(
            sites, observe(streamed, [site.consumer for site in sites], every, place), strict=True
        )
    }
    gone = {"down_blocks.1.attentions.0.transformer_blocks.0.attn1",
            "down_blocks.1.attentions.0.transformer_blocks.0.ff"}  # fmt: skip
    chosen = {
        site.path: Level(torch.arange(0 if site.path in gone else site.units), 0) for site in sites
    }
    return made(pruning.Pruned(config, weights, sites, chosen, seen))


def test_a_module_that_is_removed_leaves_its_mean(hollow, every):
    unet, path = seeded_unet(), "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    arch = from_unet_config(hollow.config)
    assert dict(arch.inner)[path] == 0
    assert sum(w.numel() for w in hollow.parameters()) == parameters(arch)
    seen = []
    handle = unet.get_submodule(path).register_forward_hook(lambda m, i, y: seen.append(y))
    run(unet, every)
    handle.remove()
    mean = torch.cat([y.flatten(0, -2) for y in seen]).mean(0)
    bias = hollow.get_submodule(path).to_out[0].bias
    assert torch.allclose(bias, mean, atol=1e-5)


def test_a_hollow_u_net_is_quantised_fused_and_converted(hollow):
    pytest.importorskip("openvino")
    from openvino import compile_model

    from koala.generation.quantise import quantise
    from koala.generation.runtime.compile import fuse_projections
    from koala.generation.runtime.openvino_graph import unet_model

    x = example(hollow, 2, 8, 5)
    with torch.no_grad():
        exact = predictor(hollow)(*x)
        fused = build_unet(hollow.config)
        fused.load_state_dict(hollow.state_dict())
        fuse_projections(fused)
        assert torch.allclose(predictor(fused)(*x), exact, atol=1e-5)
        for kind, bound in (("int8", 0.03), ("int4", 0.25)):
            other = build_unet(hollow.config)
            other.load_state_dict(hollow.state_dict())
            quantise(other, kind)
            assert (predictor(other)(*x) - exact).abs().mean() < bound * exact.abs().mean()
    exactly = {"INFERENCE_PRECISION_HINT": "f32"}
    run = compile_model(unet_model(hollow.config, hollow.state_dict()), "CPU", exactly)
    sample, t, c = x
    given = [v.numpy() for v in (sample, t.long(), c.text, c.pooled, c.time_ids)]
    assert np.allclose(run(given)[0], exact.numpy(), atol=1e-4)


def test_inputs_of_prepared_latents(base_parts):
    data, base = base_parts
    pipeline = koala.load(base, "cpu", backend="torch")
    inputs, again = (prepared_inputs(data, base, pipeline) for _ in range(2))
    assert 0 < sum(len(x) for x, _, _ in inputs) <= 256
    for (x, t, c), (same, _, _) in zip(inputs, again, strict=True):
        assert len(x) == len(t) == len(c.text) == len(c.time_ids) <= 8
        assert torch.equal(x, same)
        assert c.text.shape[-1] == pipeline.unet.config.cross_attention_dim


def test_a_model_calibrated_on_latents_says_so(toy_sdxl, tmp_path, capsys):
    out = tmp_path / "x"
    made = prune_model(
        toy_sdxl, 0.1, lambda folder, pipeline: calibration(pipeline, ["a fox"])[:2], out
    )
    assert made.prompts == 0 < made.latents == read(out).pruned.latents
    assert "prepared latents" in (out / "README.md").read_text()
    command = ["compress", str(toy_sdxl), "--prune", "0.1", "--out", str(tmp_path / "y")]
    assert main([*command, "--calibrate", str(tmp_path)]) == 2
    assert "no folder that koala prepare made" in capsys.readouterr().err
