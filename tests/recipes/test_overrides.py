"""Settings from the command line: read by their types, refused by name."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koala import recipes
from koala.distillation.settings import LOCATIONS, STAGES, Tap
from koala.errors import UserError
from koala.recipes.overrides import overridden, taps_of


def test_settings_are_read_by_their_types():
    recipe = recipes.get("koala-lightning-700m")
    changed = overridden(
        recipe,
        [
            "training.batch = 64", "training.lr=3e-5", "training.decay=true",
            "training.betas=0.9,0.95", "training.ema_others=1000,2000", "settings.min_snr=5",
            "settings.taps=sa+lf@DW-1", "hardware.compile=", "hardware.accumulate=2",
            "mixture.captions=llava:0.8,alt_txt:0.2", "pixels=none",
        ],
    )  # fmt: skip
    assert changed == replace(
        recipe,
        training=replace(
            recipe.training, batch=64, lr=3e-5, decay=True, betas=(0.9, 0.95),
            ema_others=(1000, 2000),
        ),
        settings=replace(
            recipe.settings, min_snr=5.0, taps=(Tap("sa"), Tap("lf", ("DW-1",)))
        ),
        hardware=replace(recipe.hardware, compile="", accumulate=2),
        mixture=replace(recipe.mixture, captions={"llava": 0.8, "alt_txt": 0.2}),
        pixels=None,
    )  # fmt: skip
    assert overridden(recipe, []) == recipe


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("training.batches=64", "training.batch, "),
        ("batch=64", "write training.batch=64$"),
        ("training.batch", "NAME=VALUE"),
        ("training.batch=many", "a whole number"),
        ("training.decay=1", "true or false"),
        ("training.betas=0.9", "2 values"),
        ("training.batch=7", "64000006"),  # no multiple: what would be
        ("settings.taps=sa+eye", "'eye'"),
        ("settings.depth_rule=down", "interleave"),
        ("settings.feature_weight=0", "no effect"),  # of taps that are still asked for
        ("hardware.sharding=zero", "fsdp"),
    ],
)
def test_what_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        overridden(recipes.get("koala-turbo-700m"), [given])


def test_a_setting_twice_and_one_that_the_recipe_lacks():
    with pytest.raises(UserError, match="twice"):
        overridden(recipes.get("koala-mini"), ["training.lr=1", "training.lr=1"])
    with pytest.raises(UserError, match=r"hardware\.compile"):
        overridden(recipes.get("mini-base"), ["hardware.compile=inductor"])


stages = st.lists(st.sampled_from(STAGES), min_size=1, unique=True)
a_tap = st.builds(Tap, st.sampled_from(LOCATIONS), st.none() | stages.map(tuple))


@given(st.lists(a_tap))
def test_taps_as_they_are_written(taps):
    text = "+".join(t.location + (f"@{','.join(t.stages)}" if t.stages else "") for t in taps)
    assert taps_of(text) == tuple(taps)
