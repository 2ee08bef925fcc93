"""Named colours, and recolouring of a drawing's main colour.

Colours are compared and changed in Oklab (Ottosson 2020), whose distances are close to
perception: lightness in [0, 1], and two opponent axes whose length is the chroma.
"""

import numpy as np
from PIL import Image, ImageColor

INKS = {  # of one-colour icons, and of things with a colour in their caption
    "red": "#d92b2b", "orange": "#f08419", "yellow": "#f2c21a", "green": "#2f9e44",
    "blue": "#2563d9", "purple": "#8338c9", "pink": "#ec5fa4", "brown": "#8a5a32",
    "black": "#1c1c1c", "grey": "#868e96", "teal": "#11999e", "white": "#f6f6f6",
}  # fmt: skip
BACKGROUNDS = {
    "white": "#ffffff", "pale yellow": "#fff4c2", "light blue": "#d5e8ff", "mint green": "#d8f5e3",
    "light grey": "#e6e6e6", "pale pink": "#ffdfe8", "black": "#1a1a1a", "dark blue": "#22356f",
    "yellow": "#ffd83d", "green": "#4cb85c", "blue": "#3f86e8", "pink": "#ff9ac8",
    "red": "#e2473f", "orange": "#f9993a", "purple": "#9a5fd6", "grey": "#9aa1a8",
}  # fmt: skip
OTHER_WORDS = {  # synonyms of these
    "red": ("scarlet", "crimson"), "purple": ("violet",), "grey": ("gray",), "teal": ("turquoise",),
    "yellow": ("golden",), "brown": ("chocolate brown",), "blue": ("bright blue",),
}  # fmt: skip

_TO_CONES = np.array(
    [[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.6806995, 0.10739696],
     [0.08830246, 0.28171884, 0.6299787]]
)  # fmt: skip
_TO_LAB = np.array(
    [[0.21045426, 0.79361779, -0.00407205], [1.97799849, -2.42859221, 0.4505937],
     [0.02590404, 0.78277177, -0.80867577]]
)  # fmt: skip
GREY = 0.045  # chroma below which an eye sees no hue
NEAR = 0.6  # radians of hue within which a colour is a shade of another
MAIN = 0.3  # share of the drawing; a hue below it is not the main colour


def oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1] as Oklab; [..., 3] each."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_CONES.T) @ _TO_LAB.T


def srgb(lab: np.ndarray) -> np.ndarray:
    """Oklab as sRGB, cut to [0, 1]; [..., 3] each."""
    linear = (lab @ np.linalg.inv(_TO_LAB).T) ** 3 @ np.linalg.inv(_TO_CONES).T
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def named(name: str) -> np.ndarray:
    """The Oklab of an ink."""
    return oklab(np.array(ImageColor.getrgb(INKS[name])) / 255)


def apart(ink: str, background: str) -> bool:
    """Whether a thing of this colour is visible on this background."""
    there = oklab(np.array(ImageColor.getrgb(BACKGROUNDS[background])) / 255)
    return float(np.linalg.norm(named(ink) - there)) > 0.16


def repainted(drawing: Image.Image, ink: str) -> Image.Image:
    """The drawing with its main colour changed to `ink`; shading and other colours are kept.

    The main colour is the most frequent hue, or grey. If none has a share of MAIN, everything
    but near-black is changed. drawing: RGBA.
    """
    pixels = np.asarray(drawing, dtype=np.float64) / 255
    lab, alpha = oklab(pixels[..., :3]), pixels[..., 3]
    share = _main(lab, alpha)
    weight = (share * alpha).sum()
    if weight < MAIN * alpha.sum():
        share = (lab[..., 0] > 0.3).astype(np.float64)
        weight = (share * alpha).sum()
    if weight == 0:
        return drawing
    mean = (lab * (share * alpha)[..., None]).sum((0, 1)) / weight
    goal = named(ink)
    turned = goal + (lab - mean) * (0.8, 0.35, 0.35)  # keeps shades of lightness, fewer of hue
    turned[..., 0] = turned[..., 0].clip(0.02, 1)
    mixed = lab + share[..., None] * (turned - lab)
    shown = np.concatenate([srgb(mixed), alpha[..., None]], axis=-1)
    return Image.fromarray((shown * 255).round().astype(np.uint8), "RGBA")


def _main(lab: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """[h, w] in [0, 1]: how much of each pixel is of the main colour."""
    chroma, hue = np.hypot(lab[..., 1], lab[..., 2]), np.arctan2(lab[..., 2], lab[..., 1])
    bins = np.linspace(-np.pi, np.pi, 37)
    vivid = alpha * (chroma > GREY)
    counts, _ = np.histogram(hue, bins, weights=vivid)
    around = sum((np.roll(counts, k) for k in (-2, -1, 0, 1, 2)), np.zeros(len(counts)))
    grey = alpha * (chroma <= GREY) * (lab[..., 0] > 0.35)
    if grey.sum() > around.max():
        return (1 - _rise(chroma, GREY, 2 * GREY)) * _rise(lab[..., 0], 0.25, 0.45)
    centre = bins[int(around.argmax())] + np.pi / 36
    away = np.abs((hue - centre + np.pi) % (2 * np.pi) - np.pi)
    return (1 - _rise(away, NEAR, 1.4 * NEAR)) * _rise(chroma, 0.5 * GREY, GREY)


def _rise(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, a line between."""
    return ((value - low) / (high - low)).clip(0, 1)
