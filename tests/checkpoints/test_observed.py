"""What layers are given, step by step and part by part: the moments of the whole U-Net's inputs."""

import pytest
import torch
import torch.nn.functional as F

from koala.checkpoints.observed import observe
from koala.checkpoints.prune import unet_of
from koala.generation.calibration import asked
from koala.generation.denoise import Condition
from koala.generation.runtime.backends import example
from koala.generation.runtime.pytorch import predictor
from toy import seeded_unet


def rows_in(layer, x):
    if isinstance(layer, torch.nn.Linear):
        return x.flatten(0, -2).double()
    how = {"padding": layer.padding, "stride": layer.stride}
    return F.unfold(x, layer.kernel_size, **how).transpose(1, 2).flatten(0, 1).double()


@pytest.mark.parametrize(
    ("most", "part"), [(12_000, 2**25), (300, 5000)], ids=["at once", "in parts"]
)
def test_moments_are_those_of_the_whole_u_net(most, part, tmp_path, monkeypatch):
    monkeypatch.setattr("koala.checkpoints.observed.MOST_INPUTS", most)
    monkeypatch.setattr("koala.checkpoints.observed._PART", part)
    unet, rows = seeded_unet(), {}
    every = [asked(*example(unet, 2, side, 5)) for side in (8, 8, 10)]
    for path, layer in unet.named_modules():
        watched = isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        if watched and not path.startswith("add_embedding"):  # which runs beside another's step
            layer.register_forward_pre_hook(
                lambda layer, inputs, path=path: rows.setdefault(path, []).append(
                    rows_in(layer, inputs[0])
                )
            )
    with torch.no_grad():
        for one in every:
            predictor(unet)(one.x, one.timesteps, Condition(*one[2:]))
    streamed = unet_of(unet.config, unet.state_dict())
    found = []
    for path, moments in observe(streamed, [*rows], every, tmp_path):
        x = torch.cat(rows[path])
        assert moments.rows == len(x)
        assert torch.allclose(moments.mean, x.mean(0), atol=1e-6)
        h = x.T @ x
        h += 0.1 * h.diagonal().mean() * torch.eye(len(h))
        factor = moments.about_zero(0.1)
        assert torch.equal(factor, factor.tril())
        assert (factor @ factor.T - h).abs().max() < 1e-5 * h.abs().max()
        found.append(path)
    assert sorted(found) == sorted(rows) and not [*tmp_path.iterdir()]


def test_covariances_are_about_the_mean(tmp_path):
    unet = seeded_unet()
    every = [asked(*example(unet, 2, 8, 5))]
    layer, rows = "up_blocks.0.resnets.0.conv2", []
    unet.get_submodule(layer).register_forward_pre_hook(
        lambda layer, inputs: rows.append(rows_in(layer, inputs[0]))
    )
    with torch.no_grad():
        predictor(unet)(every[0].x, every[0].timesteps, Condition(*every[0][2:]))
    streamed = unet_of(unet.config, unet.state_dict())
    ((path, moments),) = observe(streamed, [layer], every, tmp_path)
    x = rows[0] - rows[0].mean(0)
    h = x.T @ x
    h += 1e-3 * h.diagonal().mean() * torch.eye(len(h))
    assert path == layer
    assert (moments.covariance()[0] - h).abs().max() < 1e-5 * h.abs().max()
