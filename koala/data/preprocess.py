"""Turns items into samples: filters, captions, bucket and crop, everything but the encoding.

This runs in the worker processes, so it does not import torch. An item becomes a `Sample`, or a
`Dropped` with a reason; no single item can stop the run.
"""

import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from koala.data.buckets import STEP, Size, buckets, fit
from koala.data.captions import POLICIES, check_expressions, compose
from koala.data.items import SCORES, Item, Source
from koala.errors import UserError, unknown

PAPER = (255, 255, 255)  # background of transparent images
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


@dataclass(frozen=True)
class Dropped:
    """A dropped item. `reason` is one of a few, `detail` says more."""

    id: str
    reason: str
    detail: str = ""


def with_captions(source: Source, preparation: Preparation) -> Preparation:
    """The preparation with its captions resolved; UserError if the source lacks one."""
    there = (item for part in source.parts() for item in source.items(part, 0, PEEK))
    first = list(islice((item for item in there if not item.damage), PEEK))
    fields = list(dict.fromkeys(name for item in first for name in item.captions))
    told = [item.captions for item in first if item.captions]
    common = [name for name in fields if all(name in captions for captions in told)]
    captions = preparation.captions or source.captions or tuple(common or fields)
    check_expressions(captions, fields)
    if not captions and first:
        raise UserError(
            f"the first {len(first)} images of the source have no captions: looked for "
            f"{source.looked_in}"
        )
    for score in preparation.filters.scores:
        if first and not any(score in item.scores for item in first):
            raise UserError(f"the first {len(first)} images of the source have no score {score}")
    return replace(preparation, captions=captions)


def read_samples(
    source: Source, part: str, first: int, count: int, preparation: Preparation
) -> list[Sample | Dropped]:
    """Items first..first+count-1 of a part, in order."""
    return [sample_of(item, preparation) for item in source.items(part, first, count)]


def sample_of(item: Item, preparation: Preparation) -> Sample | Dropped:
    """The sample of an item, or why it is dropped."""
    if item.damage:
        return Dropped(item.id, "damaged file", item.damage)
    captions = tuple(compose(expression, item.captions) for expression in preparation.captions)
    for reason, detail in _faults(item, captions, preparation.filters):
        return Dropped(item.id, reason, detail)
    try:
        data = item.read()
        image = upright(data)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on damaged files
        return Dropped(item.id, "undecodable", f"{type(error).__name__}: {error}")
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
    return Sample(item.id, split, item.kind, captions, digest, size, crop, pixels)


def upright(data: bytes) -> Image.Image:
    """An image's first frame as RGB, rotated by its EXIF orientation, on white if transparent.

    Raises what Pillow raises on invalid files.
    """
    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, PAPER)
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def _faults(item: Item, captions: tuple[str, ...], filters: Filters) -> Iterator[tuple[str, str]]:
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
    for caption in captions:
        words = len(caption.split())
        if not words:
            yield "no caption", ""
        elif filters.min_words is not None and words < filters.min_words:
            yield "few words", str(words)
        elif filters.max_words is not None and words > filters.max_words:
            yield "many words", str(words)
