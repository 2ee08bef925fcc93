"""Files given for images: what is none is called what it is; colours are read as they are meant."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from koala.errors import UserError
from koala.generation.image_files import open_image


@pytest.mark.parametrize(
    ("name", "start", "kind"),
    [
        ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC"),
        ("a.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC"),  # as phones name it
        ("a.jxl", b"\xff\x0a\xfa\x1f", "a JPEG XL"),
        ("a.jxl", b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL"),
        ("a.jp2", b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000"),
        ("a.cr2", b"II*\0\x10\0\0\0CR\x02\0", "a camera's raw file .CR2."),
        ("a.NEF", b"MM\0*\0\0\0\x08", "a camera's raw file .NEF."),
        ("a.psd", b"8BPS\0\x01", "a Photoshop document"),
        ("a.svg", b"<?xml version='1.0'?>\n<svg xmlns=''></svg>", "an SVG"),
        ("a.png", b"\n<!DOCTYPE html><html>", "a web page"),
        ("a.png", b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        ("a.mp4", b"\0\0\0\x18ftypisom", "a video"),
        ("a.exr", b"v/1\x01", "an OpenEXR"),
        ("a.kra", b"PK\x03\x04", "a ZIP archive"),
        ("a.txt", b"a cat", "no image of a kind that is known"),
    ],
)
def test_what_is_no_image_is_called_what_it_is(tmp_path, name, start, kind):
    (tmp_path / name).write_bytes(start + bytes(200))
    with pytest.raises(UserError, match=f"cannot be read as an image: it is {kind}") as caught:
        open_image(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("https://example.org/a.png", "is an address: download it"),
        (Path("https://example.org/a.png"), "is an address: download it"),
        ("data:image/png;base64," + "iVBORw0KGgo" * 99, r"\.\.\. is a data URI: save it to a file"),
        ("x" * 300, "cannot be read as an image: File name too long"),
        ("a\0b", "cannot be read as an image: embedded null"),
        ("/dev/null", "is no plain file"),
        ("clipboard", "No such file"),
    ],
)
def test_what_is_no_file_is_called_what_it_is(given, told):
    with pytest.raises(UserError, match=told) as caught:
        open_image(given)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_grey_of_16_bits_is_read_in_8(tmp_path):
    """As depth maps are."""
    deep = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "depth.png")
    found = open_image(tmp_path / "depth.png")
    assert found.mode == "L" and (np.asarray(found) == deep // 256).all()


def test_colours_of_another_profile_become_srgb(tmp_path):
    """A picture that says sRGB is left as it is, and one whose profile is damaged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    image.save(tmp_path / "said.png", icc_profile=profile)
    assert open_image(tmp_path / "said.png").tobytes() == image.tobytes()
    image.save(tmp_path / "damaged.png", icc_profile=b"no profile")
    assert open_image(tmp_path / "damaged.png").tobytes() == image.tobytes()
    wide = bytearray(profile)  # red and blue change places
    for place in range(128, 128 + 12 * int.from_bytes(wide[128:132], "big"), 12):
        tag = wide[place + 4 : place + 8]
        swapped = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}.get(bytes(tag))
        if swapped:
            wide[place + 4 : place + 8] = swapped
    named = bytes(wide).replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
    named = named.replace(b"sRGB", b"mine")
    image.save(tmp_path / "other.png", icc_profile=named)
    found = open_image(tmp_path / "other.png")
    assert found.mode == "RGB" and "icc_profile" not in found.info
    difference = np.asarray(found, int) - np.array((50, 100, 200))
    assert np.abs(difference).max() <= 2
