"""What becomes of an item: bucket and crop, captions and filters, and what cannot be decoded."""

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from koala.data.buckets import buckets, fit
from koala.data.captions import CaptionFitter, check_expressions, compose
from koala.data.items import Item
from koala.data.preprocess import Dropped, Filters, Preparation, Sample, sample_of, upright
from koala.errors import UserError
from toy_sources import image

PREPARATION = Preparation(size=64, step=8, captions=("text",), held_out=0.0)


def item(data: bytes, text: str = "a fox", **scores: float) -> Item:
    return Item("one", lambda: data, {"text": text}, scores)


def filtered(data: bytes, text: str = "a fox", scores=None, **filters) -> Sample | Dropped:
    preparation = Preparation(64, ("text",), Filters(**filters), step=8)
    return sample_of(item(data, text, **(scores or {})), preparation)


# --- buckets --------------------------------------------------------------------------------


def test_buckets_are_sdxls():
    listed = {
        512: (1856, 1920, 1984, 2048), 576: (1664, 1728, 1792), 640: (1536, 1600),
        704: (1344, 1408, 1472), 768: (1280, 1344), 832: (1152, 1216), 896: (1088, 1152),
        960: (1024, 1088),
    }  # fmt: skip
    tall = {(long, short) for short, longs in listed.items() for long in longs}
    assert {*buckets(1024)} == tall | {(w, h) for h, w in tall} | {(1024, 1024)}
    assert len(buckets(512)) == 11
    assert buckets(64) == ((64, 64),)
    for wrong in (1000, 60, 0):
        with pytest.raises(UserError, match="multiple"):
            buckets(wrong)


@settings(deadline=None)
@given(st.integers(64, 6000), st.integers(64, 6000), st.sampled_from([512, 1024]), st.booleans())
def test_a_fit_covers_its_bucket_and_loses_little(height, width, side, upscale):
    found = fit((height, width), side, upscale=upscale)
    if found is None:
        enlarged = fit((height, width), side, upscale=True)
        assert not upscale
        assert enlarged.resized[0] > height or enlarged.resized[1] > width
        return
    assert found.target in buckets(side)
    for full, target, offset in zip(
        found.resized, found.target, (found.top, found.left), strict=True
    ):
        assert full >= target
        assert offset == (full - target) // 2
    assert found.resized[0] == found.target[0] or found.resized[1] == found.target[1]
    if not upscale:
        assert found.resized[0] <= height
        assert found.resized[1] <= width
    ratio = height / width
    nearest = min(abs(math.log(ratio * w / h)) for h, w in buckets(side))
    assert abs(math.log(ratio * found.target[1] / found.target[0])) == pytest.approx(nearest)


# --- pictures -------------------------------------------------------------------------------


def test_a_sample_says_truly_what_was_done():
    sample = sample_of(item(image(1, (160, 96))), PREPARATION)
    assert isinstance(sample, Sample)
    assert sample.original == (96, 160)
    assert sample.pixels.shape == (48, 80, 3)
    assert sample.crop == (0, 0)
    cropped = sample_of(item(image(1, (200, 100))), PREPARATION)
    assert cropped.pixels.shape[:2] == (40, 96)
    assert cropped.crop == ((48 - 40) // 2, 0)  # 200 x 100 at 96 wide is 96 x 48
    whole = upright(image(1, (200, 100))).resize((96, 48), Image.Resampling.LANCZOS)
    assert (np.asarray(whole)[4:44] == cropped.pixels).all()


def test_images_are_turned_and_laid_on_white():
    image = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert upright(buffer.getvalue()).size == (20, 40)
    clear = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(clear, "PNG")
    assert upright(clear.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    grey = io.BytesIO()
    Image.new("L", (2, 2), 7).save(grey, "PNG")
    assert upright(grey.getvalue()).getpixel((0, 0)) == (7, 7, 7)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["JPEG", "PNG", "WEBP"]), st.randoms())
def test_a_damaged_image_costs_itself(seed, format, random):
    data = bytearray(image(seed % 5, (96, 96), format))
    cut = random.randrange(len(data))
    damaged = bytes(data[:cut])
    if random.random() < 0.5:
        for _ in range(20):
            data[random.randrange(len(data))] = random.randrange(256)
        damaged = bytes(data)
    found = sample_of(item(damaged), PREPARATION)
    assert isinstance(found, Sample) or found.reason in ("undecodable", "small", "aspect")


def test_a_file_that_cannot_be_read_costs_itself():
    def gone() -> bytes:
        raise OSError("no such picture")

    found = sample_of(Item("one", gone, {"text": "a fox"}), PREPARATION)
    assert found == Dropped("one", "undecodable", "OSError: no such picture")


def test_filters_leave_out_what_they_say():
    data = image(0, (96, 96))
    for reason, detail, filters, text, scores in (
        ("small", "96x96", {"min_side": 97}, "a fox", {}),
        ("few words", "2", {"min_words": 3}, "a fox", {}),
        ("many words", "2", {"max_words": 1}, "a fox", {}),
        ("no caption", "text", {}, " ", {}),
        ("nsfw", "0.6", {"max_nsfw": 0.5}, "a fox", {"nsfw": 0.6}),
        ("no score", "nsfw", {"max_nsfw": 0.5}, "a fox", {}),
        ("similarity", "0.1", {"min_similarity": 0.2}, "a fox", {"similarity": 0.1}),
    ):
        assert filtered(data, text, scores, **filters) == Dropped("one", reason, detail)
    wide = image(0, (300, 70))
    assert filtered(wide).reason == "aspect"
    assert isinstance(filtered(wide, max_aspect=None), Sample)
    kept = {"min_side": 96, "min_words": 2, "max_words": 2, "max_nsfw": 0.6, "min_similarity": 0.1}
    assert isinstance(filtered(data, "a fox", {"nsfw": 0.6, "similarity": 0.1}, **kept), Sample)


def test_nothing_is_enlarged_unless_asked():
    small = item(image(0, (60, 60)))
    assert sample_of(small, PREPARATION).reason == "small"
    enlarged = Preparation(64, ("text",), upscale=True, step=8)
    assert sample_of(small, enlarged).pixels.shape == (64, 64, 3)


def test_some_images_are_held_out_by_their_bytes():
    some = Preparation(64, ("text",), step=8, held_out=0.25)
    splits = [sample_of(item(image(n)), some).split for n in range(60)]
    assert splits == [sample_of(item(image(n), "other"), some).split for n in range(60)]
    assert 5 <= splits.count("test") <= 25  # of 60: 15 +- 3 sigma
    assert {*splits} == {"train", "test"}


def test_impossible_preparations_are_refused():
    for make in (
        lambda: Preparation(size=1000),
        lambda: Preparation(held_out=1.0),
        lambda: Preparation(unit=0),
        lambda: Preparation(text=True, captions=("a", "b")),
        lambda: Preparation(long_captions="chunks"),
        lambda: Filters(max_aspect=0.5),
        lambda: Filters(min_side=0),
    ):
        with pytest.raises(UserError):
            make()


# --- captions -------------------------------------------------------------------------------


def test_fields_are_appended_as_sentences():
    fields = {"alt": "a fox", "told": "It  runs.", "odd": "Hi!"}
    assert compose("alt", fields) == "a fox"
    assert compose("alt+told", fields) == "a fox. It runs."
    assert compose("odd+none+told", fields) == "Hi! It runs."
    assert compose("none", fields) == ""
    check_expressions(["alt+told"], [*fields])
    with pytest.raises(UserError, match=r"no none.*alt, told, odd"):
        check_expressions(["alt+none"], [*fields])
    with pytest.raises(UserError, match="twice"):
        check_expressions(["alt", "alt"], [*fields])


def words(text: str) -> int:
    """Tokens of a tokenizer that knows words of four letters, with start and end."""
    return 2 + sum(-(-len(word) // 4) for word in text.split())


LIMIT = 12
TEXTS = st.lists(
    st.text("abc", min_size=1, max_size=60) | st.sampled_from(["a.", "b!", "cc;"]),
    min_size=1,
    max_size=40,
).map(" ".join)


@settings(deadline=None)
@given(TEXTS, st.sampled_from(["sentences", "chunks"]), st.integers(0, 100))
def test_what_is_told_always_fits_and_is_of_the_caption(text, policy, seed):
    fitter = CaptionFitter(words, LIMIT, policy)
    told = fitter.fit(text, np.random.default_rng(seed))
    assert told
    assert words(told) <= LIMIT
    if words(text) <= LIMIT:
        assert told == text
    letters = iter(text.replace(" ", ""))
    assert all(letter in letters for letter in told.replace(" ", ""))  # a subsequence of it


@pytest.mark.parametrize("length", [6, 11, 40])
def test_chunks_together_are_the_whole_caption(length):
    text = " ".join(f"w{i:03d}" for i in range(length))  # a token each, with no sentence's end
    fitter = CaptionFitter(words, LIMIT, "chunks")
    drawn = {fitter.fit(text, np.random.default_rng(seed)) for seed in range(100)}
    assert " ".join(sorted(drawn)) == text
    assert len(drawn) == -(-length // (LIMIT - 2))


def test_sentences_stay_whole_and_in_order():
    sentences = [f"{'abcdefghijkl'[i] * 8} it is." for i in range(6)]
    fitter = CaptionFitter(words, LIMIT, "sentences")
    seen = set()
    for seed in range(60):
        told = fitter.fit(" ".join(sentences), np.random.default_rng(seed))
        chosen = [s for s in sentences if s in told]
        assert told == " ".join(chosen)
        seen |= {*chosen}
    assert seen == {*sentences}
    with pytest.raises(UserError, match="sentences, chunks"):
        CaptionFitter(words, LIMIT, "cut")


def saved(picture: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight(format):
    ramp = np.tile(np.linspace(0, 65535, 64), (8, 1))
    found = np.asarray(upright(saved(Image.fromarray(ramp.astype(np.uint16)), format)))
    assert np.abs(found - ramp[..., None] / 257).max() <= 0.51
    with pytest.raises(ValueError, match="floating-point"):
        upright(saved(Image.fromarray(ramp.astype(np.float32)), "TIFF"))


def test_colours_of_a_profile_become_srgb():
    picture = Image.new("RGB", (8, 8), (200, 100, 50))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (srgb, lab, b"no profile"):  # the colours already, or of other channels
        data = saved(picture, "PNG", icc_profile=profile)
        assert np.asarray(upright(data)).tolist() == np.asarray(picture).tolist()
    # Red and green change places in this profile: its colorants are stored the other way round.
    tag = {srgb[132 + 12 * i :][:4]: srgb[136 + 12 * i :][:8] for i in range(srgb[131])}
    swapped = srgb.replace(b"rXYZ" + tag[b"rXYZ"], b"rXYZ" + tag[b"gXYZ"])
    swapped = swapped.replace(b"gXYZ" + tag[b"gXYZ"], b"gXYZ" + tag[b"rXYZ"])
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "Mine".encode("utf-16-be"))
    found = np.asarray(upright(saved(picture, "PNG", icc_profile=swapped)), dtype=int)
    assert np.abs(found - (100, 200, 50)).max() <= 2


def test_why_an_image_is_left_out_is_said():
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
    huge = saved(Image.new("1", (14_000, 13_000)), "PNG")
    for data, why in (
        (heic, "HEIC is not read here: convert it to PNG, WebP or JPEG"),
        (b"<html>", "its format is not read here: convert it to PNG, WebP or JPEG"),
        (b"", "the file is empty"),
        (huge, "more than 178 megapixels: make it smaller"),
    ):
        assert sample_of(item(data), PREPARATION) == Dropped("one", "undecodable", why)
    nothing = Item("one", bytes, {}, no_image="not there")
    assert sample_of(nothing, PREPARATION) == Dropped("one", "no image", "not there")


@pytest.mark.parametrize("format", ["AVIF", "WEBP", "GIF", "JPEG"])
def test_common_formats_are_read(format):
    picture = Image.new("RGB", (80, 80), (200, 100, 50))
    mode = picture.convert("CMYK") if format == "JPEG" else picture
    found = sample_of(item(saved(mode, format)), PREPARATION)
    assert isinstance(found, Sample)
    assert np.abs(found.pixels.mean((0, 1)) - (200, 100, 50)).max() <= 4
