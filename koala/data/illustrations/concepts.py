"""Emoji concepts, with the words people use for them."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from koala.data.illustrations.colours import INKS
from koala.utils.asset_packages import package

# Common names for Unicode's formal labels.
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
    "ewe": "sheep",
    "cooking": "fried egg in a pan",
    "steaming bowl": "bowl of noodles",
    "teacup without handle": "cup of tea",
    "globe showing Americas": "globe",
    "beach with umbrella": "beach with an umbrella",
    "video game": "game controller",
    "mirror ball": "disco ball",
    "thread": "spool of thread",
    "yarn": "ball of yarn",
    "closed mailbox with raised flag": "mailbox",
    "woman's hat": "sun hat",
    "woman's clothes": "blouse",
    "man's shoe": "shoe",
    "woman's sandal": "sandal",
    "woman's boot": "boot",
    "one-piece swimsuit": "swimsuit",
    "billed cap": "baseball cap",
    "carpentry saw": "saw",
    "horizontal traffic light": "traffic light",
    "rescue worker's helmet": "helmet",
    "high-heeled shoe": "high heel",
    "thong sandal": "flip-flop",
    "mantelpiece clock": "clock",
    "hourglass done": "hourglass",
    "closed book": "book",
    "magnifying glass tilted left": "magnifying glass",
    "optical disk": "compact disc",
    "headphone": "headphones",
    "couch and lamp": "couch and a lamp",
    "red paper lantern": "paper lantern",
    "old key": "antique key",
    "locked": "padlock",
    "straight ruler": "ruler",
    "wastebasket": "trash can",
    "round pushpin": "push pin",
    "bellhop bell": "desk bell",
    "bottle with popping cork": "bottle of champagne",
    "cocktail glass": "cocktail",
    "tumbler glass": "glass of whisky",
    "cup with straw": "cup with a straw",
    "beverage box": "juice box",
    "fork and knife with plate": "plate with a fork and a knife",
    "fork and knife": "fork and a knife",
    "shallow pan of food": "pan of food",
    "poultry leg": "chicken leg",
    "cheese wedge": "wedge of cheese",
    "baguette bread": "baguette",
    "cut of meat": "steak",
    "roasted sweet potato": "sweet potato",
    "spiral shell": "shell",
    "jack-o-lantern": "jack-o'-lantern",
    "diya lamp": "oil lamp",
    "fishing pole": "fishing rod",
    "flying disc": "frisbee",
    "ping pong": "ping pong paddle",
    "tennis": "tennis racket",
    "ice hockey": "hockey stick",
    "bullseye": "target with an arrow",
    "pool 8 ball": "billiard ball",
    "game die": "die",
    "musical keyboard": "piano",
    "night with stars": "starry night",
    "snow-capped mountain": "snowy mountain",
    "house with garden": "house with a garden",
    "classical building": "temple with columns",
    "water wave": "wave",
    "high voltage": "lightning bolt",
    "umbrella with rain drops": "umbrella in the rain",
    "police car light": "siren",
    "T-Rex": "tyrannosaurus",
}
# The same thing in other words; a caption now and then says one of these.
OTHER_NAMES = {
    "car": ("automobile", "auto"), "truck": ("lorry",), "airplane": ("aeroplane", "plane", "jet"),
    "bicycle": ("bike", "cycle"), "motorcycle": ("motorbike",), "sailboat": ("boat",),
    "ship": ("vessel",), "bus": ("coach",),
    "taxi": ("cab",), "helicopter": ("chopper",), "rocket": ("spaceship", "space rocket"),
    "dog": ("puppy", "hound", "doggy"), "cat": ("kitten", "kitty", "feline"), "pig": ("piglet",),
    "rabbit": ("bunny", "hare"), "horse": ("pony", "stallion"), "cow": ("cattle",),
    "chicken": ("hen",), "baby chick": ("chick",), "mouse": ("little mouse",), "frog": ("toad",),
    "turtle": ("tortoise",), "bear": ("grizzly bear",), "sheep": ("lamb",), "donkey": ("mule",),
    "ladybug": ("ladybird",), "bug": ("insect", "caterpillar"), "crocodile": ("alligator",),
    "shell": ("seashell", "sea shell"), "tree": ("oak tree",), "pine tree": ("fir tree", "fir"),
    "red apple": ("apple",), "doughnut": ("donut",), "french fries": ("chips", "fries"),
    "hamburger": ("burger",), "eggplant": ("aubergine",), "ear of corn": ("corn", "corn cob"),
    "pizza": ("slice of pizza", "pizza slice"), "cookie": ("biscuit",), "candy": ("sweet",),
    "cup of coffee": ("coffee", "hot drink", "mug of coffee"), "glass of wine": ("wine",),
    "mug of beer": ("beer",), "potted plant": ("house plant",), "birthday cake": ("cake",),
    "chocolate bar": ("chocolate",), "teapot": ("kettle",),
    "television": ("tv", "television set"), "mobile phone": ("smartphone", "cell phone", "phone"),
    "laptop": ("notebook computer",), "desktop computer": ("computer", "pc"),
    "headphones": ("headset",), "light bulb": ("lightbulb", "lamp"), "flashlight": ("torch",),
    "camera": ("photo camera",), "glasses": ("pair of glasses", "spectacles", "eyeglasses"),
    "sunglasses": ("pair of sunglasses", "shades"), "jeans": ("pair of jeans", "trousers"),
    "socks": ("pair of socks",), "gloves": ("pair of gloves",), "scissors": ("pair of scissors",),
    "shorts": ("pair of shorts",), "t-shirt": ("shirt", "tee shirt"), "running shoe": ("sneaker",),
    "purse": ("clutch",), "backpack": ("rucksack", "schoolbag"), "necktie": ("tie",),
    "gemstone": ("diamond", "jewel"), "ring": ("diamond ring",), "crown": ("king's crown",),
    "trash can": ("dustbin", "bin"), "couch and a lamp": ("sofa", "couch"), "bathtub": ("bath",),
    "padlock": ("lock",), "gift box": ("present", "gift"), "balloon": ("toy balloon",),
    "teddy bear": ("teddy", "plush bear"), "package": ("cardboard box", "parcel", "box"),
    "sun": ("shining sun",), "crescent moon": ("moon", "half moon"), "fire": ("flame",),
    "droplet": ("water drop", "drop of water"), "lightning bolt": ("flash of lightning",),
    "ufo": ("flying saucer",), "robot": ("robot head",),
    "ghost": ("spook",), "house": ("home", "cottage"), "office building": ("skyscraper",),
    "castle": ("fortress", "palace"), "tent": ("camping tent",), "soccer ball": ("football ball",),
    "treasure chest": ("chest",), "wrench": ("spanner",), "broom": ("broomstick",),
    "piano": ("keyboard instrument",), "violin": ("fiddle",),
    "guitar": ("electric guitar",), "globe": ("world globe",),
    "red heart": ("heart", "love heart"), "pile of poo": ("poop",), "book": ("closed book",),
}  # fmt: skip
# Said without an article.
MASS = {
    "bacon", "badminton", "bowling", "bread", "broccoli", "butter", "camping", "confetti", "coral",
    "curry", "custard", "fire", "fog", "fondue", "garlic", "ice", "lacrosse", "lightning", "oden",
    "popcorn", "salt", "snow", "soap", "spaghetti", "sushi", "tennis", "thread", "tofu", "wood",
    "yarn",
}  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """A thing drawn in several art sets. `key` unites its faces and variants."""

    hexcode: str
    label: str  # Unicode's: "fox", "hot beverage"
    name: str  # what a person says: "fox", "cup of coffee"
    group: str  # emojibase's group, "animals-nature"
    subgroup: str  # "animal-mammal"
    keywords: tuple[str, ...]

    @property
    def key(self) -> str:
        """The base concept, which decides the split."""
        return base_concept(self.name)

    @property
    def subject(self) -> str:
        """With its article: "a fox", "an owl", "glasses"."""
        return with_article(self.name)

    @property
    def thing(self) -> str:
        """Without a colour: "red apple" -> "apple", so that another colour can be named."""
        first, _, rest = self.name.partition(" ")
        return rest if rest and first.lower() in INKS else self.name


def base_concept(name: str) -> str:
    """ "dog face" -> "dog", "oncoming bus" -> "bus"."""
    return re.sub(r"^(oncoming|small|front-facing baby|baby) | face$", "", name)


@cache
def _inflect() -> Any:
    import inflect

    return inflect.engine()


@cache
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
    if word.lower() in {"jeans", "shorts", "glasses", "sunglasses", "goggles", "scissors", "skis"}:
        return True
    if re.search(r"(ss|us|is|bus|x-ray|t-rex|lens|dress|compass)$", word.lower()):
        return False
    return bool(word.endswith("s") and _inflect().singular_noun(word))


@cache
def plural(name: str) -> str:
    """ "green apple" -> "green apples", "cup of coffee" -> "cups of coffee", "grapes" as it is."""
    return name if is_plural(_head(name)) else _inflect().plural_noun(name)


def hashed(*words: object) -> float:
    """A number in [0, 1) that depends on the words alone, so splits are stable."""
    digest = hashlib.sha256("\x1f".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@cache
def concepts() -> tuple[Concept, ...]:
    """All emoji except flags, skin-tone variants and components, in Unicode's order."""
    folder = package("emojibase-data")
    data = json.loads((folder / "en" / "data.json").read_text("utf-8"))
    meta = json.loads((folder / "meta" / "groups.json").read_text("utf-8"))
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
