"""Image files to start from: opened, checked, fingerprinted. Importing this loads no torch.

A file may be anything: its size is checked before its pixels are read. Its EXIF orientation is
applied, and colours of another profile become sRGB.
"""

from __future__ import annotations

import hashlib
import io
import re
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageCms, ImageFilter, ImageOps

from koala.errors import UserError
from koala.utils.file_kinds import START, kind_of
from koala.utils.frames import frames_of

if TYPE_CHECKING:
    import numpy as np

MOST_PIXELS = 64_000_000
LIGHT = 128  # from here on a mask's pixel is light, and alpha is opaque
LARGEST_PROFILE = 2**20  # bytes of a colour profile that is applied
_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
_SHOWN = 80  # characters of a name
_RGB_LIKE = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
# Other formats hold no pixels (EPS runs a program), or nobody uses them.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "TGA")
# What Pillow raises for damaged files.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def open_image(file: str | Path | Image.Image) -> Image.Image:
    """An image, upright and loaded, in sRGB and a mode of 8 bits per channel, without its EXIF.

    The first frame of an animated one. UserError for what is no file, a file that is no image or
    is truncated, or holds more than 64 million pixels.
    """
    if isinstance(file, Image.Image):
        try:
            return _read(file, "the image")
        except UNREADABLE as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the image cannot be read as an image: {error}") from None
    name = str(file) if len(str(file)) <= _SHOWN else f"{str(file)[:_SHOWN]}..."
    path = _path(file, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            with Image.open(path, formats=_FORMATS) as image:
                return _read(image, name)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(
            f"{name} holds over a hundred million pixels: allowed are {MOST_PIXELS:,}; make it "
            "smaller"
        ) from None
    except UNREADABLE as error:
        raise UserError(f"{name} cannot be read as an image: {_reason(path, error)}") from None


def frames_note(file: Path) -> str | None:
    """A line for an image file that `open_image` took, where it has more than is read of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(file.expanduser(), formats=_FORMATS) as image:
            frames = frames_of(image)
    return f"{file} has {frames:,} frames or pages: the first is read" if frames > 1 else None


def _path(file: str | Path, name: str) -> Path:
    """The file. UserError for what is no file, by what it is."""
    text = str(file)
    if text.startswith("data:"):
        raise UserError(f"{name} is a data URI: save it to a file, and name that")
    if re.match(r"[a-z][a-z0-9+.-]+:/", text, re.IGNORECASE):  # a Path has one slash
        shown = re.sub(r":/+", "://", name, count=1)
        raise UserError(f"{shown} is an address: download it, and name the file by its path")
    path = Path(text).expanduser()
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # a ValueError for a null byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name} cannot be read as an image: {reason}") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{name} is a folder: name one image in it")
    if not stat.S_ISREG(mode):
        raise UserError(f"{name} is no plain file: save the image to one")
    return path


def _reason(path: Path, error: Exception) -> str:
    """What a file is that cannot be read, and what to do."""
    try:
        with path.open("rb") as opened:
            kind = kind_of(opened.read(START), path.name)
    except OSError as reason:
        return str(reason.strerror or reason)
    if kind == "empty":
        return "it is empty"
    if "truncated" in str(error):
        return "it is truncated; download or save it again"
    if kind:
        return f"it is {kind}; give a PNG or JPEG"
    return str(error) if path.name not in str(error) else "it is no image of a kind that is known"


def _read(image: Image.Image, name: str) -> Image.Image:
    """UserError for an image that is too large, cannot be decoded, or of another mode."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise UserError(
            f"{name} is {width}x{height}: allowed are {MOST_PIXELS:,} pixels; make it smaller"
        )
    if image.mode not in {*_RGB_LIKE, *_GREY_16}:
        raise UserError(
            f"{name} has the mode {image.mode}: allowed are images of 8 bits, and grey ones of 16; "
            "save it as PNG"
        )
    turned = ImageOps.exif_transpose(image)
    turned.load()
    turned.info.pop("exif", None)  # applied; of a damaged one the next reader would complain
    return _in_srgb(_in_8_bits(turned))


def _in_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits as one of 8; others as they are."""
    if image.mode not in _GREY_16:
        return image
    import numpy as np

    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _in_srgb(image: Image.Image) -> Image.Image:
    """An image with a profile of other colours, such as Adobe RGB, Display P3 or CMYK, as sRGB.

    One whose profile cannot be read is taken as it is, as browsers do.
    """
    profile = image.info.get("icc_profile")
    if image.mode not in ("RGB", "RGBA", "CMYK") or not isinstance(profile, bytes):
        return image
    if len(profile) > LARGEST_PROFILE:
        return image
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(own).lower():
            return image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        srgb = ImageCms.createProfile("sRGB")
        found = ImageCms.profileToProfile(image, own, srgb, outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    assert found is not None  # it is not done in place
    found.info.pop("icc_profile", None)
    return found


def fingerprint(image: Image.Image) -> str:
    """16 hexadecimal digits of the SHA-256 of the image's mode, size and pixels."""
    header = f"{image.mode} {image.width}x{image.height} ".encode()
    return hashlib.sha256(header + image.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Mask:
    """What of an image is repainted: whole places of its latent, and how they blend into it."""

    places: np.ndarray  # bool [h, w] of the latent: repainted
    blend: Image.Image  # "L", of the image's size: 0 keeps the image's pixel, 255 repaints it


def read_mask(
    mask: Image.Image, image_size: tuple[int, int], size: tuple[int, int], factor: int, blur: int
) -> Mask:
    """The part of an image that a mask says to repaint: where it is light.

    image_size: of the image that the mask is for. size: of the image to be drawn. Both are
    (width, height) in pixels. A mask with transparent pixels is read by these (`as_grey`). Every
    place of the latent, factor x factor pixels, with a light pixel is repainted; dark pixels keep
    the image's. blur: pixels, inwards from the mask's edge, over which the two blend.
    UserError for a mask of another size, or dark everywhere.
    """
    import numpy as np

    if mask.size != image_size:
        raise UserError(
            f"the mask is {mask.width}x{mask.height}, its image {image_size[0]}x{image_size[1]}: "
            "make them the same size"
        )
    grey = as_grey(mask)
    if grey.size != size:
        grey = grey.resize(size, Image.Resampling.LANCZOS)
    light = np.asarray(grey) >= LIGHT
    if not light.any():
        raise UserError("the mask is dark everywhere: make the part to repaint light")
    height, width = light.shape
    padded = np.pad(light, ((0, -height % factor), (0, -width % factor)))
    places = np.any(padded.reshape(-1, factor, padded.shape[1] // factor, factor), axis=(1, 3))
    return Mask(places, _blend(Image.fromarray(light.astype(np.uint8)), blur))


def as_grey(mask: Image.Image) -> Image.Image:
    """A mask without transparency: light where it says to repaint.

    Of one with transparent pixels these are repainted, whatever its colours, as in OpenAI's API
    and in ComfyUI: the picture with a part erased. But where all that is opaque is light, and most
    of the border is transparent, they are strokes on an empty layer, and the strokes are repainted.
    """
    import numpy as np

    if not mask.has_transparency_data:
        return mask.convert("L")
    rgba = mask.convert("RGBA")
    opaque = np.asarray(rgba.getchannel("A")) >= LIGHT
    light = np.asarray(rgba.convert("RGB").convert("L")) >= LIGHT
    if opaque.all():
        return rgba.convert("RGB").convert("L")
    border = np.concatenate([opaque[0], opaque[-1], opaque[:, 0], opaque[:, -1]])
    strokes = light[opaque].all() and border.mean() < 0.5
    return Image.fromarray(((opaque if strokes else ~opaque) * 255).astype(np.uint8))


def _blend(light: Image.Image, blur: int) -> Image.Image:
    """0 outside of the light pixels (1, not 0); inside rising to 255 within `blur` pixels.

    A line that is too thin for that reaches 255 in its middle.
    """
    import numpy as np

    depth, rest = np.zeros((light.height, light.width), np.uint8), light
    for _ in range(blur + 1):  # the distance to the edge, up to blur + 1
        depth += np.asarray(rest)
        rest = rest.filter(ImageFilter.MinFilter(3))
    peak = Image.fromarray(depth)
    for _ in range(blur):
        peak = peak.filter(ImageFilter.MaxFilter(3))
    share = depth / np.maximum(np.asarray(peak), 1)
    return Image.fromarray((share * 255).round().astype(np.uint8))
