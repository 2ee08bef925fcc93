"""The interface of sources of captioned images, and the items that they yield.

A source locates images, captions and scores, and does nothing else with them. It is pickled to the
worker processes, so it holds settings and no open files.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Protocol

KINDS = (
    "folder",
    "webdataset",
    "parquet",
    "saved",
    "datasets",
    "ye-pop",
)  # of sources, as `--as` calls them
SCORES = {  # our name of a score -> names in data sets; the first one present counts
    "nsfw": ("nsfw", "nsfw_prediction", "punsafe"),
    "similarity": ("similarity", "alt_txt_similarity", "clip_similarity"),
}
FILE_NAME = "file_name"  # the caption in the image's file name: used only if it is asked for
IMAGE_NAMES = (  # columns that name an image's file
    "file_name", "filename", "image", "image_path", "path", "file", "image_name", "image_file",
    "image_filename", "img", "img_path", "filepath", "file_path", "relative_path",
)  # fmt: skip
NOT_CAPTIONS = frozenset(
    (*IMAGE_NAMES, "id", "uid", "key", "url", "status", "error_message", "exif", "sha256", "md5",
     "hash", "phash", "license", "split", "kind", "language", "lang", "mime", "mime_type",
     "mimetype", "format", "source", "dataset", "author", "date", "created_at", "timestamp",
     "width", "height", "original_width", "original_height", "pwatermark", "aesthetic", "rating",
     "file_ext", "file_url",
     *(name for names in SCORES.values() for name in names))
)  # fmt: skip
HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")  # names of such files or folders
_SPLIT = re.compile(rf"({'|'.join(HELD_OUT)})(?=[-_.]|$)", re.IGNORECASE)
_TEXTS = re.compile("caption|text|txt|prompt|descri|sentence|title|tag|comment", re.IGNORECASE)
_BOORU = re.compile(r"tag_string(?:_\w+)?")  # tags with `_` inside and spaces between
_ANSWERING = ("gpt", "assistant", "model")  # who answers, in a conversation
_NUMBER = re.compile("(?:^|_)(?:id|number|num|index|idx|count)$", re.IGNORECASE)
_REPEATS = re.compile(r"repeated (\d+) times")


@dataclass(frozen=True)
class Item:
    """One captioned image, not yet read."""

    id: str  # unique in the source
    read: Callable[[], bytes]  # the image file's bytes; OSError if it cannot be read
    captions: dict[str, str]  # by field
    scores: dict[str, float] = field(default_factory=dict)  # by the keys of SCORES
    split: str | None = None  # if the source has its own: "train", "test-pair", ...
    kind: str = "picture"
    damage: str = ""  # of the file that the item stands for: nothing more can be read of it
    no_image: str = ""  # why there is none, though the source names one


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

    @property
    def looked_in(self) -> str:
        """Where it looks for captions, for the message that there are none."""
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


def damaged(part: str, why: object) -> Item:
    """Stands for what cannot be read of a damaged file, so that it is counted and reported."""
    return Item(
        "the source" if part == "." else part, bytes, {}, damage=f"{why}: download it again"
    )


def captions_of(record: dict[str, Any]) -> dict[str, str]:
    """The fields of a record that may be captions: text that is not metadata.

    A list of captions gives "name.0", "name.1", ..., a structure "name.key"; tags are one caption,
    and Danbooru's are written as text: "1girl long_hair" is "1girl, long hair". Of a conversation
    about the image, as LLaVA's, the caption is the first answer.
    """
    found: dict[str, str] = {}
    for name, value in record.items():
        if name.lower() in NOT_CAPTIONS or _NUMBER.search(name):
            continue
        if isinstance(value, list) and (answer := _answer(value)):
            found[name] = answer
            continue
        if isinstance(value, list | dict) and not _TEXTS.search(name):
            continue
        found |= {key: text.strip() for key, text in _texts(name, value) if text.strip()}
    return found


def _answer(turns: list[Any]) -> str:
    """What is first answered in a conversation, as LLaVA or OpenAI write one; "" if it is none."""
    for turn in turns:
        if not isinstance(turn, dict):
            return ""
        if turn.get("from", turn.get("role")) in _ANSWERING:
            said = turn.get("value", turn.get("content"))
            parts = said if isinstance(said, list) else [said]
            texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
            return " ".join(text.strip() for text in texts if isinstance(text, str))
    return ""


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """(name, text) of every text in a value."""
    if isinstance(value, str):
        yield name, _tags(value.split()) if _BOORU.fullmatch(name) else value
    elif isinstance(value, list) and "tag" in name.lower():
        yield name, _tags([one.get("name") if isinstance(one, dict) else one for one in value])
    elif isinstance(value, list | dict):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in inner:
            if str(key).lower() not in NOT_CAPTIONS:
                yield from _texts(f"{name}.{key}", one)


def _tags(tags: list[Any]) -> str:
    """Tags as one text; those of three letters, such as `^_^`, keep their `_`."""
    texts = [str(tag).strip() for tag in tags if tag is not None]
    return ", ".join(t.replace("_", " ") if len(t) > 3 else t for t in texts if t)


def is_worded(name: str) -> bool:
    """Whether a field's name says that it holds captions, or tags."""
    return bool(_TEXTS.search(name))


def scores_of(record: dict[str, Any]) -> dict[str, float]:
    """The scores of a record, by our names; text that is no number is no score."""
    found = {}
    for score, names in SCORES.items():
        values = [value for n in names if (value := _number(record.get(n))) is not None]
        if values:
            found[score] = values[0]
    return found


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return None if math.isnan(number) and isinstance(value, str) else number


# --- what a place says of its images --------------------------------------------------------


def held_out(parts: Iterable[str]) -> frozenset[str]:
    """The parts of which the source says that they are not for training: `test-00000.parquet`.

    Unless all are: then they were named on purpose.
    """
    parts = list(parts)
    found = frozenset(part for part in parts if _says_held_out(PurePosixPath(part)))
    return frozenset() if len(found) == len(parts) else found


def _says_held_out(part: PurePosixPath) -> bool:
    folders = {folder.lower() for folder in part.parts[:-1]}
    return bool(_SPLIT.match(part.name)) or bool(folders & {*HELD_OUT})


def repeated(times: int) -> str:
    """The kind of images that an epoch shows several times."""
    return "picture" if times == 1 else f"repeated {times} times"


def repeats_of(kind: str) -> int:
    """How often an epoch shows the images of a kind, if the training does not say otherwise."""
    found = _REPEATS.fullmatch(kind)
    return int(found[1]) if found else 1
