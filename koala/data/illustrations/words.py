"""Which words the captions of a prepared folder teach."""

from dataclasses import replace
from pathlib import Path

from koala.checkpoints.words import Words, single_words
from koala.data.illustrations.colours import BACKGROUNDS, INKS
from koala.data.illustrations.images import ImageSet
from koala.data.illustrations.scenes import NUMBERS

CAPTIONS = ("short", "subject", "long", "everyday")  # that training draws from
PLACES = ("to the left of", "to the right of", "above", "below", "next to")


def words_of(folder: str | Path) -> Words:
    """The words of the training images. UserError if there are no prepared illustrations."""
    images = ImageSet(folder)
    rows = [images.rows[i] for i in images.select("train")]
    text = " ".join(row["short"] for row in rows)
    words = Words(
        things=tuple(sorted({row["concept"] for row in rows if row["kind"] == "emoji"})),
        looks=tuple(sorted({row["style"] for row in rows})),
        colours=tuple(INKS),
        backgrounds=tuple(BACKGROUNDS),
        numbers=tuple(NUMBERS.values()),
        places=tuple(place for place in PLACES if place in text),
        others=(),
    )
    every = " ".join(row[caption] for row in rows for caption in CAPTIONS)
    return replace(words, others=tuple(sorted({*single_words(every)} - words.single)))
