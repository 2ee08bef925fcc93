"""The paper's recipes: every row builds, without weights, with the counts that the paper gives."""

import json
from functools import cache

import pytest

from koala import recipes
from koala.architectures.flops import flops as forward_flops
from koala.architectures.table import get, student_of
from koala.distillation.taps import paired_points, tap_points
from koala.recipes import paper
from koala.recipes.cost import _flops, _setup
from koala.recipes.memory import blank_unet
from koala.recipes.recipe import described

PARAMETERS = {"koala-1b": 1_161_184_324, "koala-700m": 782_822_724, "bk-sdxl": 1_717_277_764}
PARAMETERS[paper.SMALLER] = 440_004_804
BEST_700M, BEST_1B, BEST_BK = {"sa": 21, "lf": 2}, {"sa": 30, "lf": 2}, {"sa": 46, "lf": 2}
BEST_440M = {"sa": 9, "lf": 2}
TAPS = {
    "koala-turbo-1b": BEST_1B,
    "koala-turbo-700m": BEST_700M,
    "koala-lightning-1b": BEST_1B,
    "koala-lightning-700m": BEST_700M,
    "koala-1b": BEST_1B,
    "koala-700m": BEST_700M,
    "study-turbo": BEST_700M,
    "study-lightning": BEST_700M,
    "bk-sdxl-sa": BEST_BK,
    "ablation-task": {},
    "ablation-sa": {"sa": 30},
    "ablation-ca": {"ca": 30},
    "ablation-ffn": {"ffn": 30},
    "ablation-residual": {"residual": 11},
    "ablation-lf": {"lf": 7},
    "ablation-sa-lf": BEST_1B,
    "ablation-sa-lf-all": {"sa": 30, "lf": 7},
    "ablation-sa-dw": {"sa": 8},
    "ablation-sa-mid": {"sa": 6},
    "ablation-sa-up": {"sa": 16},
    "ablation-interleave": {"sa": 30},
    "ablation-upper": {"sa": 30},
    "koala-lightning-700m-24gb": BEST_700M,
    "koala-lightning-700m-12gb": BEST_700M,
    "koala-turbo-700m-12gb": BEST_700M,
    "koala-lightning-440m-8gb": BEST_440M,
    "koala-turbo-440m-8gb": BEST_440M,
}


built = cache(blank_unet)


def unet(name: str):
    """A U-Net on the meta device."""
    return built(get(name))


@pytest.mark.parametrize("name", paper.PRESETS)
def test_every_recipe_builds_with_its_counts(name):
    recipe = recipes.get(name)
    arch = student_of(get(recipe.of), recipe.cut)
    student = built(arch)
    assert sum(p.numel() for p in student.parameters()) == PARAMETERS[recipe.cut]
    found = {tap.location: len(tap_points(student, [tap])) for tap in recipe.settings.taps}
    assert found == TAPS[name]
    points = tap_points(student, recipe.settings.taps)
    pairs = paired_points(student, unet("sdxl"), points, recipe.settings.depth_rule)
    assert len(set(pairs)) == len(points)
    json.dumps(described(recipe))


def test_the_depth_rules_pair_other_blocks():
    def last_block(name):
        recipe = recipes.get(name)
        student = unet("koala-1b")
        points = tap_points(student, recipe.settings.taps)
        pairs = paired_points(student, unet("sdxl"), points, recipe.settings.depth_rule)
        point = "down_blocks.2.attentions.0.transformer_blocks.5.attn1"
        return dict(zip(points, pairs, strict=True))[point].split(".")[5]

    names = ("ablation-sa", "ablation-interleave", "ablation-upper")
    assert [last_block(name) for name in names] == ["5", "8", "9"]


def test_the_final_runs_are_the_papers():
    for name, samples, pixels in (
        ("koala-lightning-700m", 64_000_000, 1024),
        ("koala-turbo-1b", 64_000_000, 512),
        ("study-lightning", 12_800_000, 1024),
        ("ablation-sa", 960_000, 1024),
    ):
        recipe = recipes.get(name)
        assert (recipe.training.samples, recipe.pixels) == (samples, pixels)
        assert recipe.training.lr_at(0) == recipe.training.lr_at(samples - 128) == 1e-5
        assert recipe.settings.task_weight == recipe.settings.output_weight == 1
        assert not recipe.settings.normalise and recipe.settings.min_snr is None


@pytest.mark.parametrize(
    ("name", "tflop"),
    [
        ("koala-lightning-700m", 14.9),
        ("koala-lightning-1b", 17.1),
        ("koala-turbo-700m", 3.5),
        ("koala-turbo-1b", 4.0),
    ],
)
def test_flop_of_a_sample(name, tflop):
    again, flops = _flops(_setup(recipes.get(name), None, 1, True, None))
    assert again == 0
    assert round(flops / 1e12, 1) == tflop


def test_one_small_card_computes_activations_again_and_the_control_asks_no_teacher():
    again, flops = _flops(_setup(recipes.get("koala-lightning-700m-24gb"), None, 1, True, None))
    forward = forward_flops(get("koala-700m"), 1024, 1024, 77)
    assert again == forward
    _, alone = _flops(_setup(recipes.get("ablation-task"), None, 1, True, None))
    assert alone == 3 * forward_flops(get("koala-1b"), 1024, 1024, 77)
    assert flops > 3 * forward


def test_ablations_differ_in_their_features_alone():
    from dataclasses import replace

    best = recipes.get("ablation-sa-lf")
    for name in paper.PRESETS:
        if name.startswith("ablation-"):
            assert replace(recipes.get(name), settings=best.settings) == best
