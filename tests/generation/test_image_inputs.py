"""Pictures from pictures: equal to diffusers' pipelines, whatever file they come from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from koala.errors import UserError
from koala.generation import load, read_settings, save
from koala.generation.image_files import fingerprint, open_image, read_mask
from koala.generation.image_inputs import filled, on_white, to_pixels
from koala.generation.png import parameters
from koala.generation.runtime.pytorch import encode_image
from koala.generation.validation import MASK_FILLS
from stepping import latents_of


@pytest.fixture(scope="module")
def pipeline(toy_koala):
    return load(toy_koala, device="cpu")


@pytest.fixture(scope="module")
def image():
    """64 x 48 pixels of smooth colours."""
    y, x = np.mgrid[0:48, 0:64] / 64
    return Image.fromarray((np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8))


@pytest.fixture(scope="module")
def mask():
    grey = np.zeros((48, 64), np.uint8)
    grey[8:40, 16:48] = 255  # whole places: diffusers looks at their corners alone
    grey[:, 0] = 127  # just too dark
    return Image.fromarray(grey)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def encoded(pipe, image):
    with torch.inference_mode():
        return encode_image(pipe.vae, torch.from_numpy(to_pixels(image)))


# --- equality with diffusers ----------------------------------------------------------------


def test_latents_of_a_image_are_the_mode_of_diffusers_vae(toy_koala, pipeline, image):
    """Its pipelines draw from the posterior; the most likely latents need no seed."""
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(toy_koala)
    config = pipe.vae.config
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std))
    pixels = pipe.image_processor.preprocess(image)
    with torch.inference_mode():
        mode = pipe.vae.encode(pixels).latent_dist.mode()
        back = pipeline.decode(encoded(pipeline, image))
        theirs = pipe.vae.decode(mode).sample / 2 + 0.5
    expected = (mode - mean) / std * config.scaling_factor
    torch.testing.assert_close(encoded(pipeline, image), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(back, theirs.clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("strength", "guidance"), [(0.3, 3.5), (0.65, 1.0), (1.0, 3.5)])
def test_image_to_image_equals_diffusers(toy_koala, pipeline, image, strength, guidance):
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(toy_koala)
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "prompt": ["a red fox", "an owl"], "strength": strength, "guidance_scale": guidance,
        "num_inference_steps": 10, "image": encoded(pipeline, image),
    }  # fmt: skip
    latents = pipe(**arguments, generator=generators(5, 6), output_type="latent").images
    expected = pipe(**arguments, generator=generators(5, 6), output_type="np").images
    asked = {"image": image, "strength": strength, "guidance": guidance, "seed": 5}
    ours = latents_of(pipeline, arguments["prompt"], **asked)
    torch.testing.assert_close(ours, latents, atol=1e-4, rtol=0)
    result = pipeline(arguments["prompt"], **asked)
    for drawn, array in zip(result.images, expected, strict=True):
        assert drawn.size == image.size
        assert np.abs(np.asarray(drawn) / 255 - array).max() <= 0.5 / 255 + 1e-4


@pytest.mark.parametrize(("strength", "guidance"), [(0.6, 3.5), (1.0, 1.0)])
def test_inpainting_equals_diffusers(toy_koala, image, mask, strength, guidance):
    """With a VAE without statistics: diffusers' inpainting forgets them when it encodes."""
    ours = load(toy_koala, device="cpu")
    ours.vae.register_to_config(latents_mean=None, latents_std=None)
    pipe = StableDiffusionXLInpaintPipeline.from_pretrained(toy_koala, vae=ours.vae)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        prompt=["a red fox", "an owl"], strength=strength, guidance_scale=guidance,
        num_inference_steps=10, image=encoded(ours, image), mask_image=mask, width=64,
        height=48, generator=generators(5, 6), output_type="latent",
    ).images  # fmt: skip
    asked = {"image": image, "mask": mask, "strength": strength, "guidance": guidance}
    x = latents_of(ours, ["a red fox", "an owl"], **asked, seed=5)
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)


def test_what_the_mask_leaves_dark_is_kept(pipeline, image, mask):
    x = latents_of(pipeline, "an owl", image=image, mask=mask, strength=0.8, seed=1)
    places = torch.from_numpy(read_mask(mask, image.size, image.size, 8, 0).places).float()
    original = encoded(pipeline, image)
    assert places.mean() == pytest.approx(16 / 48)
    torch.testing.assert_close(x * (1 - places), original * (1 - places), atol=1e-5, rtol=0)
    assert ((x - original).abs() * places).max() > 0.1


def test_every_place_with_a_light_pixel_is_repainted():
    grey = np.zeros((48, 64), np.uint8)
    grey[7, 15] = 128  # the lower right pixel of a place
    grey[40:, 63] = 127  # just too dark
    found = read_mask(Image.fromarray(grey), (64, 48), (64, 48), 8, 0).places
    assert np.argwhere(found).tolist() == [[0, 1]]


WHITE, CLEAR_WHITE, CLEAR_BLACK = (255,) * 4, (255, 255, 255, 0), (0, 0, 0, 0)
BOX = (16, 8, 48, 32)


def boxed(ground, box=WHITE, mode="RGBA"):
    """A mask of one colour with a box of another."""
    found = Image.new("RGBA", (64, 48), ground)
    found.paste(box, BOX)
    return found.convert(mode)


@pytest.mark.parametrize(
    "mask",
    [
        boxed((0, 0, 0, 255), WHITE, "L"),
        boxed((0, 0, 0, 255)),  # alpha that says nothing
        boxed(CLEAR_WHITE),  # strokes on an empty layer
        boxed(CLEAR_BLACK),
        boxed(CLEAR_BLACK, WHITE, "LA"),
        boxed(WHITE, CLEAR_BLACK),  # a hole in a white sheet
        boxed(WHITE, CLEAR_WHITE),
        boxed((90, 140, 60, 255), CLEAR_BLACK),  # the picture itself with a part erased
        boxed((0, 0, 0, 255), CLEAR_BLACK),
    ],
)  # fmt: skip
def test_a_masks_alpha_counts_where_it_has_one(mask):
    found = read_mask(mask, (64, 48), (64, 48), 8, 0)
    wanted = np.zeros((6, 8), bool)
    wanted[1:4, 2:6] = True
    assert (found.places == wanted).all()
    assert (np.asarray(found.blend) == np.kron(wanted, np.full((8, 8), 255))).all()


@pytest.mark.parametrize("blur", [None, 0, 9])
def test_what_is_not_painted_comes_back_pixel_for_pixel(pipeline, blur):
    """Whatever the mask's edge, and in a picture whose sides are no multiples of 8."""
    noise = np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)
    grey = np.zeros((45, 61), np.uint8)
    grey[11:38, 5:33] = 255
    image, mask = Image.fromarray(noise), Image.fromarray(grey)
    asked = {"image": image, "mask": mask, "steps": 2, "strength": 1.0, "seed": 1}
    (drawn,) = pipeline("an owl", **asked, mask_blur=blur).images
    assert drawn.size == image.size
    found = np.asarray(drawn)
    assert (found[grey == 0] == noise[grey == 0]).all()
    assert (found[20:30, 15:23] != noise[20:30, 15:23]).mean() > 0.9


@pytest.mark.parametrize("fill", MASK_FILLS)
def test_a_painted_part_starts_from_what_is_asked_for(pipeline, fill):
    """The unpainted part is there from the start in every case, at the first step's noise."""
    image = Image.linear_gradient("L").resize((48, 40)).convert("RGB")
    mask = Image.new("L", image.size)
    mask.paste(255, (16, 8, 40, 32))
    asked = {"image": image, "mask": mask, "strength": 0.5, "steps": 4, "seed": 2}
    (request,) = pipeline.requests("an owl", **asked, mask_fill=fill)
    assert request.settings.mask_fill == fill
    row = pipeline.begin(request)
    (usual,) = pipeline.requests("an owl", **asked)
    with torch.inference_mode():
        latents, sigma = pipeline.encode(usual.image), row.sampler.sigmas[0]
        start = row.x - sigma * row.kept.noise
    inside = row.kept.mask.bool().expand_as(start)
    if fill != "surroundings":  # the encoder sees beyond the mask's edge
        torch.testing.assert_close(start[~inside], latents[~inside], atol=1e-5, rtol=0)
    if fill == "original":
        torch.testing.assert_close(start[inside], latents[inside], atol=1e-5, rtol=0)
    elif fill == "noise":
        assert start[inside].std() == pytest.approx(1, abs=0.2)
    elif fill == "nothing":
        assert start[inside].abs().max() < 1e-5
    else:
        torch.testing.assert_close(start, pipeline.encode(request.image), atol=1e-5, rtol=0)
        assert not torch.equal(request.image, usual.image)


@given(
    height=st.integers(8, 70), width=st.integers(8, 70), seed=st.integers(0, 2**31),
    share=st.floats(0.05, 0.95),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_surroundings_fill_a_hole_and_leave_the_rest(height, width, seed, share):
    """And the hole lies within the range of what is around it: a plain image stays plain."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    places = random.random((-(-height // 8), -(-width // 8))) < share
    lacking = places.repeat(8, 0).repeat(8, 1)[:height, :width]
    found = np.asarray(filled(Image.fromarray(pixels), places, 8))
    assert (found[~lacking] == pixels[~lacking]).all()
    if not lacking.all():
        assert (found >= pixels[~lacking].min(0)).all() and (found <= pixels[~lacking].max(0)).all()
    plain = Image.new("RGB", (width, height), "teal")
    assert filled(plain, places, 8).tobytes() == plain.tobytes()


def test_a_masks_edge_rises_within_the_blur():
    grey = np.zeros((40, 40), np.uint8)
    grey[:, 8:] = 255
    grey[20, 3] = 255  # too thin to rise
    blend = np.asarray(read_mask(Image.fromarray(grey), (40, 40), (40, 40), 8, 3).blend)
    assert blend[5, 6:14].tolist() == [0, 0, 64, 128, 191, 255, 255, 255]
    assert blend[20, 2:5].tolist() == [0, 255, 0]
    assert (blend[:, 20:] == 255).all()  # a picture's border is no edge


# --- sizes ----------------------------------------------------------------------------------


def test_a_image_is_drawn_in_its_own_size_or_the_one_asked_for(pipeline, image, mask):
    asked = {"image": image, "mask": mask, "steps": 2}
    assert pipeline("a", **asked).images[0].size == (64, 48)
    result = pipeline("a", **asked, size=(32, 40))
    assert result.images[0].size == (32, 40)
    odd = image.resize((50, 61))
    assert pipeline("a", image=odd, steps=2).images[0].size == (50, 61)
    with pytest.raises(UserError, match="size 50x60: allowed are multiples of 8"):
        pipeline("a", size="50x60")
    with pytest.raises(UserError, match="size 15x48: allowed are whole numbers from 16 to 4096"):
        pipeline("a", image=image.resize((15, 48)))
    assert pipeline("a", image=odd, size=(48, 64), steps=2).images[0].size == (48, 64)


def test_settings_say_from_what_a_image_was_made(pipeline, image, mask, tmp_path):
    result = pipeline("a fox", image=image, mask=mask, steps=4, strength=0.5, seed=2)
    (path,) = save(result, tmp_path)
    found = read_settings(path)
    assert found == result.settings[0]
    assert (found.image, found.mask) == (fingerprint(image), fingerprint(mask))
    assert found.mask_blur == 4
    assert "Denoising strength: 0.5, Mask blur: 4" in parameters(found)
    plain = pipeline("a fox", steps=1).settings[0]
    assert (plain.image, plain.mask, plain.strength) == ("", "", 1.0)
    assert "Denoising" not in parameters(plain)
    assert pipeline("a", image=image, steps=4).settings[0].strength == 0.6
    other = replace(found, image=fingerprint(image.rotate(180)))
    assert other != found


# --- files ----------------------------------------------------------------------------------


def test_a_image_is_turned_as_its_camera_says(tmp_path):
    image = Image.new("RGB", (24, 16), "red")
    image.paste("blue", (0, 0, 8, 8))  # upper left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: upright, it is 16 x 24 with blue at the upper right
    image.save(tmp_path / "turned.png", exif=exif)
    found = open_image(tmp_path / "turned.png")
    assert found.size == (16, 24) and found.getpixel((15, 0)) == (0, 0, 255)
    assert found.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_of_eight_bits_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (16, 16), "white").convert(mode).save(path)
    pixels = to_pixels(on_white(open_image(path), (16, 16)))
    assert pixels.shape == (1, 3, 16, 16) and pixels.dtype == np.float32
    assert pixels.min() > 0.98 and pixels.max() <= 1


def test_transparent_images_lie_on_white():
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert (to_pixels(on_white(clear, (16, 16))) == 1).all()


def bomb(path):
    """A PNG of 50,000 x 50,000 pixels, in a hundred bytes."""
    import struct
    import zlib

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.filterwarnings("error")
def test_files_that_are_no_images_are_refused_in_one_line(tmp_path, pipeline):
    bomb(tmp_path / "bomb.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "torn.png").write_bytes(whole.read_bytes()[:-500])
    Image.new("F", (16, 16)).save(tmp_path / "deep.tif")
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "program.eps")  # what reads it runs a program
    reasons = {
        "bomb.png": "holds over a hundred million pixels: allowed are 64,000,000",
        "large.png": "is 9000x9000: allowed are 64,000,000 pixels",
        "text.png": "cannot be read as an image",
        "empty.png": "cannot be read as an image: it is empty",
        "torn.png": "cannot be read as an image: it is truncated",
        "missing.png": "No such file",
        "deep.tif": "has the mode F: allowed are images of 8 bits, and grey ones of 16",
        "program.eps": "cannot be read as an image: it is a PostScript file; give a PNG or JPEG",
        ".": "is a folder: name one image in it",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=reason) as caught:
            pipeline("a", image=tmp_path / name)
        assert "\n" not in str(caught.value), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0.5}, "strength 0.5 has no effect without an image"),
        ({"image": True, "strength": 0}, "strength is 0: allowed are numbers above 0"),
        ({"image": True, "strength": 1.01}, "strength is 1.01"),
        ({"image": True, "strength": float("nan")}, "strength is nan"),
        ({"image": True, "strength": 0.09}, "strength 0.09 of 10 steps leaves no step"),
        ({"mask": True}, "a mask needs an image"),
        ({"image": True, "mask_blur": 4}, "mask blur 4 has no effect without a mask"),
        ({"image": True, "mask": True, "mask_blur": 65}, "mask blur is 65: allowed are whole"),
        ({"image": True, "mask_fill": "noise"}, "mask fill 'noise' has no effect without a mask"),
        ({"image": True, "mask": True, "mask_fill": "none"}, "unknown mask fill 'none': choose"),
        (
            {"image": True, "mask": True, "mask_fill": "noise", "strength": 1},
            "mask fill 'noise' has no effect at strength 1",
        ),
        ({"image": True, "mask": (32, 48)}, "the mask is 32x48, its image 64x48"),
        ({"image": True, "mask": "dark"}, "the mask is dark everywhere"),
    ],
)
def test_what_does_not_go_together_is_refused(pipeline, image, mask, arguments, message):
    masks = {True: mask, (32, 48): mask.resize((32, 48)), "dark": Image.new("L", (64, 48))}
    if "image" in arguments:
        arguments = {**arguments, "image": image}
    if "mask" in arguments:
        arguments = {**arguments, "mask": masks[arguments["mask"]]}
    with pytest.raises(UserError, match=message) as caught:
        pipeline("a", **arguments)
    assert "\n" not in str(caught.value)
