"""Taps: how many, where, paired with what, and captured as what."""

import gc
import weakref
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.checkpoint import checkpoint

from koala.architectures.config import unet_config
from koala.architectures.table import get
from koala.distillation.settings import PAPER_TAPS, STAGES, Tap
from koala.distillation.taps import Features, paired_points, regions, tap_points
from koala.errors import UserError
from toy import toy_unet


def on_meta(name: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(unet_config(get(name)))


@pytest.fixture(scope="module")
def sdxl() -> UNet2DConditionModel:
    return on_meta("sdxl")


@pytest.fixture(scope="module")
def koala_1b() -> UNet2DConditionModel:
    return on_meta("koala-1b")


@pytest.fixture(scope="module")
def koala_700m() -> UNet2DConditionModel:
    return on_meta("koala-700m")


def inputs(unet: UNet2DConditionModel) -> dict:
    n = 2
    g = torch.Generator().manual_seed(0)
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "sample": torch.randn(n, 4, 8, 8, generator=g),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(n, 5, config.cross_attention_dim, generator=g),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(n, pooled, generator=g),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * n),
        },
    }


def test_the_papers_recipe_has_30_and_21_self_attention_taps_and_2_last_features(
    koala_1b: UNet2DConditionModel, koala_700m: UNet2DConditionModel
) -> None:
    for student, count in ((koala_1b, 30), (koala_700m, 21)):
        points = tap_points(student, PAPER_TAPS)
        blocks = [name for name, _ in student.named_modules() if name.endswith(".attn1")]
        assert len(blocks) == count
        assert sorted(points) == sorted([*blocks, "down_blocks.0", "up_blocks.2"])


def test_pairs_are_the_blocks_that_gave_the_weights(
    sdxl: UNet2DConditionModel, koala_1b: UNet2DConditionModel, koala_700m: UNet2DConditionModel
) -> None:
    for student in (koala_1b, koala_700m):
        points = tap_points(student, PAPER_TAPS)
        pairs = dict(zip(points, paired_points(student, sdxl, points), strict=True))
        for point, pair in pairs.items():
            if point.startswith("up_blocks"):
                point = point.replace("attentions.1", "attentions.2")
            assert pair == point


@pytest.mark.parametrize("location", ["sa", "ca", "ffn", "residual", "lf"])
def test_every_tap_of_every_location_has_a_teacher_module_of_the_same_kind(
    location: str, sdxl: UNet2DConditionModel, koala_700m: UNet2DConditionModel
) -> None:
    points = tap_points(koala_700m, [Tap(location)])
    assert len(points) == {"sa": 21, "ca": 21, "ffn": 21, "residual": 9, "lf": 6}[location]
    for point, pair in zip(points, paired_points(koala_700m, sdxl, points), strict=True):
        ours, theirs = koala_700m.get_submodule(point), sdxl.get_submodule(pair)
        assert type(ours) is type(theirs)
        if location != "lf":
            shapes = [[p.shape for p in module.parameters()] for module in (ours, theirs)]
            assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("rule", "depth_3", "depth_2"),
    [
        ("bottom", [0, 1, 2, 3, 4], [0, 1]),
        ("interleave", [0, 2, 4, 6, 8], [0, 1]),
        ("up", [5, 6, 7, 8, 9], [0, 1]),
    ],
)
def test_depth_rules(
    rule: str,
    depth_3: list[int],
    depth_2: list[int],
    sdxl: UNet2DConditionModel,
    koala_700m: UNet2DConditionModel,
) -> None:
    for stage, depths in (("DW-3", depth_3), ("DW-2", depth_2)):
        points = tap_points(koala_700m, [Tap("sa", (stage,))])
        pairs = paired_points(koala_700m, sdxl, points, rule)
        assert [int(path.split(".")[5]) for path in pairs] == depths


def test_the_mid_stage_is_there_only_where_the_student_has_one(
    koala_1b: UNet2DConditionModel, koala_700m: UNet2DConditionModel
) -> None:
    assert len(tap_points(koala_1b, [Tap("sa", ("Mid",))])) == 6
    assert not any(point.startswith("mid") for point in tap_points(koala_700m, [Tap("lf")]))
    with pytest.raises(UserError, match="'sa' at Mid: the student has no such feature"):
        tap_points(koala_700m, [Tap("sa", ("Mid",))])


def test_settings_that_mean_nothing_are_refused_by_what_is_allowed(
    koala_700m: UNet2DConditionModel,
) -> None:
    with pytest.raises(UserError, match="'xa': choose sa, ca, ffn, residual, lf"):
        Tap("xa")
    with pytest.raises(UserError, match="'DW-4': choose DW-1, DW-2, DW-3, Mid, UP-1"):
        Tap("sa", ("DW-4",))
    with pytest.raises(UserError, match="give a tuple of names from DW-1"):
        Tap("sa", ())
    with pytest.raises(UserError, match="give a tuple of names from DW-1"):
        Tap("sa", "DW-1")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'sa' at DW-1: the student has no such feature"):
        tap_points(koala_700m, [Tap("sa", ("DW-1",))])
    with pytest.raises(UserError, match="'sa' at UP-2 is given twice"):
        tap_points(koala_700m, [Tap("sa"), Tap("sa", ("UP-2",))])
    with pytest.raises(UserError, match="'lf' at DW-1 is given twice"):
        tap_points(koala_700m, [Tap("lf", ("DW-1", "DW-1"))])


def test_features_have_the_shapes_of_their_stages() -> None:
    torch.manual_seed(0)
    unet = toy_unet("koala")
    points = ["up_blocks.2", "down_blocks.1.attentions.0.transformer_blocks.0.attn1"]
    points += ["down_blocks.0", "down_blocks.2.resnets.0"]
    features = Features(unet, points)
    with torch.no_grad(), features.capture() as captured:
        unet(**inputs(unet))
    shapes = [tuple(captured[point].shape) for point in points]
    assert shapes == [(2, 16, 8, 8), (2, 16, 32), (2, 16, 4, 4), (2, 32, 2, 2)]


def test_the_last_feature_of_a_stage_is_what_the_next_stage_is_given() -> None:
    torch.manual_seed(0)
    unet = toy_unet("sdxl")
    stages = ("DW-1", "DW-2", "DW-3", "Mid", "UP-1", "UP-2", "UP-3")
    assert stages == STAGES
    points = tap_points(unet, [Tap("lf")])
    following = [unet.get_submodule(path) for path in points[1:]]
    given: list[torch.Tensor] = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        given.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in following]
    handles.append(unet.conv_norm_out.register_forward_pre_hook(note, with_kwargs=True))
    features = Features(unet, points)
    with torch.no_grad(), features.capture() as captured:
        unet(**inputs(unet))
    for handle in handles:
        handle.remove()
    assert len(given) == 7
    for point, expected in zip(points, given, strict=True):
        assert torch.equal(captured[point], expected)


def test_taps_change_neither_the_result_nor_the_names_and_keep_nothing() -> None:
    torch.manual_seed(0)
    unet = toy_unet("koala")
    names = [name for name, _ in unet.named_modules()]
    with torch.no_grad():
        before = unet(**inputs(unet)).sample
        features = Features(unet, tap_points(unet, PAPER_TAPS))
        with features.capture() as captured:
            assert torch.equal(unet(**inputs(unet)).sample, before)
    assert [name for name, _ in unet.named_modules()] == names
    kept = [weakref.ref(value) for value in captured.values()]
    del captured
    with torch.no_grad():
        unet(**inputs(unet))  # outside: nobody listens
    gc.collect()
    assert not any(reference() is not None for reference in kept)
    assert not any(getattr(module, "tapped", None) is not None for module in unet.modules())


def test_capture_is_for_exactly_one_pass_and_over_after_an_error() -> None:
    unet = toy_unet("koala")
    features = Features(unet, tap_points(unet, PAPER_TAPS))
    with pytest.raises(AssertionError, match="exactly one"), features.capture():
        pass
    with pytest.raises(AssertionError, match="exactly one"), features.capture():
        _ = [unet(**inputs(unet)) for _ in range(2)]
    with pytest.raises(RuntimeError, match="stop"), features.capture():
        raise RuntimeError("stop")
    with features.capture() as captured:
        unet(**inputs(unet))
    assert set(captured) == set(features.points)


def test_a_checkpoint_that_computes_again_is_not_heard_again() -> None:
    unet = toy_unet("koala").train()
    features = Features(unet, tap_points(unet, PAPER_TAPS))
    for region in regions(unet):
        region.compute = partial(checkpoint, region.compute, use_reentrant=False)
    with features.capture() as captured:
        output = unet(**inputs(unet)).sample
        loss = output.square().mean() + sum(f.square().mean() for f in captured.values())
        loss.backward()  # inside: a second hearing would be an error
    assert not any(getattr(module, "tapped", None) is not None for module in unet.modules())
