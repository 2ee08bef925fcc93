"""The art sets: their styles in words, and their drawings as pixels."""

import io
import json
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from PIL import Image

from koala.utils.asset_packages import package


@dataclass(frozen=True)
class ArtSet:
    """A set of drawings by one artist. `style`: its name in captions."""

    name: str
    package: str
    kind: str  # emoji | colour-icon | icon (one colour, ours to choose)
    style: str
    licence: str
    author: str

    @property
    def share_alike(self) -> bool:
        return "-SA-" in self.licence


# fmt: off
ART_SETS = {s.name: s for s in (
    #       name                 package                            kind           style                     licence         author
    ArtSet("noto",              "@iconify-json/noto",              "emoji",       "noto style",             "Apache-2.0",   "Google Inc"),
    ArtSet("noto-v1",           "@iconify-json/noto-v1",           "emoji",       "blob noto style",        "Apache-2.0",   "Google Inc"),
    ArtSet("twemoji",           "@iconify-json/twemoji",           "emoji",       "flat twemoji style",     "CC-BY-4.0",    "Twitter"),
    ArtSet("fluent-flat",       "@iconify-json/fluent-emoji-flat", "emoji",       "flat fluent style",      "MIT",          "Microsoft Corporation"),
    ArtSet("fluent-3d",         "@lobehub/fluent-emoji-3d",        "emoji",       "3d fluent style",        "MIT",          "Microsoft Corporation, packaged by LobeHub"),
    ArtSet("emojione",          "@iconify-json/emojione",          "emoji",       "emojione style",         "CC-BY-4.0",    "Emoji One"),
    ArtSet("fxemoji",           "@iconify-json/fxemoji",           "emoji",       "firefox emoji style",    "Apache-2.0",   "Mozilla"),
    ArtSet("openmoji",          "@iconify-json/openmoji",          "emoji",       "outlined openmoji style", "CC-BY-SA-4.0", "OpenMoji"),
    ArtSet("streamline-emojis", "@iconify-json/streamline-emojis", "emoji",       "pastel streamline style", "CC-BY-4.0",   "Streamline"),
    ArtSet("flat-color-icons",  "@iconify-json/flat-color-icons",  "colour-icon", "flat colour icon",       "MIT",          "Icons8"),
    ArtSet("icon-park",         "@iconify-json/icon-park",         "colour-icon", "two-tone blue icon",     "Apache-2.0",   "ByteDance"),
    ArtSet("streamline-color",  "@iconify-json/streamline-color",  "colour-icon", "blue outline icon",      "CC-BY-4.0",    "Streamline"),
    ArtSet("mdi",               "@iconify-json/mdi",               "icon",        "solid icon",             "Apache-2.0",   "Pictogrammers"),
    ArtSet("tabler",            "@iconify-json/tabler",            "icon",        "outline icon",           "MIT",          "Paweł Kuna"),
    ArtSet("ph",                "@iconify-json/ph",                "icon",        "rounded outline icon",   "MIT",          "Phosphor Icons"),
    ArtSet("game-icons",        "@iconify-json/game-icons",        "icon",        "engraved icon",          "CC-BY-3.0",    "GameIcons"),
)}
# fmt: on


@cache
def _iconify(art: str) -> dict:
    return json.loads((package(ART_SETS[art].package) / "icons.json").read_text("utf-8"))


def _plain(hexcode: str) -> str:
    """Code points without the variation selector, which vendors use inconsistently."""
    return "-".join(p.lstrip("0") for p in hexcode.lower().split("-") if p != "fe0f")


@cache
def by_code_point(art: str) -> dict[str, str]:
    """Emoji code points ('1f98a') -> the drawing's name for `drawing`."""
    folder = package(ART_SETS[art].package)
    if (folder / "chars.json").is_file():
        return {
            _plain(h): n for h, n in json.loads((folder / "chars.json").read_text("utf-8")).items()
        }
    return {_plain(p.stem): p.stem for p in (folder / "assets").glob("*.webp")}


def drawing_of(art: str, hexcode: str, label: str) -> str | None:
    """The name of an emoji's drawing in an art set, or None if the set lacks it.

    Found by code points, or by Unicode's label in sets that do not list code points.
    """
    if by_code_point(art):
        return by_code_point(art).get(_plain(hexcode))
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    return slug if slug in _iconify(art)["icons"] else None


@cache
def names(art: str) -> list[str]:
    """All drawings of an iconify set, in order."""
    return sorted(_iconify(art)["icons"])


@lru_cache(maxsize=4096)
def drawing(art: str, name: str, side: int, colour: str | None = None) -> Image.Image:
    """A drawing as RGBA, side x side pixels; `colour` (CSS) for one-colour sets."""
    import resvg_py

    assets = package(ART_SETS[art].package) / "assets"
    if assets.is_dir():
        return _from_pixels(assets / f"{name}.webp", side)
    data = _iconify(art)
    icon = data["icons"][name]

    def box(key: str, default: float) -> float:
        return icon.get(key, data.get(key, default))

    left, top, width, height = box("left", 0), box("top", 0), box("width", 16), box("height", 16)
    body = icon["body"] if colour is None else icon["body"].replace("currentColor", colour)
    long = max(width, height)  # a square box around it keeps proportions
    left, top = left - (long - width) / 2, top - (long - height) / 2
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {long} {long}" width="{long}" height="{long}">{body}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _from_pixels(path: Path, side: int) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)


def notice(arts: list[str]) -> str:
    """The credits required by the licences of these sets, as the text of a NOTICE file."""
    lines = ["Trained on drawings of these openly licensed sets:", ""]
    for art in (ART_SETS[a] for a in arts):
        lines.append(f"- {art.name}: {art.author}, {art.licence} (npm package {art.package})")
    return "\n".join([*lines, ""])
