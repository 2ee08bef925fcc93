"""Turns items into samples: filters, captions, bucket and crop, everything but the encoding.

This runs in the worker processes, so it does not import torch. An item becomes a `Sample`, or a
`Dropped` with a reason; no single item can stop the run.
"""

import hashlib
import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from koala.data.buckets import STEP, Size, buckets, fit
from koala.data.captions import POLICIES, check_expressions, compose
from koala.data.items import FILE_NAME, SCORES, Item, Source, is_worded
from koala.errors import UserError, unknown
from koala.utils.frames import frames_of

PAPER = (255, 255, 255)  # background of transparent images
_NUMBERS = re.compile(
    r"[-+]?\d*\.?\d+(?:\s+[-+]?\d*\.?\d+)+"
)  # several, as a detector's labels are
PEEK = 64  # items of a source that are inspected for captions and scores
Stored = Literal["moments", "draw", "pixels"]


@dataclass(frozen=True)
class Filters:
    """Which items are dropped. None: the filter is off."""

    min_side: int | None = None  # pixels of the shorter side
    max_aspect: float | None = 4.0  # longer side over shorter
    min_words: int | None = None  # of every caption
    max_words: int | None = None
    max_nsfw: float | None = None  # items without the score are dropped too
    min_similarity: float | None = None  # same for items without the score
    keep_duplicates: bool = False  # of the file's bytes

    def __post_init__(self) -> None:
        if self.max_aspect is not None and self.max_aspect < 1:
            raise UserError(
                f"aspect {self.max_aspect}: longer over shorter side, must be at least 1"
            )
        for name in ("min_side", "min_words", "max_words"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name.replace('_', ' ')} {value}: must be at least 1")

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores that the filters need."""
        asked = {"nsfw": self.max_nsfw, "similarity": self.min_similarity}
        return tuple(score for score in SCORES if asked[score] is not None)


@dataclass(frozen=True)
class Preparation:
    """Everything that determines a folder of latents, besides the source and the encoder."""

    size: int = 1024  # pixels of the square bucket's side
    captions: tuple[str, ...] = ()  # fields, or fields joined by "+"; one column each
    filters: Filters = Filters()
    upscale: bool = False  # enlarge images smaller than their bucket
    mirror: bool = False  # let a training mirror half of the images
    # The posterior's mean and standard deviation; one draw from it, half the bytes; or the cropped
    # images, twelve times the bytes, which a training encodes itself.
    posterior: Stored = "moments"
    text: bool = False  # store the captions' embeddings
    long_captions: str | None = None  # policy for stored embeddings; None: sentences
    held_out: float = 0.002  # share of the images in the split "test"
    unit: int = 4096  # items per unit; a killed run loses at most one
    step: int = STEP  # pixels between the sides of neighbouring buckets

    def __post_init__(self) -> None:
        buckets(self.size, self.step)
        if not 0 <= self.held_out < 1:
            raise UserError(f"held out {self.held_out}: must be a share, at least 0 and below 1")
        if self.unit < 1:
            raise UserError(f"unit {self.unit}: must be at least 1 item")
        if self.long_captions is not None and not self.text:
            raise UserError(
                f"long captions {self.long_captions!r}: applies to stored embeddings only; add "
                "--text, or set it in the training"
            )
        if self.long_captions not in (None, *POLICIES):
            raise unknown("policy for long captions", self.long_captions, POLICIES)
        if self.text and len(self.captions) > 1:
            raise UserError(
                f"embeddings need one caption, not {', '.join(self.captions)}: choose one"
            )


@dataclass(frozen=True)
class Sample:
    """An image ready for the VAE, with its entries in the index."""

    id: str
    split: str
    kind: str
    captions: tuple[str, ...]  # in the order of Preparation.captions
    digest: int  # 64 bits of a hash of the file
    original: Size  # of the upright image, pixels
    crop: Size  # top, left
    pixels: np.ndarray  # uint8 [h, w, 3]
    animated: bool = False  # the file has more frames than the one that is read


@dataclass(frozen=True)
class Dropped:
    """A dropped item. `reason` is one of a few, `detail` says more."""

    id: str
    reason: str
    detail: str = ""


def with_captions(source: Source, preparation: Preparation) -> Preparation:
    """The preparation with its captions resolved; UserError if the source lacks one."""
    first = _first(source)
    fields = [*dict.fromkeys(name for item in first for name in item.captions)]
    captions = preparation.captions or source.captions or _usual(first)
    check_expressions(captions, fields)
    if not captions and first:
        raise UserError(
            f"the first {len(first)} images of the source have no captions: looked for "
            f"{source.looked_in}"
        )
    told = [text for item in first for one in captions if (text := compose(one, item.captions))]
    if told and all(_NUMBERS.fullmatch(text) for text in told):
        raise UserError(
            f"the captions of the first {len(first)} images are numbers alone, such as "
            f"{told[0]!r}: those are labels or boxes of a detector, not captions; name others with "
            "--caption, or leave these files out"
        )
    for score in preparation.filters.scores:
        if first and not any(score in item.scores for item in first):
            raise UserError(f"the first {len(first)} images of the source have no score {score}")
    return replace(preparation, captions=captions)


def unused_captions(source: Source, preparation: Preparation) -> list[str]:
    """The fields of text that are not among the preparation's captions."""
    used = {field for expression in preparation.captions for field in expression.split("+")}
    there = dict.fromkeys(name for item in _first(source) for name in item.captions)
    return [name for name in there if name not in used and name != FILE_NAME]


def _first(source: Source) -> list[Item]:
    """The first items that can be read. UserError if none can."""
    readable: list[Item] = []
    other: list[Item] = []
    for item in (item for part in source.parts() for item in source.items(part, 0, PEEK)):
        (other if item.damage or item.no_image else readable).append(item)
        if len(readable) == PEEK:
            break
    if other and not readable:
        raise UserError(
            f"none of the source's first {len(other)} images can be read: {other[0].id}: "
            f"{other[0].damage or other[0].no_image}"
        )
    return readable


def _usual(first: list[Item]) -> tuple[str, ...]:
    """The fields of all images that have any: those called captions, if there are such.

    UserError if there are captions, but none that all images have.
    """
    told = [own for item in first if (own := [n for n in item.captions if n != FILE_NAME])]
    counts = Counter(name for own in told for name in own)
    common = [name for name, count in counts.items() if count == len(told)]
    if told and not common:
        listed = ", ".join(f"{name} ({count:,})" for name, count in counts.items())
        raise UserError(
            f"the first {len(told)} captioned images have no field in common, but {listed}: choose "
            f"with --caption; --caption {'+'.join([*counts][:2])} joins those that are there"
        )
    worded = [name for name in common if is_worded(name)] or common
    whole = "tag_string" in worded  # Danbooru's: the others are its parts
    return tuple(name for name in worded if not (whole and name.startswith("tag_string_")))


def read_samples(
    source: Source, part: str, first: int, count: int, preparation: Preparation
) -> list[Sample | Dropped]:
    """Items first..first+count-1 of a part, in order."""
    return [sample_of(item, preparation) for item in source.items(part, first, count)]


def sample_of(item: Item, preparation: Preparation) -> Sample | Dropped:
    """The sample of an item, or why it is dropped."""
    if item.damage:
        return Dropped(item.id, "damaged file", item.damage)
    if item.no_image:
        return Dropped(item.id, "no image", item.no_image)
    captions = tuple(compose(expression, item.captions) for expression in preparation.captions)
    for reason, detail in _faults(item, preparation.captions, captions, preparation.filters):
        return Dropped(item.id, reason, detail)
    data = None
    try:
        data = item.read()
        image = upright(data)
        with Image.open(io.BytesIO(data)) as opened:
            animated = frames_of(opened) > 1
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on damaged files
        return Dropped(item.id, "undecodable", _why_not(data, error))
    filters, size = preparation.filters, (image.height, image.width)
    if filters.min_side is not None and min(size) < filters.min_side:
        return Dropped(item.id, "small", f"{image.width}x{image.height}")
    if filters.max_aspect is not None and max(size) > filters.max_aspect * min(size):
        return Dropped(item.id, "aspect", f"{image.width}x{image.height}")
    way = fit(size, preparation.size, preparation.step, preparation.upscale)
    if way is None:
        return Dropped(item.id, "small", f"{image.width}x{image.height}, smaller than its bucket")
    image = image.resize(way.resized[::-1], Image.Resampling.LANCZOS)
    bottom, right = way.top + way.target[0], way.left + way.target[1]
    pixels = np.asarray(image.crop((way.left, way.top, right, bottom)))
    digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    split = item.split or ("test" if digest < preparation.held_out * 2**64 else "train")
    crop = (way.top, way.left)
    return Sample(item.id, split, item.kind, captions, digest, size, crop, pixels, animated)


def upright(data: bytes) -> Image.Image:
    """An image's first frame as sRGB, rotated by its EXIF orientation, on white if transparent.

    16 bits become 8. Raises what Pillow raises on invalid files, ValueError for pixels without a
    known range.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images, which are read, and of broken EXIF
        with Image.open(io.BytesIO(data)) as opened:
            image = ImageOps.exif_transpose(opened)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # `convert` would cut off all above 255
        deep = np.asarray(image).clip(0, 65535)
        image = Image.fromarray((deep.astype(np.float32) / 257).round().astype(np.uint8))
    image = _as_srgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, PAPER)
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def _as_srgb(image: Image.Image) -> Image.Image:
    """The colours of the image's ICC profile in sRGB; the image itself without a usable one."""
    if not (profile := image.info.get("icc_profile")):
        return image
    mode = {"RGB": "RGB", "CMYK": "RGB", "RGBA": "RGBA"}.get(image.mode)
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        usual = "srgb" in ImageCms.getProfileDescription(own).lower()
        if mode is None or usual or "transparency" in image.info:
            return image
        return ImageCms.profileToProfile(image, own, _srgb(), outputMode=mode) or image
    except (ImageCms.PyCMSError, OSError, ValueError):  # broken, or of other channels
        return image


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _why_not(data: bytes | None, error: Exception) -> str:
    """Why an image cannot be read or decoded."""
    if data is None:
        return f"{type(error).__name__}: {error}"
    if not data:
        return "the file is empty"
    kinds = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"avif": "AVIF"}
    kind = kinds.get(data[8:12]) if data[4:8] == b"ftyp" else None
    if data[:2] == b"\xff\x0a" or data[4:8] == b"JXL ":
        kind = "JPEG XL"
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        return f"more than {most} megapixels: make it smaller"
    if isinstance(error, UnidentifiedImageError):
        return f"{kind or 'its format'} is not read here: convert it to PNG, WebP or JPEG"
    return f"{type(error).__name__}: {error}"


def _faults(
    item: Item, expressions: tuple[str, ...], captions: tuple[str, ...], filters: Filters
) -> Iterator[tuple[str, str]]:
    """(reason, detail) of the faults known before the image is read."""
    nsfw, similarity = item.scores.get("nsfw"), item.scores.get("similarity")
    for score in filters.scores:
        if score not in item.scores or math.isnan(item.scores[score]):
            yield "no score", score
    if filters.max_nsfw is not None and nsfw is not None and nsfw > filters.max_nsfw:
        yield "nsfw", f"{nsfw:g}"
    least = filters.min_similarity
    if least is not None and similarity is not None and similarity < least:
        yield "similarity", f"{similarity:g}"
    for expression, caption in zip(expressions, captions, strict=True):
        words = len(caption.split())
        if not words:
            yield "no caption", expression
        elif filters.min_words is not None and words < filters.min_words:
            yield "few words", str(words)
        elif filters.max_words is not None and words > filters.max_words:
            yield "many words", str(words)
