"""Images of which only the first frame or page is read, and files that have one picture."""

import io

import pytest
from PIL import Image

from koala.utils.frames import frames_of


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
@pytest.mark.parametrize("number", [1, 3])
def test_frames_and_pages_are_counted(format, number):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")[:number]]
    buffer = io.BytesIO()
    frames[0].save(buffer, format, save_all=number > 1, append_images=frames[1:])
    assert frames_of(Image.open(buffer)) == number


@pytest.mark.parametrize("format", ["JPEG", "BMP", "MPO"])
def test_other_files_have_one(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    buffer = io.BytesIO()
    many = {"save_all": True, "append_images": frames[1:]} if format == "MPO" else {}
    frames[0].save(buffer, format, **many)
    assert frames_of(Image.open(buffer)) == 1
