"""Drawings of Open Clip Art that show what the mini family knows, as a look that it does not know.

They are Debian's: `apt-get install openclipart-svg` puts them into /usr/share/openclipart/svg (or
`apt-get download` and `dpkg -x` anywhere). Many hands drew them, in the public domain. What one
shows is a word at the start of its file's name. A fifth of the things is held out of the training.
"""

import io
import re
from collections import defaultdict
from pathlib import Path

import resvg_py
from PIL import Image, ImageOps

from benchmarks.looks import HeldOut, evenly
from koala.checkpoints.resolve import resolve_model
from koala.checkpoints.words import read_words
from koala.data.prepare import prepare
from koala.data.preprocess import Preparation

MOST = 6  # drawings of a thing
SIZE, MARGIN = 128, 16
NOT = {"computer", "duplicates", "logos", "roadsigns", "signs_and_symbols", "special"}  # folders
EVERY = 5  # thing is held out


def drawings(svg: Path, things: set[str]) -> dict[str, list[Path]]:
    """Files by what they show, of the things asked for."""
    found: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(svg.rglob("*.svg")):
        words = re.findall("[a-z]+", file.stem.lower())[:2]
        if not NOT & {*file.parts} and not file.is_symlink():
            for thing in [word for word in words if word in things][:1]:
                found[thing].append(file)
    return {thing: evenly(files, MOST) for thing, files in sorted(found.items())}


def caption(thing: str) -> str:
    return f"a {thing}, clip art"


def image(file: Path) -> Image.Image | None:
    """A drawing on white, RGB, as large as it can be within margins; None if there is none."""
    text = file.read_text("utf-8", errors="replace")
    try:
        drawn = resvg_py.svg_to_bytes(svg_string=text, width=4 * SIZE, dpi=96)
    except ValueError:
        return None
    found = Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
    if (inked := found.getbbox()) is None:
        return None
    found = found.crop(inked)  # pages are often larger than what is on them
    found = ImageOps.contain(found, (SIZE - MARGIN, SIZE - MARGIN), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(found, ((SIZE - found.width) // 2, (SIZE - found.height) // 2))
    return canvas.convert("RGB")


def prepare_clipart(svg: Path, model: str, out: Path, most: int) -> tuple[Path, HeldOut]:
    """The folder of latents to train on, and at most so many things that are not in it."""
    things = set(read_words(resolve_model(model), model).things)
    held_out, folder = HeldOut([], []), out / "seen"
    folder.mkdir(parents=True)
    for n, (thing, files) in enumerate(drawings(svg, things).items()):
        images = [found for file in files if (found := image(file))]
        if n % EVERY == EVERY - 1:
            held_out.prompts.extend([caption(thing)] * len(images))
            held_out.drawings.extend(images)
            continue
        for i, drawn in enumerate(images):
            drawn.save(folder / f"{thing}-{i}.png")
            (folder / f"{thing}-{i}.txt").write_text(caption(thing))
    given = Preparation(size=SIZE, held_out=0.0)
    prepare(str(folder), out / "data", model, workers=1, preparation=given)
    chosen = evenly(range(len(held_out.prompts)), most)
    shown = [held_out.prompts[i] for i in chosen], [held_out.drawings[i] for i in chosen]
    return out / "data", HeldOut(*shown)
