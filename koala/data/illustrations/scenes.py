"""Plans the illustration set: one `PlannedImage` per image, with its drawing and captions.

Five kinds. An *emoji* is one drawing on white; so is a *colour-icon*; a *painted* emoji has its
main colour changed to a named one; an *icon* is a drawing of one colour, which we choose; a *scene*
is one to four emoji whose number, place, background and, in some, colour we choose. So the captions
of the last three are true by construction. Planning draws nothing and depends on the settings
alone; `koala.data.illustrations.images` renders.

Splits: `test-concept` holds base concepts that no training image shows; `test-pair` holds
(concept, style) pairs whose concept and whose style are both seen in training, never together.
"""

import random
from dataclasses import dataclass, field

from koala.data.illustrations import art
from koala.data.illustrations.colours import BACKGROUNDS, INKS, OTHER_WORDS, apart
from koala.data.illustrations.concepts import (
    OTHER_NAMES,
    Concept,
    base_concept,
    concepts,
    hashed,
    plural,
    with_article,
)
from koala.data.illustrations.everyday import NAMES, UNSEEN

VARIANTS = {  # one-colour art: suffix of the icon's name -> the look in words
    "mdi": {"": "solid icon"},
    "tabler": {"": "outline icon", "-filled": "solid icon"},
    "ph": {"-bold": "thick outline icon", "-fill": "solid icon", "-duotone": "duotone icon"},
    "game-icons": {"": "engraved icon"},
}
TRADEMARKS = {"apple", "windows"}  # icon names that are somebody's logo
SCENERY = ("place-geographic", "place-building", "place-religious", "sky-weather", "place-map")
OBJECTS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
NUMBERS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Illustrations:
    """Settings of the set. The defaults are the full set; a CPU can learn `SMALL` well."""

    styles: tuple[str, ...] = tuple(
        s.name for s in art.ART_SETS.values() if s.kind == "emoji" and not s.share_alike
    )
    groups: tuple[str, ...] = (*OBJECTS, "smileys-emotion", "people-body")
    leave_out: tuple[str, ...] = ("time", "hotel", "transport-sign")  # subgroups
    names: tuple[str, ...] | None = None  # of concepts; None: all of these groups
    colour_icons: tuple[str, ...] = ("flat-color-icons", "icon-park", "streamline-color")
    painted: int = 20_000
    icons: int = 12_000
    scenes: int = 40_000
    size: int = 128  # pixels a side
    test_concepts: float = 0.05  # share of base concepts held out
    unseen: tuple[str, ...] = ()  # further base concepts to hold out
    test_pairs: float = 0.5  # share of seen concepts of which one style is held out
    seed: int = 0


SMALL = Illustrations(
    styles=("noto", "twemoji", "fluent-flat", "fluent-3d"),
    groups=(*OBJECTS, "smileys-emotion"),
    leave_out=(),
    names=NAMES,
    colour_icons=(),
    painted=8_000,
    icons=3_000,
    scenes=16_000,
    test_concepts=0.0,
    unseen=UNSEEN,
)
ILLUSTRATIONS = {"illustrations": Illustrations(), "illustrations-small": SMALL}


Box = tuple[float, float, float]


@dataclass(frozen=True)
class Layer:
    """A drawing in a box of the image; box in shares of the side: left, top, side."""

    art: str
    name: str
    box: Box
    ink: str | None = None  # of an icon, or the new main colour of an emoji


@dataclass(frozen=True)
class PlannedImage:
    """One planned image. `subject` is the bare thing; `everyday` is phrased as people type."""

    id: str
    kind: str
    concept: str
    style: str
    split: str  # train | test-concept | test-pair
    subject: str
    short: str
    long: str
    everyday: str
    background: str
    layers: tuple[Layer, ...] = field(repr=False)


FULL = (0.06, 0.06, 0.88)
# Where 1 to 4 things stand.
PLACES = {
    1: [(0.14, 0.14, 0.72)],
    2: [(0.04, 0.27, 0.45), (0.51, 0.27, 0.45)],
    3: [(0.28, 0.05, 0.44), (0.05, 0.51, 0.44), (0.51, 0.51, 0.44)],
    4: [(0.04, 0.04, 0.44), (0.52, 0.04, 0.44), (0.04, 0.52, 0.44), (0.52, 0.52, 0.44)],
}
BESIDE = PLACES[2]
STACKED = [(0.27, 0.04, 0.45), (0.27, 0.51, 0.45)]


def plan(settings: Illustrations) -> list[PlannedImage]:
    """All images of the set; their order and ids depend on the settings alone."""
    chosen = [
        c
        for c in concepts()
        if c.group in settings.groups
        and c.subgroup not in settings.leave_out
        and (settings.names is None or c.name in settings.names)
    ]
    emoji = _emoji(settings, chosen)
    seen = {(r.concept, r.layers[0].art) for r in emoji if r.split == "train"}
    rows = emoji + _colour_icons(settings)
    rows += _painted(settings, chosen, seen)
    rows += _icons(settings, chosen)
    rows += _scenes(settings, [c for c in chosen if c.subgroup not in SCENERY], seen)
    return rows


def _split_of_concept(settings: Illustrations, key: str) -> str:
    held = key in settings.unseen or hashed("concept", key) < settings.test_concepts
    return "test-concept" if held else "train"


def _everyday(word: str, style: str, *seed: object) -> str:
    """A thing under one of its names, phrased in one of the ways people ask for it."""
    look = style.replace(" fluent", "") if hashed("look", *seed) < 0.5 else style
    name = _one_of([word, *OTHER_NAMES.get(word, ())], "name", *seed)
    subject = with_article(name)
    return _one_of(
        [
            name,
            f"{name}, {look}",
            f"{name} emoji",
            f"emoji of {subject}",
            f"{subject}, emoji",
            f"cute {name}",
            f"{subject} in {look}",
            f"a picture of {subject}",
            f"{look} {name}" if look.endswith("style") else f"{name} {look}",
            subject,
            f"{subject}, {look}",
            f"{subject} on a white background",
        ],
        "form", *seed,
    )  # fmt: skip


def _one_of(choices: list[str], *seed: object) -> str:
    return choices[int(hashed(*seed) * len(choices))]


def _emoji(settings: Illustrations, chosen: list[Concept]) -> list[PlannedImage]:
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
                PlannedImage(
                    id=f"emoji-{s}-{c.hexcode.lower()}",
                    kind="emoji",
                    concept=c.name,
                    style=style,
                    split="test-pair" if s == held else split,
                    subject=c.subject,
                    short=f"{c.subject}, {style}",
                    long=f"{words}, {style}, white background",
                    everyday=_everyday(c.name, style, s, c.hexcode),
                    background="white",
                    layers=(Layer(s, name, FULL),),
                )
            )
    return rows


def _colour_icons(settings: Illustrations) -> list[PlannedImage]:
    rows = []
    for s in settings.colour_icons:
        style = art.ART_SETS[s].style
        for name in art.names(s):
            words = " ".join(w for w in name.split("-") if not w.isdigit())
            subject = with_article(words)
            rows.append(
                PlannedImage(
                    id=f"colour-icon-{s}-{name}",
                    kind="colour-icon",
                    concept=words,
                    style=style,
                    split=_split_of_concept(settings, base_concept(words)),
                    subject=subject,
                    short=f"{subject}, {style}",
                    long=f"{_an(style)} of {subject}, white background",
                    everyday=f"{words} icon",
                    background="white",
                    layers=(Layer(s, name, FULL),),
                )
            )
    return rows


def _an(style: str) -> str:
    return with_article(style)


def _painted(
    settings: Illustrations, chosen: list[Concept], seen: set[tuple[str, str]]
) -> list[PlannedImage]:
    """Emoji on white with their main colour changed to a named one, sampled from all possible."""
    drawings = [(c, s) for c in chosen for s in settings.styles if (c.name, s) in seen]
    rng = random.Random(settings.seed + 2)
    colours = [ink for ink in INKS if apart(ink, "white")]
    pairs = [(c, s, ink) for c, s in drawings for ink in colours if _other(c, ink)]
    rows = []
    for n, (c, s, ink) in enumerate(rng.sample(pairs, min(settings.painted, len(pairs)))):
        style = art.ART_SETS[s].style
        word = _one_of([ink, ink, *OTHER_WORDS.get(ink, ())], "ink", c.name, s, ink)
        subject = with_article(f"{ink} {c.thing}")
        rows.append(
            PlannedImage(
                id=f"painted-{n:06d}",
                kind="painted",
                concept=c.name,
                style=style,
                split="train",
                subject=subject,
                short=f"{subject}, {style}",
                long=f"{subject}, {style}, white background",
                everyday=_everyday(f"{word} {c.thing}", style, s, c.name, ink),
                background="white",
                layers=(Layer(s, art.drawing_of(s, c.hexcode, c.label) or "", FULL, ink),),
            )
        )
    return rows


def _other(c: Concept, ink: str) -> bool:
    """Whether the drawing of a concept is not of this colour by name ("green apple")."""
    return not c.name.startswith(f"{ink} ")


def _icons(settings: Illustrations, chosen: list[Concept]) -> list[PlannedImage]:
    """One-colour drawings of the same concepts, in inks and on backgrounds drawn at random."""
    drawings = []
    present = {s: frozenset(art.names(s)) for s in VARIANTS}
    for c in chosen:
        if _split_of_concept(settings, c.key) != "train" or c.name.split()[0] in INKS:
            continue
        wanted = c.key.replace(" ", "-").lower()
        for s, variants in VARIANTS.items():
            drawings += [
                (c, s, wanted + suffix, style)
                for suffix, style in variants.items()
                if wanted + suffix in present[s] and not (s == "mdi" and wanted in TRADEMARKS)
            ]
    rng = random.Random(settings.seed)
    rows = []
    for n in range(settings.icons if drawings else 0):
        c, s, name, style = drawings[n % len(drawings)]
        ink = rng.choice([*INKS])
        background = rng.choice([b for b in BACKGROUNDS if apart(ink, b)])
        if rng.random() < 0.4:
            background = "white" if apart(ink, "white") else background
        subject = with_article(f"{ink} {c.key}")
        on = "" if background == "white" else f" on a {background} background"
        long = f"{_an(style)} of {subject}, one colour, on a {background} background"
        rows.append(
            PlannedImage(
                id=f"icon-{n:06d}",
                kind="icon",
                concept=c.name,
                style=style,
                split="train",
                subject=subject + on,
                short=f"{subject}{on}, {style}",
                long=long,
                everyday=f"{ink} {c.key} icon{on}",
                background=background,
                layers=(Layer(s, name, (0.12, 0.12, 0.76), ink),),
            )
        )
    return rows


def _scenes(
    settings: Illustrations, things: list[Concept], seen: set[tuple[str, str]]
) -> list[PlannedImage]:
    rng = random.Random(settings.seed + 1)
    by_style = {s: [c for c in things if (c.name, s) in seen] for s in settings.styles}
    styles = [s for s in settings.styles if len(by_style[s]) > 1]
    rows = []
    for n in range(settings.scenes if styles else 0):
        s = rng.choice(styles)
        background = "white" if rng.random() < 0.15 else rng.choice([*BACKGROUNDS])
        one, other = (_Thing.drawn(c, background, rng) for c in rng.sample(by_style[s], 2))
        form = rng.random()
        if form < 0.25:
            subject = f"one {one.name}" if rng.random() < 0.2 else one.subject
            drawn, boxes = [one], PLACES[1]
        elif form < 0.55:
            count = rng.choice([*NUMBERS])
            subject, drawn = f"{NUMBERS[count]} {plural(one.name)}", [one] * count
            boxes = PLACES[count] if count > 2 or rng.random() < 0.7 else STACKED
        else:
            subject, drawn, boxes = _pair(rng, one, other)
        bare = background == "white" and rng.random() < 0.5
        on = "" if bare else f" on {with_article(background)} background"
        style = art.ART_SETS[s].style
        layers = tuple(
            Layer(s, art.drawing_of(s, t.concept.hexcode, t.concept.label) or "", box, t.ink)
            for t, box in zip(drawn, boxes, strict=True)
        )
        rows.append(
            PlannedImage(
                id=f"scene-{n:06d}",
                kind="scene",
                concept=" + ".join(dict.fromkeys(t.concept.name for t in drawn)),
                style=style,
                split="train",
                subject=subject + on,
                short=f"{subject}{on}, {style}",
                long=f"a simple picture of {subject}, {style}, with a plain {background} "
                "background",
                everyday=f"{subject}, {background} background",
                background=background,
                layers=layers,
            )
        )
    return rows


@dataclass(frozen=True)
class _Thing:
    """What stands in a scene: a concept, in its own colours or in one that is named."""

    concept: Concept
    ink: str | None

    @classmethod
    def drawn(cls, concept: Concept, background: str, rng: random.Random) -> "_Thing":
        inks = [ink for ink in INKS if apart(ink, background) and _other(concept, ink)]
        return cls(concept, rng.choice(inks) if rng.random() < 0.35 else None)

    @property
    def name(self) -> str:
        return f"{self.ink} {self.concept.thing}" if self.ink else self.concept.name

    @property
    def subject(self) -> str:
        return with_article(self.name)


def _pair(rng: random.Random, one: _Thing, other: _Thing) -> tuple[str, list[_Thing], list[Box]]:
    """Two different things: caption, drawings and boxes."""
    a, b = one.subject, other.subject
    said, boxes = rng.choice(
        [
            (f"{a} to the left of {b}", BESIDE),
            (f"{a} on the left and {b} on the right", BESIDE),
            (f"{a} on the right and {b} on the left", BESIDE[::-1]),
            (f"{a} next to {b}", BESIDE),
            (f"{a} and {b}", BESIDE),
            (f"{a} to the right of {b}", BESIDE[::-1]),
            (f"{a} above {b}", STACKED),
            (f"{a} below {b}", STACKED[::-1]),
        ]
    )
    return said, [one, other], boxes
