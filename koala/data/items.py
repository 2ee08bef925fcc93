"""What a source of captioned pictures gives, and what it is asked.

A source knows where pictures, captions and scores lie; what becomes of them is not its business.
It is pickled to the processes that read pictures, so it holds settings and nothing open.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

KINDS = ("folder", "webdataset", "parquet", "ye-pop")  # of sources, as `--as` calls them
SCORES = {  # our name of a score -> what collections call it; the first that is there counts
    "nsfw": ("nsfw", "nsfw_prediction", "punsafe"),
    "similarity": ("similarity", "alt_txt_similarity", "clip_similarity"),
}
NOT_CAPTIONS = frozenset(
    ("id", "key", "url", "path", "file_name", "filename", "image", "status", "error_message",
     "exif", "sha256", "md5", "license", "split", "kind")
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One captioned picture, not yet read."""

    id: str  # nothing else in the source has it
    read: Callable[[], bytes]  # the picture's file; OSError where it cannot be read
    captions: dict[str, str]  # by field
    scores: dict[str, float] = field(default_factory=dict)  # by the keys of SCORES
    split: str | None = None  # where the source has its own: "train", "test-pair", ...
    kind: str = "picture"


class Source(Protocol):
    """Captioned pictures in parts (files, as a rule), each with its items in a fixed order."""

    @property
    def name(self) -> str:
        """As `--as` calls it."""
        ...

    @property
    def captions(self) -> tuple[str, ...]:
        """What `prepare` takes where no caption is asked for; () for all that there are."""
        ...

    def parts(self) -> dict[str, int]:
        """The parts in order, each with a number that changes when the part does, as its bytes.

        Cheap. UserError where there are none.
        """
        ...

    def count(self, part: str) -> int:
        """How many items a part has. May read its table of contents; UserError if it cannot."""
        ...

    def items(self, part: str, first: int, count: int) -> Iterator[Item]:
        """Items first..first+count-1 of a part."""
        ...


def captions_of(record: dict[str, Any]) -> dict[str, str]:
    """The fields of a record that may be captions: text, and no bookkeeping."""
    return {
        name: value.strip()
        for name, value in record.items()
        if isinstance(value, str) and value.strip() and name.lower() not in NOT_CAPTIONS
    }


def scores_of(record: dict[str, Any]) -> dict[str, float]:
    """The scores that a record has, by our names."""
    found = {}
    for score, names in SCORES.items():
        values = [record[n] for n in names if isinstance(record.get(n), int | float)]
        if values:
            found[score] = float(values[0])
    return found
