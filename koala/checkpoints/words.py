"""The words that a small model was taught: `words.json` in its folder.

A model of the mini family knows some hundred things. Whoever draws with it should see which.
"""

import json
import textwrap
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from koala.checkpoints.validate import read_json
from koala.errors import UserError
from koala.utils.atomic import write_text

FILE = "words.json"


@dataclass(frozen=True)
class Words:
    """What its training images show, in the words of their captions."""

    things: tuple[str, ...]
    looks: tuple[str, ...]
    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]
    numbers: tuple[str, ...]
    places: tuple[str, ...]

    def text(self) -> str:
        """For the terminal: a paragraph each, and what becomes of other words."""
        lists = (
            textwrap.fill(f"{name} ({len(words)}): {', '.join(words)}", 96)
            for name, words in asdict(self).items()
        )
        return "\n\n".join((*lists, "Any other word is read as the nearest of these in meaning."))

    def write(self, folder: Path) -> None:
        """Writes the file into a model's folder."""
        write_text(folder / FILE, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def read_words(folder: Path, model: str) -> Words:
    """The words of a model's folder. UserError if it lists none, as large models do."""
    if not (folder / FILE).is_file():
        raise UserError(
            f"{model} lists no words: {FILE} is in the folders of the mini family alone; a large "
            "model takes any words"
        )
    found = read_json(folder / FILE)
    return Words(**{field.name: tuple(found.get(field.name, ())) for field in fields(Words)})
