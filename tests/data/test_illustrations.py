"""The illustration set: its plan, its captions, its splits, and its making in pieces."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from koala.checkpoints.latent_scale import LatentScale
from koala.checkpoints.load import load_vae
from koala.data.encoding import to_pixels
from koala.data.illustrations import art
from koala.data.illustrations.colours import BACKGROUNDS, INKS, named, oklab, repainted, srgb
from koala.data.illustrations.concepts import (
    OTHER_NAMES,
    Concept,
    base_concept,
    plural,
    with_article,
)
from koala.data.illustrations.everyday import NAMES, UNSEEN
from koala.data.illustrations.images import ImageSet, prepare_images, render, shards_of
from koala.data.illustrations.scenes import SMALL, Illustrations, plan
from koala.data.index import Index
from koala.data.latents import LatentSet
from koala.data.prepare import encode_images, prepare
from koala.data.preprocess import Preparation
from koala.errors import UserError
from koala.utils.asset_packages import package
from toy_packages import TOY


@pytest.fixture
def rows(packages):
    return plan(TOY)


def test_plan_depends_on_the_settings_alone(rows):
    assert rows == plan(TOY)
    other = plan(replace(TOY, seed=5))
    assert [r.split for r in other if r.kind == "emoji"] == [
        r.split for r in rows if r.kind == "emoji"
    ]
    assert other != rows
    assert len({r.id for r in rows}) == len(rows)


def test_test_concepts_are_in_no_training_image(rows):
    held = {r.concept for r in rows if r.split == "test-concept"}
    assert held
    for row in rows:
        if row.split != "test-concept":
            assert not held & set(row.concept.split(" + ")), row


def test_test_pairs_have_halves_that_are_both_seen(rows):
    train = [r for r in rows if r.split == "train" and r.kind == "emoji"]
    pairs = [r for r in rows if r.split == "test-pair"]
    assert pairs
    for pair in pairs:
        assert pair.concept in {r.concept for r in train}
        assert pair.style in {r.style for r in train}
        drawing = (pair.layers[0].art, pair.layers[0].name)
        shown = {(la.art, la.name) for r in rows if r.split == "train" for la in r.layers}
        assert drawing not in shown, "a held-out drawing stands in a training picture"


def test_scenes_show_what_they_say(rows):
    numbers = {"two": 2, "three": 3, "four": 4}
    scenes = [r for r in rows if r.kind == "scene"]
    assert len(scenes) == TOY.scenes
    for row in scenes:
        on = f" on {with_article(row.background)} background, {row.style}"
        assert row.short.endswith(on) or row.background == "white"
        first = row.subject.split()[0]
        if first in numbers:
            assert len(row.layers) == numbers[first]
            assert len({la.name for la in row.layers}) == 1
        if " to the left of " in row.subject or " on the left and " in row.subject:
            assert row.layers[0].box[0] < row.layers[1].box[0]
        if " to the right of " in row.subject or " on the right and " in row.subject:
            assert row.layers[0].box[0] > row.layers[1].box[0]
        if " above " in row.subject:
            assert row.layers[0].box[1] < row.layers[1].box[1]
        if " below " in row.subject:
            assert row.layers[0].box[1] > row.layers[1].box[1]
    forms = [" above ", " below ", " to the left of ", " to the right of ", "three ", "four "]
    assert all(any(f in r.subject for r in scenes) for f in forms)


def test_boxes_of_a_scene_do_not_overlap(rows):
    for row in rows:
        for i, a in enumerate(row.layers):
            for b in row.layers[:i]:
                (ax, ay, s), (bx, by, t) = a.box, b.box
                assert ax >= bx + t or bx >= ax + s or ay >= by + t or by >= ay + s, row


def test_painted_things_have_the_colour_that_they_say(rows):
    painted = [r for r in rows if r.kind == "painted"]
    assert len(painted) == TOY.painted
    for row in painted:
        ink = row.layers[0].ink
        assert ink in row.short.split(), row
        pixels = oklab(np.asarray(render(row, 32)).reshape(-1, 3) / 255)
        drawn = pixels[np.linalg.norm(pixels - oklab(np.ones(3)), axis=1) > 0.1]
        near = np.linalg.norm((drawn - named(ink))[:, 1:], axis=1) < 0.08  # hue and chroma
        assert near.mean() > 0.3, row


def test_a_repainted_drawing_keeps_its_shape_and_its_other_colours():
    drawing = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    drawing.paste((230, 120, 20, 255), (0, 0, 8, 6))  # the main colour
    drawing.paste((30, 90, 200, 255), (0, 6, 8, 7))
    turned = np.asarray(repainted(drawing, "green"))
    before = np.asarray(drawing)
    assert (turned[..., 3] == before[..., 3]).all()
    assert np.abs(turned[6, :, :3].astype(int) - before[6, :, :3]).max() <= 1
    goal = tuple(bytes.fromhex(INKS["green"][1:]))
    assert np.abs(turned[:6, :, :3].astype(int) - goal).max() <= 1


@given(st.lists(st.integers(0, 255), min_size=3, max_size=3))
def test_oklab_is_undone(rgb):
    assert np.abs(srgb(oklab(np.array(rgb) / 255)) * 255 - rgb).max() < 0.01


def test_the_small_set_names_each_thing_once():
    assert len(set(NAMES)) == len(NAMES)
    assert set(UNSEEN) <= {base_concept(name) for name in NAMES}
    others = [other for names in OTHER_NAMES.values() for other in names]
    assert not set(others) & set(NAMES), "another thing's name"


def test_icons_have_the_ink_and_the_ground_that_they_say(rows):
    icons = [row for row in rows if row.kind == "icon"]
    assert icons
    for row in icons:
        pixels = np.asarray(render(row, 32)).reshape(-1, 3)
        found = {tuple(p) for p in pixels.tolist()}
        ink = INKS[row.layers[0].ink]
        assert row.layers[0].ink in row.subject.split()
        ground = BACKGROUNDS[row.background]
        for colour in (ink, ground):
            assert tuple(bytes.fromhex(colour[1:])) in found, row


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fox", "a fox"), ("owl", "an owl"), ("grapes", "grapes"), ("bus", "a bus"),
        ("octopus", "an octopus"), ("bread", "bread"), ("glasses", "glasses"),
        ("cup of coffee", "a cup of coffee"), ("ear of corn", "an ear of corn"),
        ("hourglass", "an hourglass"), ("UFO", "a UFO"), ("cherries", "cherries"),
    ],
)  # fmt: skip
def test_articles(name, said):
    assert with_article(name) == said


@pytest.mark.parametrize(
    ("one", "more"),
    [
        ("fox", "foxes"), ("mouse", "mice"), ("cup of coffee", "cups of coffee"),
        ("sheep", "sheep"), ("grapes", "grapes"), ("paw prints", "paw prints"),
    ],
)  # fmt: skip
def test_plurals(one, more):
    assert plural(one) == more


def test_faces_and_whole_animals_are_one_base_concept():
    dog, face = (Concept("1", name, name, "", "", ()) for name in ("dog", "dog face"))
    assert dog.key == face.key == "dog"


def test_share_alike_sets_are_left_out_of_what_is_trained_on(packages):
    assert art.ART_SETS["openmoji"].share_alike
    for settings in (Illustrations(), SMALL):
        assert not any(art.ART_SETS[s].share_alike for s in settings.styles)
        used = (*settings.styles, *settings.colour_icons)
        for name in used:
            assert art.ART_SETS[name].author in art.notice([*used])


def test_images_come_back_as_they_were_drawn(packages, rows, tmp_path):
    assert prepare_images(TOY, tmp_path, workers=1) == len(rows)
    images = ImageSet(tmp_path)
    assert len(images) == len(rows)
    assert [r["id"] for r in images.rows] == [r.id for r in rows]
    for i in (0, len(rows) // 2, len(rows) - 1):
        assert images.image(i).tobytes() == render(rows[i], TOY.size).tobytes()
    assert set(images.select("train", "scene")) == {
        i for i, r in enumerate(rows) if r.split == "train" and r.kind == "scene"
    }
    assert "Google" in (tmp_path / "NOTICE.txt").read_text()


def test_a_killed_run_goes_on_and_ends_in_the_same_files(packages, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    prepare_images(TOY, whole, workers=1)
    code = (
        "from pathlib import Path; from koala.data.illustrations.scenes import Illustrations as I; "
        "from koala.data.illustrations.images import prepare_images; "
        f"prepare_images(I(**{asdict(TOY)!r}), Path({str(broken)!r}), workers=1)"
    )
    job = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while not list(broken.glob("*.parquet")):
        assert job.poll() is None  # it is at work, however slow the machine is
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert len(shards_of(broken)) < len(shards_of(whole))
    prepare_images(TOY, broken, workers=1)
    assert [p.name for p in shards_of(broken)] == [p.name for p in shards_of(whole)]
    for a, b in zip(shards_of(whole), shards_of(broken), strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_other_settings_are_refused(packages, tmp_path):
    small = replace(TOY, scenes=0, icons=0, colour_icons=())
    prepare_images(small, tmp_path, workers=1)
    with pytest.raises(UserError, match="size=32, now it is 40"):
        prepare_images(replace(small, size=40), tmp_path, workers=1)


def test_latents_are_the_pipelines_own(packages, toy_sdxl, tmp_path):
    settings = replace(TOY, scenes=10, icons=10)
    prepare_images(settings, tmp_path, workers=1)
    images, vae = ImageSet(tmp_path), load_vae(toy_sdxl)
    assert encode_images(tmp_path, toy_sdxl).kept == len(images)
    index = Index(tmp_path)
    scale = LatentScale(vae.config)
    by_id = {row["id"]: i for i, row in enumerate(images.rows)}
    for shard in range(len(index)):
        stored = index.tensors(shard, 0)
        i = by_id[index.fact(shard, 0, "id")]
        with torch.no_grad():
            posterior = vae.encode(to_pixels([images.image(i)])).latent_dist
        for name, own in (
            ("mean", scale.normalise(posterior.mean)),
            ("deviation", posterior.std / scale.std * scale.factor),
        ):
            torch.testing.assert_close(stored[name].float(), own[0], atol=0.01, rtol=5e-3)
        assert index.caption(shard, 0, "long") == images.rows[i]["long"]


def test_a_mixture_shows_copies_of_kinds_and_chosen_captions(packages, toy_sdxl, tmp_path):
    prepare_images(replace(TOY, scenes=10, icons=10), tmp_path, workers=1)
    encode_images(tmp_path, toy_sdxl)
    images = ImageSet(tmp_path)
    data = LatentSet(tmp_path, toy_sdxl, {"emoji": 2, "icon": 1}, {"short": 1.0}, seed=0)
    emoji, icons = (images.select("train", k) for k in ("emoji", "icon"))
    assert data.epoch_length == 2 * len(emoji) + len(icons)
    places = [data.order.batch(n, 1)[0] for n in range(data.epoch_length)]
    shown = [data.index.fact(*place, "id") for place in places]
    assert sorted(shown) == sorted(images.rows[i]["id"] for i in emoji * 2 + icons)
    batch = data.batch(0, 8)
    assert batch["latents"].shape == (8, 4, 4, 4)
    assert batch["latents"].dtype == torch.float32
    assert batch["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 8
    other = LatentSet(tmp_path, toy_sdxl, {"emoji": 1}, {"short": 1, "subject": 3}, seed=0)
    told = [c for n in range(0, 800, 8) for c in other.batch(n, 8)["captions"]]
    subjects = {images.rows[i]["subject"] for i in emoji}
    assert 0.7 < sum(c in subjects for c in told) / len(told) < 0.8  # 3 in 4, within 3 sigma


def test_latents_of_another_vae_are_refused(packages, toy_sdxl, tmp_path):
    from toy import toy_pipeline

    data = tmp_path / "data"
    prepare_images(replace(TOY, scenes=0, icons=0, colour_icons=()), data, workers=1)
    with pytest.raises(UserError, match="is not completely prepared"):
        LatentSet(data, toy_sdxl, {"emoji": 1}, {"short": 1.0}, 0)
    encode_images(data, toy_sdxl)
    other = toy_pipeline(tmp_path / "other", seed=9)
    for use in (
        lambda: encode_images(data, other),
        lambda: LatentSet(data, other, {"emoji": 1}, {"short": 1.0}, 0),
    ):
        with pytest.raises(UserError, match="another VAE"):
            use()


def test_what_prepare_refuses(packages, tmp_path):
    for arguments, said in (
        (("photographs", tmp_path), "illustrations-small"),
        (("illustrations", tmp_path, None, 0), "at least 1"),
        (("illustrations", tmp_path, None, 1, "cpu"), "give --model"),
        (("illustrations", tmp_path, None, 1, None, None, "folder"), "has fixed settings"),
        (("illustrations", tmp_path, None, 1, None, None, None, Preparation(text=True)), "--size"),
    ):
        with pytest.raises(UserError, match=said):
            prepare(*arguments)
    assert not list(tmp_path.iterdir())


def test_a_package_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("KOALA_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no npm
    with pytest.raises(UserError, match=r"emojibase-data@.*npm is not installed"):
        package("emojibase-data")
    with pytest.raises(UserError, match="unknown asset package"):
        package("left-pad")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_sets_without_code_points_are_joined_by_label(packages):
    place = packages / "packages"
    (listed,) = place.glob("@iconify-json+emojione-*")
    (listed / "chars.json").write_text("{}")
    assert art.drawing_of("emojione", "1F900", "Fox") == "fox"
    assert art.drawing_of("emojione", "1F900", "red  apple!") == "red-apple"
    assert art.drawing_of("emojione", "1F900", "zebra") is None
    assert art.drawing_of("noto", "1F900", "no such label") == "fox"
