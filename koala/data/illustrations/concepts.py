"""What the drawings show: emoji concepts with the words people use for them."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache

from koala.utils.asset_packages import package

# What a person would say where Unicode's label is a clerk's.
COMMON_NAMES = {
    "automobile": "car",
    "hot beverage": "cup of coffee",
    "locomotive": "steam train",
    "lady beetle": "ladybug",
    "honeybee": "bee",
    "deciduous tree": "tree",
    "evergreen tree": "pine tree",
    "sauropod": "brontosaurus",
    "beer mug": "mug of beer",
    "wine glass": "glass of wine",
    "meat on bone": "leg of meat",
    "cooked rice": "bowl of rice",
    "glowing star": "shining star",
    "ringed planet": "planet with rings",
    "passenger ship": "cruise ship",
    "articulated lorry": "truck",
    "racing car": "race car",
    "american football": "football",
    "wrapped gift": "gift box",
    "snowman without snow": "snowman with a hat",
    "sun behind cloud": "sun behind a cloud",
    "cloud with rain": "cloud with rain",
    "ear of corn": "ear of corn",
    "soft ice cream": "ice cream cone",
    "flying saucer": "ufo",
    "gem stone": "gemstone",
}
# Said without an article.
MASS = {
    "bacon", "badminton", "bowling", "bread", "broccoli", "butter", "camping", "confetti", "coral",
    "curry", "custard", "fire", "fog", "fondue", "garlic", "ice", "lacrosse", "lightning", "oden",
    "popcorn", "salt", "snow", "soap", "spaghetti", "sushi", "tennis", "thread", "tofu", "wood",
    "yarn",
}  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """One thing that several hands have drawn. `key` unites its faces and variants."""

    hexcode: str
    label: str  # Unicode's: "fox", "hot beverage"
    name: str  # what a person says: "fox", "cup of coffee"
    group: str  # emojibase's group, "animals-nature"
    subgroup: str  # "animal-mammal"
    keywords: tuple[str, ...]

    @property
    def key(self) -> str:
        """The base concept, by which train and test are split."""
        return base_concept(self.name)

    @property
    def subject(self) -> str:
        """With its article: "a fox", "an owl", "glasses"."""
        return with_article(self.name)


def base_concept(name: str) -> str:
    """ "dog face" -> "dog", "oncoming bus" -> "bus"."""
    return re.sub(r"^(oncoming|small|front-facing baby|baby) | face$", "", name)


@cache
def _inflect():
    import inflect

    return inflect.engine()


def with_article(name: str) -> str:
    """ "fox" -> "a fox"; plurals and mass nouns stand alone."""
    head = _head(name)
    if head.lower() in MASS or is_plural(head):
        return name
    return _inflect().a(name)


def _head(name: str) -> str:
    """ "cup of coffee" -> "cup", "green apple" -> "apple"."""
    return re.split(r" (?:of|with|on|behind|in|and) ", name)[0].split()[-1]


def is_plural(word: str) -> bool:
    """Whether a label's head noun is a plural ("grapes", but not "bus" or "octopus")."""
    if word.lower() in {"jeans", "shorts", "glasses", "sunglasses", "goggles", "scissors"}:
        return True
    if re.search(r"(ss|us|is|bus|x-ray|t-rex|lens|dress|compass)$", word.lower()):
        return False
    return bool(word.endswith("s") and _inflect().singular_noun(word))


def plural(name: str) -> str:
    """ "green apple" -> "green apples", "cup of coffee" -> "cups of coffee", "grapes" as it is."""
    return name if is_plural(_head(name)) else _inflect().plural_noun(name)


def hashed(*words: object) -> float:
    """A number in [0, 1) that depends on the words alone: the splits never move."""
    digest = hashlib.sha256("\x1f".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@cache
def concepts() -> tuple[Concept, ...]:
    """All emoji that are no flag, no skin-tone variant and no component, in Unicode's order."""
    folder = package("emojibase-data")
    data = json.loads((folder / "en" / "data.json").read_text())
    meta = json.loads((folder / "meta" / "groups.json").read_text())
    found = []
    for entry in sorted(data, key=lambda e: e.get("order", 0)):
        group = meta["groups"].get(str(entry.get("group")), "")
        if group in {"", "component", "flags"}:
            continue
        label = entry["label"].replace("’", "'")
        name = COMMON_NAMES.get(label, label)
        words = tuple(t for t in entry.get("tags", ()) if t.isascii() and t.lower() not in name)
        subgroup = meta["subgroups"][str(entry["subgroup"])]
        found.append(Concept(entry["hexcode"], label, name, group, subgroup, words))
    return tuple(found)
