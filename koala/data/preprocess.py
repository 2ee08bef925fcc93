"""From an item to a sample: filters, captions, bucket and crop. Everything but the encoding.

This runs in the processes that read pictures, so it imports no torch. An item becomes either a
`Sample` or a `Dropped` with its reason; nothing about one item can stop the run.
"""

import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from koala.data.buckets import STEP, Size, buckets, fit
from koala.data.captions import compose
from koala.data.items import SCORES, Item, Source
from koala.errors import UserError

PAPER = (255, 255, 255)  # what lies under transparent pictures
Stored = Literal["moments", "draw", "pixels"]


@dataclass(frozen=True)
class Filters:
    """Which items are left out. None: the filter is off."""

    min_side: int | None = None  # pixels of the shorter side
    max_aspect: float | None = 4.0  # longer side over shorter
    min_words: int | None = None  # of every caption
    max_words: int | None = None
    max_nsfw: float | None = None  # an item without the score is left out too
    min_similarity: float | None = None  # likewise
    keep_duplicates: bool = False  # of the file's bytes

    def __post_init__(self) -> None:
        if self.max_aspect is not None and self.max_aspect < 1:
            raise UserError(f"aspect {self.max_aspect}: longer over shorter side, at least 1")
        for name in ("min_side", "min_words", "max_words"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name.replace('_', ' ')} {value}: at least 1")

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores that it asks for."""
        asked = {"nsfw": self.max_nsfw, "similarity": self.min_similarity}
        return tuple(score for score in SCORES if asked[score] is not None)


@dataclass(frozen=True)
class Preparation:
    """All that decides what a folder of latents holds, besides the source and the encoder."""

    size: int = 1024  # pixels of the square bucket's side
    captions: tuple[str, ...] = ()  # fields, or fields joined by "+"; one column each
    filters: Filters = Filters()
    upscale: bool = False  # whether pictures smaller than their bucket are enlarged
    mirror: bool = False  # whether a training shows half of the pictures left to right
    # The posterior's mean and deviation; one draw from it, half the bytes; or the cropped pictures,
    # twelve times the bytes, which a training encodes itself.
    posterior: Stored = "moments"
    text: bool = False  # whether the captions' embeddings are stored
    long_captions: str | None = None  # how stored embeddings tell them; None: by sentences
    held_out: float = 0.002  # share of the pictures that becomes the split "test"
    unit: int = 4096  # items that are worked off at once: what a killed run loses at most
    step: int = STEP  # pixels between the sides of neighbouring buckets

    def __post_init__(self) -> None:
        buckets(self.size, self.step)
        if not 0 <= self.held_out < 1:
            raise UserError(f"held out {self.held_out}: a share, at least 0 and below 1")
        if self.unit < 1:
            raise UserError(f"unit {self.unit}: at least 1 item")
        if self.long_captions is not None and not self.text:
            raise UserError(
                f"long captions {self.long_captions!r}: says how embeddings are made, and none are "
                "asked for (--text); otherwise the training decides"
            )
        if self.text and len(self.captions) > 1:
            raise UserError(
                f"embeddings are of one caption, not of {', '.join(self.captions)}: name one"
            )


@dataclass(frozen=True)
class Sample:
    """A picture as the VAE wants it, and what the index says of it."""

    id: str
    split: str
    kind: str
    captions: tuple[str, ...]  # in the order of Preparation.captions
    digest: int  # 64 bits of a hash of the file
    original: Size  # of the upright picture, pixels
    crop: Size  # top, left
    pixels: np.ndarray  # uint8 [h, w, 3]


@dataclass(frozen=True)
class Dropped:
    """An item that was left out. `reason` is one of a few, `detail` says more."""

    id: str
    reason: str
    detail: str = ""


def read_samples(
    source: Source, part: str, first: int, count: int, preparation: Preparation
) -> list[Sample | Dropped]:
    """Items first..first+count-1 of a part, in order."""
    return [sample_of(item, preparation) for item in source.items(part, first, count)]


def sample_of(item: Item, preparation: Preparation) -> Sample | Dropped:
    """What becomes of an item."""
    captions = tuple(compose(expression, item.captions) for expression in preparation.captions)
    for reason, detail in _faults(item, captions, preparation.filters):
        return Dropped(item.id, reason, detail)
    try:
        data = item.read()
        image = upright(data)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        return Dropped(item.id, "undecodable", f"{type(error).__name__}: {error}")
    filters, size = preparation.filters, (image.height, image.width)
    if filters.min_side is not None and min(size) < filters.min_side:
        return Dropped(item.id, "small", f"{image.width}x{image.height}")
    if filters.max_aspect is not None and max(size) > filters.max_aspect * min(size):
        return Dropped(item.id, "aspect", f"{image.width}x{image.height}")
    way = fit(size, preparation.size, preparation.step, preparation.upscale)
    if way is None:
        return Dropped(item.id, "small", f"{image.width}x{image.height}, less than its bucket")
    image = image.resize(way.resized[::-1], Image.Resampling.LANCZOS)
    bottom, right = way.top + way.target[0], way.left + way.target[1]
    pixels = np.asarray(image.crop((way.left, way.top, right, bottom)))
    digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    split = item.split or ("test" if digest < preparation.held_out * 2**64 else "train")
    crop = (way.top, way.left)
    return Sample(item.id, split, item.kind, captions, digest, size, crop, pixels)


def upright(data: bytes) -> Image.Image:
    """A picture's first frame as RGB, turned as its EXIF says, on white where transparent.

    Raises whatever Pillow raises on a file that is none.
    """
    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, PAPER)
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def _faults(item: Item, captions: tuple[str, ...], filters: Filters) -> Iterator[tuple[str, str]]:
    """(reason, detail) of all that can be known before the picture is read."""
    nsfw, similarity = item.scores.get("nsfw"), item.scores.get("similarity")
    for score in filters.scores:
        if score not in item.scores or math.isnan(item.scores[score]):
            yield "no score", score
    if filters.max_nsfw is not None and nsfw is not None and nsfw > filters.max_nsfw:
        yield "nsfw", f"{nsfw:g}"
    least = filters.min_similarity
    if least is not None and similarity is not None and similarity < least:
        yield "similarity", f"{similarity:g}"
    for caption in captions:
        words = len(caption.split())
        if not words:
            yield "no caption", ""
        elif filters.min_words is not None and words < filters.min_words:
            yield "few words", str(words)
        elif filters.max_words is not None and words > filters.max_words:
            yield "many words", str(words)
