"""Distances on published networks, against transformers' and torch-fidelity's own results."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection, Dinov2Model

from koala.errors import UserError
from koala.evaluation.distances import (
    frechet,
    kernel_distance,
    kernel_left_out,
    polynomial,
    squared_mmd,
)
from koala.evaluation.metrics.catalogue import METRICS
from koala.evaluation.metrics.distances import gaussian
from koala.evaluation.metrics.metric import create
from koala.evaluation.prompts import Prompt
from koala.evaluation.statistics import groups_of, pseudo_values
from toy_metrics import random_pictures, seeded, toy_clip_vision, toy_dino

CPU = torch.device("cpu")


@torch.inference_mode()
def features(name: str, weights: dict, pictures) -> tuple:
    metric = create(METRICS[name])
    metric.prepare(weights, CPU)
    return metric, metric.score(pictures, [Prompt("", "")] * len(pictures))


def normalised(pictures, side: int, mean, deviation) -> torch.Tensor:
    resized = [p.resize((side, side), Image.Resampling.BICUBIC) for p in pictures]
    x = torch.from_numpy(np.stack([np.asarray(p) for p in resized])).permute(0, 3, 1, 2) / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]


def test_cmmd_is_the_published_formula_on_transformers_embeddings(tmp_path):
    folder = toy_clip_vision(tmp_path / "clip")
    pictures = random_pictures(9)
    metric, found = features("cmmd", {"clip-vit-large-patch14-336": folder}, pictures)
    clip = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    with torch.no_grad():
        model = CLIPVisionModelWithProjection.from_pretrained(folder)
        wanted = F.normalize(model(normalised(pictures, 28, *clip)).image_embeds, dim=-1)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    x, y = (part.double().numpy() for part in (found[:5], found[5:]))

    def k(a, b):
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 200).mean()

    value = 1000 * (k(x, x) + k(y, y) - 2 * k(x, y))
    assert metric.distance(found[:5], found[5:]) == pytest.approx(value, rel=1e-6)
    assert metric.distance(found, found) == pytest.approx(0, abs=1e-9)


def test_fd_dinov2_is_on_transformers_class_token(tmp_path):
    folder = toy_dino(tmp_path / "dino")
    pictures = random_pictures(8)
    metric, found = features("fd-dinov2", {"dinov2": folder}, pictures)
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        model = Dinov2Model.from_pretrained(folder)
        wanted = model(normalised(pictures, 224, *imagenet)).last_hidden_state[:, 0]
    assert wanted.std(0).min() > 1e-3
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert metric.distance(found[:4], found[4:]) == frechet(found[:4], found[4:])


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Inception with random weights, as torch-fidelity's file holds them."""
    pytest.importorskip("torch_fidelity", exc_type=(ImportError, RuntimeError))
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with seeded():
        network = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "load", lambda *_, **__: network.state_dict())
            network.__init__("inception", ["2048"], "x")
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), file)
    return file


def test_fid_and_kid_are_torch_fidelitys(inception, tmp_path):
    from torch_fidelity import calculate_metrics

    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(random_pictures(6, (64, 64), seed)):
            picture.save(tmp_path / name / f"{i}.png")
    wanted = calculate_metrics(
        input1=str(tmp_path / "a"), input2=str(tmp_path / "b"), cuda=False, fid=True, kid=True,
        feature_extractor_weights_path=str(inception), kid_subset_size=6, kid_subsets=1,
        verbose=False, cache=False,
    )  # fmt: skip
    metric, a = features("fid", {"inception": inception}, random_pictures(6, (64, 64), 0))
    _, b = features("fid", {"inception": inception}, random_pictures(6, (64, 64), 1))
    fid = wanted["frechet_inception_distance"]
    assert metric.distance(a, b) == pytest.approx(fid, rel=1e-4, abs=1e-4)
    kid = wanted["kernel_inception_distance_mean"]
    found = create(METRICS["kid"]).distance(a, b)
    assert found == pytest.approx(kid, rel=1e-4, abs=1e-4)


def test_the_whole_kernel_distance_is_its_subsets_mean():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(30, 4, generator=draw), torch.randn(25, 4, generator=draw) + 0.5
    whole = squared_mmd(a, b, polynomial)
    subsets = kernel_distance(a, b, 20, subsets=600)
    assert subsets == pytest.approx(whole, rel=0.05)
    every = kernel_distance(a[:25], b, 25, subsets=1)
    assert every == pytest.approx(squared_mmd(a[:25], b, polynomial), rel=1e-9)


@pytest.mark.parametrize(("kernel", "unbiased"), [(polynomial, True), (gaussian, False)])
def test_leaving_groups_out_equals_computing_without_them(kernel, unbiased):
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(23, 5, generator=draw), torch.randn(17, 5, generator=draw)
    groups = np.arange(23) % 4
    found = kernel_left_out(a, b, groups, kernel, unbiased)
    for group, value in enumerate(found):
        kept = torch.from_numpy(groups != group)
        assert value == pytest.approx(squared_mmd(a[kept], b, kernel, unbiased), rel=1e-9)


def test_the_jackknifes_error_is_that_of_new_pictures():
    """The standard error told from 200 pictures is the spread of 200 new sets, within 40 %."""
    draw = torch.Generator().manual_seed(2)
    real = torch.randn(300, 3, generator=draw).double()

    def drawn() -> torch.Tensor:
        return torch.randn(200, 3, generator=draw).double() * 1.3 + 0.3

    spread = np.std([frechet(drawn(), real) for _ in range(200)])
    told = []
    for _ in range(20):
        one, groups = drawn(), groups_of(200)
        kept = (torch.from_numpy(groups != g) for g in range(20))
        pseudo = pseudo_values(frechet(one, real), np.array([frechet(one[k], real) for k in kept]))
        told.append(pseudo.std(ddof=1) / 20**0.5)
    assert np.mean(told) == pytest.approx(spread, rel=0.4)


def test_another_networks_file_is_refused(tmp_path):
    pytest.importorskip("torch_fidelity", exc_type=(ImportError, RuntimeError))
    torch.save({"fox": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="does not hold torch-fidelity's Inception"):
        features("fid", {"inception": tmp_path / "x.pth"}, random_pictures(2))
