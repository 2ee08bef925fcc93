"""The interface of sources of captioned images, and the items that they yield.

A source locates images, captions and scores, and does nothing else with them. It is pickled to the
worker processes, so it holds settings and no open files.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

KINDS = ("folder", "webdataset", "parquet", "ye-pop")  # of sources, as `--as` calls them
SCORES = {  # our name of a score -> names in data sets; the first one present counts
    "nsfw": ("nsfw", "nsfw_prediction", "punsafe"),
    "similarity": ("similarity", "alt_txt_similarity", "clip_similarity"),
}
NOT_CAPTIONS = frozenset(
    ("id", "key", "url", "path", "file_name", "filename", "image", "status", "error_message",
     "exif", "sha256", "md5", "license", "split", "kind")
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One captioned image, not yet read."""

    id: str  # unique in the source
    read: Callable[[], bytes]  # the image file's bytes; OSError if it cannot be read
    captions: dict[str, str]  # by field
    scores: dict[str, float] = field(default_factory=dict)  # by the keys of SCORES
    split: str | None = None  # if the source has its own: "train", "test-pair", ...
    kind: str = "picture"


class Source(Protocol):
    """Captioned images in parts (usually files), each with its items in a fixed order."""

    @property
    def name(self) -> str:
        """Its name for `--as`."""
        ...

    @property
    def captions(self) -> tuple[str, ...]:
        """The captions that `prepare` uses by default; () for all."""
        ...

    def parts(self) -> dict[str, int]:
        """The parts in order, each with a number that changes with its content, such as its size.

        Must be cheap. UserError if there are none.
        """
        ...

    def count(self, part: str) -> int:
        """Number of items of a part. May read its table of contents; UserError if it cannot."""
        ...

    def items(self, part: str, first: int, count: int) -> Iterator[Item]:
        """Items first..first+count-1 of a part."""
        ...


def captions_of(record: dict[str, Any]) -> dict[str, str]:
    """The fields of a record that may be captions: text that is not metadata."""
    return {
        name: value.strip()
        for name, value in record.items()
        if isinstance(value, str) and value.strip() and name.lower() not in NOT_CAPTIONS
    }


def scores_of(record: dict[str, Any]) -> dict[str, float]:
    """The scores of a record, by our names."""
    found = {}
    for score, names in SCORES.items():
        values = [record[n] for n in names if isinstance(record.get(n), int | float)]
        if values:
            found[score] = float(values[0])
    return found
