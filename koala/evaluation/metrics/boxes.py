"""Where things stand in a picture: boxes of detectors, and what they say of each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Corners = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Found:
    """A thing that a detector found. mask: bool [height, width], where the detector has masks."""

    name: str
    score: float
    box: Corners
    mask: np.ndarray | None = None

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


def overlap(a: Corners, b: Corners) -> float:
    """The share of the two boxes' union that both cover, in 0..1."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    whole = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - both
    return both / whole if whole else 0.0


SLACK = 0.1  # offsets within this share of the two things' summed sizes do not count


def relations(a: Found, b: Found) -> set[str]:
    """Where a stands to b: left of, right of, above, below (GenEval, appendix)."""
    offset = np.array(a.centre) - np.array(b.centre)
    sizes = [np.array([f.box[2] - f.box[0], f.box[3] - f.box[1]]) for f in (a, b)]
    beyond = np.maximum(np.abs(offset) - SLACK * (sizes[0] + sizes[1]), 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    right, down = beyond / np.linalg.norm(offset)
    told = {
        "left of": right < -0.5,
        "right of": right > 0.5,
        "above": down < -0.5,
        "below": down > 0.5,
    }
    return {name for name, holds in told.items() if holds}


NEAR = 150  # pixels of a picture whose longer side is 512: what T2I-CompBench calls next to
APART = 0.1  # overlap up to which a thing is beside another


def placed(relation: str, a: Found, b: Found, scale: float = 1.0) -> float:
    """How well a stands to b as a relation of T2I-CompBench says, in 0..1.

    relation: a key of `SIDES`, or "next to". scale: of distances, to pictures of side 512.
    """
    right, down = ((one - other) * scale for one, other in zip(a.centre, b.centre, strict=True))
    if relation == "next to":
        if abs(right) < NEAR or abs(down) < NEAR:
            return 1.0
        return NEAR / max(abs(right), abs(down))
    along, across = (right, down) if relation in ("left", "right") else (down, right)
    if along * SIDES[relation] <= 0 or abs(along) <= abs(across):
        return 0.0
    shared = overlap(a.box, b.box)
    return 1.0 if shared < APART else APART / shared


SIDES = {"left": -1, "right": 1, "top": -1, "bottom": 1}
