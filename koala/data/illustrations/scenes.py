"""The illustration set, planned: every picture as a row that says what is drawn and how it is told.

Four kinds. An *emoji* is one drawing on white; a *colour-icon* likewise; an *icon* is a drawing of
one colour, which we choose; a *scene* is one to four emoji whose number, place and background we
choose, so that its caption is true by construction. Planning draws nothing and depends on the
settings alone; `koala.data.illustrations.pictures` renders.

Splits: `test-concept` holds base concepts that no training picture shows; `test-pair` holds
(concept, style) pairs whose concept and whose style are both seen in training, never together.
"""

import random
from dataclasses import dataclass, field

from koala.data.illustrations import art
from koala.data.illustrations.concepts import (
    Concept,
    base_concept,
    concepts,
    hashed,
    plural,
    with_article,
)

INKS = {  # colours of one-colour icons
    "red": "#d92b2b", "orange": "#f08419", "yellow": "#f2c21a", "green": "#2f9e44",
    "blue": "#2563d9", "purple": "#8338c9", "pink": "#ec5fa4", "brown": "#8a5a32",
    "black": "#1c1c1c", "grey": "#868e96", "teal": "#11999e",
}  # fmt: skip
BACKGROUNDS = {
    "white": "#ffffff", "pale yellow": "#fff4c2", "light blue": "#d5e8ff", "mint green": "#d8f5e3",
    "light grey": "#e6e6e6", "pale pink": "#ffdfe8", "black": "#1a1a1a", "dark blue": "#22356f",
}  # fmt: skip
VARIANTS = {  # one-colour art: suffix of the icon's name -> the look in words
    "mdi": {"": "solid icon"},
    "tabler": {"": "outline icon", "-filled": "solid icon"},
    "ph": {"-bold": "thick outline icon", "-fill": "solid icon", "-duotone": "duotone icon"},
    "game-icons": {"": "engraved icon"},
}
TRADEMARKS = {"apple", "windows"}  # icon names that are somebody's logo
THINGS = (  # subgroups whose members make sense in a scene
    "animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile", "animal-marine",
    "animal-bug", "food-fruit", "food-vegetable", "food-sweet", "plant-flower",
    "transport-ground", "transport-air", "transport-water", "musical-instrument", "sport",
)  # fmt: skip
OBJECTS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
NUMBERS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Illustrations:
    """What the set holds. The defaults are the whole set; `SMALL` is what a CPU can learn well."""

    styles: tuple[str, ...] = tuple(
        s.name for s in art.ART_SETS.values() if s.kind == "emoji" and not s.share_alike
    )
    groups: tuple[str, ...] = (*OBJECTS, "smileys-emotion", "people-body")
    leave_out: tuple[str, ...] = ("time", "hotel", "transport-sign")  # subgroups
    colour_icons: tuple[str, ...] = ("flat-color-icons", "icon-park", "streamline-color")
    icons: int = 12_000
    scenes: int = 20_000
    size: int = 128  # pixels a side
    test_concepts: float = 0.05  # share of base concepts held out
    test_pairs: float = 0.5  # share of seen concepts of which one style is held out
    seed: int = 0


SMALL = Illustrations(
    styles=("noto", "twemoji", "fluent-flat", "fluent-3d"),
    groups=OBJECTS,
    leave_out=(
        "time", "hotel", "transport-sign", "award-medal", "place-map", "place-other", "game",
        "arts-crafts", "sound", "music", "phone", "computer", "light-video", "book-paper", "money",
        "mail", "writing", "office", "lock", "science", "medical", "household", "other-object",
        "event", "dishware", "food-asian", "place-religious", "drink", "food-prepared", "sport",
        "sky-weather", "clothing", "place-building", "place-geographic", "tool",
    ),
    colour_icons=(),
    icons=1_500,
    scenes=3_000,
    test_pairs=0.8,
)  # fmt: skip
ILLUSTRATIONS = {"illustrations": Illustrations(), "illustrations-small": SMALL}


@dataclass(frozen=True)
class Layer:
    """A drawing in a box of the picture; box in shares of the side: left, top, side."""

    art: str
    name: str
    box: tuple[float, float, float]
    colour: str | None = None


@dataclass(frozen=True)
class Row:
    """One picture to be. `short` and `long` are its captions, `subject` the bare thing."""

    id: str
    kind: str
    concept: str
    style: str
    split: str  # train | test-concept | test-pair
    subject: str
    short: str
    long: str
    background: str
    layers: tuple[Layer, ...] = field(repr=False)


FULL = (0.06, 0.06, 0.88)
# Where 1 to 4 things stand: boxes as in Layer.
PLACES = {
    1: [(0.14, 0.14, 0.72)],
    2: [(0.04, 0.27, 0.45), (0.51, 0.27, 0.45)],
    3: [(0.28, 0.05, 0.44), (0.05, 0.51, 0.44), (0.51, 0.51, 0.44)],
    4: [(0.04, 0.04, 0.44), (0.52, 0.04, 0.44), (0.04, 0.52, 0.44), (0.52, 0.52, 0.44)],
}
BESIDE = PLACES[2]
STACKED = [(0.27, 0.04, 0.45), (0.27, 0.51, 0.45)]


def plan(settings: Illustrations) -> list[Row]:
    """All rows of the set, in an order and with ids that depend on the settings alone."""
    chosen = [
        c for c in concepts() if c.group in settings.groups and c.subgroup not in settings.leave_out
    ]
    emoji = _emoji(settings, chosen)
    seen = {(r.concept, r.layers[0].art) for r in emoji if r.split == "train"}
    rows = emoji + _colour_icons(settings)
    rows += _icons(settings, chosen)
    rows += _scenes(settings, [c for c in chosen if c.subgroup in THINGS], seen)
    return rows


def _split_of_concept(settings: Illustrations, key: str) -> str:
    return "test-concept" if hashed("concept", key) < settings.test_concepts else "train"


def _emoji(settings: Illustrations, chosen: list[Concept]) -> list[Row]:
    rows = []
    for c in chosen:
        drawn = {s: n for s in settings.styles if (n := art.drawing_of(s, c.hexcode, c.label))}
        split = _split_of_concept(settings, c.key)
        held = None
        if split == "train" and len(drawn) >= 3 and hashed("pair", c.name) < settings.test_pairs:
            held = sorted(drawn)[int(hashed("style", c.name) * len(drawn))]
        for s, name in drawn.items():
            style = art.ART_SETS[s].style
            words = ", ".join((c.subject, *c.keywords[:3]))
            rows.append(
                Row(
                    id=f"emoji-{s}-{c.hexcode.lower()}",
                    kind="emoji",
                    concept=c.name,
                    style=style,
                    split="test-pair" if s == held else split,
                    subject=c.subject,
                    short=f"{c.subject}, {style}",
                    long=f"{words}, {style}, white background",
                    background="white",
                    layers=(Layer(s, name, FULL),),
                )
            )
    return rows


def _colour_icons(settings: Illustrations) -> list[Row]:
    rows = []
    for s in settings.colour_icons:
        style = art.ART_SETS[s].style
        for name in art.names(s):
            words = " ".join(w for w in name.split("-") if not w.isdigit())
            subject = with_article(words)
            rows.append(
                Row(
                    id=f"colour-icon-{s}-{name}",
                    kind="colour-icon",
                    concept=words,
                    style=style,
                    split=_split_of_concept(settings, base_concept(words)),
                    subject=subject,
                    short=f"{subject}, {style}",
                    long=f"{_an(style)} of {subject}, white background",
                    background="white",
                    layers=(Layer(s, name, FULL),),
                )
            )
    return rows


def _an(style: str) -> str:
    return with_article(style)


def _icons(settings: Illustrations, chosen: list[Concept]) -> list[Row]:
    """One-colour drawings of the same concepts, in inks and on backgrounds drawn at random."""
    drawings = []
    for c in chosen:
        if _split_of_concept(settings, c.key) != "train" or c.name.split()[0] in INKS:
            continue
        wanted = c.key.replace(" ", "-").lower()
        for s, variants in VARIANTS.items():
            present = set(art.names(s))
            drawings += [
                (c, s, wanted + suffix, style)
                for suffix, style in variants.items()
                if wanted + suffix in present and not (s == "mdi" and wanted in TRADEMARKS)
            ]
    rng = random.Random(settings.seed)
    rows = []
    for n in range(settings.icons if drawings else 0):
        c, s, name, style = drawings[n % len(drawings)]
        ink = rng.choice([*INKS])
        background = rng.choice([b for b in BACKGROUNDS if _apart(ink, b)])
        if rng.random() < 0.4:
            background = "white" if _apart(ink, "white") else background
        subject = with_article(f"{ink} {c.key}")
        on = "" if background == "white" else f" on a {background} background"
        long = f"{_an(style)} of {subject}, one colour, on a {background} background"
        rows.append(
            Row(
                id=f"icon-{n:06d}",
                kind="icon",
                concept=c.name,
                style=style,
                split="train",
                subject=subject + on,
                short=f"{subject}{on}, {style}",
                long=long,
                background=background,
                layers=(Layer(s, name, (0.12, 0.12, 0.76), INKS[ink]),),
            )
        )
    return rows


def _apart(ink: str, background: str) -> bool:
    """Whether one can see this ink on this background."""
    dark_ground = background in {"black", "dark blue"}
    if dark_ground:
        return ink in {"red", "orange", "yellow", "green", "pink", "teal"}
    return not (ink == "yellow" and background in {"white", "pale yellow"})


def _scenes(
    settings: Illustrations, things: list[Concept], seen: set[tuple[str, str]]
) -> list[Row]:
    rng = random.Random(settings.seed + 1)
    by_style = {s: [c for c in things if (c.name, s) in seen] for s in settings.styles}
    rows = []
    for n in range(settings.scenes if things else 0):
        s = rng.choice([s for s in settings.styles if len(by_style[s]) > 1])
        one, other = rng.sample(by_style[s], 2)
        background = rng.choice([*BACKGROUNDS])
        form = rng.random()
        if form < 0.25:
            subject, drawn, boxes = one.subject, [one], PLACES[1]
        elif form < 0.6:
            count = rng.choice([*NUMBERS])
            subject, drawn = f"{NUMBERS[count]} {plural(one.name)}", [one] * count
            boxes = PLACES[count] if count > 2 or rng.random() < 0.7 else STACKED
        else:
            subject, drawn, boxes = _pair(rng, one, other)
        on = f" on a {background} background"
        style = art.ART_SETS[s].style
        names = [art.drawing_of(s, c.hexcode, c.label) for c in drawn]
        layers = tuple(Layer(s, name or "", box) for name, box in zip(names, boxes, strict=True))
        rows.append(
            Row(
                id=f"scene-{n:06d}",
                kind="scene",
                concept=" + ".join(dict.fromkeys(c.name for c in drawn)),
                style=style,
                split="train",
                subject=subject + on,
                short=f"{subject}{on}, {style}",
                long=f"a simple picture of {subject}, {style}, with a plain {background} "
                "background",
                background=background,
                layers=layers,
            )
        )
    return rows


def _pair(rng: random.Random, one: Concept, other: Concept):
    """Two different things: how it is said, what is drawn, and where."""
    a, b = one.subject, other.subject
    said, boxes = rng.choice(
        [
            (f"{a} to the left of {b}", BESIDE),
            (f"{a} on the left and {b} on the right", BESIDE),
            (f"{a} next to {b}", BESIDE),
            (f"{a} and {b}", BESIDE),
            (f"{a} to the right of {b}", BESIDE[::-1]),
            (f"{a} above {b}", STACKED),
            (f"{a} below {b}", STACKED[::-1]),
        ]
    )
    return said, [one, other], boxes
