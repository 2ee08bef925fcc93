"""The words that a small model was taught: `words.json` in its folder.

A model of the mini family knows some hundred things. Whoever draws with it should see which.
"""

import json
import re
import textwrap
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

from koala.checkpoints.validate import read_json
from koala.errors import UserError
from koala.utils.atomic import write_text

FILE = "words.json"
_SMALL = (  # words that say nothing that is drawn
    "a an the one of on in with and or to at by for from as is are it its this that some very "
    "i me my you your want show draw make please s"
)
_NO_WORDS = r"<[^<>]*>|\bBREAK\b"  # in a prompt
_SHOWN = 5  # words that a note names


@dataclass(frozen=True)
class Words:
    """What its training images show, in the words of their captions."""

    things: tuple[str, ...]
    looks: tuple[str, ...]
    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]
    numbers: tuple[str, ...]
    places: tuple[str, ...]
    others: tuple[str, ...]  # single words of its captions that are in none of these lists

    def text(self) -> str:
        """For the terminal: a paragraph each but for `others`, and what becomes of unknown ones."""
        lists = (
            textwrap.fill(f"{name} ({len(words)}): {', '.join(words)}", 96)
            for name, words in asdict(self).items()
            if name != "others"
        )
        return "\n\n".join((*lists, "Any other word is read as the nearest of these in meaning."))

    @cached_property
    def single(self) -> frozenset[str]:
        """All of them, word by word."""
        every = " ".join(word for words in asdict(self).values() for word in words)
        return frozenset(single_words(every))

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that are none of these."""
        asked = single_words(re.sub(_NO_WORDS, " ", prompt))
        known = self.single.union(_SMALL.split())
        return [word for word in asked if word not in known]

    def note(self, prompt: str, model: str) -> str | None:
        """A line about words of a prompt that the model was not taught; None without any."""
        unknown = self.unknown(prompt)
        if not unknown:
            return None
        named = ", ".join(map(repr, unknown[:_SHOWN])) + (", ..." if unknown[_SHOWN:] else "")
        return (
            f"{model} was not taught {named}: what it draws is the nearest that it knows, or "
            "something else (koala generate --list-words)"
        )

    def write(self, folder: Path) -> None:
        """Writes the file into a model's folder."""
        write_text(folder / FILE, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def single_words(text: str) -> list[str]:
    """The words of a text in lower case, each once, in their order."""
    return list(dict.fromkeys(re.findall(r"[^\W\d_]+", text.lower())))


def words_in(folder: Path) -> Words | None:
    """The words of a model's folder; None if it lists none, as large models do."""
    if not (folder / FILE).is_file():
        return None
    found = read_json(folder / FILE)
    return Words(**{field.name: tuple(found.get(field.name, ())) for field in fields(Words)})


def read_words(folder: Path, model: str) -> Words:
    """The words of a model's folder. UserError if it lists none."""
    words = words_in(folder)
    if words is None:
        raise UserError(
            f"{model} lists no words: {FILE} is in the folders of the mini family alone; a large "
            "model takes any words"
        )
    return words
