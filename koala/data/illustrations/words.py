"""Which words the captions of a prepared folder teach."""

from pathlib import Path

from koala.checkpoints.words import Words
from koala.data.illustrations.colours import BACKGROUNDS, INKS
from koala.data.illustrations.images import ImageSet
from koala.data.illustrations.scenes import NUMBERS

PLACES = ("to the left of", "to the right of", "above", "below", "next to")


def words_of(folder: str | Path) -> Words:
    """The words of the training images. UserError if there are no prepared illustrations."""
    images = ImageSet(folder)
    rows = [images.rows[i] for i in images.select("train")]
    text = " ".join(row["short"] for row in rows)
    return Words(
        things=tuple(sorted({row["concept"] for row in rows if row["kind"] == "emoji"})),
        looks=tuple(sorted({row["style"] for row in rows})),
        colours=tuple(INKS),
        backgrounds=tuple(BACKGROUNDS),
        numbers=tuple(NUMBERS.values()),
        places=tuple(place for place in PLACES if place in text),
    )
